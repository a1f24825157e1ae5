"""Items: clips, pictures and sounds as they are trained on; and verdicts: what became of every file that was found."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from tuner.data.buckets import Bucket
from tuner.data.facts import MediaError, MediaFacts
from tuner.errors import DataError
from tuner.interfaces.family import ClipShape

Status = Literal["used", "skipped", "failed", "held out"]
Kind = Literal["video", "image", "audio"]
Role = Literal["sound", "reference", "mask"]
Group = tuple[Bucket, float, Kind, tuple[tuple[Role, Bucket], ...]]


@dataclass(frozen=True)
class Companion:
    """A second file that belongs to an item: its sound from another dataset, the clip it is to follow, or the mask of what is learned."""

    role: Role
    path: Path
    content: str
    """sha256 of the file."""
    bucket: Bucket
    """What it is brought to: for a reference clip perhaps smaller than the item."""


@dataclass(frozen=True)
class Item:
    """One clip, picture or sound as it is trained on."""

    dataset: str
    path: Path
    content: str
    """sha256 of the file."""
    caption: str
    bucket: Bucket
    frame_rate: float
    """Frames per second, after resampling."""
    has_audio: bool
    """Whether its sound is trained."""
    mono: bool
    """Mix the sound to one channel, which feeds all."""
    silence: bool
    """There is no sound track, and silence stands in for it."""
    repeats: int
    """Additional passes an epoch."""
    cache_dir: Path
    kind: Kind = "video"
    start: float = 0.0
    """Seconds into the file where what is used begins; picture and sound alike."""
    companions: tuple[Companion, ...] = ()
    probability: float = 1.0
    """Share of its draws that an epoch takes."""
    first_frame: bool = False
    """Its first frame is given clean in every draw."""

    def companion(self, role: str) -> Companion | None:
        """The file in that role, if there is one."""
        return next((companion for companion in self.companions if companion.role == role), None)

    @property
    def shape(self) -> ClipShape:
        """Size and length, as the family sees them."""
        return ClipShape(self.bucket.width, self.bucket.height, self.bucket.frames, self.frame_rate, self.seconds)

    @property
    def group(self) -> Group:
        """Items of one group can share a batch: pictures, sounds and what belongs to them have the same size and length. Clips with
        and without sound mix. Groups can be sorted."""
        beside = sorted((companion.role, companion.bucket) for companion in self.companions if companion.role != "sound")
        return self.bucket, self.frame_rate, self.kind, tuple(beside)

    @property
    def seconds(self) -> float:
        """Duration of picture and sound."""
        return self.bucket.seconds or self.bucket.frames / self.frame_rate

    @property
    def key(self) -> str:
        """Stable identity: content and settings, not the path."""
        parts = (
            self.content, *self.bucket, self.frame_rate, self.has_audio, self.mono, self.silence, self.caption, self.kind, self.start,
            self.first_frame, [(c.role, c.content, *c.bucket) for c in self.companions],
        )  # fmt: skip
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


@dataclass(frozen=True)
class Verdict:
    """What became of one file."""

    dataset: str
    path: Path
    status: Status
    reason: str = ""
    """What files are counted under."""
    detail: str = ""
    """The reason with this file's numbers."""
    facts: MediaFacts | None = None
    item: Item | None = None
    """What is trained on or held out; None also for a file that is used with another one."""
    companion: bool = False
    """The file was found as another one's sound, reference or mask."""


def reason_of(error: DataError) -> str:
    """What a failed file is counted under."""
    return error.reason if isinstance(error, MediaError) else "cannot be encoded"
