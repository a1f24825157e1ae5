"""States as tensors with keys: what gradients are tracked by, between blocks.

Every tensor of a `BlockState` that may carry a gradient has a key. Nothing else connects one node of the chain with the next, so what a
transform wants to come back to must travel in the state.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

from torch import Tensor

from tuner.interfaces.blocks import Aligned, BlockState

Key = tuple[str, str, str]
"""("hidden", stream, ""), ("aligned", stream, name) or ("shared", "", name)."""


def state_tensors(state: BlockState) -> dict[Key, Tensor]:
    """Every tensor of a state that may carry gradients, by key."""
    found: dict[Key, Tensor] = {}
    for name, stream in state.streams.items():
        found["hidden", name, ""] = stream.hidden
        for label, aligned in stream.aligned.items():
            found["aligned", name, label] = aligned.tensor
    for label, tensor in state.shared.items():
        found["shared", "", label] = tensor
    return found


def with_tensors(state: BlockState, tensors: Mapping[Key, Tensor], structure: BlockState | None = None) -> BlockState:
    """`structure` (default: `state`) with tensors taken from `tensors`, else from `state`, else from itself."""
    shape = structure or state
    own = state_tensors(state)

    def pick(key: Key, default: Tensor) -> Tensor:
        return tensors[key] if key in tensors else own.get(key, default)

    streams = {}
    for name, stream in shape.streams.items():
        aligned = {
            label: Aligned(pick(("aligned", name, label), a.tensor), a.token_dims, a.batched) for label, a in stream.aligned.items()
        }
        streams[name] = replace(stream, hidden=pick(("hidden", name, ""), stream.hidden), aligned=aligned)
    return BlockState(streams, {label: pick(("shared", "", label), t) for label, t in shape.shared.items()})


def apart(state: BlockState, apply: Callable[[BlockState], BlockState]) -> BlockState:
    """Runs `apply` on views of its own: autograd sums up all uses of a view before it goes on to what is behind it.

    What is left unchanged is handed on as it came in.
    """
    before = state_tensors(state)
    inside = {key: tensor.view_as(tensor) for key, tensor in before.items() if tensor.requires_grad}
    after = apply(with_tensors(state, inside))
    kept = {key: before[key] for key, tensor in state_tensors(after).items() if key in inside and inside[key] is tensor}
    return with_tensors(after, kept) if kept else after


def needs_after(
    needs: frozenset[Key], before: Mapping[Key, Tensor], after: Mapping[Key, Tensor], reached: set[Key] | None
) -> frozenset[Key]:
    """Keys that need a gradient after a node: untouched ones that did, and changed ones (those in `reached`, None: all)."""
    kept = {key for key in needs if key in after and after[key] is before[key]}
    changed = {key for key, t in after.items() if before.get(key) is not t and t.is_floating_point()}
    return frozenset(kept | (changed if reached is None else changed & reached))
