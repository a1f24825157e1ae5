"""From the tiny family's records to batches.

Dimensions: B samples, C latent channels, F H W latent frames, rows, columns, S = F·H·W tokens, L audio tokens.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from tuner.errors import DataError
from tuner.interfaces.family import Batch, ClipShape, Noise, Sample, StreamBatch, StreamNoise
from tuner.testing.encoders import FRAME_STEP, SIZE_STEP, WORDS, audio_tokens
from tuner.testing.weights import CHANNELS

Grid = tuple[int, int, int]


def video_grid(frames: int, height: int, width: int) -> Grid:
    """Latent (F, H, W) of a clip in frames and pixels."""
    return ((frames - 1) // FRAME_STEP + 1, height // SIZE_STEP, width // SIZE_STEP)


def grids(frames: int, height: int, width: int, seconds: float, streams: Sequence[str]) -> dict[str, Grid]:
    """Of each stream."""
    every = {"video": video_grid(frames, height, width), "audio": (audio_tokens(seconds), 1, 1)}
    return {name: every[name] for name in streams}


def shape_of(grid: Grid) -> tuple[int, int]:
    """(tokens, channels)."""
    return grid[0] * grid[1] * grid[2], CHANNELS


def collate(samples: Sequence[Sample], streams: Sequence[str]) -> Batch:
    """Stacks the records of clips of one size; sound is padded to the longest, and absent where a clip has none."""
    if wrong := [sample for sample in samples if "video" not in sample.records]:
        raise DataError("is sound alone, and every clip needs a picture", where=wrong[0].key, remedy="leave it out of the dataset")
    latents = torch.stack([sample.records["video"].tensors["latents"] for sample in samples]).float()
    grid = (latents.shape[2], latents.shape[3], latents.shape[4])
    first = torch.arange(grid[0] * grid[1] * grid[2]) < grid[1] * grid[2]
    asked = torch.tensor([sample.first_frame for sample in samples])
    conditioned = asked[:, None] & first if asked.any() and grid[0] > 1 else None
    found = {"video": StreamBatch(latents.flatten(2).transpose(1, 2).contiguous(), grid, conditioned=conditioned)}
    if "audio" in streams and any("audio" in sample.records for sample in samples):
        found["audio"] = _sound(samples)
    text = torch.stack([sample.records["text"].tensors["video"] for sample in samples])
    return Batch(tuple(samples), found, {"video": text}, tuple(sample.frame_rate for sample in samples))


def _sound(samples: Sequence[Sample]) -> StreamBatch:
    records = [sample.records.get("audio") for sample in samples]
    length = max(len(record.tensors["mask"]) for record in records if record is not None)
    latents, mask = torch.zeros(len(samples), length, CHANNELS), torch.zeros(len(samples), length)
    for index, record in enumerate(records):
        if record is not None:
            own = len(record.tensors["mask"])
            latents[index, :own], mask[index, :own] = record.tensors["latents"], record.tensors["mask"]
    present = torch.tensor([record is not None for record in records])
    return StreamBatch(latents, (length, 1, 1), mask, None if present.all() else present)


def heard(sound: StreamBatch) -> Tensor | None:
    """(B, L) bool: tokens that are sound of the clip, not padding; None: all of them, or not known."""
    if sound.loss_mask is None:
        return None
    real = sound.loss_mask > 0
    return real if sound.present is None else real & sound.present[:, None]


def dummy_batch(
    shape: ClipShape, batch_size: int, streams: Sequence[str], dtype: torch.dtype, device: torch.device
) -> tuple[Batch, Noise]:
    """Random tokens in the shapes that `shape` gives; a still picture has no sound."""
    own = [name for name in streams if name == "video" or shape.frames > 1]
    found: dict[str, StreamBatch] = {}
    noises: dict[str, StreamNoise] = {}
    for name, grid in grids(shape.frames, shape.height, shape.width, shape.seconds, own).items():
        latents = torch.randn(batch_size, *shape_of(grid), device=device)
        mask = torch.ones(latents.shape[:2], device=device) if name == "audio" else None
        found[name] = StreamBatch(latents, grid, mask)
        noises[name] = StreamNoise(torch.full((batch_size,), 0.5, device=device), latents, latents, latents)
    sample = Sample("dummy", "dummy", 0, 0, shape.frame_rate, shape.frames, shape.height, shape.width, {}, seconds=shape.seconds)
    text: Mapping[str, Tensor] = {"video": torch.randn(batch_size, WORDS, CHANNELS, dtype=dtype, device=device)}
    return Batch((sample,) * batch_size, found, text, (shape.frame_rate,) * batch_size), Noise(noises)
