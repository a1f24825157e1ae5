"""The tiny family's encoders and decoders: arithmetic that can be followed by hand, and undone.

Dimensions: F frames, H W rows and columns in pixels; latents k + 1 frames of h x w tokens; L audio tokens; T words; C = 6 channels.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import ClassVar, Literal

import torch
from torch import Tensor

from tuner.errors import DataError
from tuner.interfaces.encoders import AudioClip, LatentEncoder, Record, Source, VideoClip
from tuner.interfaces.services import WeightSource
from tuner.testing.weights import BYTES, CHANNELS, FAMILY, TEXT_PART

FRAME_STEP, SIZE_STEP = 4, 16
"""Frames of a latent frame but the first, which holds one; pixels of a token's side."""
SAMPLE_RATE, SLICE = 8000, 50
"""Hz; samples of one channel of an audio token: six of them are 37.5 ms."""
PITCH = 440.0
"""Of the tone that decoded loudness is heard as, in Hz."""
WORDS = 8
"""Tokens of a caption."""


def audio_tokens(seconds: float) -> int:
    """How many tokens cover so much sound, at least one."""
    return max(1, math.ceil(round(seconds * SAMPLE_RATE) / (SLICE * CHANNELS)))


class TinyVideo(LatentEncoder):
    """Clips -> {"latents": (C, k + 1, h, w)}: of each token the mean colour of its upper half, then of its lower half, in [-1, 1]."""

    name: ClassVar[str] = "video"
    reads: ClassVar[Literal["video", "audio", "text"]] = "video"

    def settings(self) -> Mapping[str, str | int | float | bool]:
        return {"family": FAMILY, "version": 1}

    def load(self, device: torch.device) -> None:
        """There are no weights."""

    def unload(self) -> None:
        """There are no weights."""

    def encode(self, sources: Sequence[Source]) -> list[Record]:
        return [Record({"latents": self._latents(source)}) for source in sources if isinstance(source, VideoClip)]

    def _latents(self, clip: VideoClip) -> Tensor:
        frames, height, width, _ = clip.frames.shape
        if (frames - 1) % FRAME_STEP or height % SIZE_STEP or width % SIZE_STEP:
            raise DataError("the clip's size does not fit the tiny model's tokens", value=f"{width}x{height}x{frames}")
        pixels = clip.frames.float() / 127.5 - 1
        groups = [pixels[0], *(pixels[start : start + FRAME_STEP].mean(0) for start in range(1, frames, FRAME_STEP))]
        halves = torch.stack(groups).reshape(len(groups), height // SIZE_STEP, 2, SIZE_STEP // 2, width // SIZE_STEP, SIZE_STEP, 3)
        return halves.mean((3, 5)).permute(2, 4, 0, 1, 3).flatten(0, 1).contiguous()


def decode_video(latents: Tensor, frame_rate: float) -> VideoClip:
    """(C, k + 1, h, w) -> 4k + 1 frames: tokens of two plain halves."""
    channels, frames, rows, columns = latents.shape
    halves = latents.reshape(2, channels // 2, frames, rows, columns).permute(2, 3, 0, 4, 1)
    colours = halves.reshape(frames, rows * 2, columns, 3)
    pictures = colours.repeat_interleave(SIZE_STEP // 2, 1).repeat_interleave(SIZE_STEP, 2)
    repeats = torch.tensor([1] + [FRAME_STEP] * (frames - 1))
    pictures = pictures.repeat_interleave(repeats, 0)
    return VideoClip(((pictures.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8), frame_rate)


class TinySound(LatentEncoder):
    """Sound -> {"latents": (L, C), "mask": (L,)}: loudness (root mean square) of six slices a token, and which tokens are no padding."""

    name: ClassVar[str] = "audio"
    reads: ClassVar[Literal["video", "audio", "text"]] = "audio"

    def settings(self) -> Mapping[str, str | int | float | bool]:
        return {"family": FAMILY, "version": 1}

    def load(self, device: torch.device) -> None:
        """There are no weights."""

    def unload(self) -> None:
        """There are no weights."""

    def encode(self, sources: Sequence[Source]) -> list[Record]:
        return [Record(self._tensors(source)) for source in sources if isinstance(source, AudioClip)]

    def _tensors(self, clip: AudioClip) -> dict[str, Tensor]:
        count = audio_tokens(clip.samples.shape[1] / SAMPLE_RATE)
        samples = torch.zeros(count * CHANNELS * SLICE)
        samples[: clip.samples.shape[1]] = clip.samples.mean(0)
        latents = samples.reshape(count, CHANNELS, SLICE).square().mean(2).sqrt() * 2 - 1
        valid = audio_tokens(clip.valid_samples / SAMPLE_RATE) if clip.valid_samples else 0
        return {"latents": latents, "mask": (torch.arange(count) < valid).float()}


def decode_sound(latents: Tensor, seconds: float) -> AudioClip:
    """(L, C) -> a tone as loud as they say, exactly so long."""
    count = round(seconds * SAMPLE_RATE)
    loudness = ((latents.flatten() + 1) / 2).clamp(0, 1).repeat_interleave(SLICE)[:count]
    tone = math.sqrt(2) * torch.sin(2 * math.pi * PITCH * torch.arange(count) / SAMPLE_RATE)
    samples = torch.zeros(1, count)
    samples[0, : len(loudness)] = loudness * tone[: len(loudness)]
    return AudioClip(samples.clamp(-1, 1), SAMPLE_RATE, count)


class TinyText(LatentEncoder):
    """Captions -> {"video": (T, C)}: of each word the mean of its bytes' rows in the model's table; zeros behind the last word."""

    name: ClassVar[str] = "text"
    reads: ClassVar[Literal["video", "audio", "text"]] = "text"

    def __init__(self, source: WeightSource) -> None:
        self._source = source
        self._table: Tensor | None = None

    def settings(self) -> Mapping[str, str | int | float | bool]:
        return {"version": 1, "weights": self._source.fingerprint(TEXT_PART)}

    def load(self, device: torch.device) -> None:
        self._table = dict(self._source.tensors(TEXT_PART))["table"].to(device)

    def unload(self) -> None:
        self._table = None

    def encode(self, sources: Sequence[Source]) -> list[Record]:
        return [Record({"video": self._features(source)}) for source in sources if isinstance(source, str)]

    def _features(self, caption: str) -> Tensor:
        if self._table is None:
            raise ValueError("the encoder is not loaded")
        features = torch.zeros(WORDS, CHANNELS)
        for index, word in enumerate(caption.split()[:WORDS]):
            letters = torch.tensor([byte % BYTES for byte in word.encode()], device=self._table.device)
            features[index] = self._table[letters].mean(0).cpu()
        return features
