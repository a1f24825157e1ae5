"""Latent encoders: they turn a clip, a sound or a caption into a cached record, so that training needs none of them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Literal

import torch
from torch import Tensor


@dataclass(frozen=True)
class VideoClip:
    """Decoded frames at a constant rate."""

    frames: Tensor
    """(F, H, W, 3) uint8 RGB."""
    frame_rate: float
    """Frames per second."""


@dataclass(frozen=True)
class AudioClip:
    """Sound, aligned to the picture: sample 0 belongs to the start of frame 0."""

    samples: Tensor
    """(channels, N) float32 in [-1, 1]."""
    sample_rate: int
    """Hz."""
    valid_samples: int
    """How many of N were in the source; the rest is padding at the end."""


@dataclass(frozen=True)
class Record:
    """What the cache stores of one item for one encoder."""

    tensors: Mapping[str, Tensor]
    facts: Mapping[str, str] = field(default_factory=dict)


Source = VideoClip | AudioClip | str


class LatentEncoder(ABC):
    """One encoder. It is constructed cheaply; weights come with `load` and go with `unload`."""

    name: ClassVar[str]
    """Names the record in `Sample.records` and the cache."""
    reads: ClassVar[Literal["video", "audio", "text"]]
    """The kind of source it is given. A still picture is a video of one frame."""
    of: ClassVar[str] = "clip"
    """Which file of an item it reads: "clip", the item's own, or the role of a companion: "reference", "mask"."""

    @abstractmethod
    def settings(self) -> Mapping[str, str | int | float | bool]:
        """Everything beside the source that changes the record: weights' fingerprint, dtype, options, code version."""

    @abstractmethod
    def load(self, device: torch.device) -> None:
        """Brings the weights onto `device`."""

    @abstractmethod
    def unload(self) -> None:
        """Frees them. Called in every case, also after an error."""

    @abstractmethod
    def encode(self, sources: Sequence[Source]) -> list[Record]:
        """Encodes equally shaped sources; CPU tensors in, CPU tensors out, one record each.

        Records may be written while the next are made: their tensors must not share memory that the encoder uses again.
        """

    def downloads(self) -> Sequence[str]:
        """What `settings` and `load` would have to download first, in words. Asked once the plan has no problems."""
        return ()

    def reduce_memory(self) -> str | None:
        """Switches, loaded or not, to a way of encoding that is slower, needs less memory and gives the same records.

        (Where an encoder's records do change, its `settings` must change with them; all its records are then made anew.)
        Says what it did, for people; None: there is nothing left to switch on.
        """
        return None
