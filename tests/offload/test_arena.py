"""Packing: every tensor comes back with its bytes, its layout and its kind, over any memory."""

from __future__ import annotations

import mmap
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tuner.errors import ConfigError, OutOfMemoryError
from tuner_offload import arena
from tuner_offload.arena import ALIGNMENT, HostArena, Packing, Parcel


class Scaled(Tensor):
    """values · scale, the smallest tensor subclass that says what it is made of; its values may be another one."""

    values: Tensor
    scale: Tensor

    @staticmethod
    def __new__(cls, values: Tensor, scale: Tensor) -> Scaled:
        return Tensor._make_wrapper_subclass(cls, values.shape, dtype=torch.float32)  # type: ignore[attr-defined, no-any-return]

    def __init__(self, values: Tensor, scale: Tensor) -> None:
        self.values, self.scale = values, scale

    def __tensor_flatten__(self) -> tuple[list[str], dict[str, Any]]:
        return ["values", "scale"], {}

    @staticmethod
    def __tensor_unflatten__(inner: dict[str, Tensor], context: object, size: object, stride: object) -> Scaled:
        return Scaled(inner["values"], inner["scale"])

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.detach.default:
            return type(args[0])(args[0].values, args[0].scale)
        return func(*[a.dense() if isinstance(a, Scaled) else a for a in args], **(kwargs or {}))

    def dense(self) -> Tensor:
        values = self.values.dense() if isinstance(self.values, Scaled) else self.values
        return values.float() * self.scale


class Opaque(Scaled):
    """Says nothing."""

    __tensor_flatten__ = property()  # type: ignore[assignment]


def tensors() -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(0)
    plain = torch.randn(6, 10, generator=draw)
    return {
        "matrix": plain,
        "columns": torch.randn(4, 6, generator=draw).t(),
        "turned": torch.randn(2, 3, 4, generator=draw).permute(2, 0, 1),
        "gaps": plain[:, ::2],
        "single": torch.tensor(float("nan")),
        "empty": torch.empty(0, 4),
        "half": plain.bfloat16(),
        "eighth": plain.to(torch.float8_e4m3fn),
        "flags": plain > 0,
        "scaled": Scaled(plain.to(torch.int8), torch.tensor(0.5)),
        "nested": Scaled(Scaled(plain.to(torch.int8).t(), torch.tensor(0.5)), torch.rand(6, generator=draw)),  # type: ignore[arg-type]
    }


def raw(tensor: Tensor) -> bytes:
    if isinstance(tensor, Scaled):
        return raw(tensor.values) + raw(tensor.scale)
    return tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes() if tensor.numel() else b""


def test_all_kinds_of_tensors_come_back() -> None:
    given = tensors()
    packing = Packing(given)
    memory = HostArena(packing.size).memory
    packing.write(memory, given)
    over = packing.over(memory.clone())
    assert over.keys() == given.keys()
    for name, tensor in given.items():
        assert type(over[name]) is type(tensor) and over[name].shape == tensor.shape and over[name].dtype == tensor.dtype
        assert raw(over[name]) == raw(tensor), name
        if name != "gaps":
            assert over[name].stride() == tensor.stride(), name
    places = [leaf.offset for leaf in packing.leaves]
    assert all(place % ALIGNMENT == 0 for place in places) and packing.size >= sum(leaf.size for leaf in packing.leaves)
    assert {leaf.name for leaf in packing.leaves} >= {"nested.values.values", "nested.values.scale", "nested.scale", "matrix"}


def test_a_type_that_says_nothing_is_refused_by_name() -> None:
    with pytest.raises(ConfigError, match=r"to_q\.weight: weights of the type Opaque cannot be moved"):
        Packing({"to_q.weight": Opaque(torch.zeros(2, dtype=torch.int8), torch.ones(()))})


def test_a_shared_parameter_is_packed_once_and_stays_shared() -> None:
    module = nn.ModuleDict({"one": nn.Linear(4, 4), "other": nn.Linear(4, 4)})
    module["other"].weight = module["one"].weight
    parcel = Parcel(module, lambda name, parameter: name != "other.bias")
    assert list(parcel.places) == ["one.weight", "one.bias"]
    memory = HostArena(parcel.size).memory
    parcel.write(memory)
    parcel.put(parcel.parameters(memory))
    assert module["one"].weight is module["other"].weight and not module["one"].weight.requires_grad
    assert module["other"].bias.requires_grad and module["one"].weight.data_ptr() == memory.data_ptr()


def test_arenas_are_whole_pages_of_the_exact_size() -> None:
    held = HostArena(5000)
    assert held.memory.numel() == 5000 and held.memory.data_ptr() % mmap.PAGESIZE == 0
    held.memory.fill_(7)
    kept = held.memory[10:20]
    held.close()
    del held
    assert kept.tolist() == [7] * 10


def test_too_little_host_memory_is_said_in_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(arena, "free_host_memory", lambda: 1_500_000_000)
    with pytest.raises(OutOfMemoryError, match=r"the blocks need 2\.0 GB more, 1\.5 GB are free"):
        HostArena(2_000_000_000, "the blocks")
    with pytest.raises(OutOfMemoryError, match="host memory is too small"):
        monkeypatch.setattr(arena, "free_host_memory", lambda: 0)
        HostArena(1 << 60, "the blocks")
