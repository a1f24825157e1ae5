"""Companions: the sound, reference or mask of a clip, found in another entry under the same name.

Names are compared below each entry's folder and without suffix: `day/cat.mp4` belongs to `day/cat.png` and `day/cat.wav`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from tuner.config.entries import AudioEntry, ConditioningEntry, DatasetEntry, FolderEntry, PictureEntry
from tuner.config.linking import is_linked, trained_alone
from tuner.data.buckets import Bucket
from tuner.data.discover import PICTURES, stem
from tuner.data.facts import TooShort, UndecodableSound
from tuner.data.items import Companion, Item, Verdict, reason_of
from tuner.data.lengths import Unfit, check_duration
from tuner.data.media_index import Examined
from tuner.errors import DataError
from tuner.interfaces.family import Geometry

Measured = tuple[Path, Examined | DataError]
NO_OWNER = "belongs to no file"


@dataclass
class _Shelf:
    """The files of one entry, by name."""

    entry: ConditioningEntry | AudioEntry
    files: dict[str, Measured] = field(default_factory=dict)
    doubles: list[Path] = field(default_factory=list)


class Companions:
    """All files that can belong to others. `found`: every measured file, with its entry."""

    def __init__(
        self, entries: Sequence[DatasetEntry], found: Sequence[tuple[FolderEntry, Path, Examined | DataError]], geometry: Geometry
    ) -> None:
        self._entries = entries
        self._geometry = geometry
        self._shelves: dict[str, _Shelf] = {}
        self.notices: dict[str, None] = {}
        for entry, path, examined in found:
            if isinstance(entry, ConditioningEntry) or (isinstance(entry, AudioEntry) and is_linked(entry, entries)):
                shelf = self._shelves.setdefault(entry.id, _Shelf(entry))
                if shelf.files.setdefault(stem(entry, path), (path, examined))[0] != path:
                    shelf.doubles.append(path)

    def sound(self, entry: PictureEntry, path: Path, bucket: Bucket, start: float) -> tuple[Companion, AudioEntry] | None:
        """The sound of a clip, and the entry it is from; None: there is no file of its name. Raises `Unfit`."""
        for name in entry.s2v_datasets:
            shelf = self._shelves[name]
            measured = shelf.files.get(stem(entry, path))
            if measured is None or not isinstance(shelf.entry, AudioEntry):
                continue
            examined = _usable(measured, "sound")
            if examined.facts.audio_problem:
                raise Unfit(f"no usable sound: {measured[0].name}: {examined.facts.audio_problem}")
            check_duration(shelf.entry.audio, examined.facts.audio_seconds)
            if examined.facts.audio_seconds <= start:
                raise Unfit(f"sound too short: {measured[0].name} ends before second {start:.2f}, where the clip begins")
            return Companion("sound", measured[0], examined.content, bucket), shelf.entry
        return None

    def conditioning(self, entry: PictureEntry, path: Path, bucket: Bucket, frame_rate: float, start: float = 0.0) -> list[Companion]:
        """Reference and mask of a clip or picture that is brought to `bucket`. Raises `Unfit` where one is missing or too short."""
        companions = []
        for name in entry.conditioning_data:
            conditioning = self._shelves[name].entry
            assert isinstance(conditioning, ConditioningEntry)
            role = conditioning.role
            measured = self._shelves[name].files.get(stem(entry, path))
            if measured is None:
                raise Unfit(f"no {role}: nothing is called {stem(entry, path)} in {name}")
            examined = _usable(measured, role)
            still = measured[0].suffix.lower() in PICTURES
            available = 1 if still else examined.facts.frames_at(frame_rate, start)
            if available < bucket.frames and not (still and role == "mask"):
                raise Unfit(f"{role} {TooShort.reason}: {measured[0].name} has {available} of {bucket.frames} frames")
            size = bucket if role == "mask" else self._smaller(conditioning, bucket)
            companions.append(Companion(role, measured[0], examined.content, size))
        return companions

    def _smaller(self, entry: ConditioningEntry, bucket: Bucket) -> Bucket:
        """The bucket of a reference; both sides stay multiples of the family's step."""
        asked: int = entry.reference_downscale
        step = self._geometry.size_step
        factor = next(f for f in (asked, 2, 1) if f <= asked and bucket.width % (f * step) == 0 and bucket.height % (f * step) == 0)
        if factor != asked:
            sides = f"{bucket.width}x{bucket.height}"
            self.notices[f"{entry.id}: reference_downscale {asked} -> {factor} at {sides} (sides are multiples of {step})"] = None
        return Bucket(bucket.width // factor, bucket.height // factor, bucket.frames)

    def verdicts(self, items: Sequence[Item]) -> dict[tuple[str, Path], Verdict]:
        """(entry id, path) -> what became of each file that belongs to others. Sounds that are also trained alone have a verdict
        already."""
        used = {companion.path for item in items for companion in item.companions}
        judged = {}
        for name, shelf in self._shelves.items():
            if isinstance(shelf.entry, AudioEntry) and trained_alone(shelf.entry, self._entries):
                continue
            for path, examined in shelf.files.values():
                judged[name, path] = _verdict(name, path, examined, path in used)
            for path in shelf.doubles:
                detail = f"{NO_OWNER}: another file of the same name comes first"
                judged[name, path] = Verdict(name, path, "skipped", NO_OWNER, detail, companion=True)
        return judged


def _usable(measured: Measured, role: str) -> Examined:
    path, examined = measured
    if isinstance(examined, DataError):
        raise Unfit(f"no usable {role}: {path.name}: {examined.message}")
    if (examined.facts.kind == "audio") != (role == "sound"):
        raise Unfit(f"no usable {role}: {path.name} is no {'sound' if role == 'sound' else 'picture'}")
    return examined


def _verdict(dataset: str, path: Path, examined: Examined | DataError, used: bool) -> Verdict:
    if isinstance(examined, DataError):
        return Verdict(dataset, path, "failed", reason_of(examined), examined.message, companion=True)
    if used:
        return Verdict(dataset, path, "used", facts=examined.facts, companion=True)
    if examined.facts.kind == "audio" and examined.facts.audio_problem:
        detail = f"{UndecodableSound.reason}: {examined.facts.audio_problem}"
        return Verdict(dataset, path, "failed", UndecodableSound.reason, detail, examined.facts, companion=True)
    detail = f"{NO_OWNER}: no file of its name is used with it"
    return Verdict(dataset, path, "skipped", NO_OWNER, detail, examined.facts, companion=True)
