"""One block of the transformer over diffusers' own modules, for the streams that are there.

Dimensions: B samples, S tokens of one stream, D channels of that stream, N modulation vectors, t timesteps (1, or 2 where tokens are given
clean: its own, then 0).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from tuner.interfaces.blocks import BlockState, TokenStream
from tuner.model.fused import gated, rms_modulated, rms_norm
from tuner.model.lanes import Lane, lane_for
from tuner_ltxvideo2.attention import Rotary, attend
from tuner_ltxvideo2.sides import AUDIO, SIDES, VIDEO, Side


def call_block(block: nn.Module, state: BlockState) -> BlockState:
    """One transformer block over the streams of `state`: self attention, text, the other stream, feed-forward. Pure.

    Sound has few tokens, so what it does alone may run beside what the picture does alone.
    """
    sides = [side for side in SIDES if side.name in state.streams]
    both = len(sides) == len(SIDES)
    hidden = {name: stream.hidden for name, stream in state.streams.items()}
    lane = lane_for(hidden[VIDEO.name]) if both else Lane()
    if both:
        lane.fork(*_read_by(state, AUDIO))
    vectors = {}
    for side in sides:
        with lane.beside(side is AUDIO):
            vectors[side.name] = _vectors(side.of(block, "scale_shift_table"), state, side, "modulation")
            hidden[side.name] = _attend_self(block, side, state.streams[side.name], hidden[side.name], vectors[side.name])
    for side in sides:
        with lane.beside(side is AUDIO):
            hidden[side.name] = _attend_text(block, side, state, hidden[side.name], vectors[side.name])
    if both:
        lane.join(hidden[AUDIO.name])
        hidden |= _attend_across(block, state, hidden)
        lane.fork(hidden[AUDIO.name])
    for side in sides:
        with lane.beside(side is AUDIO):
            hidden[side.name] = _feed_forward(block, side, state.streams[side.name], hidden[side.name], vectors[side.name])
    if both:
        lane.join(hidden[AUDIO.name])
    return state.with_hidden(hidden)


def _read_by(state: BlockState, side: Side) -> Iterator[Tensor]:
    """What a stream's own part of a block reads beside the block's weights."""
    stream = state.streams[side.name]
    yield stream.hidden
    yield from (aligned.tensor for aligned in stream.aligned.values())
    yield from (tensor for name, tensor in state.shared.items() if name.startswith(f"{side.name}."))


def _vectors(table: Tensor, state: BlockState, side: Side, name: str) -> tuple[Tensor, ...]:
    """N modulation vectors (B, t, D): the block's own table (N, D) plus the timestep's share."""
    embedded = state.shared[f"{side.name}.{name}"]
    return (table + embedded.reshape(*embedded.shape[:2], *table.shape)).unbind(dim=2)


def _spread(vector: Tensor, stream: TokenStream) -> Tensor:
    """(B, t, D) -> (B, 1 or S, D): tokens that are given clean take the vector of timestep 0."""
    clean = stream.aligned.get("clean")
    return vector if clean is None else torch.where(clean.tensor, vector[:, 1:], vector[:, :1])


def _modulate(norm: Any, tokens: Tensor, scale: Tensor, shift: Tensor, stream: TokenStream) -> Tensor:
    """norm(tokens) · (1 + scale) + shift."""
    if norm.weight is not None:
        return shifted(rms_norm(tokens, norm.eps, norm.weight), scale, shift, stream)
    clean = stream.aligned.get("clean")
    return rms_modulated(tokens, norm.eps, scale, shift, None if clean is None else clean.tensor)


def shifted(normed: Tensor, scale: Tensor, shift: Tensor, stream: TokenStream) -> Tensor:
    """normed · (1 + scale) + shift, of each token."""
    return normed * _spread(1 + scale, stream) + _spread(shift, stream)


def _rotary(stream: TokenStream, name: str) -> Rotary:
    return stream.aligned[f"{name}_cos"].tensor, stream.aligned[f"{name}_sin"].tensor


def _attend_self(block: nn.Module, side: Side, stream: TokenStream, hidden: Tensor, vectors: tuple[Tensor, ...]) -> Tensor:
    shift, scale, gate = vectors[:3]
    normed = _modulate(side.of(block, "norm1"), hidden, scale, shift, stream)
    attended = attend(side.of(block, "attn1"), normed, query_rotary=_rotary(stream, "rope"))
    return gated(hidden, attended, _spread(gate, stream))


def _attend_text(block: Any, side: Side, state: BlockState, hidden: Tensor, vectors: tuple[Tensor, ...]) -> Tensor:
    """Cross attention to the caption; with 9 vectors (2.3 on) queries, keys and result are modulated too."""
    text = state.shared[f"{side.name}.text"]
    norm = side.of(block, "norm2")
    if block.cross_attn_adaln:
        table = side.of(block, "prompt_scale_shift_table")
        prompt = state.shared.get(f"{side.name}.prompt")
        values = table[None, None].to(hidden.dtype) if prompt is None else table + prompt.reshape(*prompt.shape[:2], *table.shape)
        text_shift, text_scale = values.unbind(dim=2)
        text = text * (1 + text_scale) + text_shift
    if len(vectors) == 9:
        shift, scale, gate = vectors[6:]
        stream = state.streams[side.name]
        attended = attend(side.of(block, "attn2"), _modulate(norm, hidden, scale, shift, stream), text)
        return gated(hidden, attended, _spread(gate, stream))
    return hidden + attend(side.of(block, "attn2"), rms_norm(hidden, norm.eps, norm.weight), text)


def _attend_across(block: nn.Module, state: BlockState, hidden: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Both cross-modal attentions, each reading the tokens from before either. Tables are ordered (scale, shift), gate last."""
    norms = {side.name: getattr(block, side.cross_norm) for side in SIDES}
    vectors = {
        side.name: _vectors(getattr(block, side.cross_table)[:4], state, side, "cross_modulation") for side in SIDES
    }
    present = state.shared.get("cross_present")
    result: dict[str, Tensor] = {}
    for side, other, first in ((VIDEO, AUDIO, 0), (AUDIO, VIDEO, 2)):  # vectors 0 and 1: sound to picture; 2 and 3: picture to sound
        queries, keys = (
            _modulate(norms[name], hidden[name], vectors[name][first], vectors[name][first + 1], state.streams[name])
            for name in (side.name, other.name)
        )
        gate = getattr(block, side.cross_table)[4:] + state.shared[f"{side.name}.cross_gate"]
        attended = attend(
            getattr(block, side.cross_attention), queries, keys,
            _rotary(state.streams[side.name], "cross_rope"), _rotary(state.streams[other.name], "cross_rope"),
        )
        result[side.name] = gated(hidden[side.name], attended, gate if present is None else gate * present.to(gate.dtype))
    return result


def _feed_forward(block: nn.Module, side: Side, stream: TokenStream, hidden: Tensor, vectors: tuple[Tensor, ...]) -> Tensor:
    shift, scale, gate = vectors[3:6]
    normed = _modulate(side.of(block, "norm3"), hidden, scale, shift, stream)
    return gated(hidden, side.of(block, "ff")(normed), _spread(gate, stream))
