"""A first look at a folder of files before anything is configured: how many, of which kind, with captions or without.

Special here: only headers are read, and only of some files, so that it answers at once; what can be trained is judged later, by the plan.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import av

from tuner.data.container import MediaError, open_media
from tuner.data.discover import CLIPS, PICTURES, SOUNDS, visible_files
from tuner.errors import DataError

KINDS = {"video": CLIPS, "image": PICTURES, "audio": SOUNDS}
"""dataset_type -> how its files end."""
MEASURED = 60
"""Files whose header is read."""


@dataclass(frozen=True)
class Clip:
    """What a header says. Seconds; frames at the clip's own rate; 0: not known."""

    seconds: float
    frames: int
    width: int
    height: int
    sound: bool


@dataclass(frozen=True)
class Survey:
    """A folder."""

    counts: dict[str, int]
    """dataset_type -> files."""
    kind: str
    """The dataset_type that most of a folder is for: clips before pictures before sounds."""
    captioned: int
    """Of the files of this kind, those with a text file beside them."""
    clips: tuple[Clip, ...]
    """Of those whose header was read."""
    unreadable: tuple[str, ...] = ()
    """Names of those that could not be opened."""

    @property
    def files(self) -> int:
        """Of this kind."""
        return self.counts[self.kind]

    @property
    def silent(self) -> int:
        """Of the measured ones, those without sound."""
        return sum(not clip.sound for clip in self.clips)

    def shorter(self, frames: int) -> int:
        """Of the measured ones, those with fewer frames."""
        return sum(0 < clip.frames < frames for clip in self.clips)

    def describe(self) -> str:
        """One line for people."""
        words = {"video": "clips", "image": "pictures", "audio": "sounds"}[self.kind]
        parts = [f"{self.files} {words}", f"{self.captioned} with a caption beside them"]
        looked = "" if len(self.clips) == self.files else f" of {len(self.clips)} looked at"
        if self.kind == "video" and self.clips:
            parts.append(f"{len(self.clips) - self.silent}{looked} with sound")
        if self.kind != "image" and self.clips:
            parts.append(_span([clip.seconds for clip in self.clips], "{:.1f} s"))
        if self.kind != "audio" and self.clips:
            parts.append(_span([min(clip.width, clip.height) for clip in self.clips], "{:.0f} pixels on the shorter side"))
        if self.unreadable:
            more = f" and {len(self.unreadable) - 3} more" if len(self.unreadable) > 3 else ""
            parts.append(f"cannot be opened: {', '.join(self.unreadable[:3])}{more}")
        others = [f"{count} {name}" for name, count in self.counts.items() if count and name != self.kind]
        return ", ".join(parts) + (f"; files for other entries: {', '.join(others)}" if others else "")


def look_at(folder: Path, kind: str = "") -> Survey:
    """A survey of `folder` with its subfolders; `kind`: the dataset_type, instead of the one that is found. Raises `DataError`."""
    if not folder.is_dir():
        raise DataError("there is no such folder" if not folder.exists() else "is a file, no folder", where="data", value=str(folder),
                        remedy="name the folder that holds your clips")  # fmt: skip
    files = sorted(visible_files(folder))
    found = {name: [path for path in files if path.suffix.lower() in suffixes] for name, suffixes in KINDS.items()}
    chosen = kind or next((name for name, paths in found.items() if paths), "")
    if not chosen or not found[chosen]:
        suffixes = " ".join(sorted(KINDS[chosen] if chosen else CLIPS))
        raise DataError("holds no clips" if chosen in ("", "video") else f"holds no file for dataset_type {chosen}", where="data",
                        value=str(folder), remedy=f"files are found by their ending: {suffixes}")  # fmt: skip
    paths = found[chosen]
    clips, unreadable = _measured(paths[:: max(1, len(paths) // MEASURED)][:MEASURED])
    captioned = sum(path.with_suffix(".txt").is_file() for path in paths)
    return Survey({name: len(each) for name, each in found.items()}, chosen, captioned, clips, unreadable)


def _measured(paths: Sequence[Path]) -> tuple[tuple[Clip, ...], tuple[str, ...]]:
    clips, unreadable = [], []
    for path in paths:
        try:
            clips.append(_header(path))
        except MediaError:
            unreadable.append(path.name)
    return tuple(clips), tuple(unreadable)


def _header(path: Path) -> Clip:
    """Raises `MediaError`."""
    if path.suffix.lower() in PICTURES:
        from tuner.data.pictures import probe_picture

        facts = probe_picture(path)
        return Clip(0.0, 1, facts.width, facts.height, False)
    with open_media(path) as container:
        picture = next(iter(container.streams.video), None)
        seconds = (container.duration or 0) / av.time_base
        rate = float(picture.average_rate or 0) if picture is not None else 0.0
        context = picture.codec_context if picture is not None else None
        size = (context.width, context.height) if context is not None else (0, 0)
        return Clip(seconds, round(seconds * rate), *size, bool(container.streams.audio))


def _span(values: Sequence[float], form: str) -> str:
    least, most = form.format(min(values)), form.format(max(values))
    return most if least == most else f"{least.split(' ')[0]} to {most}"
