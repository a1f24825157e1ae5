"""What a walk over the blocks leaves behind, and how it is walked back."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from tuner.interfaces.blocks import BlockState, TokenStream
from tuner.interfaces.losses import Tap, TapValue
from tuner.model.states import Key, state_tensors, with_tensors


@dataclass(frozen=True)
class Node:
    """One step of the chain: a block, or a transform between blocks."""

    block: int
    """Index of the block; -1 for a transform."""
    apply: Callable[[BlockState], BlockState]


@dataclass
class Tape:
    """What backward needs of one node."""

    node: Node
    before: BlockState
    needs: frozenset[Key]
    """Keys of `before` whose gradient is wanted."""
    taps: tuple[str, ...]
    """Taps that read the state after this node."""
    graph: tuple[dict[Key, Tensor], dict[Key, Tensor]] | None
    """Leaves and outputs of a node whose activations are kept; None: recompute."""
    rng: tuple[Tensor, Tensor | None] | None


@dataclass
class Pass:
    """One state on its way with gradients: filled by forward, consumed by backward."""

    given: BlockState
    """As it came in, with the caller's graph."""
    first: BlockState
    """The same, detached."""
    inputs: tuple[Key, ...]
    """Keys of `given` whose gradient is wanted."""
    state: BlockState
    """Where the walk forward is."""
    needs: frozenset[Key]
    """Keys of `state` whose gradient is wanted."""
    tapes: list[Tape | None] = field(default_factory=list)
    outputs: tuple[Key, ...] = ()
    """Keys of the final state that are not those of the first."""
    taps: dict[str, tuple[Key, BlockState]] = field(default_factory=dict)
    flowing: dict[Key, Tensor] = field(default_factory=dict)
    """Gradients, where the walk back is."""
    arrived: dict[str, Tensor | None] = field(default_factory=dict)
    """Gradients of the taps."""
    done: bool = False

    @staticmethod
    def of(state: BlockState, tensors: Mapping[Key, Tensor]) -> Pass:
        """`tensors`: those of `state`."""
        inputs = tuple(key for key, tensor in tensors.items() if tensor.requires_grad)
        first = with_tensors(state, {key: tensor.detach() for key, tensor in tensors.items()})
        return Pass(state, first, inputs, first, frozenset(inputs))

    def values(self) -> list[Tensor]:
        """After the walk forward: what the autograd function returns for this pass. Distinct objects: each gets its own gradient."""
        before, last = state_tensors(self.first), state_tensors(self.state)
        self.outputs = tuple(key for key, tensor in last.items() if before.get(key) is not tensor)
        found = [last[key].detach() for key in self.outputs]
        return found + [state_tensors(after)[key].detach() for key, after in self.taps.values()]

    def ended(self, results: Iterator[Tensor]) -> BlockState:
        """The final state with the graph; takes its tensors from what the autograd function returned."""
        return with_tensors(self.given, {key: next(results) for key in self.outputs}, structure=self.state)

    def tapped(self, results: Iterator[Tensor]) -> dict[str, TapValue]:
        """The taps with the graph; the rest of the pass's part of what the function returned."""
        return {name: tap_value(after.streams[key[1]], next(results)) for name, (key, after) in self.taps.items()}

    def turn(self, gradients: Iterator[Tensor | None]) -> None:
        """Takes the gradients of `values`."""
        self.done = True
        found = {key: next(gradients) for key in self.outputs}
        self.flowing = {key: gradient for key, gradient in found.items() if gradient is not None}
        self.arrived = {name: next(gradients) for name in self.taps}

    def add_taps(self, names: Sequence[str]) -> None:
        """Adds what came for these taps to what flows."""
        for name in names:
            _add(self.flowing, self.taps[name][0], self.arrived[name])


def walk_back(one: Pass, tape: Tape, parameters: Sequence[nn.Parameter]) -> Sequence[Tensor | None]:
    """Moves what flows in a pass to before its node; returns the gradients of `parameters`."""
    if tape.graph is None:
        with restored_rng(tape.rng):
            leaves, outputs, _ = differentiate(tape.node, tape.before, tape.needs)
    else:
        leaves, outputs = tape.graph
    flowing = one.flowing
    reached = [key for key, tensor in outputs.items() if key in flowing and tensor.requires_grad]
    one.flowing = {key: g for key, g in flowing.items() if key not in outputs}
    if not reached:
        return ()
    wanted = [*leaves.values(), *parameters]
    found = torch.autograd.grad([outputs[key] for key in reached], wanted, [flowing[key] for key in reached], allow_unused=True)
    for key, gradient in zip(leaves, found, strict=False):
        _add(one.flowing, key, gradient)
    return found[len(leaves) :]


def differentiate(node: Node, state: BlockState, needs: frozenset[Key]) -> tuple[dict[Key, Tensor], dict[Key, Tensor], BlockState]:
    """Runs a node with gradients from fresh leaves: (leaves, changed outputs with their graph, detached state after)."""
    before = state_tensors(state)
    leaves = {key: before[key].detach().requires_grad_() for key in needs}
    inside = with_tensors(state, leaves)
    given = state_tensors(inside)
    with torch.enable_grad():
        after = node.apply(inside)
    last = state_tensors(after)
    outputs = {key: tensor for key, tensor in last.items() if given.get(key) is not tensor}
    # Unchanged tensors are handed on as the very objects that came in, so that "unchanged" stays visible further on.
    plain = {key: outputs[key].detach() if key in outputs else before[key] for key in last}
    return leaves, outputs, with_tensors(after, plain)


def tap_value(stream: TokenStream, hidden: Tensor | None = None) -> TapValue:
    return TapValue(stream.hidden if hidden is None else hidden, stream.grid, stream.token_ids)


def handed_out(state: BlockState, taps: Sequence[Tap]) -> tuple[BlockState, dict[str, TapValue]]:
    """What the taps after a node read, with the graph, and the state that goes on.

    Several of one stream get tensors of their own: left to itself, autograd adds up three and more gradients in the order of its own
    walk, not in that of `Pass.add_taps`.
    """
    found: dict[str, TapValue] = {}
    for name in dict.fromkeys(tap.stream for tap in taps):
        readers, stream = [tap.name for tap in taps if tap.stream == name], state.streams[name]
        if len(readers) == 1:
            found[readers[0]] = tap_value(stream)
            continue
        onwards, *own = _Copies.apply(stream.hidden, len(readers))  # type: ignore[no-untyped-call]
        found |= {reader: tap_value(stream, hidden) for reader, hidden in zip(readers, own, strict=True)}
        state = state.with_hidden({name: onwards})
    return state, found


class _Copies(torch.autograd.Function):
    """A tensor and so many more of it; their gradients are added up in this order."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, count: int) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        return tuple(tensor.detach() for _ in range(count + 1))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> Any:
        total: Tensor | None = None
        for gradient in gradients:
            if gradient is not None:
                total = gradient if total is None else total + gradient
        return total, None


class Sums:
    """Gradients of the parameters of one block, added up over several passes.

    An adapter's matrices are small and many, and a kernel for each of them in each pass took 4 % of a step of four batches. So `wide`
    ones, which are added up in float32, lie one after the other in one tensor for each pass.
    """

    def __init__(self, wide: Sequence[bool]) -> None:
        self._wide = tuple(wide)
        self._narrow: dict[int, Tensor] = {}
        self._flat: list[tuple[dict[int, torch.Size], Tensor]] = []
        """Of passes in a row that reached the same parameters: which, and their sum."""

    def add(self, gradients: Sequence[Tensor | None]) -> None:
        """Those of the next pass; none at all where it did not reach the block."""
        found = {place: gradient for place, gradient in enumerate(gradients) if gradient is not None}
        for place, gradient in found.items():
            if not self._wide[place]:
                self._narrow[place] = self._narrow[place] + gradient if place in self._narrow else gradient
        shapes = {place: gradient.shape for place, gradient in found.items() if self._wide[place]}
        if not shapes:
            return
        flat = torch.cat([found[place].reshape(-1) for place in shapes])
        if self._flat and self._flat[-1][0] == shapes:
            self._flat[-1][1].add_(flat)
        else:
            self._flat.append((shapes, flat.float()))

    def totals(self) -> dict[int, Tensor]:
        """Place -> sum, of all parameters that were reached."""
        found = dict(self._narrow)
        for shapes, flat in self._flat:
            pieces = torch.split(flat, [shape.numel() for shape in shapes.values()])
            for (place, shape), piece in zip(shapes.items(), pieces, strict=True):
                found[place] = found[place] + piece.view(shape) if place in found else piece.view(shape)
        return found


def _add(gradients: dict[Key, Tensor], key: Key, gradient: Tensor | None) -> None:
    if gradient is not None:
        gradients[key] = gradients[key] + gradient if key in gradients else gradient


def rng_state(state: BlockState) -> tuple[Tensor, Tensor | None]:
    device = next(iter(state.streams.values())).hidden.device
    return torch.get_rng_state(), torch.cuda.get_rng_state(device) if device.type == "cuda" else None


class restored_rng:
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
