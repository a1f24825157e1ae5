"""From cached records to a batch: latents become tokens, what is missing is masked, what is given is marked.

Special here: a stream that no sample of a batch has is left out, so that pictures and silent clips cost nothing for sound, and sound
alone nothing for pictures. The tokens of a reference clip stand behind the picture's own.

Dimensions: B samples, C latent channels, F H W latent frames, rows, columns, S = F·H·W video tokens, R reference tokens, L audio tokens,
T text tokens.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor

from tuner.errors import DataError
from tuner.interfaces.family import Batch, ClipShape, Noise, Sample, StreamBatch, StreamNoise
from tuner_ltxvideo2.conditioning import Conditioning, given_audio, given_video
from tuner_ltxvideo2.geometry import AUDIO_CHANNELS, CHANNELS, audio_latents, pack_video, video_grid

NOTHING = Conditioning()
"""Only what the dataset asks for is given."""


# --- the batch ---------------------------------------------------------------------------------------------------
def collate(
    samples: Sequence[Sample], streams: Sequence[str], *, seed: int = 0, rules: Conditioning = NOTHING, given: str = "none"
) -> Batch:
    """Stacks samples of one bucket on the CPU; latents in fp32, text as cached. `given`: the stream that is not learned but given clean.

    Raises `DataError` for a sample without the record that a stream needs or of another shape than the first, and where nothing is left
    to learn.
    """
    names = batch_streams(samples, streams, given)
    parts: dict[str, StreamBatch] = {}
    if "video" in names:
        parts["video"] = _video(samples, None if given == "video" else rules, seed)
    if "audio" in names:
        frames = parts["video"].grid[0] if "video" in parts else 0
        parts["audio"] = _audio(samples, frames, NOTHING if given == "audio" else rules, seed)
    if given in parts:
        parts[given] = replace(parts[given], clean=True, loss_mask=None)
    text = {name: _stack([_tensor(sample, "text", name) for sample in samples], samples, f"text {name}") for name in names}
    return Batch(tuple(samples), parts, text, tuple(sample.frame_rate for sample in samples))


def batch_streams(samples: Sequence[Sample], streams: Sequence[str], given: str = "none") -> tuple[str, ...]:
    """Those of `streams` that any sample has. Raises `DataError` for a sample without the only stream that is learned."""
    learned = [name for name in streams if name != given]
    for sample in samples if len(learned) == 1 else ():
        if not has(sample, learned[0]):
            what = {"video": "sound alone", "audio": "a clip without sound"}[learned[0]]
            raise DataError(
                f"is {what}, and nothing but {learned[0]} is learned", where=sample.key, remedy="leave it out of the dataset"
            )
    return tuple(name for name in streams if any(has(sample, name) for sample in samples))


def has(sample: Sample, stream: str) -> bool:
    """Whether a sample has a stream at all."""
    return sample.kind != "audio" if stream == "video" else "audio" in sample.records


def dummy_batch(
    shape: ClipShape, batch_size: int, text: Mapping[str, tuple[int, int]], dtype: torch.dtype, device: torch.device, given: str = "none"
) -> tuple[Batch, Noise]:
    """Random tokens of the streams in `text` (stream -> tokens and channels of a caption) in the shapes that `shape` gives.

    Sound alone has no frames; a still picture has one and no sound.
    """
    kind: Literal["video", "image", "audio"] = "audio" if shape.frames == 0 else "image" if shape.frames == 1 else "video"
    missing = {"audio": "video", "image": "audio", "video": ""}[kind]
    grids = {"video": video_grid(shape.frames, shape.height, shape.width), "audio": (audio_latents(shape.seconds), 1, 1)}
    streams, noises, captions = {}, {}, {}
    for name, (tokens, width) in text.items():
        if name == missing:
            continue
        frames, height, columns = grids[name]
        latents = torch.randn(batch_size, frames * height * columns, CHANNELS, device=device)
        streams[name] = StreamBatch(latents, grids[name], clean=name == given)
        level = 0.0 if name == given else 0.5
        noises[name] = StreamNoise(torch.full((batch_size,), level, device=device), latents, latents, latents)
        captions[name] = torch.randn(batch_size, tokens, width, dtype=dtype, device=device)
    sample = Sample(
        "dummy", "dummy", 0, 0, shape.frame_rate, shape.frames, shape.height, shape.width, {}, kind=kind, seconds=shape.seconds
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


# --- the picture -------------------------------------------------------------------------------------------------
def _video(samples: Sequence[Sample], rules: Conditioning | None, seed: int) -> StreamBatch:
    """`rules` None: the picture is given whole, and no reference is needed for it."""
    latents, grid = _pictures(samples, "video")
    if rules is None:
        return StreamBatch(latents, grid)
    conditioned = given_video(samples, grid, rules, seed)
    if not any("reference" in sample.records for sample in samples):
        return StreamBatch(latents, grid, conditioned=conditioned)
    extra, extra_grid = _pictures(samples, "reference")
    own = torch.zeros(latents.shape[:2], dtype=torch.bool) if conditioned is None else conditioned
    conditioned = torch.cat([own, torch.ones(extra.shape[:2], dtype=torch.bool)], dim=1)
    return StreamBatch(torch.cat([latents, extra], dim=1), grid, conditioned=conditioned, extra_grid=extra_grid)


def _pictures(samples: Sequence[Sample], record: str) -> tuple[Tensor, tuple[int, int, int]]:
    """(B, S, C) fp32 tokens of the record's latents, and their grid."""
    latents = _stack([_tensor(sample, record, "latents") for sample in samples], samples, f"{record} latents").float()
    return pack_video(latents).contiguous(), (latents.shape[2], latents.shape[3], latents.shape[4])


# --- the sound ---------------------------------------------------------------------------------------------------
def _audio(samples: Sequence[Sample], frames: int, rules: Conditioning, seed: int) -> StreamBatch:
    """Sound, padded at the end to the longest; a clip without sound is zeros that count nowhere.

    `frames`: latent frames of the picture beside it, whose given beginning or end takes its sound along; 0: sound alone.
    """
    present = torch.tensor([has(sample, "audio") for sample in samples])
    lengths = [_tensor(sample, "audio", "latents").shape[0] if has(sample, "audio") else _silent_length(sample) for sample in samples]
    latents = torch.zeros(len(samples), max(lengths), AUDIO_CHANNELS)
    mask = torch.zeros(len(samples), max(lengths))
    for index, sample in enumerate(samples):
        if present[index]:
            latents[index, : lengths[index]] = _tensor(sample, "audio", "latents").float()
            mask[index, : lengths[index]] = _tensor(sample, "audio", "mask").float()
    conditioned = given_audio(samples, frames, max(lengths), rules, seed) if frames else None
    return StreamBatch(latents, (max(lengths), 1, 1), mask, None if present.all() else present, conditioned)


def _silent_length(sample: Sample) -> int:
    """Audio tokens to the picture of a clip without sound."""
    return audio_latents(sample.seconds or sample.frames / sample.frame_rate)
