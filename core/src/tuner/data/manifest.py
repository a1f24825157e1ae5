"""The manifest: a verdict for every file that was found, and the items that are trained on. Its numbers add up by construction."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from tuner.config.entries import AudioEntry, CaptionedEntry, DatasetEntry, FolderEntry
from tuner.config.linking import text_entry, trained_alone
from tuner.config.settings import DataSettings
from tuner.data.buckets import Bucket
from tuner.data.captions import CaptionProblem
from tuner.data.discover import Found, Report, examine_all, find_files, ignored_notice
from tuner.data.epochs import batches_per_epoch, sound_share
from tuner.data.facts import UndecodableSound
from tuner.data.items import Companion, Item, Kind, Role, Status, Verdict, reason_of
from tuner.data.judge import Judge, check_entry
from tuner.data.lengths import LONGEST
from tuner.data.media_index import Examined
from tuner.data.pairing import Companions
from tuner.data.workers import DecodeWorkers
from tuner.errors import DataError
from tuner.interfaces.family import Geometry

__all__ = [
    "LONGEST", "AudioLedger", "Companion", "Item", "Kind", "Manifest", "Report", "Role", "Status", "Verdict", "reason_of",
    "require_usable", "scan", "survey",
]  # fmt: skip

SHOWN = 20
"""Lines of a list of files in an error or a table."""


@dataclass(frozen=True)
class AudioLedger:
    """Sound of the clips that are used, and sound alone."""

    with_sound: int
    """Clips with a track of their own or a sound file."""
    without_sound: int
    """With `with_sound` all clips that are used with their picture."""
    silence: int
    """Of those without sound: trained with silence."""
    undecodable: int
    """Files that failed for their sound; none of them is counted above."""
    seconds: float
    """Of sound that is trained, in one pass."""
    alone: int = 0
    """Sounds that are trained alone."""

    def describe(self) -> str:
        """One line."""
        text = f"{self.with_sound} clips with sound ({self.seconds:.1f} s trained), {self.without_sound} without"
        text += f" ({self.silence} of them trained with silence)" if self.silence else ""
        text += f", {self.alone} sounds alone" if self.alone else ""
        return text + (f", {self.undecodable} undecodable" if self.undecodable else "")


@dataclass(frozen=True)
class Manifest:
    """All verdicts, in the order of entries and file names."""

    verdicts: tuple[Verdict, ...]
    notices: tuple[str, ...]
    """What was adjusted, once each."""
    text_cache: Path
    """Where encoded captions are kept."""
    geometry: Geometry
    """What the clips are brought to."""

    @property
    def items(self) -> tuple[Item, ...]:
        """What is trained on."""
        return tuple(v.item for v in self.verdicts if v.item is not None and v.status == "used")

    @property
    def held_out(self) -> tuple[Item, ...]:
        """What is kept for validation."""
        return tuple(v.item for v in self.verdicts if v.item is not None and v.status == "held out")

    @property
    def streams_available(self) -> frozenset[str]:
        """What can be learned from the items: "video" (clips and pictures), "audio"."""
        pictures = {"video" for item in self.items if item.kind != "audio"}
        return frozenset(pictures | {"audio" for item in self.items if item.has_audio})

    @property
    def companions(self) -> frozenset[str]:
        """The roles of further files that are encoded for themselves: "reference", "mask"."""
        return frozenset(c.role for item in self.items for c in item.companions if c.role != "sound")

    def count(self, status: Status) -> int:
        """found = used + skipped + failed + held out."""
        return sum(verdict.status == status for verdict in self.verdicts)

    def reasons(self) -> dict[tuple[Status, str], int]:
        """(status, reason) -> files, for those left out; most frequent first."""
        return dict(Counter((v.status, v.reason) for v in self._left_out()).most_common())

    @property
    def ledger(self) -> AudioLedger:
        """Counts of sound."""
        used = [item for item in self.items if item.has_audio]
        clips = [(v.item, v.facts) for v in self.verdicts if v.item and v.status == "used" and v.item.kind == "video"]
        sounding = sum(1 for item, facts in clips if (facts and facts.has_audio) or item.companion("sound"))
        return AudioLedger(
            with_sound=sounding, without_sound=len(clips) - sounding, silence=sum(item.silence for item in used),
            undecodable=sum(v.reason == UndecodableSound.reason for v in self.verdicts),
            seconds=sum(item.seconds for item in used if not item.silence), alone=sum(item.kind == "audio" for item in used),
        )  # fmt: skip

    def describe_sound(self, batch_size: int, seed: int) -> str:
        """The ledger, and how many batches of an epoch have sound. One line."""
        share = sound_share(self.items, batch_size, seed)
        return f"{self.ledger.describe()}; in {share:.0%} of the batches"

    def batches_per_epoch(self, batch_size: int) -> int:
        """Batches hold items of one group; a group's last one may be smaller."""
        return batches_per_epoch(self.items, batch_size)

    def digest(self) -> str:
        """Identity of what is trained on, in its order; a resumed run must find the same."""
        rows = [(item.key, item.repeats, item.probability) for item in self.items]
        return hashlib.sha256(json.dumps(rows).encode()).hexdigest()

    def without(self, failures: Mapping[Item, DataError]) -> Manifest:
        """The manifest with these items failed, after decoding showed what headers did not."""
        return replace(self, verdicts=tuple(_failed(v, failures.get(v.item)) if v.item else v for v in self.verdicts))

    def bucket_counts(self) -> dict[Bucket, int]:
        """Bucket -> items, most frequent first."""
        return dict(Counter(item.bucket for item in self.items).most_common())

    def describe(self) -> str:
        """One line: found = used + skipped + failed, and held out where there is any. Files that belong to others are used, too."""
        beside = sum(verdict.companion and verdict.status == "used" for verdict in self.verdicts)
        text = _sum(self.verdicts, held_out=self.count("held out") > 0)
        return text + (f" ({beside} of the used belong to others)" if beside else "")

    def table(self) -> str:
        """The sum, the sum of each entry where there are several, one line a reason, then the files concerned."""
        entries = dict.fromkeys(verdict.dataset for verdict in self.verdicts)
        lines = [self.describe()]
        for name in entries if len(entries) > 1 else ():
            own = [v for v in self.verdicts if v.dataset == name]
            lines.append(f"  {name}: {_sum(own, held_out=any(v.status == 'held out' for v in own))}")
        lines += [f"  {count} {status}: {reason}" for (status, reason), count in self.reasons().items()]
        left_out = list(self._left_out())
        lines += [f"    {v.path}: {v.detail or v.reason}" for v in left_out[:SHOWN]]
        return "\n".join(lines + ([f"    and {len(left_out) - SHOWN} more"] if len(left_out) > SHOWN else []))

    def _left_out(self) -> Iterator[Verdict]:
        return (v for v in self.verdicts if v.status in ("skipped", "failed"))


def _sum(verdicts: Sequence[Verdict], *, held_out: bool) -> str:
    statuses = ("used", "skipped", "failed", *(("held out",) if held_out else ()))
    counts = [f"{status} {sum(v.status == status for v in verdicts)}" for status in statuses]
    return f"found {len(verdicts)} = {' + '.join(counts)}"


def _failed(verdict: Verdict, error: DataError | None) -> Verdict:
    if error is None:
        return verdict
    return replace(verdict, status="failed", reason=reason_of(error), detail=error.message, item=None)


def scan(
    entries: Sequence[DatasetEntry], settings: DataSettings, geometry: Geometry, *,
    progress: Report | None = None, workers: DecodeWorkers | None = None, remember: bool = True,
) -> Manifest:  # fmt: skip
    """Finds and measures all files; raises `DataError` when the dataset cannot be trained on as it is (see `require_usable`)."""
    manifest = survey(entries, settings, geometry, progress=progress, workers=workers, remember=remember)
    require_usable(manifest, strict=settings.strict)
    return manifest


def survey(
    entries: Sequence[DatasetEntry], settings: DataSettings, geometry: Geometry, *,
    progress: Report | None = None, workers: DecodeWorkers | None = None, remember: bool = True,
) -> Manifest:  # fmt: skip
    """A verdict for every file, whatever they are. Raises `ConfigError` for settings that the family cannot follow.

    `remember`: write what was measured of the files to the cache, so that the next time reads none of them again.
    """
    found = {entry.id: (entry, find_files(entry)) for entry in entries if isinstance(entry, FolderEntry)}
    measured = _measure(list(found.values()), progress, workers, remember)
    notices: dict[str, None] = {}
    for entry, files in found.values():
        own = check_entry(entry, entries, geometry) if isinstance(entry, CaptionedEntry) else []
        notices |= dict.fromkeys([*entry.notes, *own, ignored_notice(entry, files.ignored)])
    notices |= dict.fromkeys(note for entry in entries if not isinstance(entry, FolderEntry) for note in entry.notes)
    companions = Companions(entries, measured, geometry)
    judge = Judge(settings, geometry, companions)
    judged = {
        (entry.id, path): judge.verdict(entry, path, examined) for entry, path, examined in measured
        if isinstance(entry, CaptionedEntry) and (not isinstance(entry, AudioEntry) or trained_alone(entry, entries))
    }  # fmt: skip
    judged |= companions.verdicts([verdict.item for verdict in judged.values() if verdict.item])
    verdicts = tuple(judged[entry.id, path] for entry, path, _ in measured)
    notices |= judge.notices | dict.fromkeys(_doubles(verdicts))
    texts = text_entry(entries)
    text_cache = texts.cache_dir if texts else Path(settings.cache_dir)
    return Manifest(verdicts, tuple(notice for notice in notices if notice), text_cache, geometry)


def _measure(
    found: Sequence[tuple[FolderEntry, Found]], progress: Report | None, workers: DecodeWorkers | None, remember: bool
) -> list[tuple[FolderEntry, Path, Examined | DataError]]:
    files = [(entry, path) for entry, files in found for path in files.paths]
    own = workers or DecodeWorkers()
    try:
        examined = examine_all(files, own, progress, remember=remember)
    finally:
        if workers is None:
            own.close()
    return [(entry, path, result) for (entry, path), result in zip(files, examined, strict=True)]


def _doubles(verdicts: Sequence[Verdict]) -> list[str]:
    """One notice for files that are trained on twice in the same way, one for files that are trained on though they are held out."""
    first: dict[tuple[object, ...], Item] = {}
    trained: dict[str, Item] = {}
    twice, leaked = [], []
    for verdict in verdicts:
        if (item := verdict.item) is not None and verdict.status == "used":
            trained.setdefault(item.content, item)
            known = first.setdefault((item.content, item.group, item.start), item)
            if known is not item:
                twice.append(f"{_place(known)} and {_place(item)}")
    for verdict in verdicts:
        if (item := verdict.item) is not None and verdict.status == "held out" and item.content in trained:
            leaked.append(f"{_place(item)} and {_place(trained[item.content])}")
    notices = []
    if twice:
        notices.append(f"the same file twice, so it is trained on twice: {_shortened(twice)}")
    if leaked:
        notices.append(f"held out and trained on as well: {_shortened(leaked)}")
    return notices


def _place(item: Item) -> str:
    return f"{item.path} ({item.dataset})"


def _shortened(pairs: Sequence[str]) -> str:
    more = len(pairs) - SHOWN
    return "; ".join(pairs[:SHOWN]) + (f"; and {more} more" if more > 0 else "")


def require_usable(manifest: Manifest, *, strict: bool = False) -> None:
    """Raises `DataError` for files without caption (all of them are named), when nothing is left, and, if `strict`, for any file
    that is left out and any adjustment."""
    uncaptioned = [v for v in manifest.verdicts if v.reason == CaptionProblem.reason]
    if uncaptioned:
        lines = "".join(f"\n  {v.path}: {v.detail}" for v in uncaptioned)
        raise DataError(
            f"{len(uncaptioned)} clips have no usable caption:{lines}", where="caption_strategy",
            remedy="write the captions, or move these clips out of the folder",
        )  # fmt: skip
    if not manifest.items:
        raise DataError("no clip can be used: " + manifest.table(), where="datasets", remedy="see the reasons above")
    if strict and (manifest.notices or manifest.reasons()):
        adjusted = "".join(f"\n  {notice}" for notice in manifest.notices)
        raise DataError(f"strict is on, and not everything is used as asked: {manifest.table()}{adjusted}", where="strict")
