"""Small complete encoders: each record is a simple function of its source, so that tests know what to expect."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar, Literal

import torch

from tuner.errors import DataError
from tuner.interfaces.encoders import AudioClip, LatentEncoder, Record, Source, VideoClip
from tuner.interfaces.family import Geometry

GEOMETRY = Geometry(frame_step=8, size_step=32, sample_rate=16000, audio_channels=2, default_frame_rate=25.0)
"""Like a video family's: 1 + 8k frames, sides in steps of 32 pixels."""


class CountingEncoder(LatentEncoder):
    """Counts what it is asked; `scale` is its only setting. Encoding without `load` is an error, as with real weights."""

    name: ClassVar[str]

    def __init__(self, scale: float = 1.0) -> None:
        self.scale = scale
        self.loads = self.unloads = 0
        self.batches: list[int] = []
        self.loaded = False

    def settings(self) -> Mapping[str, str | int | float | bool]:
        return {"scale": self.scale}

    def load(self, device: torch.device) -> None:
        assert device.type == "cpu"
        self.loads += 1
        self.loaded = True

    def unload(self) -> None:
        self.unloads += 1
        self.loaded = False

    def encode(self, sources: Sequence[Source]) -> list[Record]:
        assert self.loaded and len({self.shape(source) for source in sources}) == 1
        self.batches.append(len(sources))
        return [self.record(source) for source in sources]

    def shape(self, source: Source) -> tuple[int, ...]:
        """Sources of a batch have one shape."""
        return ()

    def record(self, source: Source) -> Record:
        """Of one source."""
        raise NotImplementedError


class Pictures(CountingEncoder):
    """The mean colour of each frame."""

    name = "video"
    reads: ClassVar[Literal["video", "audio", "text"]] = "video"

    def shape(self, source: Source) -> tuple[int, ...]:
        assert isinstance(source, VideoClip)
        return tuple(source.frames.shape)

    def record(self, source: Source) -> Record:
        assert isinstance(source, VideoClip)
        return Record({"latents": source.frames.float().mean(dim=(1, 2)) * self.scale})


class Sounds(CountingEncoder):
    """The loudness of each channel, and how much of the sound is real."""

    name = "audio"
    reads: ClassVar[Literal["video", "audio", "text"]] = "audio"

    def shape(self, source: Source) -> tuple[int, ...]:
        assert isinstance(source, AudioClip)
        return tuple(source.samples.shape)

    def record(self, source: Source) -> Record:
        assert isinstance(source, AudioClip)
        return Record({"latents": source.samples.abs().mean(1) * self.scale, "valid": torch.tensor(source.valid_samples)})


class Words(CountingEncoder):
    """The letters of a caption; declines captions that say so."""

    name = "text"
    reads: ClassVar[Literal["video", "audio", "text"]] = "text"

    def record(self, source: Source) -> Record:
        assert isinstance(source, str)
        if "undecipherable" in source:
            raise DataError("cannot be tokenized", where=source)
        return Record({"video": torch.tensor([ord(letter) for letter in source], dtype=torch.float32) * self.scale})
