"""Where the records of a run lie: item and encoder -> file that is read -> cache folder and key.

Caching writes there, the training set reads there.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

from tuner.data.cache import RecordCache, Setting, record_key
from tuner.data.decode import DECODE_VERSION
from tuner.data.manifest import Item
from tuner.interfaces.encoders import LatentEncoder, Record
from tuner.interfaces.family import Geometry


class Place(NamedTuple):
    """One entry of a cache."""

    cache: RecordCache
    key: str

    def filled(self) -> bool:
        """Whether a sound record is there."""
        return self.cache.has(self.key)


@dataclass(frozen=True)
class SourceFile:
    """One file as an encoder reads it. For sound, `width`, `height` and `frames` are 0."""

    path: Path
    content: str
    """sha256; empty for silence, which is made without a file."""
    start: float
    """Seconds into the file."""
    seconds: float
    width: int = 0
    height: int = 0
    frames: int = 0
    frame_rate: float = 1.0
    """1 for a single frame, which has none."""
    mono: bool = False
    alone: bool = False
    """The sound is timed by its own beginning, not by a picture in the same file."""


@dataclass(frozen=True)
class EncoderIdentity:
    """What names an encoder's records; taken once, because fingerprints of weights cost time."""

    name: str
    """Made of the package of its class, the class and its own name: encoders of two families may share the latter, and settings."""
    reads: Literal["video", "audio", "text"]
    of: str
    settings: Mapping[str, Setting]

    @staticmethod
    def of_encoder(encoder: LatentEncoder) -> EncoderIdentity:
        """As the encoder says now."""
        made_by = type(encoder)
        name = f"{made_by.__module__.partition('.')[0]}/{made_by.__qualname__}/{encoder.name}"
        return EncoderIdentity(name, encoder.reads, encoder.of, dict(encoder.settings()))


class RecordPlaces:
    """The places of all records that `encoders` make of items and captions."""

    def __init__(self, encoders: Sequence[LatentEncoder], geometry: Geometry, text_cache: Path) -> None:
        self.geometry = geometry
        self._encoders: dict[str, EncoderIdentity] = {}
        self._caches: dict[Path, RecordCache] = {}
        self._text_cache = text_cache
        for encoder in encoders:
            self.refresh(encoder)

    def refresh(self, encoder: LatentEncoder) -> bool:
        """Asks for the encoder's settings again; whether they changed, and with them its places."""
        identity = EncoderIdentity.of_encoder(encoder)
        changed = self._encoders.get(encoder.name) != identity
        self._encoders[encoder.name] = identity
        return changed

    def identities(self) -> dict[str, Mapping[str, Setting]]:
        """Encoder name -> what decides its records beside the source."""
        return {name: encoder.settings for name, encoder in self._encoders.items()}

    def source(self, item: Item, name: str) -> SourceFile | None:
        """What encoder `name` reads of the item; None: nothing."""
        encoder = self._encoders[name]
        return audio_source(item) if encoder.reads == "audio" else video_source(item, encoder.of)

    def clip(self, item: Item, name: str) -> Place | None:
        """The record of the item's picture, sound or companion; None where the item has none of what the encoder reads."""
        encoder, source = self._encoders[name], self.source(item, name)
        if source is None:
            return None
        return Place(self._cache(item.cache_dir), record_key(source_key(source, self.geometry), encoder.name, encoder.settings))

    def caption(self, text: str, name: str) -> Place:
        """The record of a caption."""
        encoder = self._encoders[name]
        return Place(self._cache(self._text_cache), record_key({"text": text}, encoder.name, encoder.settings))

    def read(self, item: Item, caption: str) -> dict[str, Record]:
        """Encoder name -> record, of one item with that caption. Raises `MissingRecord`."""
        records = {}
        for name, encoder in self._encoders.items():
            place = self.caption(caption, name) if encoder.reads == "text" else self.clip(item, name)
            if place is not None:
                records[name] = place.cache.read(place.key)
        return records

    def _cache(self, folder: Path) -> RecordCache:
        return self._caches.setdefault(folder, RecordCache(folder))


def video_source(item: Item, of: str = "clip") -> SourceFile | None:
    """The item's own picture, or the companion in the role `of`; None where there is none.

    A companion runs beside the item: the same seconds of it are read, at the same rate. (A still one has no time.)
    """
    frames = item.bucket.frames
    rate = item.frame_rate if frames > 1 else 1.0
    if of == "clip":
        if item.kind == "audio":
            return None
        return SourceFile(item.path, item.content, item.start, item.seconds, item.bucket.width, item.bucket.height, frames, rate)
    companion = item.companion(of)
    if companion is None:
        return None
    width, height = companion.bucket.width, companion.bucket.height
    return SourceFile(companion.path, companion.content, item.start, item.seconds, width, height, frames, rate)


def audio_source(item: Item) -> SourceFile | None:
    """The sound that is trained: of the companion where there is one, else the item's own; None where the item trains none."""
    if not item.has_audio:
        return None
    companion = item.companion("sound")
    if companion is not None:
        return SourceFile(companion.path, companion.content, item.start, item.seconds, mono=item.mono, alone=True)
    if item.silence:
        return SourceFile(item.path, "", 0.0, item.seconds)
    return SourceFile(item.path, item.content, item.start, item.seconds, mono=item.mono, alone=item.kind == "audio")


def source_key(source: SourceFile, geometry: Geometry) -> dict[str, Setting]:
    """Everything that decides which pixels or samples an encoder is given, and nothing else."""
    if source.frames:
        return {
            "reads": "video", "content": source.content, "start": float(source.start), "width": source.width, "height": source.height,
            "frames": source.frames, "frame_rate": float(source.frame_rate), "crop": "centre", "decode": DECODE_VERSION,
        }  # fmt: skip
    return {
        "reads": "audio", "content": source.content, "start": float(source.start), "samples": round(source.seconds * geometry.sample_rate),
        "sample_rate": geometry.sample_rate, "channels": geometry.audio_channels, "mono": source.mono, "alone": source.alone,
        "decode": DECODE_VERSION,
    }  # fmt: skip
