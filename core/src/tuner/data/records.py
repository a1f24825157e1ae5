"""Where the records of a run lie: item and encoder -> cache folder and key. Caching writes there, the training set reads there."""

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
class EncoderIdentity:
    """What names an encoder's records; taken once, because fingerprints of weights cost time."""

    name: str
    reads: Literal["video", "audio", "text"]
    settings: Mapping[str, Setting]


class RecordPlaces:
    """The places of all records that `encoders` make of items and captions."""

    def __init__(self, encoders: Sequence[LatentEncoder], geometry: Geometry, text_cache: Path) -> None:
        self.geometry = geometry
        self._encoders = {e.name: EncoderIdentity(e.name, e.reads, dict(e.settings())) for e in encoders}
        self._caches: dict[Path, RecordCache] = {}
        self._text_cache = text_cache

    def identities(self) -> dict[str, Mapping[str, Setting]]:
        """Encoder name -> what decides its records beside the source."""
        return {name: encoder.settings for name, encoder in self._encoders.items()}

    def clip(self, item: Item, name: str) -> Place | None:
        """The record of the item's picture or sound; None where the encoder reads sound and the item trains none."""
        encoder = self._encoders[name]
        source = video_source(item) if encoder.reads == "video" else audio_source(item, self.geometry)
        if encoder.reads == "audio" and not item.has_audio:
            return None
        return Place(self._cache(item.cache_dir), record_key(source, name, encoder.settings))

    def caption(self, text: str, name: str) -> Place:
        """The record of a caption."""
        return Place(self._cache(self._text_cache), record_key({"text": text}, name, self._encoders[name].settings))

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


def video_source(item: Item) -> dict[str, Setting]:
    """Everything that decides which pixels an encoder is given."""
    return {
        "reads": "video", "content": item.content, "width": item.bucket.width, "height": item.bucket.height, "frames": item.bucket.frames,
        "frame_rate": item.frame_rate, "crop": "centre", "decode": DECODE_VERSION,
    }  # fmt: skip


def audio_source(item: Item, geometry: Geometry) -> dict[str, Setting]:
    """Everything that decides which samples an encoder is given; silence depends on no file."""
    return {
        "reads": "audio", "content": "" if item.silence else item.content, "frames": item.bucket.frames, "frame_rate": item.frame_rate,
        "sample_rate": geometry.sample_rate, "channels": geometry.audio_channels, "mono": item.mono, "decode": DECODE_VERSION,
    }  # fmt: skip
