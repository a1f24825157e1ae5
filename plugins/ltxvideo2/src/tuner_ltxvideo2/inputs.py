"""From cached records to a batch: latents become tokens, missing sound becomes masked zeros, first frames may be given clean.

Dimensions: B samples, C latent channels, F H W latent frames, rows, columns, S = F·H·W video tokens, L audio tokens, T text tokens.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from tuner.data.randomness import uniform
from tuner.errors import DataError
from tuner.interfaces.family import Batch, ClipShape, Noise, Sample, StreamBatch, StreamNoise

CHANNELS = 128
"""Of a latent token of either stream."""
AUDIO_CHANNELS = CHANNELS
"""8 latent channels times 16 latent mel bins."""
AUDIO_LATENTS_PER_SECOND = 25.0
"""16,000 samples a second / hop 160 / 4."""
TEMPORAL_STEP = 8
SPATIAL_STEP = 32


# --- geometry ----------------------------------------------------------------------------------------------------
def pack_video(latents: Tensor) -> Tensor:
    """(..., C, F, H, W) -> (..., S, C), tokens in the order f, h, w."""
    return latents.flatten(-3).transpose(-1, -2)


def unpack_video(tokens: Tensor, grid: tuple[int, int, int]) -> Tensor:
    """Inverse of `pack_video`: (..., S, C) -> (..., C, F, H, W)."""
    swapped = tokens.transpose(-1, -2)
    return swapped.reshape(*swapped.shape[:-1], *grid)


def video_grid(frames: int, height: int, width: int) -> tuple[int, int, int]:
    """Latent (F, H, W) of a clip in frames and pixels."""
    return ((frames - 1) // TEMPORAL_STEP + 1, height // SPATIAL_STEP, width // SPATIAL_STEP)


def audio_length(frames: int, frame_rate: float) -> int:
    """Audio latents that cover a clip."""
    return audio_latents(frames / frame_rate)


def audio_latents(seconds: float) -> int:
    """Audio latents that cover so many seconds: 25 a second, at least one."""
    return max(1, round(AUDIO_LATENTS_PER_SECOND * seconds))


# --- the batch ---------------------------------------------------------------------------------------------------
def collate(samples: Sequence[Sample], streams: Sequence[str], *, seed: int = 0, i2v_probability: float = 0.0) -> Batch:
    """Stacks samples of one bucket on the CPU; latents in fp32, text as cached.

    Raises `DataError` for a sample without the record that a stream needs, or of another shape than the first.
    """
    parts: dict[str, StreamBatch] = {}
    if "video" in streams:
        parts["video"] = _video(samples, seed, i2v_probability)
    if "audio" in streams:
        parts["audio"] = _audio(samples, required="video" not in streams)
    text = {name: _stack([_tensor(sample, "text", name) for sample in samples], samples, f"text {name}") for name in parts}
    return Batch(tuple(samples), parts, text, tuple(sample.frame_rate for sample in samples))


def dummy_batch(
    shape: ClipShape, batch_size: int, text: Mapping[str, tuple[int, int]], dtype: torch.dtype, device: torch.device
) -> tuple[Batch, Noise]:
    """Random tokens of the streams in `text` (stream -> tokens and channels of a caption) in the shapes that `shape` gives."""
    grids = {"video": video_grid(shape.frames, shape.height, shape.width), "audio": (audio_latents(shape.seconds), 1, 1)}
    streams, noises, captions = {}, {}, {}
    for name, (tokens, width) in text.items():
        if name == "video" and not shape.frames:
            continue
        frames, height, columns = grids[name]
        latents = torch.randn(batch_size, frames * height * columns, CHANNELS, device=device)
        streams[name] = StreamBatch(latents, grids[name])
        noises[name] = StreamNoise(torch.full((batch_size,), 0.5, device=device), latents, latents, latents)
        captions[name] = torch.randn(batch_size, tokens, width, dtype=dtype, device=device)
    sample = Sample(
        "dummy", "dummy", 0, 0, shape.frame_rate, shape.frames, shape.height, shape.width, {}, seconds=shape.seconds
    )
    return Batch((sample,) * batch_size, streams, captions, (shape.frame_rate,) * batch_size), Noise(noises)


def _tensor(sample: Sample, record: str, name: str) -> Tensor:
    """One cached tensor of a sample."""
    held = sample.records.get(record)
    if held is None or name not in held.tensors:
        raise DataError(
            f"the cache holds no {record} record with {name!r} for this clip", where=sample.key,
            remedy="run `tuner cache` for this dataset",
        )
    return held.tensors[name]


def _stack(tensors: Sequence[Tensor], samples: Sequence[Sample], what: str) -> Tensor:
    """Stacks equally shaped tensors; names the first sample that differs."""
    for tensor, sample in zip(tensors, samples, strict=True):
        if tensor.shape != tensors[0].shape:
            raise DataError(
                f"{what} has another shape than that of {samples[0].key}, {tuple(tensors[0].shape)}, in the same batch",
                where=sample.key, value=tuple(tensor.shape), remedy="clips of one batch must share frames, height and width",
            )
    return torch.stack(list(tensors))


def _video(samples: Sequence[Sample], seed: int, i2v_probability: float) -> StreamBatch:
    latents = _stack([_tensor(sample, "video", "latents") for sample in samples], samples, "video latents").float()
    grid = (latents.shape[2], latents.shape[3], latents.shape[4])
    conditioned = first_frame_conditioning(samples, grid, seed, i2v_probability)
    mask = None if conditioned is None else (~conditioned).float()
    return StreamBatch(pack_video(latents).contiguous(), grid, loss_mask=mask, conditioned=conditioned)


def first_frame_conditioning(samples: Sequence[Sample], grid: tuple[int, int, int], seed: int, probability: float) -> Tensor | None:
    """(B, S) bool: the first frame's tokens of the samples that draw it; None when none does.

    One counter-based draw per sample. Single-frame samples never draw it: nothing would be left to learn.
    """
    frames, height, width = grid
    if frames == 1 or probability <= 0:
        return None
    drawn = torch.tensor([uniform(seed, "i2v", sample.epoch, sample.draw) < probability for sample in samples])
    if not drawn.any():
        return None
    first = torch.arange(frames * height * width) < height * width
    return drawn[:, None] & first[None]


def _audio(samples: Sequence[Sample], *, required: bool) -> StreamBatch:
    """Sound, padded at the end to the longest; a clip without sound is zeros that count nowhere.

    `required`: sound is all there is to learn, so that a clip without it is an error.
    """
    present = torch.tensor(["audio" in sample.records for sample in samples])
    if required and not present.all():
        index = present.tolist().index(False)
        raise DataError("this clip has no sound, and nothing but sound is trained", where=samples[index].key)
    lengths = [
        _tensor(sample, "audio", "latents").shape[0] if has else audio_length(sample.frames, sample.frame_rate)
        for sample, has in zip(samples, present.tolist(), strict=True)
    ]
    latents = torch.zeros(len(samples), max(lengths), AUDIO_CHANNELS)
    mask = torch.zeros(len(samples), max(lengths))
    for index, sample in enumerate(samples):
        if present[index]:
            latents[index, : lengths[index]] = _tensor(sample, "audio", "latents").float()
            mask[index, : lengths[index]] = _tensor(sample, "audio", "mask").float()
    return StreamBatch(latents, (max(lengths), 1, 1), loss_mask=mask, present=None if present.all() else present)
