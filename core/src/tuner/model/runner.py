"""The only loop over blocks: it owns activation checkpointing and calls memory sessions, transforms and taps between blocks.

With gradients enabled, and anything to recompute or anybody to tell, the whole stack is one autograd function. Forward runs the
blocks and keeps the inputs of the recomputed ones, or the graph of the others. Backward walks back: it recomputes a block with
gradients, differentiates it while its weights are held, and goes on. So everything that attaches is called plainly between
blocks, in both directions, and nothing depends on when a checkpointing library stops its recomputation.

Every tensor of a `BlockState` has a key; gradients are tracked per key. A tensor that a node returns unchanged (the same
object) passes its gradient by.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from tuner.interfaces.blocks import Aligned, BlockSet, BlockState, trainable_parameters
from tuner.interfaces.family import BlockFunction
from tuner.interfaces.losses import Tap, TapValue, Transform
from tuner.interfaces.memory import MemorySession

Key = tuple[str, str, str]
"""("hidden", stream, ""), ("aligned", stream, name) or ("shared", "", name)."""
CallBlock = Callable[[nn.Module, BlockState], BlockState]


@dataclass(frozen=True)
class Checkpointing:
    """Which blocks are recomputed in backward instead of keeping their activations."""

    recomputed: frozenset[int] = frozenset()

    @staticmethod
    def every(blocks: int, interval: int = 1) -> Checkpointing:
        """Recomputes all (1), or all but every `interval`-th block."""
        kept = range(interval - 1, blocks, interval) if interval > 1 else range(0)
        return Checkpointing(frozenset(range(blocks)) - frozenset(kept))


@dataclass(frozen=True)
class _Node:
    """One step of the chain: a block, or a transform between blocks."""

    block: int
    """Index of the block; -1 for a transform."""
    apply: Callable[[BlockState], BlockState]


@dataclass
class _Tape:
    """What backward needs of one node."""

    node: _Node
    before: BlockState
    needs: frozenset[Key]
    """Keys of `before` whose gradient is wanted."""
    taps: tuple[str, ...]
    """Taps that read the state after this node."""
    graph: tuple[dict[Key, Tensor], dict[Key, Tensor]] | None
    """Leaves and outputs of a node whose activations are kept; None: recompute."""
    rng: tuple[Tensor, Tensor | None] | None


@dataclass
class _Pass:
    """One forward pass with gradients: filled by forward, consumed by backward."""

    state: BlockState
    inputs: tuple[Key, ...]
    tapes: list[_Tape | None] = field(default_factory=list)
    final: BlockState | None = None
    outputs: tuple[Key, ...] = ()
    taps: dict[str, tuple[Key, BlockState]] = field(default_factory=dict)
    done: bool = False


class BlockRunner(BlockFunction):
    """Runs a state through all blocks, in training and in sampling.

    Under `torch.no_grad` it is a plain loop with the memory session's events; transforms and taps belong to training.
    """

    def __init__(
        self,
        blocks: BlockSet,
        call_block: CallBlock,
        *,
        checkpointing: Checkpointing | None = None,
        session: MemorySession | None = None,
        transforms: Sequence[Transform] = (),
        taps: Sequence[Tap] = (),
    ) -> None:
        self.blocks = blocks
        self.call_block = call_block
        self.checkpointing = checkpointing or Checkpointing()
        self.session = session or MemorySession()
        self.transforms = tuple(transforms)
        self.taps = tuple(taps)
        self.tapped: dict[str, TapValue] = {}
        """Values of the last pass with gradients."""
        self.under_way = False
        """Whether a walk forward has begun whose walk back has not ended."""
        self._parameters = [trainable_parameters(block) for block in blocks.blocks]
        self._chain = self._build_chain()
        self.draws = any(isinstance(m, nn.Dropout) and m.p > 0 for block in blocks.blocks for m in block.modules())

    def _build_chain(self) -> tuple[_Node, ...]:
        count = len(self.blocks)
        for name, index in [("transform", t.block) for t in self.transforms] + [(t.name, t.block) for t in self.taps]:
            if not 0 <= index < count:
                raise IndexError(f"{name}: block {index} is outside 0..{count - 1}")
        chain: list[_Node] = []
        for index in range(count):
            chain += [_Node(-1, t.apply) for t in self.transforms if (t.block, t.when) == (index, "before")]
            chain.append(_Node(index, self._block_call(index)))
            chain += [_Node(-1, t.apply) for t in self.transforms if (t.block, t.when) == (index, "after")]
        return tuple(chain)

    def _block_call(self, index: int) -> Callable[[BlockState], BlockState]:
        block = self.blocks.blocks[index]
        return lambda state: self.call_block(block, state)

    def run(self, state: BlockState) -> BlockState:
        """The state after the last block; `tapped` holds the taps of this pass. Gradients flow into block parameters."""
        if not torch.is_grad_enabled():
            return self.observe(state)[0]
        self.tapped = {}
        if not self.checkpointing.recomputed and type(self.session) is MemorySession:
            return self._run_graph(state)
        tensors = _tensors(state)
        inputs = tuple(key for key, tensor in tensors.items() if tensor.requires_grad)
        current = _Pass(_replace(state, {key: tensor.detach() for key, tensor in tensors.items()}), inputs)
        device = next(iter(state.streams.values())).hidden.device
        # Without an input that needs a gradient autograd would not call backward at all.
        anchor = torch.zeros((), device=device, requires_grad=True)
        results = _Stack.apply(self, current, anchor, *(tensors[key] for key in inputs))  # type: ignore[no-untyped-call]
        self._collect_taps(current, results[len(current.outputs) :])
        return _replace(state, dict(zip(current.outputs, results, strict=False)), structure=current.final)

    def _collect_taps(self, current: _Pass, values: Sequence[Tensor]) -> None:
        for (name, (key, after)), value in zip(current.taps.items(), values, strict=True):
            stream = after.streams[key[1]]
            self.tapped[name] = TapValue(value, stream.grid, stream.token_ids)

    def _run_graph(self, state: BlockState) -> BlockState:
        """Nothing is recomputed and nobody waits for events: one graph, which autograd walks in a single call.

        Gradients add up as in the walk over tapes, bit for bit: those of a node's uses first, then of one node after the other.
        """
        return _apart(state, self._run_chain)

    def _run_chain(self, state: BlockState) -> BlockState:
        for node in self._chain:
            state = _apart(state, node.apply)
            for tap in self._taps_after(node, state):
                stream = state.streams[tap.stream]
                self.tapped[tap.name] = TapValue(stream.hidden, stream.grid, stream.token_ids)
        return state

    def _taps_after(self, node: _Node, state: BlockState) -> list[Tap]:
        """A batch without a stream gives its taps nothing."""
        return [tap for tap in self.taps if tap.block == node.block and tap.stream in state.streams]

    @torch.no_grad()
    def observe(self, state: BlockState, taps: Sequence[Tap] = ()) -> tuple[BlockState, dict[str, TapValue]]:
        """Runs the blocks alone, without gradients; hands out the given taps, not those of training. `tapped` stays as it is."""
        found: dict[str, TapValue] = {}
        try:
            self.session.begin_step(len(self.blocks))
            for index in range(len(self.blocks)):
                self.session.before_forward(index)
                state = self.call_block(self.blocks.blocks[index], state)
                self.session.after_forward(index)
                for tap in taps:
                    if tap.block == index and tap.stream in state.streams:
                        stream = state.streams[tap.stream]
                        found[tap.name] = TapValue(stream.hidden, stream.grid, stream.token_ids)
            self.session.end_step()
        except BaseException:
            self.abort()
            raise
        return state, found

    def abort(self) -> None:
        """A pass ended early, and what is left of it will not be walked back."""
        self.under_way = False
        self.session.abort()

    # --- forward with gradients ------------------------------------------------------------------------------------
    def forward(self, current: _Pass) -> tuple[Tensor, ...]:
        """Runs the chain and fills `current`; returns the changed tensors of the final state, then the taps."""
        self.under_way = True
        self.session.begin_step(self._first_backward(current))
        state, needs = current.state, frozenset(current.inputs)
        for node in self._chain:
            state, needs, tape = self._advance(node, state, needs)
            for tap in self._taps_after(node, state):
                current.taps[tap.name] = (("hidden", tap.stream, ""), state)
            current.tapes.append(tape)
        current.final = state
        first, last = _tensors(current.state), _tensors(state)
        current.outputs = tuple(key for key, tensor in last.items() if first.get(key) is not tensor)
        # Distinct tensor objects: autograd hands each output its own gradient.
        values = [last[key].detach() for key in current.outputs]
        values += [_tensors(after)[key].detach() for key, after in current.taps.values()]
        return tuple(values)

    def _first_backward(self, current: _Pass) -> int:
        """The lowest block that backward will visit: below it nothing is trained, and no gradient of the input is wanted."""
        if current.inputs:
            return 0
        return next((index for index, parameters in enumerate(self._parameters) if parameters), len(self.blocks))

    def _advance(self, node: _Node, state: BlockState, needs: frozenset[Key]) -> tuple[BlockState, frozenset[Key], _Tape | None]:
        parameters = self._parameters[node.block] if node.block >= 0 else []
        taps = tuple(tap.name for tap in self._taps_after(node, state))
        if node.block >= 0:
            self.session.before_forward(node.block)
        if not needs and not parameters:
            # Nothing before this point is trained: backward will not come here, so nothing is kept.
            after, tape, needed = node.apply(state), None, needs
        elif node.block in self.checkpointing.recomputed:
            rng = _rng_state(state) if self.draws else None
            after = node.apply(state)
            tape = _Tape(node, state, needs, taps, None, rng)
            needed = _needs_after(needs, _tensors(state), _tensors(after), None)
        else:
            leaves, outputs, after = _differentiate(node, state, needs)
            tape = _Tape(node, state, needs, taps, (leaves, outputs), None)
            needed = _needs_after(needs, _tensors(state), _tensors(after), {k for k, t in outputs.items() if t.requires_grad})
        if node.block >= 0:
            self.session.after_forward(node.block)
        return after, needed, tape

    # --- backward --------------------------------------------------------------------------------------------------
    def backward(self, current: _Pass, gradients: Sequence[Tensor | None]) -> list[Tensor | None]:
        """Walks back over the tapes; returns the gradients of `current.inputs`."""
        if current.done:
            raise RuntimeError("backward was called twice over one pass of the blocks")
        current.done = True
        flowing = {key: g for key, g in zip(current.outputs, gradients, strict=False) if g is not None}
        tapped = dict(zip(current.taps, gradients[len(current.outputs) :], strict=True))
        while current.tapes:
            tape = current.tapes.pop()
            if tape is None:
                break
            for name in tape.taps:
                _add(flowing, current.taps[name][0], tapped[name])
            flowing = self._retreat(tape, flowing)
        current.tapes.clear()
        return [flowing.get(key) for key in current.inputs]

    def _retreat(self, tape: _Tape, flowing: dict[Key, Tensor]) -> dict[Key, Tensor]:
        """Gradients after a node -> gradients before it; accumulates those of the block's parameters."""
        index = tape.node.block
        parameters = self._parameters[index] if index >= 0 else []
        if index >= 0:
            self.session.before_backward(index)
        if tape.graph is None:
            with _restored_rng(tape.rng):
                leaves, outputs, _ = _differentiate(tape.node, tape.before, tape.needs)
        else:
            leaves, outputs = tape.graph
            tape.graph = None
        reached = [key for key, tensor in outputs.items() if key in flowing and tensor.requires_grad]
        passed = {key: g for key, g in flowing.items() if key not in outputs}
        if reached:
            wanted = [*leaves.values(), *parameters]
            found = torch.autograd.grad(
                [outputs[key] for key in reached], wanted, [flowing[key] for key in reached], allow_unused=True
            )
            for key, gradient in zip(leaves, found, strict=False):
                _add(passed, key, gradient)
            for parameter, gradient in zip(parameters, found[len(leaves) :], strict=True):
                _accumulate(parameter, gradient)
        if index >= 0:
            self.session.after_backward(index)
        return passed


class _Stack(torch.autograd.Function):
    """The whole stack of blocks as one node of the autograd graph."""

    @staticmethod
    def forward(ctx: Any, runner: BlockRunner, current: _Pass, anchor: Tensor, *inputs: Tensor) -> tuple[Tensor, ...]:
        ctx.runner, ctx.current = runner, current
        ctx.set_materialize_grads(False)
        try:
            return runner.forward(current)
        except BaseException:
            runner.abort()
            raise

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> Any:
        runner: BlockRunner = ctx.runner
        try:
            found = runner.backward(ctx.current, gradients)
            runner.session.end_step()
            runner.under_way = False
        except BaseException:
            runner.abort()
            raise
        return (None, None, None, *found)


def _tensors(state: BlockState) -> dict[Key, Tensor]:
    """Every tensor of a state that may carry gradients, by key."""
    found: dict[Key, Tensor] = {}
    for name, stream in state.streams.items():
        found["hidden", name, ""] = stream.hidden
        for label, aligned in stream.aligned.items():
            found["aligned", name, label] = aligned.tensor
    for label, tensor in state.shared.items():
        found["shared", "", label] = tensor
    return found


def _replace(state: BlockState, tensors: Mapping[Key, Tensor], structure: BlockState | None = None) -> BlockState:
    """`structure` (default: `state`) with tensors taken from `tensors`, else from `state`, else from itself."""
    shape = structure or state
    own = _tensors(state)

    def pick(key: Key, default: Tensor) -> Tensor:
        return tensors[key] if key in tensors else own.get(key, default)

    streams = {}
    for name, stream in shape.streams.items():
        aligned = {
            label: Aligned(pick(("aligned", name, label), a.tensor), a.token_dims, a.batched) for label, a in stream.aligned.items()
        }
        streams[name] = replace(stream, hidden=pick(("hidden", name, ""), stream.hidden), aligned=aligned)
    return BlockState(streams, {label: pick(("shared", "", label), t) for label, t in shape.shared.items()})


def _differentiate(node: _Node, state: BlockState, needs: frozenset[Key]) -> tuple[dict[Key, Tensor], dict[Key, Tensor], BlockState]:
    """Runs a node with gradients from fresh leaves: (leaves, changed outputs with their graph, detached state after)."""
    before = _tensors(state)
    leaves = {key: before[key].detach().requires_grad_() for key in needs}
    inside = _replace(state, leaves)
    given = _tensors(inside)
    with torch.enable_grad():
        after = node.apply(inside)
    last = _tensors(after)
    outputs = {key: tensor for key, tensor in last.items() if given.get(key) is not tensor}
    # Unchanged tensors are handed on as the very objects that came in, so that "unchanged" stays visible further on.
    plain = {key: outputs[key].detach() if key in outputs else before[key] for key in last}
    return leaves, outputs, _replace(after, plain)


def _apart(state: BlockState, apply: Callable[[BlockState], BlockState]) -> BlockState:
    """Runs `apply` on views of its own: autograd sums up all uses of a view before it goes on to what is behind it.

    What is left unchanged is handed on as it came in.
    """
    before = _tensors(state)
    inside = {key: tensor.view_as(tensor) for key, tensor in before.items() if tensor.requires_grad}
    after = apply(_replace(state, inside))
    kept = {key: before[key] for key, tensor in _tensors(after).items() if key in inside and inside[key] is tensor}
    return _replace(after, kept) if kept else after


def _needs_after(
    needs: frozenset[Key], before: Mapping[Key, Tensor], after: Mapping[Key, Tensor], reached: set[Key] | None
) -> frozenset[Key]:
    """Keys that need a gradient after a node: untouched ones that did, and changed ones (those in `reached`, None: all)."""
    kept = {key for key in needs if key in after and after[key] is before[key]}
    changed = {key for key, t in after.items() if before.get(key) is not t and t.is_floating_point()}
    return frozenset(kept | (changed if reached is None else changed & reached))


def _add(gradients: dict[Key, Tensor], key: Key, gradient: Tensor | None) -> None:
    if gradient is not None:
        gradients[key] = gradients[key] + gradient if key in gradients else gradient


def _accumulate(parameter: nn.Parameter, gradient: Tensor | None) -> None:
    if gradient is None:
        return
    if parameter.grad is None:
        parameter.grad = gradient
    else:
        parameter.grad.add_(gradient)


def _rng_state(state: BlockState) -> tuple[Tensor, Tensor | None]:
    device = next(iter(state.streams.values())).hidden.device
    return torch.get_rng_state(), torch.cuda.get_rng_state(device) if device.type == "cuda" else None


class _restored_rng:
    """Draws inside repeat those of the forward pass (dropout); the generators are left as they were found."""

    def __init__(self, states: tuple[Tensor, Tensor | None] | None) -> None:
        self.states = states

    def __enter__(self) -> None:
        if self.states is None:
            return
        cpu, device = self.states
        self.outer = (torch.get_rng_state(), torch.cuda.get_rng_state() if device is not None else None)
        torch.set_rng_state(cpu)
        if device is not None:
            torch.cuda.set_rng_state(device)

    def __exit__(self, *_: object) -> None:
        if self.states is None:
            return
        torch.set_rng_state(self.outer[0])
        if self.outer[1] is not None:
            torch.cuda.set_rng_state(self.outer[1])
