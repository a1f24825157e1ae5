"""What a dataset is, and what would be trained of it: a row for every file, and totals that add up. No weights are needed nor loaded."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from tuner.config.datasets import DatasetEntry, configured_datasets
from tuner.config.entries import FolderEntry, TurnOptions
from tuner.config.resolve import Settings
from tuner.config.settings import DataSettings, ModelSettings, RunSettings, TrainSettings
from tuner.data.discover import Report
from tuner.data.epochs import GroupTurns, group_turns, sound_share
from tuner.data.facts import MediaFacts
from tuner.data.items import Item, Verdict
from tuner.data.looks import Heard, Look
from tuner.data.manifest import Manifest, require_usable, survey
from tuner.data.remarks import Remark, equal_captions, estimate_tokens, find_remarks
from tuner.data.scenes import view
from tuner.data.workers import DecodeWorkers
from tuner.errors import ConfigError, DataError, TunerError
from tuner.interfaces.family import BuildContext, ModelFamily
from tuner.plugins.registry import Registry


@dataclass(frozen=True)
class MediaRow:
    """What a file holds."""

    kind: str
    """"video", "image" or "audio"."""
    width: int
    """Pixels; 0 for sound alone, like `height` and `frames`."""
    height: int
    fps: float
    frames: int
    seconds: float
    codec: str


@dataclass(frozen=True)
class UseRow:
    """What of a file is trained or held out."""

    bucket: str
    """What it is brought to, as `768x512@97`."""
    frames: int
    """0 for sound alone."""
    seconds: float
    start: float
    """Seconds into the file."""
    frame_rate: float
    turns: int
    """How often an epoch sees it, before the dataset's `probability`; 0: it is held out."""
    files: tuple[str, ...]
    """Files that belong to it, as "mask masks: cat.png"."""


@dataclass(frozen=True)
class SoundRow:
    """Sound of one file, as it is trained where it is."""

    source: str
    """"own", "silence" (made), or the file that it is from."""
    trained: bool
    channels: int
    """Of the file; 0: not known, like `rate`."""
    rate: int
    """Hz."""
    measured: bool = False
    loudness: float | None = None
    """LUFS of what is used; None: silence, or not measured."""
    peak: float | None = None
    """dB relative to full scale; None: silence, or not measured."""
    clipped: float | None = None
    """Share of the samples; None: not measured."""


@dataclass(frozen=True)
class CaptionRow:
    """The caption of one file."""

    text: str
    words: int
    tokens: int
    """About."""


@dataclass(frozen=True)
class Row:
    """One file."""

    dataset: str
    file: str
    """Below the dataset's folder."""
    status: str
    reason: str
    detail: str
    belongs_to_others: bool
    """It is the sound, reference or mask of other files."""
    media: MediaRow | None
    """None: it could not be read."""
    use: UseRow | None
    """None: it is left out, or used with another file."""
    sound: SoundRow | None
    """None: there is no sound."""
    caption: CaptionRow | None
    remarks: tuple[Remark, ...]

    @property
    def fine(self) -> bool:
        """Whether it is used or held out, and nothing was noticed."""
        return self.status in ("used", "held out") and not self.remarks


@dataclass(frozen=True)
class DatasetRow:
    """One entry of the dataset file that has files."""

    name: str
    folder: str
    kind: str
    found: int
    """found = used + skipped + failed + held_out"""
    used: int
    skipped: int
    failed: int
    held_out: int
    repeats: int
    probability: float


@dataclass(frozen=True)
class Inspection:
    """All of it. `rows` and `looks` follow the manifest's verdicts."""

    family: str
    streams: tuple[str, ...]
    """What would be trained; empty: nothing can be."""
    manifest: Manifest
    rows: tuple[Row, ...]
    looks: tuple[Look | None, ...]
    datasets: tuple[DatasetRow, ...]
    groups: tuple[GroupTurns, ...]
    batch_size: int
    sound_share: float
    """Of the batches of the first epoch: those in which a sample has sound."""
    notices: tuple[str, ...]
    """What would be adjusted, and what was noticed of a dataset as a whole."""
    stops: str
    """Why `tuner train` would not start; empty: as far as the dataset goes, it would."""

    @property
    def sound(self) -> str:
        """The audio ledger. One line."""
        return f"{self.manifest.ledger.describe()}; in {self.sound_share:.0%} of the batches"

    @property
    def batches(self) -> int:
        """In an epoch."""
        return sum(group.batches for group in self.groups)

    @property
    def remarked(self) -> dict[str, int]:
        """Kind of remark -> files, most frequent first."""
        return dict(Counter(remark.kind for row in self.rows for remark in row.remarks).most_common())

    @property
    def flawless(self) -> bool:
        """Whether everything is used as it is and nothing was noticed."""
        return all(row.fine for row in self.rows) and not self.notices and not self.stops


def inspect(
    registry: Registry, settings: Settings, *, decode: bool = True, thumbnails: int = 0, progress: Report | None = None
) -> Inspection:
    """Finds, measures and, if `decode`, looks at and listens to all files; writes nothing.

    `thumbnails`: so many files keep small pictures. Raises `ConfigError` for a configuration that cannot be followed, `DataError` for a
    dataset that is not there.
    """
    name, family = find_family(registry, settings)
    data, train = settings.get(DataSettings), settings.get(TrainSettings)
    entries = configured_datasets(settings, name)
    with DecodeWorkers() as workers:
        manifest = survey(entries, data, family.geometry, progress=progress, workers=workers, remember=False)
        looks: tuple[Look | None, ...] = (None,) * len(manifest.verdicts)
        if decode:
            viewed = view(manifest, workers, progress=progress, thumbnails=thumbnails)
            manifest, looks = viewed.manifest, viewed.looks
    places = Places(entries)
    verdicts = manifest.verdicts
    remarks = find_remarks(verdicts, looks, family.caption_tokens, places.of)
    streams, stops = _streams(family, manifest)
    return Inspection(
        name, streams, manifest, tuple(map(_Rows(manifest, places).row, verdicts, looks, remarks)), looks,
        tuple(_dataset(entry, verdicts) for entry in entries if isinstance(entry, FolderEntry)),
        tuple(group_turns(manifest.items, train.train_batch_size)), train.train_batch_size,
        sound_share(manifest.items, train.train_batch_size, train.seed),
        tuple(places.clean(notice) for notice in (*manifest.notices, *equal_captions(verdicts, entries))), places.clean(stops),
    )  # fmt: skip


def find_family(registry: Registry, settings: Settings) -> tuple[str, ModelFamily]:
    """The family that was chosen, or the only one that is installed. Nothing of the model is looked for. Raises `ConfigError`."""
    model = settings.get(ModelSettings)
    names = [component.name for component in registry.components("family")]
    chosen = model.model_family or (names[0] if len(names) == 1 else "")
    if not chosen:
        raise ConfigError(
            "sizes and lengths depend on the model family, and none was chosen", where="model_family",
            remedy=f"add --family NAME; installed: {', '.join(names) or 'none: install one'}",
        )  # fmt: skip
    component = registry.component("family", chosen)
    dtype = torch.bfloat16 if model.mixed_precision == "bf16" else torch.float32
    output = Path(settings.get(RunSettings).output_dir)
    context = BuildContext(torch.device("cpu"), dtype, settings.get(TrainSettings).seed, 0, output)
    family: ModelFamily = component.load()(settings.get(component.options), context)  # type: ignore[operator]
    return component.name, family


def _streams(family: ModelFamily, manifest: Manifest) -> tuple[tuple[str, ...], str]:
    """The streams that would be trained, and what keeps a run from starting."""
    streams: tuple[str, ...] = ()
    try:
        streams = family.select_streams(manifest.streams_available) if manifest.items else ()
        require_usable(manifest)
    except DataError as error:
        return streams, error.message.partition("\n")[0].removesuffix(":")
    except TunerError as error:
        return streams, f"{error.where}: {error.message}"
    return streams, ""


class Places:
    """What files are called: below their folder, which is called as the user wrote it."""

    def __init__(self, entries: Sequence[DatasetEntry]) -> None:
        self._folders = {entry.id: entry.instance_data_dir.absolute() for entry in entries if isinstance(entry, FolderEntry)}
        written = {entry.instance_data_dir.absolute(): folder_name(entry) for entry in entries if isinstance(entry, FolderEntry)}
        self._written = sorted(written.items(), key=lambda pair: -len(str(pair[0])))

    def file(self, verdict: Verdict) -> str:
        """Below its folder."""
        return verdict.path.relative_to(self._folders[verdict.dataset]).as_posix()

    def of(self, verdict: Verdict) -> str:
        """With its dataset, where there are several."""
        return f"{verdict.dataset}: {self.file(verdict)}" if len(self._folders) > 1 else self.file(verdict)

    def clean(self, text: str) -> str:
        """A message without absolute paths that nobody wrote."""
        for folder, written in self._written:
            text = text.replace(str(folder), written)
        return text


def folder_name(entry: FolderEntry) -> str:
    """As it was given, but for the home folder: that is `~`, whatever it was given as."""
    folder = entry.instance_data_dir
    try:
        home = Path.home()
    except RuntimeError:  # a user without one
        return folder.as_posix()
    return f"~/{folder.relative_to(home).as_posix()}" if home.name and folder.is_relative_to(home) else folder.as_posix()


def _dataset(entry: FolderEntry, verdicts: Sequence[Verdict]) -> DatasetRow:
    counts = Counter(verdict.status for verdict in verdicts if verdict.dataset == entry.id)
    statuses = (counts["used"], counts["skipped"], counts["failed"], counts["held out"])
    turns = entry if isinstance(entry, TurnOptions) else TurnOptions()
    return DatasetRow(entry.id, folder_name(entry), entry.dataset_type, counts.total(), *statuses, turns.repeats, turns.probability)


class _Rows:
    """Makes the rows of a manifest."""

    def __init__(self, manifest: Manifest, places: Places) -> None:
        self._places = places
        self._by_path = {verdict.path: verdict for verdict in manifest.verdicts}

    def row(self, verdict: Verdict, look: Look | None, remarks: tuple[Remark, ...]) -> Row:
        """Of one file."""
        facts, item = verdict.facts, verdict.item
        text = item.caption if item else ""
        return Row(
            verdict.dataset, self._places.file(verdict), verdict.status, verdict.reason, self._places.clean(verdict.detail),
            verdict.companion, _media(facts) if facts else None, self._use(item, verdict.status) if item else None,
            self._sound(verdict, look), CaptionRow(text, len(text.split()), estimate_tokens(text)) if item else None, remarks,
        )  # fmt: skip

    def _use(self, item: Item, status: str) -> UseRow:
        files = tuple(f"{companion.role} {self._place(companion.path)}" for companion in item.companions)
        turns = item.repeats + 1 if status == "used" else 0
        return UseRow(str(item.bucket), item.bucket.frames, item.seconds, item.start, item.frame_rate, turns, files)

    def _sound(self, verdict: Verdict, look: Look | None) -> SoundRow | None:
        facts, item = verdict.facts, verdict.item
        linked = item.companion("sound") if item else None
        if item is not None and item.silence and linked is None:
            return SoundRow("silence", True, 0, 0)
        source = self._by_path[linked.path].facts if linked else facts
        if source is None or not source.has_audio:
            return None
        row = SoundRow(
            self._place(linked.path) if linked else "own", item.has_audio if item else False, source.audio_channels, source.audio_rate
        )
        return _measured(row, look.heard) if look and look.heard else row

    def _place(self, path: Path) -> str:
        return self._places.of(self._by_path[path])


def _media(facts: MediaFacts) -> MediaRow:
    return MediaRow(facts.kind, facts.width, facts.height, round(facts.fps, 3), facts.frames, round(facts.seconds, 3), facts.codec)


def _measured(row: SoundRow, heard: Heard) -> SoundRow:
    peak = round(20 * math.log10(heard.peak), 1) if heard.peak > 0 else None
    loudness = None if heard.loudness is None else round(heard.loudness, 1)
    return replace(row, loudness=loudness, peak=peak, clipped=round(heard.clipped, 5), measured=True)
