"""The transformer's forward pass before and after the blocks, `enter` and `exit`, over diffusers' own modules.

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
from collections.abc import Mapping, Sequence
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from tuner.interfaces.blocks import Aligned, BlockState, TokenStream
from tuner.interfaces.family import Batch, Noise, Prediction, StreamBatch
from tuner_ltxvideo2.attention import Rotary
from tuner_ltxvideo2.block import shifted
from tuner_ltxvideo2.geometry import Grid
from tuner_ltxvideo2.sides import SIDES, VIDEO, Side

TableKey = tuple[Grid, Grid | None, tuple[float, ...], str]


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


# --- after the blocks --------------------------------------------------------------------------------------------
def exit(model: nn.Module, state: BlockState) -> Prediction:
    """Velocity (B, S, C) of each stream, in the weights' dtype; of tokens that were given it means nothing."""
    return Prediction({side.name: _predict(model, side, state) for side in SIDES if side.name in state.streams})


def _predict(model: nn.Module, side: Side, state: BlockState) -> Tensor:
    stream = state.streams[side.name]
    shift, scale = (side.of(model, "scale_shift_table") + state.shared[f"{side.name}.time"][:, :, None]).unbind(dim=2)
    velocity: Tensor = side.of(model, "proj_out")(shifted(side.of(model, "norm_out")(stream.hidden), scale, shift, stream))
    return velocity
