"""How clips and sounds become latents, and latents tokens.

Dimensions: C latent channels, F H W latent frames, rows, columns, S = F·H·W video tokens.
"""

from __future__ import annotations

from torch import Tensor

Grid = tuple[int, int, int]

CHANNELS = 128
"""Of a latent token of either stream."""
AUDIO_CHANNELS = CHANNELS
"""8 latent channels times 16 latent mel bins."""
AUDIO_LATENTS_PER_SECOND = 25.0
"""16,000 samples a second / hop 160 / 4."""
TEMPORAL_STEP = 8
"""Pixel frames of a latent frame; the first one holds a single frame."""
SPATIAL_STEP = 32
"""Pixels of a latent's side."""


def pack_video(latents: Tensor) -> Tensor:
    """(..., C, F, H, W) -> (..., S, C), tokens in the order f, h, w."""
    return latents.flatten(-3).transpose(-1, -2)


def unpack_video(tokens: Tensor, grid: Grid) -> Tensor:
    """Inverse of `pack_video`: (..., S, C) -> (..., C, F, H, W)."""
    swapped = tokens.transpose(-1, -2)
    return swapped.reshape(*swapped.shape[:-1], *grid)


def video_grid(frames: int, height: int, width: int) -> Grid:
    """Latent (F, H, W) of a clip in frames and pixels."""
    return ((frames - 1) // TEMPORAL_STEP + 1, height // SPATIAL_STEP, width // SPATIAL_STEP)


def audio_length(frames: int, frame_rate: float) -> int:
    """Audio latents that cover a clip."""
    return audio_latents(frames / frame_rate)


def audio_latents(seconds: float) -> int:
    """Audio latents that cover so many seconds: 25 a second, at least one."""
    return max(1, round(AUDIO_LATENTS_PER_SECOND * seconds))
