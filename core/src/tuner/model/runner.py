"""The only loop over blocks: it owns activation checkpointing and calls memory sessions, transforms and taps between blocks.

With gradients enabled, and anything to recompute or anybody to tell, the whole stack is one autograd function. Forward runs the
blocks and keeps the inputs of the recomputed ones, or the graph of the others. Backward walks back: it recomputes a block with
gradients, differentiates it while its weights are held, and goes on. So everything that attaches is called plainly between
blocks, in both directions, and nothing depends on when a checkpointing library stops its recomputation.

Every tensor of a `BlockState` has a key; gradients are tracked per key. A tensor that a node returns unchanged (the same
object) passes its gradient by.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from tuner.interfaces.blocks import BlockSet, BlockState, trainable_parameters
from tuner.interfaces.family import BlockFunction
from tuner.interfaces.losses import Tap, TapValue, Transform
from tuner.interfaces.memory import MemorySession
from tuner.model.lanes import permitted
from tuner.model.quantized import QuantizedLinear, made_once
from tuner.model.states import apart, needs_after, state_tensors
from tuner.model.tape import Node, Pass, Sums, Tape, differentiate, handed_out, rng_state, tap_value, walk_back

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


class GradientSink(Protocol):
    """Takes gradients of parameters that are added up in float32 outside the model."""

    def takes(self, parameter: nn.Parameter) -> bool:
        """Whether `receive` wants those of this one; else they are added to its `grad`."""

    def receive(self, parameter: nn.Parameter, gradient: Tensor) -> None:
        """`gradient`: float32, the sum over the states of one pass."""


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
        train_block: CallBlock | None = None,
    ) -> None:
        """`train_block`: calls a block in passes with gradients, where that is another way than `call_block`."""
        self.blocks = blocks
        self.call_block = call_block
        self.train_block = train_block
        self.checkpointing = checkpointing or Checkpointing()
        self.session = session or MemorySession()
        self.transforms = tuple(transforms)
        self.taps = tuple(taps)
        self.tapped: dict[str, TapValue] = {}
        """Values of the last pass with gradients."""
        self.sink: GradientSink | None = None
        """Of gradients of several states at once."""
        self.under_way = False
        """Whether a walk forward has begun whose walk back has not ended."""
        self.lanes = False
        """Whether blocks of a captured step may put small work beside large work."""
        # Whoever brings weights inside a block brings them for each batch.
        self._quantized: list[list[QuantizedLinear]] = [
            [] if self.session.inside_blocks else [m for m in block.modules() if isinstance(m, QuantizedLinear)] for block in blocks.blocks
        ]
        self._parameters = [trainable_parameters(block) for block in blocks.blocks]
        self._chain = self._build_chain()
        self.draws = any(isinstance(m, nn.Dropout) and m.p > 0 for block in blocks.blocks for m in block.modules())

    def _build_chain(self) -> tuple[Node, ...]:
        count = len(self.blocks)
        for name, index in [("transform", t.block) for t in self.transforms] + [(t.name, t.block) for t in self.taps]:
            if not 0 <= index < count:
                raise IndexError(f"{name}: block {index} is outside 0..{count - 1}")
        if len({tap.name for tap in self.taps}) < len(self.taps):
            raise ValueError(f"two taps have one name: {', '.join(sorted(tap.name for tap in self.taps))}")
        chain: list[Node] = []
        for index in range(count):
            chain += [Node(-1, t.apply) for t in self.transforms if (t.block, t.when) == (index, "before")]
            chain.append(Node(index, self._block_call(index)))
            chain += [Node(-1, t.apply) for t in self.transforms if (t.block, t.when) == (index, "after")]
        return tuple(chain)

    def _block_call(self, index: int) -> Callable[[BlockState], BlockState]:
        block = self.blocks.blocks[index]

        def call(state: BlockState) -> BlockState:
            with permitted(self.lanes and not self.session.inside_blocks):
                return (self.train_block or self.call_block)(block, state)

        return call

    def run(self, state: BlockState) -> BlockState:
        """The state after the last block; `tapped` holds the taps of this pass. Gradients flow into block parameters."""
        if not torch.is_grad_enabled():
            return self.observe(state)[0]
        ((after, self.tapped),) = self.run_all([state])
        return after

    def run_all(self, states: Sequence[BlockState]) -> list[tuple[BlockState, dict[str, TapValue]]]:
        """Training passes over several states, together: each block takes all of them while its weights are there, in both directions.

        Returns what is behind the last block, and the taps, of each. One backward pass must reach all of them. Gradients are added up
        in the order of the states, as one pass after the other would. A transform is called for one state after the other.
        """
        if not self.checkpointing.recomputed and type(self.session) is MemorySession:
            return [self._run_graph(state) for state in states]
        given = [state_tensors(state) for state in states]
        passes = [Pass.of(state, tensors) for state, tensors in zip(states, given, strict=True)]
        device = next(iter(states[0].streams.values())).hidden.device
        # Without an input that needs a gradient autograd would not call backward at all.
        anchor = torch.zeros((), device=device, requires_grad=True)
        inputs = [tensors[key] for one, tensors in zip(passes, given, strict=True) for key in one.inputs]
        results = iter(_Stack.apply(self, passes, anchor, *inputs))  # type: ignore[no-untyped-call]
        return [(one.ended(results), one.tapped(results)) for one in passes]

    def _run_graph(self, state: BlockState) -> tuple[BlockState, dict[str, TapValue]]:
        """Nothing is recomputed and nobody waits for events: one graph, which autograd walks in a single call.

        Gradients add up as in the walk over tapes, bit for bit: those of a node's uses first, then of one node after the other.
        """
        found: dict[str, TapValue] = {}

        def chain(state: BlockState) -> BlockState:
            for node in self._chain:
                state = apart(state, node.apply)
                state, values = handed_out(state, self._taps_after(node, state))
                found.update(values)
            return state

        return apart(state, chain), found

    def _taps_after(self, node: Node, state: BlockState) -> list[Tap]:
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
                here = [tap for tap in taps if tap.block == index and tap.stream in state.streams]
                found.update((tap.name, tap_value(state.streams[tap.stream])) for tap in here)
            self.session.end_step()
        except BaseException:
            self.abort()
            raise
        return state, found

    def leave(self) -> None:
        """The walk forward that is under way will not be walked back."""
        if self.under_way:
            self.under_way = False
            self.session.end_step()

    def abort(self) -> None:
        """A pass ended early, and what is left of it will not be walked back."""
        self.under_way = False
        self.session.abort()

    # --- forward with gradients ------------------------------------------------------------------------------------
    def forward(self, passes: Sequence[Pass]) -> tuple[Tensor, ...]:
        """Runs the chain and fills `passes`; returns of each the changed tensors of its final state, then the taps."""
        self.under_way = True
        self.session.begin_step(min(self._first_backward(one) for one in passes))
        for node in self._chain:
            if node.block >= 0:
                self.session.before_forward(node.block)
            with made_once(self._several(node, len(passes))):
                for one in passes:
                    self._advance(node, one)
            if node.block >= 0:
                self.session.after_forward(node.block)
        return tuple(value for one in passes for value in one.values())

    def _several(self, node: Node, batches: int) -> list[QuantizedLinear]:
        """The layers whose weights are dequantized once for all batches that a block takes together."""
        return self._quantized[node.block] if node.block >= 0 and batches > 1 else []

    def _first_backward(self, one: Pass) -> int:
        """The lowest block that backward will visit: below it nothing is trained, and no gradient of the input is wanted."""
        if one.inputs:
            return 0
        return next((index for index, parameters in enumerate(self._parameters) if parameters), len(self.blocks))

    def _advance(self, node: Node, one: Pass) -> None:
        """Takes a pass on over one node, and leaves a tape."""
        state, needs = one.state, one.needs
        parameters = self._parameters[node.block] if node.block >= 0 else []
        taps = tuple(tap.name for tap in self._taps_after(node, state))
        tape: Tape | None
        if not needs and not parameters:
            # Nothing before this point is trained: backward will not come here, so nothing is kept.
            after, tape = node.apply(state), None
        elif node.block in self.checkpointing.recomputed:
            rng = rng_state(state) if self.draws else None
            after = node.apply(state)
            tape = Tape(node, state, needs, taps, None, rng)
            one.needs = needs_after(needs, state_tensors(state), state_tensors(after), None)
        else:
            leaves, outputs, after = differentiate(node, state, needs)
            tape = Tape(node, state, needs, taps, (leaves, outputs), None)
            reached = {key for key, tensor in outputs.items() if tensor.requires_grad}
            one.needs = needs_after(needs, state_tensors(state), state_tensors(after), reached)
        one.taps.update((tap.name, (("hidden", tap.stream, ""), after)) for tap in self._taps_after(node, after))
        one.tapes.append(tape)
        one.state = after

    # --- backward --------------------------------------------------------------------------------------------------
    def backward(self, passes: Sequence[Pass], gradients: Sequence[Tensor | None]) -> list[Tensor | None]:
        """Walks back over the tapes; returns the gradients of the passes' inputs."""
        if any(one.done for one in passes):
            raise RuntimeError("backward was called twice over one pass of the blocks")
        arriving = iter(gradients)
        for one in passes:
            one.turn(arriving)
        for node in reversed(self._chain):
            tapes = [(one, tape) for one in passes if (tape := one.tapes.pop()) is not None]
            if not tapes:
                break
            if node.block >= 0:
                self.session.before_backward(node.block)
            self._retreat(node, tapes)
            if node.block >= 0:
                self.session.after_backward(node.block)
        return [one.flowing.get(key) for one in passes for key in one.inputs]

    def _retreat(self, node: Node, tapes: Sequence[tuple[Pass, Tape]]) -> None:
        """Gradients after a node -> gradients before it, of each pass; accumulates those of the block's parameters."""
        parameters = self._parameters[node.block] if node.block >= 0 else []
        wide = [len(tapes) > 1 and self.sink is not None and self.sink.takes(parameter) for parameter in parameters]
        sums = Sums(wide)
        with made_once(self._several(node, len(tapes))):
            for one, tape in tapes:
                one.add_taps(tape.taps)
                sums.add(walk_back(one, tape, parameters))
        for place, total in sums.totals().items():
            if wide[place] and self.sink is not None:
                self.sink.receive(parameters[place], total)
            else:
                _accumulate(parameters[place], total)


class _Stack(torch.autograd.Function):
    """The whole stack of blocks as one node of the autograd graph."""

    @staticmethod
    def forward(ctx: Any, runner: BlockRunner, passes: Sequence[Pass], anchor: Tensor, *inputs: Tensor) -> tuple[Tensor, ...]:
        ctx.runner, ctx.passes = runner, passes
        ctx.set_materialize_grads(False)
        try:
            return runner.forward(passes)
        except BaseException:
            runner.abort()
            raise

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> Any:
        runner: BlockRunner = ctx.runner
        try:
            found = runner.backward(ctx.passes, gradients)
            runner.session.end_step()
            runner.under_way = False
        except BaseException:
            runner.abort()
            raise
        return (None, None, None, *found)


def _accumulate(parameter: nn.Parameter, gradient: Tensor) -> None:
    if parameter.grad is None:
        parameter.grad = gradient
    else:
        parameter.grad.add_(gradient)
