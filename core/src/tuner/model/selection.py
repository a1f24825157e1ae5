"""Leaving tokens of a stream out of some blocks, and putting them back: what any technique that drops tokens needs.

Special here: everything that waits travels in `BlockState.shared`. The runner differentiates transforms and blocks one by one and hands
gradients from one to the next through the tensors of the state alone; a tensor kept in a closure would lose its gradient.

Dimensions: B samples, S tokens of a stream, K kept tokens, D channels.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from torch import Tensor

from tuner.interfaces.blocks import Aligned, BlockState, TokenStream
from tuner.interfaces.family import Batch


def select(state: BlockState, stream: str, ids: Tensor) -> BlockState:
    """The state with only the tokens `ids` in `stream`, and everything that is aligned with them; `restore` undoes it.

    `ids`: (B, K) int64 on the stream's device, positions in the stream as it is, none twice within a row; the tokens lie in that order
    afterwards. `token_ids` of the result are positions in the full sequence, also where tokens had been selected before. Aligned tensors
    without a batch dimension get one in front, since each sample keeps other tokens. Raises `ValueError` for ids of another batch size.
    """
    whole = state.streams[stream]
    batch = whole.hidden.shape[0]
    if ids.ndim != 2 or ids.shape[0] != batch:
        raise ValueError(f"ids must be ({batch}, K) for {batch} samples of {stream}, not {tuple(ids.shape)}")
    chosen = replace(
        whole,
        hidden=_gathered(whole.hidden, ids, 1),
        aligned={name: _aligned(each, ids) for name, each in whole.aligned.items()},
        token_ids=ids if whole.token_ids is None else whole.token_ids.gather(1, ids),
        protected=None if whole.protected is None else whole.protected.gather(1, ids),
    )
    waiting = _waiting(whole, ids, _prefix(stream, _depth(state, stream)))
    return BlockState({**state.streams, stream: chosen}, {**state.shared, **waiting})


def restore(state: BlockState, stream: str) -> BlockState:
    """Undoes the last `select` of `stream`: kept tokens as they are now, skipped ones bit for bit as they were, everything aligned whole.

    Raises `ValueError` where nothing is selected.
    """
    depth = _depth(state, stream)
    if depth == 0:
        raise ValueError(f"no tokens of {stream} have been left out")
    prefix = _prefix(stream, depth - 1)
    before = {name.removeprefix(prefix): tensor for name, tensor in state.shared.items() if name.startswith(prefix)}
    kept = state.streams[stream]
    ids = before["ids"]
    whole = replace(
        kept,
        hidden=before["hidden"].scatter(1, ids[..., None].expand_as(kept.hidden), kept.hidden),
        aligned={name: _whole(each, before[f"aligned.{name}"]) for name, each in kept.aligned.items()},
        token_ids=before.get("token_ids"),
        protected=before.get("protected"),
    )
    shared = {name: tensor for name, tensor in state.shared.items() if not name.startswith(prefix)}
    return BlockState({**state.streams, stream: whole}, shared)


def with_counts(batch: Batch) -> Batch:
    """The batch with `most_given` filled in, for who drops tokens and must not drop those. On a device this waits for it."""
    given = {name: stream.conditioned for name, stream in batch.streams.items()}
    return replace(batch, most_given={name: 0 if c is None else int(c.sum(dim=1).max()) for name, c in given.items()})


def _prefix(stream: str, depth: int) -> str:
    """Of the names in `BlockState.shared` under which selection `depth` (0: the outermost) of a stream keeps what waits."""
    return f"{stream}.unselected{depth}."


def _depth(state: BlockState, stream: str) -> int:
    """How many selections of a stream are not yet undone."""
    depth = 0
    while _prefix(stream, depth) + "ids" in state.shared:
        depth += 1
    return depth


def _waiting(whole: TokenStream, ids: Tensor, prefix: str) -> Mapping[str, Tensor]:
    """What `restore` needs, by its names in `BlockState.shared`."""
    kept = {"ids": ids, "hidden": whole.hidden, "token_ids": whole.token_ids, "protected": whole.protected}
    kept |= {f"aligned.{name}": each.tensor for name, each in whole.aligned.items()}
    return {prefix + name: tensor for name, tensor in kept.items() if tensor is not None}


def _aligned(whole: Aligned, ids: Tensor) -> Aligned:
    """Gathered along every token dimension whose size is not 1."""
    tensor, dims = whole.tensor, tuple(dim % whole.tensor.ndim for dim in whole.token_dims)
    wanted = [dim for dim in dims if tensor.shape[dim] != 1]
    if not wanted:
        return whole
    if not whole.batched:
        tensor, dims, wanted = tensor[None], tuple(dim + 1 for dim in dims), [dim + 1 for dim in wanted]
    for dim in wanted:
        tensor = _gathered(tensor, ids, dim)
    return Aligned(tensor, dims)


def _whole(kept: Aligned, before: Tensor) -> Aligned:
    """`before` with the dimensions that it had: a batch dimension that `_aligned` put in front is gone again."""
    added = kept.tensor.ndim - before.ndim
    return Aligned(before, tuple(dim - added for dim in kept.token_dims), batched=kept.batched and not added)


def _gathered(tensor: Tensor, ids: Tensor, dim: int) -> Tensor:
    """(B or 1, ..., S, ...) -> (B, ..., K, ...) with the tokens `ids` (B, K) along `dim`."""
    batch, count = ids.shape
    shape = [batch, *tensor.shape[1:]]
    whole = tensor.expand(shape)
    index = ids.view(batch, *(count if d == dim else 1 for d in range(1, tensor.ndim)))
    shape[dim] = count
    return whole.gather(dim, index.expand(shape))
