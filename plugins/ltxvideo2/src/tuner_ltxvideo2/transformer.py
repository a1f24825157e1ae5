"""The transformer's forward pass in three parts, over diffusers' own modules: `enter`, `call_block`, `exit`.

Special here: a stream that is not in the state is neither computed nor needed in memory, so training on video alone or on sound
alone runs the same code over a model whose other modules were deleted. The modulation of the cross-modal attention follows the
model's makers: scale and shift from a stream's own timestep (0 for tokens that are given clean), the gate from the other stream's
sigma. diffusers' `forward` offers only one of the two for both. A sample has two timesteps at most, its own and 0, so modulation is
computed for these and spread over the tokens where it is used: no (B, S, N·D) tensor exists, 300 MB a sample at 6,144 tokens.

Dimensions: B samples, S tokens of one stream, D channels of that stream, C latent channels, T text tokens, N modulation vectors,
t timesteps (1, or 2 where tokens are given clean: its own, then 0), H attention heads, r half the channels of a head.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from tuner.interfaces.blocks import Aligned, BlockState, TokenStream
from tuner.interfaces.family import Batch, Noise, Prediction, StreamBatch
from tuner.model.fused import gated, rms_modulated, rms_norm
from tuner.model.lanes import Lane, lane_for
from tuner_ltxvideo2.attention import Rotary, attend
from tuner_ltxvideo2.geometry import Grid

TableKey = tuple[Grid, Grid | None, tuple[float, ...], str]


@dataclass(frozen=True)
class Side:
    """The names under which one stream's modules are found. `prefix` is put before the names that both streams have."""

    name: str
    prefix: str
    cross_attention: str
    """The attention whose queries are this stream and whose keys are the other."""
    cross_norm: str
    cross_table: str
    cross_embedding: str
    cross_gate: str
    cross_rope: str

    def of(self, module: nn.Module, name: str) -> Any:
        """This stream's `name` in `module`: a submodule or parameter."""
        return getattr(module, self.prefix + name)


VIDEO = Side(
    name="video", prefix="",
    cross_attention="audio_to_video_attn", cross_norm="audio_to_video_norm", cross_table="video_a2v_cross_attn_scale_shift_table",
    cross_embedding="av_cross_attn_video_scale_shift", cross_gate="av_cross_attn_video_a2v_gate", cross_rope="cross_attn_rope",
)
AUDIO = Side(
    name="audio", prefix="audio_",
    cross_attention="video_to_audio_attn", cross_norm="video_to_audio_norm", cross_table="audio_a2v_cross_attn_scale_shift_table",
    cross_embedding="av_cross_attn_audio_scale_shift", cross_gate="av_cross_attn_audio_v2a_gate", cross_rope="cross_attn_audio_rope",
)
SIDES = (VIDEO, AUDIO)
BLOCKS = "transformer_blocks"

_CROSS_PREFIXES = ("av_cross_attn_", "cross_attn_", "audio_to_video_", "video_to_audio_", "video_a2v_", "audio_a2v_")


# --- which weights a stream needs --------------------------------------------------------------------------------
def streams_of(name: str) -> frozenset[str]:
    """The streams that all have to be there for the parameter or module `name` to be used: one, or both for cross-modal ones."""
    segments = name.split(".")
    head = segments[2] if segments[0] == BLOCKS and len(segments) > 2 else segments[0]
    if head.startswith(_CROSS_PREFIXES):
        return frozenset({VIDEO.name, AUDIO.name})
    return frozenset({AUDIO.name if head.startswith(AUDIO.prefix) else VIDEO.name})


def skip_for(streams: Sequence[str]) -> Callable[[str], bool]:
    """The predicate for loading: whether a parameter is of no use when only `streams` run."""
    present = frozenset(streams)
    return lambda name: not streams_of(name) <= present


def drop_unused(model: nn.Module, streams: Sequence[str]) -> None:
    """Deletes, in place, every module and parameter that `streams` do not need."""
    skip = skip_for(streams)
    blocks = [(f"{BLOCKS}.{i}.", block) for i, block in enumerate(transformer_blocks(model))]
    for prefix, owner in [("", model), *blocks]:
        children = [name for name, _ in owner.named_children() if name != BLOCKS]
        for name in children + [name for name, _ in owner.named_parameters(recurse=False)]:
            if skip(prefix + name):
                delattr(owner, name)


def drop_audio(model: nn.Module) -> None:
    """Deletes the audio branch and the cross-modal attentions: what training on video alone never touches."""
    drop_unused(model, (VIDEO.name,))


def drop_video(model: nn.Module) -> None:
    """Deletes the video branch and the cross-modal attentions: what training on sound alone never touches."""
    drop_unused(model, (AUDIO.name,))


def transformer_blocks(model: nn.Module) -> list[nn.Module]:
    """The blocks, in order."""
    blocks = getattr(model, BLOCKS)
    return list(blocks)


def widths(model: nn.Module) -> dict[str, int]:
    """Stream -> channels of its tokens, of those that the model was loaded for."""
    return {side.name: int(side.of(model, "proj_in").out_features) for side in SIDES if hasattr(model, side.prefix + "proj_in")}


def text_widths(model: Any, streams: Sequence[str]) -> dict[str, int]:
    """Stream -> channels of the encoded captions that it takes."""
    if model.config.use_prompt_embeddings:
        return dict.fromkeys(streams, int(model.config.caption_channels))
    block = transformer_blocks(model)[0]
    return {side.name: int(side.of(block, "attn2").to_k.in_features) for side in SIDES if side.name in streams}


# --- positions ---------------------------------------------------------------------------------------------------
class RotaryTables:
    """Rotary tables (cos, sin), fp32, built once per rotary module, grids, frame rates and device.

    Holds the `capacity` most recently used tables of each module, and further ones while all of it take at most `spare` bytes: at 6,144
    tokens one of video takes 100 MB. Building one brings numbers from the host, which a step that is being captured must not do.
    """

    def __init__(self, capacity: int = 2, spare: int = 128 * 2**20) -> None:
        self.capacity = capacity
        self.spare = spare
        self._tables: WeakKeyDictionary[nn.Module, OrderedDict[TableKey, Rotary]] = WeakKeyDictionary()

    def for_batch(
        self, model: nn.Module, side: Side, given: StreamBatch, frame_rates: Sequence[float], device: torch.device, *, cross: bool
    ) -> Rotary:
        """Tables for one stream, one sample each: (B, H, S, r) split or (B, S, D) interleaved. `cross`: of the cross-modal attention."""
        rates = tuple(frame_rates) if side is VIDEO else (0.0,) * len(frame_rates)  # sound has its own clock
        alike = len(set(rates)) == 1
        cos, sin = self._held(model, side, (given.grid, given.extra_grid, rates[:1] if alike else rates, str(device)), cross)
        if alike:  # a view for all samples: diffusers' processor wants a full batch dimension
            return cos.expand(len(rates), *cos.shape[1:]), sin.expand(len(rates), *sin.shape[1:])
        return cos, sin

    def _held(self, model: nn.Module, side: Side, key: TableKey, cross: bool) -> Rotary:
        positions = side.of(model, "rope")
        rope = getattr(model, side.cross_rope) if cross else positions
        kept = self._tables.setdefault(rope, OrderedDict())
        if key not in kept:
            kept[key] = self._made(positions, rope, side, key, cross)
            while len(kept) > self.capacity and sum(cos.nbytes + sin.nbytes for cos, sin in kept.values()) > self.spare:
                kept.popitem(last=False)
        kept.move_to_end(key)
        return kept[key]

    @staticmethod
    @torch.no_grad()
    def _made(positions: nn.Module, rope: nn.Module, side: Side, key: TableKey, cross: bool) -> Rotary:
        """One for each of the key's rates. Put together here, not in every step: who replays a step holds on to what it is given."""
        grid, extra, rates, device = key
        each = []
        for rate in rates:
            coordinates = token_coordinates(positions, side, grid, extra, rate, device)
            # across modalities only time has meaning
            each.append(rope(coordinates[:, :1] if cross else coordinates, device=coordinates.device))
        return each[0] if len(each) == 1 else (torch.cat([cos for cos, _ in each]), torch.cat([sin for _, sin in each]))


def token_coordinates(rope: Any, side: Side, grid: Grid, extra: Grid | None, rate: float, device: torch.device | str) -> Tensor:
    """Bounds of each token, (1, 3 or 1, S, 2) fp32: seconds, and pixels for video. `extra`: the grid of a reference clip behind it.

    A reference covers the same picture however small it is: its rows and columns are stretched to the picture's own.
    """
    if side is not VIDEO:
        sound: Tensor = rope.prepare_audio_coords(1, grid[0], torch.device(device))
        return sound
    coordinates: Tensor = rope.prepare_video_coords(1, *grid, torch.device(device), fps=rate)
    if extra is None:
        return coordinates
    reference: Tensor = rope.prepare_video_coords(1, *extra, torch.device(device), fps=rate)
    for axis in (1, 2):
        reference[:, axis] *= grid[axis] / extra[axis]
    return torch.cat([coordinates, reference], dim=2)


# --- before the blocks -------------------------------------------------------------------------------------------
def enter(model: nn.Module, batch: Batch, noise: Noise, tables: RotaryTables) -> BlockState:
    """Embeds tokens, positions, timesteps and text of the streams that `batch` has.

    Weights may be of any floating dtype; timesteps and positions stay fp32 up to their embedding. No mask reaches the attention:
    text padding was replaced by learned registers, and padded sound leaves the loss only.
    """
    sides = [side for side in SIDES if side.name in batch.streams]
    sigmas = {side.name: _sigma(batch.streams[side.name], noise.streams[side.name].sigma) for side in sides}
    cross = len(sides) == len(SIDES)
    streams: dict[str, TokenStream] = {}
    shared: dict[str, Tensor] = {}
    for side in sides:
        given = batch.streams[side.name]
        tokens = given.latents if given.clean else noise.streams[side.name].noisy
        dtype = side.of(model, "time_embed").linear.weight.dtype
        hidden = side.of(model, "proj_in")(tokens.to(dtype))
        if side is VIDEO and hasattr(model, "keyframes_abs_pos_embedding"):
            hidden = _mark_first_frame(model, hidden, given.grid)
        aligned = _placed(model, side, given, batch.frame_rate, tokens.device, tables, cross)
        conditioned = None if given.clean or given.conditioned is None else given.conditioned.to(tokens.device)
        if conditioned is not None:
            aligned["clean"] = Aligned(conditioned[..., None], (1,))
        protected = torch.ones(tokens.shape[:2], dtype=torch.bool, device=tokens.device) if given.clean else conditioned
        streams[side.name] = TokenStream(hidden, aligned, given.grid, protected=protected, extra_tokens=given.extra_tokens)
        shared |= _timed(model, side, sigmas[side.name], conditioned is not None, dtype, cross)
        shared |= _per_sample(model, side, batch.text[side.name].to(tokens.device, dtype), sigmas, dtype)
    if cross and (present := _both_present(batch.streams)) is not None:
        shared["cross_present"] = present.to(streams[VIDEO.name].hidden.device)[:, None, None]
    return BlockState(streams, shared)


def _mark_first_frame(model: Any, hidden: Tensor, grid: Grid) -> Tensor:
    """Adds 2.5's mark to the tokens that stand for one picture instead of eight: the first latent frame's, whatever is trained.

    The reference implementation does so in every pass; diffusers leaves the mask to its caller.
    """
    marked = grid[1] * grid[2]
    mark = model.keyframes_abs_pos_embedding.to(hidden.dtype)
    return torch.cat([hidden[:, :marked] + mark, hidden[:, marked:]], dim=1)


def _sigma(given: StreamBatch, sigma: Tensor) -> Tensor:
    """(B,) fp32; 0 for a stream that is given whole."""
    return torch.zeros_like(sigma, dtype=torch.float32) if given.clean else sigma.float()


def _timestep(model: Any, sigma: Tensor) -> Tensor:
    """sigma on the scale that the embedding was trained with, fp32: bf16 would round 873.2 to 872."""
    timestep: Tensor = sigma * float(model.config.timestep_scale_multiplier)
    return timestep


def _timed(model: nn.Module, side: Side, sigma: Tensor, both: bool, dtype: torch.dtype, cross: bool) -> dict[str, Tensor]:
    """Modulation from a stream's own timestep, (B, t, N·D), and the embedded timestep, (B, t, D). `both`: timestep 0 as well."""
    timestep = _timestep(model, sigma)
    values, time = _embed_timestep(side.of(model, "time_embed"), timestep, dtype, both)
    shared = {f"{side.name}.modulation": values, f"{side.name}.time": time}
    if cross:
        shared[f"{side.name}.cross_modulation"], _ = _embed_timestep(getattr(model, side.cross_embedding), timestep, dtype, both)
    return shared


def _embed_timestep(embedding: nn.Module, timestep: Tensor, dtype: torch.dtype, both: bool = False) -> tuple[Tensor, Tensor]:
    """Modulation vectors (B, t, N·D) and embedded timestep (B, t, D)."""
    count = timestep.shape[0]
    given = (timestep, torch.zeros_like(timestep)) if both else (timestep,)
    # One call each, so that a sample's values do not depend on whether another token is given clean.
    parts = [embedding(each, batch_size=count, hidden_dtype=dtype) for each in given]
    return torch.stack([values for values, _ in parts], dim=1), torch.stack([embedded for _, embedded in parts], dim=1)


def _placed(
    model: nn.Module, side: Side, given: StreamBatch, rates: Sequence[float], device: torch.device, tables: RotaryTables, cross: bool
) -> dict[str, Aligned]:
    """Rotary tables with their token dimension."""
    aligned: dict[str, Aligned] = {}
    for name, is_cross in (("rope", False), ("cross_rope", True)) if cross else (("rope", False),):
        for part, table in zip(("cos", "sin"), tables.for_batch(model, side, given, rates, device, cross=is_cross), strict=True):
            aligned[f"{name}_{part}"] = Aligned(table, (2,) if table.ndim == 4 else (1,))
    return aligned


def _per_sample(model: Any, side: Side, text: Tensor, sigmas: Mapping[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    """Text (B, T, D), the prompt's modulation (B, 1, 2·D) and the cross-modal gate (B, 1, D): one for all tokens of a sample."""
    shared: dict[str, Tensor] = {}
    shared[f"{side.name}.text"] = side.of(model, "caption_projection")(text) if model.config.use_prompt_embeddings else text
    if hasattr(model, side.prefix + "prompt_adaln"):  # driven by the stream's sigma, never by a conditioned token's 0
        prompt, _ = _embed_timestep(side.of(model, "prompt_adaln"), _timestep(model, sigmas[side.name]), dtype)
        shared[f"{side.name}.prompt"] = prompt
    others = [sigma for name, sigma in sigmas.items() if name != side.name]
    if others:
        config = model.config
        factor = float(config.cross_attn_timestep_scale_multiplier) / float(config.timestep_scale_multiplier)
        gate, _ = _embed_timestep(getattr(model, side.cross_gate), _timestep(model, others[0]) * factor, dtype)
        shared[f"{side.name}.cross_gate"] = gate
    return shared


def _both_present(streams: Mapping[str, StreamBatch]) -> Tensor | None:
    """(B,) bool: samples that have both streams; None when all have. Nothing flows to or from a stand-in for a missing stream."""
    masks = [given.present for given in streams.values() if given.present is not None]
    if not masks:
        return None
    return torch.stack(masks).all(dim=0)


# --- one block ---------------------------------------------------------------------------------------------------
def call_block(block: nn.Module, state: BlockState) -> BlockState:
    """One transformer block over the streams of `state`: self attention, text, the other stream, feed-forward. Pure.

    Sound has few tokens, so what it does alone may run beside what the picture does alone.
    """
    sides = [side for side in SIDES if side.name in state.streams]
    both = len(sides) == len(SIDES)
    hidden = {name: stream.hidden for name, stream in state.streams.items()}
    lane = lane_for(hidden[VIDEO.name]) if both else Lane()
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
    if side.name in state.streams:
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
        return _shifted(rms_norm(tokens, norm.eps, norm.weight), scale, shift, stream)
    clean = stream.aligned.get("clean")
    return rms_modulated(tokens, norm.eps, scale, shift, None if clean is None else clean.tensor)


def _shifted(normed: Tensor, scale: Tensor, shift: Tensor, stream: TokenStream) -> Tensor:
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


# --- after the blocks --------------------------------------------------------------------------------------------
def exit(model: nn.Module, state: BlockState) -> Prediction:
    """Velocity (B, S, C) of each stream, in the weights' dtype; of tokens that were given it means nothing."""
    return Prediction({side.name: _predict(model, side, state) for side in SIDES if side.name in state.streams})


def _predict(model: nn.Module, side: Side, state: BlockState) -> Tensor:
    stream = state.streams[side.name]
    shift, scale = (side.of(model, "scale_shift_table") + state.shared[f"{side.name}.time"][:, :, None]).unbind(dim=2)
    velocity: Tensor = side.of(model, "proj_out")(_shifted(side.of(model, "norm_out")(stream.hidden), scale, shift, stream))
    return velocity
