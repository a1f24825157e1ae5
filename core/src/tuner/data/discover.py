"""Finds the files of an entry, and measures each once."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from tuner.config.entries import AudioEntry, EvalEntry, FolderEntry, ImageEntry, VideoEntry
from tuner.data.media_index import Examined, MediaIndex, examine
from tuner.data.workers import DecodeWorkers
from tuner.errors import DataError

CLIPS = frozenset({".mp4", ".mov", ".mkv", ".webm", ".avi", ".m4v", ".gif"})
PICTURES = frozenset({".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff"})
SOUNDS = frozenset({".flac", ".wav", ".mp3", ".ogg", ".m4a", ".opus", ".aac"})
CAPTIONS = frozenset({".txt"})

Report = Callable[[int, int, str], None]
"""`report(done, total, label)`."""


@dataclass(frozen=True)
class Found:
    """The files of one entry."""

    paths: tuple[Path, ...]
    ignored: Counter[str]
    """Suffix -> files that are nothing an entry of this kind holds."""


def suffixes(entry: FolderEntry) -> frozenset[str]:
    """How files of such an entry end."""
    if isinstance(entry, VideoEntry):
        return CLIPS
    if isinstance(entry, ImageEntry):
        return PICTURES
    if isinstance(entry, EvalEntry) and entry.audio.audio_only:
        return SOUNDS | CLIPS
    return SOUNDS if isinstance(entry, AudioEntry) else CLIPS | PICTURES


def find_files(entry: FolderEntry) -> Found:
    """Files below the entry's folder, sorted by their relative path; hidden files and folders and the entry's own cache are not looked
    at. Raises `DataError` when there is none, or a folder cannot be read."""
    folder = entry.instance_data_dir.absolute()  # worker processes may have started in another working directory
    wanted, cache = suffixes(entry), entry.cache_dir.absolute()
    paths, ignored = [], Counter[str]()
    for path in visible_files(folder, cache):
        if path.suffix.lower() in wanted:
            paths.append(path)
        elif path.suffix.lower() not in CAPTIONS:
            ignored[path.suffix.lower() or path.name] += 1
    if not paths:
        raise DataError(
            f"entry {entry.id!r} has no {_plural(entry)}", where="instance_data_dir", value=str(folder),
            remedy=f"{_plural(entry)} end in {' '.join(sorted(wanted))}",
        )  # fmt: skip
    return Found(tuple(sorted(paths, key=lambda path: path.relative_to(folder).as_posix())), ignored)


def visible_files(folder: Path, cache: Path | None = None, above: frozenset[str] = frozenset()) -> Iterator[Path]:
    """Files below `folder` in no order, without hidden ones and those below `cache`. Raises `DataError` for a folder that cannot be read.

    Links are followed, but not into one of `above`, where they lead round. One that leads nowhere counts as the file it is named after:
    a clip that is not there is to be seen.
    """
    above |= {os.path.realpath(folder)}
    try:
        for path in [folder / entry.name for entry in os.scandir(folder) if not entry.name.startswith(".")]:
            if path.is_dir():
                if path != cache and os.path.realpath(path) not in above:
                    yield from visible_files(path, cache, above)
            elif path.is_file() or path.is_symlink():
                yield path
    except OSError as error:
        raise DataError(
            f"a folder cannot be read: {error.strerror}", where="instance_data_dir", value=str(folder), remedy="allow reading it"
        ) from error


def ignored_notice(entry: FolderEntry, ignored: Counter[str]) -> str:
    """One line for all files that are none of the entry's kind; empty: there are none."""
    if not ignored:
        return ""
    kinds = ", ".join(f"{count} {suffix}" for suffix, count in sorted(ignored.items()))
    return f"{entry.id}: ignored files that are no {_plural(entry)}: {kinds}"


def stem(entry: FolderEntry, path: Path) -> str:
    """What files of two entries that belong together have in common: the path below the folder, without suffix."""
    return path.relative_to(entry.instance_data_dir.absolute()).with_suffix("").as_posix()


def examine_all(
    found: Sequence[tuple[FolderEntry, Path]], workers: DecodeWorkers, progress: Report | None, *, remember: bool
) -> list[Examined | DataError]:
    """From the index where the file has not changed, else in worker processes."""
    indexes = {entry.cache_dir: MediaIndex(entry.cache_dir) for entry, _ in found}
    results: list[Examined | DataError | None] = [indexes[entry.cache_dir].find(path) for entry, path in found]
    todo = [number for number, result in enumerate(results) if result is None]
    for done, (number, result) in enumerate(zip(todo, workers.map(examine, [(found[n][1],) for n in todo]), strict=True), 1):
        results[number] = result
        if isinstance(result, Examined):
            indexes[found[number][0].cache_dir].add(found[number][1], result)
        if progress:
            progress(done, len(todo), "examining files")
    for index in indexes.values() if remember else ():
        index.save()
    return [result for result in results if result is not None]


def _plural(entry: FolderEntry) -> str:
    if isinstance(entry, VideoEntry):
        return "clips"
    if isinstance(entry, ImageEntry):
        return "pictures"
    if isinstance(entry, EvalEntry) and entry.audio.audio_only:
        return "sounds or clips"
    return "sounds" if isinstance(entry, AudioEntry) else "clips or pictures"
