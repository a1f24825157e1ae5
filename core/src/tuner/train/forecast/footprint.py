"""What a training step takes, found out without a device: two blocks are trained on the meta device, and what lives is counted.

Special here: nothing is modelled that can be observed. The family's own forward pass, the runner and autograd run over tensors without
storage, so what they keep for backward and what they need for a moment come out as they would on a device. Blocks are alike, so the
second of two stands for all others. Attention and norms are replaced by stand-ins that keep what a device's fused kernels keep.

Dimensions: B samples, H attention heads, S queries, T keys, D channels of a head.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import astuple, dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from tuner.config.settings import AdapterSettings
from tuner.errors import ConfigError
from tuner.interfaces.blocks import BlockSet, BlockState
from tuner.interfaces.family import ClipShape, ModelFacts, ModelFamily
from tuner.interfaces.losses import LossTerm
from tuner.interfaces.memory import MemorySession
from tuner.interfaces.services import WeightSource
from tuner.model.adapters import add_adapters, resolve_targets
from tuner.model.runner import BlockRunner, Checkpointing
from tuner.train.step import Item, TrainingModel, train_together

META = torch.device("meta")
OBSERVED = 2
"""Blocks that are run: the first one also finds the family's tables not yet built."""


@dataclass(frozen=True)
class Work:
    """What one stretch of a step computes."""

    flops: int = 0
    kernels: int = 0
    """Operations that a device would be given, each of which the processor has to launch."""
    moved: int = 0
    """Bytes that operations other than products read and write."""
    attention: int = 0
    """Of `flops`, those of attention."""

    def __add__(self, other: Work) -> Work:
        return Work(*(mine + theirs for mine, theirs in zip(astuple(self), astuple(other), strict=True)))

    def __sub__(self, other: Work) -> Work:
        return self + other * -1

    def __mul__(self, factor: int) -> Work:
        return Work(*(mine * factor for mine in astuple(self)))


@dataclass(frozen=True)
class Footprint:
    """Bytes and work of one forward and backward pass, without the frozen weights of the blocks and without the optimizer."""

    blocks: int
    outside: int
    """Frozen weights outside the blocks."""
    trained: tuple[int, int]
    """Number of trained weights in each block, and outside the blocks."""
    width: int
    """Bytes of one trained weight, and of its gradient, as the model computes with it."""
    entered: int
    """Kept from before the first block: the batch, embedded tokens, tables."""
    kept: int
    """Kept for each block from forward to backward: its input where it is recomputed, else its activations."""
    forward: int
    """Most that a block adds to that while it runs forward, what it keeps included."""
    tail: int
    """Most that everything after the last block adds, the loss included."""
    turn: int
    """Most that the last block adds while it is walked back, with the gradients that come in."""
    backward: int
    """The same for any other block, whose own kept bytes count extra: gradients of what all blocks share flow along by then."""
    forward_work: Work
    """Of a block."""
    backward_work: Work
    """Of a block, its recomputation included."""
    other_work: Work
    """Before the first and after the last block, both ways."""

    @property
    def trained_weights(self) -> int:
        """Of the whole model."""
        return self.blocks * self.trained[0] + self.trained[1]

    @property
    def gradients(self) -> int:
        """Bytes of all gradients, in the model's dtype."""
        return self.trained_weights * self.width

    @property
    def peak(self) -> int:
        """Most bytes that forward and backward hold at once. On the way back each block takes what it kept and leaves its gradients."""
        others = self.blocks - 1
        top = self.entered + others * self.kept
        if not others:
            return top + max(self.forward, self.kept + self.tail, self.kept + self.turn)
        bottom = self.entered + self.kept + (others - 1) * self.trained[0] * self.width
        return max(top + max(self.forward, self.kept + self.tail, self.kept + self.turn, self.backward), bottom + self.backward)


@dataclass(frozen=True)
class Trained:
    """What is asked for: which clips, how many at once, and what of the model is trained."""

    streams: tuple[str, ...]
    shape: ClipShape
    batch_size: int
    adapters: AdapterSettings | None
    """None: every weight is trained."""
    together: int = 1
    """How many batches each block takes while its weights are there."""


def measure(
    family: ModelFamily, source: WeightSource, facts: ModelFacts, asked: Trained, terms: Sequence[LossTerm], dtype: torch.dtype,
    ways: Sequence[bool] = (True, False),
) -> Mapping[bool, Footprint]:  # fmt: skip
    """Whether all blocks are recomputed -> what a step takes then, for each of `ways`. Reads no weight.

    Raises `ConfigError` for a family that offers no model without weights, and for adapters that fit no layer.
    """
    model = skeleton(family, source, facts, asked, dtype)
    blocks = family.block_set(model)
    observed = BlockSet(blocks.blocks[-OBSERVED:], blocks.names[-OBSERVED:])
    return {
        recomputed: replace(_observe(family, model, observed, asked, terms, recomputed=recomputed), **_weights(model, blocks, facts))
        for recomputed in ways
    }


def skeleton(family: ModelFamily, source: WeightSource, facts: ModelFacts, asked: Trained, dtype: torch.dtype) -> nn.Module:
    """The model on the meta device with its adapters; with few blocks, unless the adapters' layers are named one by one."""
    named = asked.adapters is not None and asked.adapters.peft_lora_target_modules
    model = family.empty(source, asked.streams, dtype, 0 if named else min(OBSERVED, facts.blocks))
    if model is None:
        raise ConfigError("what a step takes cannot be told for this family: it offers no model without weights", where="model_family")
    if asked.adapters is None:
        model.requires_grad_(True)
    else:
        targets = resolve_targets(model, asked.adapters.peft_lora_target_modules, family.adapter_targets(model, asked.streams))
        add_adapters(model, targets, asked.adapters, seed=0)
    return model.train()


def _weights(model: nn.Module, blocks: BlockSet, facts: ModelFacts) -> dict[str, Any]:
    """The fields of a footprint that the skeleton's parameters tell; what blocks have is taken as their average."""
    inside = {id(p) for block in blocks.blocks for p in block.parameters()}
    trained = {id(p): p for p in model.parameters() if p.requires_grad}
    in_blocks = sum(p.numel() for key, p in trained.items() if key in inside) // len(blocks)
    outside = sum(p.numel() for key, p in trained.items() if key not in inside)
    frozen = [t for t in (*model.parameters(), *model.buffers()) if id(t) not in inside and id(t) not in trained]
    held = {id(b) for block in blocks.blocks for b in block.buffers()}
    return {
        "blocks": facts.blocks, "trained": (in_blocks, outside), "width": max((p.element_size() for p in trained.values()), default=0),
        "outside": sum(_bytes(t) for t in frozen if id(t) not in held),
    }  # fmt: skip


# --- running it --------------------------------------------------------------------------------------------------
def _observe(
    family: ModelFamily, model: nn.Module, blocks: BlockSet, asked: Trained, terms: Sequence[LossTerm], *, recomputed: bool
) -> Footprint:
    """A step over `blocks` alone."""
    live, fused = LiveBytes(_storages(model)), FusedKernels()
    watch = _Watch(live, lambda: Work(live.flops + fused.flops, live.kernels, live.moved, fused.flops))
    policy = Checkpointing.every(len(blocks)) if recomputed else Checkpointing()

    def call_block(block: nn.Module, state: BlockState) -> BlockState:
        with fused:  # entered anew for each block: autograd does not hand it on to what runs inside backward
            return family.call_block(block, state)

    run = TrainingModel(family, model, BlockRunner(blocks, call_block, checkpointing=policy, session=watch), terms)
    with live:
        drawn = [family.dummy_batch(model, asked.shape, asked.batch_size, asked.streams, META) for _ in range(asked.together)]
        results = train_together(run, [Item(*pair) for pair in drawn])
        loss = torch.stack([result.loss for result in results]).sum() if asked.together > 1 else results[0].loss
        watch.mark("loss")
        if loss.requires_grad:
            torch.autograd.backward(loss)
        watch.mark("end")
    for parameter in model.parameters():
        parameter.grad = None
    return _footprint(watch, len(blocks) - 1)


def _footprint(watch: _Watch, last: int) -> Footprint:
    """From the marks of a pass that ended with block `last`."""
    entered, before, after, end = (watch.at(name) for name in ("before 0", f"before {last}", f"after {last}", "end"))
    # A pass in which nothing is trained does not walk back.
    start, finish = watch.marks.get(f"back {last}", watch.at("loss")), watch.marks.get(f"backed {last}", end)
    forward_work, backward_work = after.work - before.work, finish.work - start.work
    kept = max(after.live - (watch.at("after 0").live if last else entered.live), 0)
    first = watch.marks.get("backed 0", end)
    return Footprint(
        blocks=last + 1, outside=0, trained=(0, 0), width=0, entered=entered.live, kept=kept,
        forward=after.peak - before.live, tail=max(start.peak, watch.at("loss").peak) - after.live, turn=finish.peak - after.live,
        backward=first.peak - entered.live - kept, forward_work=forward_work, backward_work=backward_work,
        other_work=end.work - (forward_work + backward_work) * (last + 1),
    )  # fmt: skip


@dataclass(frozen=True)
class _Mark:
    """A moment of a pass: bytes that live, the most since the mark before, and all work until then."""

    live: int
    peak: int
    work: Work


class _Watch(MemorySession):
    """Marks the moments around each block."""

    def __init__(self, live: LiveBytes, work: Callable[[], Work]) -> None:
        self.marks: dict[str, _Mark] = {}
        self._live, self._work = live, work

    def mark(self, name: str) -> None:
        """Now."""
        self.marks[name] = _Mark(self._live.now, self._live.take_peak(), self._work())

    def at(self, name: str) -> _Mark:
        """A mark that was made."""
        return self.marks[name]

    def before_forward(self, index: int) -> None:
        self.mark(f"before {index}")

    def after_forward(self, index: int) -> None:
        self.mark(f"after {index}")

    def before_backward(self, index: int) -> None:
        self.mark(f"back {index}")

    def after_backward(self, index: int) -> None:
        self.mark(f"backed {index}")


class LiveBytes(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the bytes of all storages that operations make, as long as they live, on any device.

    `known`: storages that are there already and do not count.
    """

    def __init__(self, known: Iterable[torch.UntypedStorage] = ()) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.now = self.flops = self.kernels = self.moved = 0
        self._peak = 0
        self._seen: dict[int, Any] = {}
        for storage in known:
            self._watch(storage, 0)

    def take_peak(self) -> int:
        """The most since the last call."""
        peak, self._peak = self._peak, self.now
        return peak

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        found = [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
        fresh = [tensor for tensor in found if self._see(tensor)]
        if fresh or func._schema.is_mutable:
            self.kernels += 1
            # torch's table has no entry for the product that adds in place.
            packet = torch.ops.aten.addmm if func._overloadpacket is torch.ops.aten.addmm_ else func._overloadpacket
            if (count := flop_registry.get(packet)) is not None:
                self.flops += count(*args, **(kwargs or {}), out_val=result)
            else:
                given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
                self.moved += sum(tensor.numel() * tensor.element_size() for tensor in (*given, *found))
        return result

    def _see(self, tensor: Tensor) -> bool:
        """Whether the tensor's storage is new."""
        storage = tensor.untyped_storage()
        if storage._cdata in self._seen:
            return False
        self._watch(storage, storage.nbytes())
        return True

    def _watch(self, storage: torch.UntypedStorage, size: int) -> None:
        key = storage._cdata
        self.now += size
        self._peak = max(self._peak, self.now)
        self._seen[key] = weakref.ref(storage, lambda _: self._gone(key, size))

    def _gone(self, key: int, size: int) -> None:
        self._seen.pop(key, None)
        self.now -= size


def _storages(model: nn.Module) -> list[torch.UntypedStorage]:
    return [tensor.untyped_storage() for tensor in (*model.parameters(), *model.buffers())]


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


class FusedKernels(TorchFunctionMode):
    """Stand-ins for what is one kernel on a device and would be computed piece by piece here, with all S x T weights of attention."""

    def __init__(self) -> None:
        super().__init__()
        self.flops = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        named = kwargs or {}
        if func is functional.scaled_dot_product_attention:
            given = dict(zip(("query", "key", "value"), args, strict=False)) | named
            return _Attention.apply(given["query"], given["key"], given["value"], self)  # type: ignore[no-untyped-call]
        if func in (functional.rms_norm, torch.rms_norm):
            return _RMSNorm.apply(args[0] if args else named["input"])  # type: ignore[no-untyped-call]
        return func(*args, **named)


class _Attention(torch.autograd.Function):
    """Keeps queries, keys, values, result, and the logarithm of each row's sum. The result lies in memory as (B, S, H, D).

    Backward adds up the queries' gradient in float32 first.
    """

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, mode: FusedKernels) -> Tensor:
        batch, heads, length, width = query.shape
        result = query.new_empty((batch, length, heads, value.shape[-1])).transpose(1, 2)
        sums = query.new_empty((batch, heads, length), dtype=torch.float32)
        ctx.save_for_backward(query, key, value, result, sums)
        ctx.mode = mode
        mode.flops += 2 * batch * heads * length * key.shape[2] * (width + value.shape[-1])
        return result

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        query, key, value, _, _ = ctx.saved_tensors
        summed = query.new_empty(query.shape, dtype=torch.float32)
        # The scores once more, then a product for each of the three gradients and one for the weights'.
        ctx.mode.flops += query.shape[0] * query.shape[1] * query.shape[2] * key.shape[2] * (6 * query.shape[3] + 4 * value.shape[3])
        gradients = tuple(torch.empty_like(tensor) for tensor in (query, key, value))
        del summed
        return (*gradients, None)


class _RMSNorm(torch.autograd.Function):
    """Keeps its input and a number a row; its weights are frozen or small."""

    @staticmethod
    def forward(ctx: Any, input: Tensor) -> Tensor:
        ctx.save_for_backward(input, input.new_empty(input.shape[:-1], dtype=torch.float32))
        return torch.empty_like(input)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return torch.empty_like(ctx.saved_tensors[0])
