"""Frozen weights as flat bytes in host memory: packed once, found again as tensors over any other flat memory.

Tensor subclasses (quantized weights) are taken apart by `__tensor_flatten__`, nested ones too, down to plain tensors, and rebuilt
over other memory by `__tensor_unflatten__`, so that scales and zero points travel with the values. Only bytes are moved: what is
computed from a tensor rebuilt on the device is bitwise what was computed from the original.
"""

from __future__ import annotations

import contextlib
import math
import mmap
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tuner.errors import ConfigError, OutOfMemoryError
from tuner.model.host import free_host_memory
from tuner_offload.transfer import Link, Registration

ALIGNMENT = 512
"""Every tensor starts at a multiple of it, as torch's own allocations do: kernels are chosen by alignment, and results must not differ."""


def aligned(size: int) -> int:
    """`size` rounded up to the alignment."""
    return -(-size // ALIGNMENT) * ALIGNMENT


@dataclass(frozen=True)
class Leaf:
    """A plain tensor inside flat memory."""

    name: str
    dtype: torch.dtype
    shape: torch.Size
    stride: tuple[int, ...]
    """In elements; dense in any order of dimensions, so that kernels see what they saw before."""
    offset: int
    size: int
    """Bytes."""

    def over(self, flat: Tensor, offset: int | None = None) -> Tensor:
        """The tensor over flat uint8 memory, at `offset` if its place there is another."""
        start = self.offset if offset is None else offset
        return flat[start : start + self.size].view(self.dtype).as_strided(self.shape, self.stride)


@dataclass(frozen=True)
class Wrapper:
    """A tensor subclass and what it is made of."""

    kind: type[Any]
    parts: Mapping[str, Leaf | Wrapper]
    context: Any
    shape: torch.Size
    stride: tuple[int, ...]


Node = Leaf | Wrapper


class Packing:
    """Where each of some named tensors lies in flat memory of `size` bytes."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self.size = 0
        self.leaves: list[Leaf] = []
        self.nodes: dict[str, Node] = {name: self._node(name, tensor.detach()) for name, tensor in tensors.items()}

    def _node(self, name: str, tensor: Tensor) -> Node:
        if type(tensor) in (Tensor, nn.Parameter):
            stride = tensor.stride() if _dense(tensor) else _row_by_row(tensor.shape)
            leaf = Leaf(name, tensor.dtype, tensor.shape, stride, self.size, tensor.numel() * tensor.element_size())
            self.leaves.append(leaf)
            self.size = aligned(self.size + leaf.size)
            return leaf
        if not hasattr(tensor, "__tensor_flatten__"):
            raise ConfigError(
                f"weights of the type {type(tensor).__name__} cannot be moved: it does not say what it is made of", where=name,
                remedy="choose a precision of torchao or quanto, or switch the memory strategy off",
            )  # fmt: skip
        names, context = tensor.__tensor_flatten__()
        parts = {part: self._node(f"{name}.{part}", getattr(tensor, part)) for part in names}
        return Wrapper(type(tensor), parts, context, tensor.shape, tensor.stride())

    @torch.no_grad()
    def write(self, flat: Tensor, tensors: Mapping[str, Tensor]) -> None:
        """Copies the tensors' bytes into `flat` (uint8, at least `size`), from whatever device they are on."""
        for name, node in self.nodes.items():
            _write(node, flat, tensors[name].detach())

    def plain(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Leaf name -> its elements on the host, in the order in which memory holds them; with their shape where that is row by row."""
        found: dict[str, Tensor] = {}
        for name, node in self.nodes.items():
            _collect(node, tensors[name].detach(), found)
        return found

    def over(self, flat: Tensor, offsets: Mapping[str, int] | None = None) -> dict[str, Tensor]:
        """The named tensors as views of `flat`; `offsets`: leaf name -> its place there, where it is another."""
        return {name: _over(node, flat, offsets) for name, node in self.nodes.items()}


def _write(node: Node, flat: Tensor, tensor: Tensor) -> None:
    if isinstance(node, Leaf):
        node.over(flat).copy_(tensor)
        return
    for name, part in node.parts.items():
        _write(part, flat, getattr(tensor, name))


def _collect(node: Node, tensor: Tensor, found: dict[str, Tensor]) -> None:
    if isinstance(node, Wrapper):
        for name, part in node.parts.items():
            _collect(part, getattr(tensor, name), found)
        return
    if not _dense(tensor):
        tensor = tensor.contiguous()
    in_memory = tensor if tensor.is_contiguous() else tensor.as_strided((tensor.numel(),), (1,))
    found[node.name] = in_memory.cpu()


def _over(node: Node, flat: Tensor, offsets: Mapping[str, int] | None) -> Tensor:
    if isinstance(node, Leaf):
        return node.over(flat, None if offsets is None else offsets[node.name])
    parts = {name: _over(part, flat, offsets) for name, part in node.parts.items()}
    rebuilt: Tensor = node.kind.__tensor_unflatten__(parts, node.context, node.shape, node.stride)
    return rebuilt


def _dense(tensor: Tensor) -> bool:
    """Whether the elements fill their memory without gaps, in whatever order of dimensions."""
    order = sorted(range(tensor.dim()), key=tensor.stride, reverse=True)
    return tensor.permute(order).is_contiguous()


def _row_by_row(shape: torch.Size) -> tuple[int, ...]:
    return tuple(math.prod(shape[dimension + 1 :]) for dimension in range(len(shape)))


class HostArena:
    """Ordinary host memory of exactly `size` bytes, on whole pages of its own. Raises `OutOfMemoryError`.

    torch's allocator is not asked: page-locking works on pages, and those must hold nothing else.
    """

    def __init__(self, size: int, what: str = "weights") -> None:
        _check_host_memory(size, what)
        try:
            # Shared memory, Python's default, gets no large pages on most systems.
            private = {"flags": mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS} if hasattr(mmap, "MAP_PRIVATE") else {}
            self.buffer = mmap.mmap(-1, max(size, 1), **private)
        except OSError as error:
            raise _no_memory(size, what, 0) from error
        # Not every kernel offers large pages, which make touching and page-locking quicker. Processes that are forked get nothing of it:
        # they have no use for it, and page-locked pages must never be copied on writing.
        for advice in ("MADV_HUGEPAGE", "MADV_DONTFORK"):
            with contextlib.suppress(OSError, AttributeError):
                self.buffer.madvise(getattr(mmap, advice))
        self.memory = torch.frombuffer(self.buffer, dtype=torch.uint8)[:size]
        """Flat uint8; lives as long as any tensor over it."""
        self._registration: Registration | None = None

    def register(self, link: Link) -> bool:
        """Page-locks it for `link`; whether copies from it are fast. Call it when the memory has been written to."""
        self._registration = Registration(link, self.memory)
        return self._registration.pinned or not link.pins

    def close(self) -> None:
        """Ordinary memory again. No copy may be under way."""
        if self._registration is not None:
            self._registration.close()
            self._registration = None


def _check_host_memory(size: int, what: str) -> None:
    free = free_host_memory()
    if free and size > free:
        raise _no_memory(size, what, free)


def _no_memory(size: int, what: str, free: int) -> OutOfMemoryError:
    left = f", {free / 1e9:.1f} GB are free" if free else ""
    return OutOfMemoryError(
        f"host memory is too small: {what} need {size / 1e9:.1f} GB more{left}",
        remedy="choose an 8-bit base_model_precision, stream fewer blocks, or set group_offload_to_disk_path",
    )


@dataclass(frozen=True)
class Place:
    """A parameter's place in a module."""

    owner: nn.Module
    attribute: str


class Parcel:
    """The frozen parameters of one module, as one packing that can be put into the module over any memory.

    A parameter that has several places in the module is packed once. `wanted`: which parameters, by name and value; all by default.
    """

    def __init__(self, module: nn.Module, wanted: Callable[[str, nn.Parameter], bool] = lambda name, parameter: True) -> None:
        self.places: dict[str, list[Place]] = {}
        tensors: dict[str, nn.Parameter] = {}
        names: dict[int, str] = {}
        for name, place, parameter in _parameters(module):
            if wanted(name, parameter):
                first = names.setdefault(id(parameter), name)
                self.places.setdefault(first, []).append(place)
                tensors[first] = parameter
        self.packing = Packing(tensors)

    @property
    def size(self) -> int:
        """Bytes of flat memory that it fills."""
        return self.packing.size

    def write(self, flat: Tensor) -> None:
        """Copies what the module holds now into `flat`."""
        self.packing.write(flat, self.held())

    def lies_in(self, flat: Tensor) -> bool:
        """Whether what the module holds now are plain tensors in their places in `flat`."""
        held, nodes = self.held(), self.packing.nodes
        return all(
            isinstance(node, Leaf) and (held[name].data_ptr() == flat.data_ptr() + node.offset or not node.size)
            for name, node in nodes.items()
        )

    def held(self) -> dict[str, Tensor]:
        """Name -> the parameter that the module holds now."""
        found: dict[str, Tensor] = {}
        for name, places in self.places.items():
            parameter = places[0].owner._parameters[places[0].attribute]
            assert parameter is not None
            found[name] = parameter
        return found

    def parameters(self, flat: Tensor, offsets: Mapping[str, int] | None = None) -> dict[str, nn.Parameter]:
        """New frozen parameters as views of `flat`. Make them once: the module then keeps the same objects through all steps."""
        return {name: nn.Parameter(t, requires_grad=False) for name, t in self.packing.over(flat, offsets).items()}

    def put(self, parameters: Mapping[str, nn.Parameter]) -> None:
        """Makes the module hold these."""
        for name, parameter in parameters.items():
            for place in self.places[name]:
                place.owner._parameters[place.attribute] = parameter


def _parameters(module: nn.Module) -> Iterator[tuple[str, Place, nn.Parameter]]:
    """Every place of every parameter, by name, shared ones repeatedly."""
    for path, owner in module.named_modules():
        for attribute, parameter in owner._parameters.items():
            if parameter is not None:
                yield f"{path}.{attribute}" if path else attribute, Place(owner, attribute), parameter


def move_buffers(module: nn.Module, device: torch.device) -> None:
    """Brings the module's buffers to `device`: they are small, and may be written to."""
    for owner in module.modules():
        for name, buffer in owner._buffers.items():
            if buffer is not None:
                owner._buffers[name] = buffer.to(device)

