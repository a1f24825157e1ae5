"""The manifest: a verdict for every clip that was found, and the items that are trained on. Its numbers add up by construction."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from tuner.config.datasets import DatasetEntry, TextEntry, VideoEntry
from tuner.config.settings import DataSettings
from tuner.data.buckets import Bucket, choose_size
from tuner.data.captions import CaptionProblem, read_caption
from tuner.data.container import MediaError, MediaFacts, TooShort, UndecodableSound
from tuner.data.media_index import Examined, MediaIndex, examine
from tuner.data.workers import DecodeWorkers
from tuner.errors import ConfigError, DataError
from tuner.interfaces.family import ClipShape, Geometry

SUFFIXES = frozenset({".mp4", ".mov", ".mkv", ".webm", ".avi", ".m4v", ".gif"})
LONGEST = 121
"""Frames that are taken at most where an entry does not say `num_frames`: about five seconds, what one card can train."""
SHOWN = 20
"""Lines of a list of clips in an error."""

Report = Callable[[int, int, str], None]
"""`report(done, total, label)`."""
Status = Literal["used", "skipped", "failed"]


Role = Literal["sound", "reference", "mask"]


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
    kind: Literal["video", "image", "audio"] = "video"
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
    def group(self) -> tuple[Bucket, float]:
        """Items of one group can share a batch: their pictures and their sound have the same length."""
        return self.bucket, self.frame_rate

    @property
    def seconds(self) -> float:
        """Duration of picture and sound."""
        return self.bucket.seconds or self.bucket.frames / self.frame_rate

    @property
    def key(self) -> str:
        """Stable identity: content and settings, not the path."""
        parts = (self.content, *self.bucket, self.frame_rate, self.has_audio, self.mono, self.silence, self.caption)
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


@dataclass(frozen=True)
class Verdict:
    """What became of one file."""

    dataset: str
    path: Path
    status: Status
    reason: str = ""
    """What clips are counted under."""
    detail: str = ""
    """The reason with this clip's numbers."""
    facts: MediaFacts | None = None
    item: Item | None = None


@dataclass(frozen=True)
class AudioLedger:
    """Sound of the clips found, where their entry trains sound."""

    with_sound: int
    without_sound: int
    silence: int
    """Of those without sound: trained with silence."""
    undecodable: int
    seconds: float
    """Of sound that is trained, in one pass."""

    def describe(self) -> str:
        """One line."""
        text = f"{self.with_sound} clips with sound ({self.seconds:.1f} s trained), {self.without_sound} without"
        text += f" ({self.silence} of them trained with silence)" if self.silence else ""
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
        return tuple(verdict.item for verdict in self.verdicts if verdict.item is not None)

    def count(self, status: Status) -> int:
        """found = used + skipped + failed."""
        return sum(verdict.status == status for verdict in self.verdicts)

    def reasons(self) -> dict[tuple[Status, str], int]:
        """(status, reason) -> clips, for those not used; most frequent first."""
        return dict(Counter((v.status, v.reason) for v in self.verdicts if v.status != "used").most_common())

    @property
    def ledger(self) -> AudioLedger:
        """Counts of sound."""
        used = [item for item in self.items if item.has_audio]
        with_facts = [v for v in self.verdicts if v.facts]
        return AudioLedger(
            with_sound=sum(v.facts is not None and v.facts.has_audio for v in with_facts),
            without_sound=sum(v.facts is not None and not v.facts.has_audio for v in with_facts),
            silence=sum(item.silence for item in used),
            undecodable=sum(v.reason == UndecodableSound.reason for v in self.verdicts),
            seconds=sum(item.seconds for item in used if not item.silence),
        )

    def batches_per_epoch(self, batch_size: int) -> int:
        """Batches hold clips of one group; a group's last one may be smaller."""
        draws: Counter[tuple[Bucket, float]] = Counter()
        for item in self.items:
            draws[item.group] += item.repeats + 1
        return sum(-(-count // batch_size) for count in draws.values())

    def digest(self) -> str:
        """Identity of what is trained on, in its order; a resumed run must find the same."""
        rows = [(item.key, item.repeats) for item in self.items]
        return hashlib.sha256(json.dumps(rows).encode()).hexdigest()

    def without(self, failures: Mapping[Item, DataError]) -> Manifest:
        """The manifest with these items failed, after decoding showed what headers did not."""
        return replace(self, verdicts=tuple(_failed(v, failures.get(v.item)) if v.item else v for v in self.verdicts))

    def bucket_counts(self) -> dict[Bucket, int]:
        """Bucket -> clips, most frequent first."""
        return dict(Counter(item.bucket for item in self.items).most_common())

    def describe(self) -> str:
        """One line: found = used + skipped + failed."""
        statuses: tuple[Status, ...] = ("used", "skipped", "failed")
        counts = [f"{status} {self.count(status)}" for status in statuses]
        return f"found {len(self.verdicts)} = {' + '.join(counts)}"

    def table(self) -> str:
        """found = used + skipped + failed, then one line a reason, then the clips concerned."""
        lines = [self.describe()]
        lines += [f"  {count} {status}: {reason}" for (status, reason), count in self.reasons().items()]
        unused = [v for v in self.verdicts if v.status != "used"]
        lines += [f"    {v.path}: {v.detail or v.reason}" for v in unused[:SHOWN]]
        return "\n".join(lines + ([f"    and {len(unused) - SHOWN} more"] if len(unused) > SHOWN else []))


def _failed(verdict: Verdict, error: DataError | None) -> Verdict:
    if error is None:
        return verdict
    return replace(verdict, status="failed", reason=reason_of(error), detail=error.message, item=None)


def reason_of(error: DataError) -> str:
    """What a failed clip is counted under."""
    return error.reason if isinstance(error, MediaError) else "cannot be encoded"


def scan(
    entries: Sequence[DatasetEntry], settings: DataSettings, geometry: Geometry, *,
    progress: Report | None = None, workers: DecodeWorkers | None = None, remember: bool = True,
) -> Manifest:  # fmt: skip
    """Finds and probes all clips; raises `DataError` when the dataset cannot be trained on as it is (see `require_usable`)."""
    manifest = survey(entries, settings, geometry, progress=progress, workers=workers, remember=remember)
    require_usable(manifest, strict=settings.strict)
    return manifest


def survey(
    entries: Sequence[DatasetEntry], settings: DataSettings, geometry: Geometry, *,
    progress: Report | None = None, workers: DecodeWorkers | None = None, remember: bool = True,
) -> Manifest:  # fmt: skip
    """A verdict for every clip, whatever they are. Raises `ConfigError` for settings that the family cannot follow.

    `remember`: write what was measured of the clips to the cache, so that the next time reads none of them again.
    """
    videos = [entry for entry in entries if isinstance(entry, VideoEntry)]
    found = [(entry, path) for entry in videos for path in find_clips(entry)]
    own = workers or DecodeWorkers()
    try:
        examined = _examine_all(found, own, progress, remember)
    finally:
        if workers is None:
            own.close()
    notices: dict[str, None] = {}
    for entry in videos:
        _check_entry(entry, geometry, notices)
    judged = [_judge(e, p, x, settings, geometry, notices) for (e, p), x in zip(found, examined, strict=True)]
    texts = [entry for entry in entries if isinstance(entry, TextEntry)]
    text = next((entry for entry in texts if entry.default), texts[0] if texts else None)
    return Manifest(tuple(judged), tuple(notices), text.cache_dir if text else Path(settings.cache_dir), geometry)


def require_usable(manifest: Manifest, *, strict: bool = False) -> None:
    """Raises `DataError` for clips without caption (all of them are named), when nothing is left, and, if `strict`, for any
    clip that is not used and any adjustment."""
    uncaptioned = [v for v in manifest.verdicts if v.reason == CaptionProblem.reason]
    if uncaptioned:
        lines = "".join(f"\n  {v.path}: {v.detail}" for v in uncaptioned)
        raise DataError(
            f"{len(uncaptioned)} clips have no usable caption:{lines}", where="caption_strategy",
            remedy="write the captions, or move these clips out of the folder",
        )  # fmt: skip
    if not manifest.items:
        raise DataError("no clip can be used: " + manifest.table(), where="datasets", remedy="see the reasons above")
    if strict and (manifest.notices or manifest.count("used") < len(manifest.verdicts)):
        adjusted = "".join(f"\n  {notice}" for notice in manifest.notices)
        raise DataError(f"strict is on, and not everything is used as asked: {manifest.table()}{adjusted}", where="strict")


def find_clips(entry: VideoEntry) -> list[Path]:
    """Clips below the entry's folder, sorted; hidden files and folders are not looked at. Raises `DataError` when there is none."""
    folder = entry.instance_data_dir.absolute()  # worker processes may have started in another working directory
    clips = [
        path for path in folder.rglob("*")
        if path.suffix.lower() in SUFFIXES and path.is_file() and not any(p.startswith(".") for p in path.relative_to(folder).parts)
    ]  # fmt: skip
    if not clips:
        raise DataError(
            f"entry {entry.id!r} has no clips", where="instance_data_dir", value=str(folder),
            remedy=f"clips end in {' '.join(sorted(SUFFIXES))}",
        )  # fmt: skip
    return sorted(clips, key=lambda path: path.relative_to(folder).as_posix())


def _examine_all(
    found: Sequence[tuple[VideoEntry, Path]], workers: DecodeWorkers, progress: Report | None, remember: bool
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
            progress(done, len(todo), "examining clips")
    for index in indexes.values() if remember else ():
        index.save()
    return [result for result in results if result is not None]


def _check_entry(entry: VideoEntry, geometry: Geometry, notices: dict[str, None]) -> None:
    """What concerns the entry as a whole."""
    asked, audio = entry.video.num_frames, entry.audio
    if asked is not None and (frames := geometry.snap_frames(asked)) != asked:
        notices[f"{entry.id}: num_frames {asked} -> {frames} (valid counts are 1 + k·{geometry.frame_step})"] = None
    if not audio.auto_split:
        return
    if audio.sample_rate not in (None, geometry.sample_rate):
        raise ConfigError(
            f"entry {entry.id!r}: the audio encoder takes {geometry.sample_rate} Hz; sound is resampled to that",
            where="audio.sample_rate", value=audio.sample_rate, remedy=f"leave it out, or write {geometry.sample_rate}",
        )  # fmt: skip
    if audio.channels not in (None, 1, geometry.audio_channels):
        raise ConfigError(
            f"entry {entry.id!r}: the audio encoder takes {geometry.audio_channels} channels", where="audio.channels", value=audio.channels,
            remedy=f"leave it out, or write {geometry.audio_channels}, or 1 to mix to mono",
        )  # fmt: skip
    if audio.duration_interval is not None:
        notices[f"{entry.id}: audio.duration_interval has no effect here: sound is as long as its picture"] = None


def _judge(
    entry: VideoEntry, path: Path, examined: Examined | DataError, settings: DataSettings, geometry: Geometry, notices: dict[str, None]
) -> Verdict:
    if isinstance(examined, DataError):
        return Verdict(entry.id, path, "failed", reason_of(examined), examined.message)
    facts = examined.facts
    try:
        caption = read_caption(entry, path)
    except CaptionProblem as problem:
        return Verdict(entry.id, path, "failed", problem.reason, problem.message, facts)
    if entry.audio.auto_split and facts.audio_problem:
        return Verdict(entry.id, path, "failed", UndecodableSound.reason, f"its sound cannot be decoded: {facts.audio_problem}", facts)
    frame_rate = entry.video.frame_rate or settings.frame_rate or geometry.default_frame_rate
    skip = _reason_to_skip(entry, facts, settings) or _length_problem(entry, facts.frames_at(frame_rate), geometry)
    if skip:
        return Verdict(entry.id, path, "skipped", skip.partition(":")[0], skip, facts)
    size = choose_size(facts.width, facts.height, entry.resolution, entry.resolution_type, geometry)
    if size.asked:
        asked = f"{size.asked[0]}x{size.asked[1]}"
        notices[f"{entry.id}: {asked} -> {size.width}x{size.height} (sides are multiples of {geometry.size_step})"] = None
    bucket = Bucket(size.width, size.height, _length(entry, facts.frames_at(frame_rate), geometry))
    item = _item(entry, path, examined, caption, bucket, frame_rate)
    return Verdict(entry.id, path, "used", facts=facts, item=item)


def _item(entry: VideoEntry, path: Path, examined: Examined, caption: str, bucket: Bucket, frame_rate: float) -> Item:
    silence = entry.audio.auto_split and entry.audio.allow_zero_audio and not examined.facts.has_audio
    return Item(
        dataset=entry.id, path=path, content=examined.content, caption=caption, bucket=bucket, frame_rate=frame_rate,
        has_audio=entry.audio.auto_split and (examined.facts.has_audio or silence), mono=entry.audio.channels == 1, silence=silence,
        repeats=entry.repeats, cache_dir=entry.cache_dir,
    )  # fmt: skip


def _reason_to_skip(entry: VideoEntry, facts: MediaFacts, settings: DataSettings) -> str:
    """Why a good clip is left out, as "reason: numbers"; empty: it is not."""
    if min(facts.width, facts.height) < settings.minimum_image_size:
        return f"too small: {facts.width}x{facts.height}, minimum_image_size is {settings.minimum_image_size:g}"
    least, most = entry.audio.min_duration_seconds, entry.audio.max_duration_seconds
    if not (entry.audio.auto_split and facts.has_audio):
        return ""
    if least is not None and facts.audio_seconds < least:
        return f"sound too short: {facts.audio_seconds:.2f} of {least:g} seconds"
    if most is not None and facts.audio_seconds > most:
        return f"sound too long: {facts.audio_seconds:.2f} seconds, at most {most:g}"
    return ""


def _length_problem(entry: VideoEntry, available: int, geometry: Geometry) -> str:
    video = entry.video
    least = video.min_frames or geometry.snap_frames(video.num_frames or 1 + geometry.frame_step)
    if video.max_frames is not None and available > video.max_frames:
        return f"too long: {available} frames, at most {video.max_frames}"
    if _length_is_own(entry, available, geometry):
        least = max(least, video.frame_interval or 1)
    return f"{TooShort.reason}: {available} of {least} frames" if available < least else ""


def _length_is_own(entry: VideoEntry, available: int, geometry: Geometry) -> bool:
    """Whether the clip is shorter than what is taken at most, so that its own length counts."""
    return available < geometry.snap_frames(entry.video.num_frames or LONGEST)


def _length(entry: VideoEntry, available: int, geometry: Geometry) -> int:
    """Frames taken from a clip that has `available` of them at the frame rate."""
    if not _length_is_own(entry, available, geometry):
        return geometry.snap_frames(entry.video.num_frames or LONGEST)
    interval = entry.video.frame_interval or 1
    return geometry.snap_frames(available // interval * interval)
