"""Which tokens of a sample are given clean: its beginning, its end, a part of the picture, or what its mask says.

Given tokens have timestep 0 and no loss; what is learned is what goes with them. Every choice is a function of (seed, epoch, draw): one
number picks the mode, so that the modes exclude each other. What the dataset asks for - a mask, or the first frame in every draw -
goes before chance. At least one token of a picture is always left to learn.

Dimensions: B samples, F H W latent frames, rows, columns, S = F·H·W video tokens, L audio tokens.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Literal, get_args

import torch
from torch import Tensor

from tuner.data.randomness import uniform
from tuner.errors import ConfigError, DataError
from tuner.interfaces.family import Sample
from tuner_ltxvideo2.geometry import AUDIO_LATENTS_PER_SECOND, TEMPORAL_STEP, Grid
from tuner_ltxvideo2.options import LTX2Options

SMALLEST, LARGEST = 1 / 4, 3 / 4
"""Of each side of the picture: what a given rectangle takes."""

Mode = Literal["i2v", "prefix", "suffix", "crop"]


@dataclass(frozen=True)
class Conditioning:
    """How often which tokens are given, and how many. Latent frames, not pixel frames."""

    i2v: float = 0.0
    prefix: float = 0.0
    suffix: float = 0.0
    crop: float = 0.0
    prefix_frames: int = 1
    suffix_frames: int = 1

    @staticmethod
    def of(options: LTX2Options) -> Conditioning:
        """Raises `ConfigError` for probabilities that exceed 1 together, and where the picture is given anyway."""
        keys = [f"{mode}_conditioning_probability" for mode in get_args(Mode)]
        asked = {key: chance for key in keys if (chance := float(getattr(options, key))) > 0}
        if sum(asked.values()) > 1 + 1e-9:
            raise ConfigError(
                "together they are more than 1, and a draw has one of them", where=", ".join(asked), value=round(sum(asked.values()), 6),
                remedy="lower them; what is missing to 1 is trained without",
            )  # fmt: skip
        if asked and options.given_stream == "video":
            raise ConfigError(
                "the whole picture is given already", where=", ".join(asked), value="given_stream: video", remedy="set them to 0"
            )
        return Conditioning(
            options.i2v_conditioning_probability, options.prefix_conditioning_probability, options.suffix_conditioning_probability,
            options.crop_conditioning_probability, prefix_frames=prefix_latents(options.prefix_conditioning_frames),
            suffix_frames=options.suffix_conditioning_frames // TEMPORAL_STEP,
        )  # fmt: skip

    def mode(self, sample: Sample, seed: int, frames: int) -> Mode | None:
        """What this draw of `sample`, of so many latent frames, is given; None: nothing.

        A single frame has no beginning and no end: those draws give nothing.
        """
        if sample.kind == "audio":
            return None
        if sample.first_frame:
            return "i2v" if frames > 1 else None
        number = uniform(seed, "conditioning", sample.epoch, sample.draw)
        limits = accumulate((self.i2v, self.prefix, self.suffix, self.crop))
        chosen: Mode | None = next((mode for mode, limit in zip(get_args(Mode), limits, strict=True) if number < limit), None)
        return chosen if frames > 1 or chosen == "crop" else None

    def beginning(self, frames: int) -> int:
        """Latent frames of the given beginning of a clip of `frames`."""
        return min(self.prefix_frames, frames - 1)

    def end(self, frames: int) -> int:
        """Latent frames of the given end of a clip of `frames`."""
        return min(self.suffix_frames, frames - 1)


def prefix_latents(frames: int) -> int:
    """Latent frames that hold at most the first `frames` pixel frames."""
    return (frames - 1) // TEMPORAL_STEP + 1


def notices(options: LTX2Options) -> list[str]:
    """Lengths that no number of latent frames has."""
    changed = []
    asked = options.prefix_conditioning_frames
    got = 1 + (prefix_latents(asked) - 1) * TEMPORAL_STEP
    if options.prefix_conditioning_probability > 0 and got != asked:
        changed.append(f"prefix_conditioning_frames: {asked} -> {got} (valid counts are 1 + k·{TEMPORAL_STEP})")
    asked = options.suffix_conditioning_frames
    got = asked // TEMPORAL_STEP * TEMPORAL_STEP
    if options.suffix_conditioning_probability > 0 and got != asked:
        changed.append(f"suffix_conditioning_frames: {asked} -> {got} (valid counts are k·{TEMPORAL_STEP})")
    return changed


# --- the picture -------------------------------------------------------------------------------------------------
def given_video(samples: Sequence[Sample], grid: Grid, rules: Conditioning, seed: int) -> Tensor | None:
    """(B, S) bool: the picture's tokens that are given; None when no sample of the batch has any.

    Raises `DataError` for a mask of another shape, or that leaves nothing to learn.
    """
    rows = [_of_picture(sample, grid, rules, seed) for sample in samples]
    if all(row is None for row in rows):
        return None
    return torch.stack([torch.zeros(math.prod(grid), dtype=torch.bool) if row is None else row.flatten() for row in rows])


def _of_picture(sample: Sample, grid: Grid, rules: Conditioning, seed: int) -> Tensor | None:
    """(F, H, W) bool for one sample."""
    mask = sample.records.get("mask")
    if mask is not None:
        return _masked(sample, mask.tensors["mask"], grid)
    mode = rules.mode(sample, seed, grid[0])
    if mode is None:
        return None
    given = torch.zeros(grid, dtype=torch.bool)
    match mode:
        case "i2v":
            given[0] = True
        case "prefix":
            given[: rules.beginning(grid[0])] = True
        case "suffix":
            given[grid[0] - rules.end(grid[0]) :] = True
        case "crop":
            top, height = _span(sample, seed, "rows", grid[1])
            left, width = _span(sample, seed, "columns", grid[2])
            given[:, top : top + height, left : left + width] = True
    return given if mode != "crop" or not given.all() else None  # a picture of one token has no part


def _masked(sample: Sample, mask: Tensor, grid: Grid) -> Tensor:
    """Black is given, white is learned; also the first frame where the dataset asks for it."""
    if tuple(mask.shape) != grid:
        raise DataError("its mask is of another shape than its latents", where=sample.key, value=tuple(mask.shape), remedy=f"not {grid}")
    given = mask <= 0.5
    if sample.first_frame and grid[0] > 1:
        given[0] = True
    if given.all():
        raise DataError("its mask leaves nothing to learn", where=sample.key, remedy="white is learned: paint some, or remove the clip")
    return given


def _span(sample: Sample, seed: int, side: str, count: int) -> tuple[int, int]:
    """Begin and length of a random span: between a quarter and three quarters of `count` places, at least one."""
    least = max(1, math.ceil(SMALLEST * count))
    most = max(least, math.floor(LARGEST * count))
    length = least + int(uniform(seed, f"crop/{side}/length", sample.epoch, sample.draw) * (most - least + 1))
    return int(uniform(seed, f"crop/{side}/begin", sample.epoch, sample.draw) * (count - length + 1)), length


# --- the sound ---------------------------------------------------------------------------------------------------
def given_audio(samples: Sequence[Sample], frames: int, length: int, rules: Conditioning, seed: int) -> Tensor | None:
    """(B, L) bool: the sound to a given beginning or end of the picture, of `frames` latent frames; None when no sample has any.

    A token of sound is given where all of its 40 ms are inside the span. A clip whose picture follows a mask keeps all its sound to learn.
    """
    given = torch.zeros(len(samples), length, dtype=torch.bool)
    for row, sample in zip(given, samples, strict=True):
        mode = None if "mask" in sample.records or "audio" not in sample.records else rules.mode(sample, seed, frames)
        if mode == "prefix":
            seconds = (1 + (rules.beginning(frames) - 1) * TEMPORAL_STEP) / sample.frame_rate
            row[: min(math.floor(AUDIO_LATENTS_PER_SECOND * seconds + 1e-6), length - 1)] = True
        elif mode == "suffix":
            seconds = (1 + (frames - 1 - rules.end(frames)) * TEMPORAL_STEP) / sample.frame_rate
            row[max(math.ceil(AUDIO_LATENTS_PER_SECOND * seconds - 1e-6), 1) :] = True
    return given if given.any() else None
