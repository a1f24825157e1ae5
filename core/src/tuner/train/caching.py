"""Fills the cache: one encoder in memory at a time, clips decoded ahead in worker processes, equal shapes encoded together.

Records are written in threads while the next are encoded, and all of them are there before anybody looks for them.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, TypeVar

import torch

from tuner.data.decode import decode_frames, decode_sound
from tuner.data.manifest import Item, Manifest, Report
from tuner.data.media_index import is_still
from tuner.data.prefetch import Prefetcher
from tuner.data.records import Place, RecordPlaces, SourceFile
from tuner.data.workers import DecodeWorkers
from tuner.data.writer import RecordWriter
from tuner.errors import DataError
from tuner.interfaces.encoders import AudioClip, LatentEncoder, Source, VideoClip
from tuner.interfaces.family import Geometry
from tuner.train.encoding import EncoderAtWork, SettingsChanged, Task, shape_of

Key = TypeVar("Key", Item, str)
Decoded = tuple[Item, Source | DataError]

AHEAD = 2**30
"""Bytes of decoded clips that wait for the encoder at most, or a few clips where a single one is larger than a share of it."""


@dataclass(frozen=True)
class Beside:
    """What is encoded beside the items that are trained on: for validation."""

    items: tuple[Item, ...] = ()
    texts: tuple[str, ...] = ()
    encoders: frozenset[str] = frozenset()
    """Names of the encoders that `items` are for."""


NOTHING_BESIDE = Beside()


@dataclass(frozen=True)
class CacheSummary:
    """What became of the items: found = cached + encoded + failed."""

    manifest: Manifest
    """The manifest without the items that failed."""
    found: int
    cached: int
    """Items all of whose records were there already."""
    encoded: int
    """Items for which at least one record was made."""
    failures: Mapping[Item, DataError]
    captions_cached: int
    captions_encoded: int
    notices: tuple[str, ...] = ()
    """What was adjusted because memory ran out."""

    @property
    def failed(self) -> int:
        """How many items dropped out."""
        return len(self.failures)

    def describe(self) -> str:
        """One line for people, one more for each adjustment and each failure."""
        lines = [
            f"cache: {self.found} clips = {self.cached} cached + {self.encoded} encoded + {self.failed} failed; "
            f"captions: {self.captions_cached} cached + {self.captions_encoded} encoded"
        ]
        lines += [f"  adjusted: {notice}" for notice in self.notices]
        return "\n".join(lines + [f"  failed: {item.path}: {error.message}" for item, error in self.failures.items()])

    def facts(self) -> dict[str, object]:
        """The numbers, and the failed clips' names and reasons, for the run's record."""
        return {
            "found": self.found, "cached": self.cached, "encoded": self.encoded, "failed": self.failed,
            "captions_cached": self.captions_cached, "captions_encoded": self.captions_encoded,
            "notices": list(self.notices),
            "failures": [{"dataset": i.dataset, "clip": i.path.name, "reason": e.message} for i, e in self.failures.items()],
        }  # fmt: skip


class _Tally:
    """What happened so far."""

    def __init__(self) -> None:
        self.encoded: set[Item] = set()
        self.failures: dict[Item, DataError] = {}
        self.captions: set[str] = set()
        """All that were asked for, and those that were encoded."""
        self.captions_encoded: set[str] = set()
        self.notices: list[str] = []

    def summary(self, manifest: Manifest, beside: int) -> CacheSummary:
        found, encoded = len(manifest.items) + beside, len(self.encoded - self.failures.keys())
        return CacheSummary(
            manifest.without(self.failures), found, found - encoded - len(self.failures), encoded, dict(self.failures),
            len(self.captions) - len(self.captions_encoded), len(self.captions_encoded), tuple(self.notices),
        )  # fmt: skip


def fill_cache(
    manifest: Manifest,
    encoders: Sequence[LatentEncoder],
    device: torch.device,
    *,
    batch_size: int = 1,
    with_empty_caption: bool = False,
    report: Report | None = None,
    workers: DecodeWorkers | None = None,
    beside: Beside = NOTHING_BESIDE,
) -> CacheSummary:
    """Makes every record that is missing, encoder by encoder in the given order.

    `with_empty_caption`: also encode "", which caption dropout and guidance need. A clip that cannot be decoded or encoded is counted and
    left out; when none is left that is a `DataError`. Also raises `DiskError`, `OutOfMemoryError`. Encoders are unloaded in every case.
    """
    places = RecordPlaces(encoders, manifest.geometry, manifest.text_cache)
    tally = _Tally()
    own = workers or DecodeWorkers()
    try:
        for encoder in encoders:
            with EncoderAtWork(encoder, device, batch_size, tally.notices) as work:
                filling = _Filling(encoder, places, work, report, tally, own)
                also = beside.items if encoder.name in beside.encoders else ()
                items = [item for item in (*manifest.items, *also) if item not in tally.failures]
                texts = (*beside.texts, *([""] if with_empty_caption else []))
                while True:
                    try:
                        filling.captions(items, texts) if encoder.reads == "text" else filling.clips(items)
                        break
                    except SettingsChanged:  # what was made so far has other names from now on
                        places.refresh(encoder)
    finally:
        if workers is None:
            own.close()
    summary = tally.summary(manifest, len(beside.items))
    if not summary.manifest.items:
        raise DataError("no clip could be encoded: " + summary.manifest.table(), where="datasets")
    return summary


@dataclass
class _Filling:
    """One encoder's records."""

    encoder: LatentEncoder
    places: RecordPlaces
    work: EncoderAtWork
    report: Report | None
    tally: _Tally
    workers: DecodeWorkers

    def captions(self, items: Sequence[Item], further: Sequence[str]) -> None:
        """Of all items' captions, and of `further` texts, without which the run cannot go on."""
        texts = dict.fromkeys([*(item.caption for item in items), *further])
        missing = {text: place for text in texts if not (place := self.places.caption(text, self.encoder.name)).filled()}
        self.tally.captions.update(texts)
        self.tally.captions_encoded.update(missing)
        failed: dict[str, DataError] = {}
        if missing:
            sources = iter([(text, text) for text in missing])
            _Batches(self.work, missing, failed, _Progress(self.report, len(missing), self._label)).encode(sources, str)
        for item in items:
            if item.caption in failed:
                self.tally.failures[item] = failed[item.caption]
            elif item.caption in missing:
                self.tally.encoded.add(item)
        for text in further:
            if text in failed:
                raise failed[text]

    def clips(self, items: Sequence[Item]) -> None:
        """Of all items' pictures, sounds or companions."""
        name = self.encoder.name
        wanted = {item: place for item in items if (place := self.places.clip(item, name)) is not None}
        missing = {item: place for item, place in wanted.items() if not place.filled()}
        # The same clip in two entries, or twice in one folder, is decoded and encoded once.
        first: dict[tuple[Path, str], Item] = {}
        for item, place in missing.items():
            first.setdefault((place.cache.folder, place.key), item)
        sources = {item: source for item in first.values() if (source := self.places.source(item, name)) is not None}
        failed: dict[Item, DataError] = {}
        if sources:
            batches = _Batches(self.work, missing, failed, _Progress(self.report, len(sources), self._label))
            with _ahead(self.encoder, sources, self.places.geometry, self.workers) as decoded:
                batches.encode(decoded, lambda item: str(sources[item].path))
        for item, place in missing.items():
            error = failed.get(first[place.cache.folder, place.key])
            if error is not None:
                self.tally.failures[item] = error
            else:
                self.tally.encoded.add(item)

    @property
    def _label(self) -> str:
        return f"encoding {self.encoder.name}"


@contextmanager
def _ahead(
    encoder: LatentEncoder, sources: Mapping[Item, SourceFile], geometry: Geometry, workers: DecodeWorkers
) -> Iterator[Iterator[Decoded]]:
    """Decoded clips, equal shapes together, made by a thread and the worker processes while the encoder is busy."""
    ordered = dict(sorted(sources.items(), key=lambda pair: (_shape(pair[1], geometry), pair[1].content)))
    # Half of them with the workers, half with the thread.
    share = max(1, AHEAD // 2 // max(_bytes(source, geometry) for source in ordered.values()))
    stream = _examined(_decode(encoder, ordered, geometry, workers, most=share), ordered)
    try:
        with Prefetcher(lambda _: next(stream), depth=min(share, 64)) as decoded:
            try:
                yield decoded
            finally:
                workers.stop()  # else leaving would wait for what is being decoded
    finally:
        stream.close()


def _shape(source: SourceFile, geometry: Geometry) -> tuple[int, int, int, int]:
    return source.frames, source.height, source.width, 0 if source.frames else round(source.seconds * geometry.sample_rate)


def _bytes(source: SourceFile, geometry: Geometry) -> int:
    frames, height, width, samples = _shape(source, geometry)
    return 3 * frames * height * width + 4 * geometry.audio_channels * samples


def _examined(decoded: Generator[Decoded], sources: Mapping[Item, SourceFile]) -> Generator[Decoded]:
    """The same; a file that is another one than was examined has no record, which would have the other content's name for good."""
    try:
        for item, clip in decoded:
            source = sources[item]
            if source.content and not isinstance(clip, DataError) and not is_still(source.path, source.content):
                problem = "was changed since it was examined"
                yield item, DataError(problem, where=str(source.path), remedy="start again when the files stay as they are")
            else:
                yield item, clip
    finally:
        decoded.close()


def _decode(
    encoder: LatentEncoder, sources: Mapping[Item, SourceFile], geometry: Geometry, workers: DecodeWorkers, most: int
) -> Generator[Decoded]:
    """What the files hold, or why that cannot be decoded, in order."""
    rate, channels = geometry.sample_rate, geometry.audio_channels
    if encoder.reads == "video":
        still = encoder.of == "mask"  # a still mask holds for the whole clip
        frames = workers.map(
            decode_frames, [(s.path, s.frames, s.frame_rate, (s.width, s.height), s.start, still) for s in sources.values()], most
        )
        for (item, source), pixels in zip(sources.items(), frames, strict=True):
            yield item, pixels if isinstance(pixels, DataError) else VideoClip(torch.from_numpy(pixels), source.frame_rate)
        return
    heard = [source for source in sources.values() if source.content]
    sounds = workers.map(decode_sound, [(s.path, s.seconds, rate, channels, s.start, s.mono, s.alone) for s in heard], most)
    for item, source in sources.items():
        if not source.content:
            count = round(source.seconds * rate)
            yield item, AudioClip(torch.zeros(channels, count), rate, count)
            continue
        sound = next(sounds)
        if sound is None:
            sound = DataError("its sound track is gone since the clip was examined", where=str(source.path))
        yield item, sound if isinstance(sound, DataError) else AudioClip(torch.from_numpy(sound[0]), rate, sound[1])


@dataclass
class _Batches(Generic[Key]):
    """Puts equal shapes together, has them encoded and writes the records."""

    work: EncoderAtWork
    places: Mapping[Key, Place]
    failed: dict[Key, DataError]
    progress: _Progress

    def encode(self, sources: Iterable[tuple[Key, Source | DataError]], name: Callable[[Key], str]) -> None:
        """`sources`: equal shapes follow each other. `name`: what errors call a source. All records are written on return."""
        with RecordWriter() as writer:
            self._encode(sources, name, writer)

    def _encode(self, sources: Iterable[tuple[Key, Source | DataError]], name: Callable[[Key], str], writer: RecordWriter) -> None:
        batch: list[tuple[Key, Task]] = []
        for key, source in sources:
            if isinstance(source, DataError):
                self.failed[key] = source
                self.progress.add(1)
                continue
            if batch and shape_of(source) != shape_of(batch[0][1].source):
                self._finish(batch, writer)
                batch = []
            batch.append((key, Task(name(key), source)))
            if len(batch) >= self.work.batch_size:
                self._finish(batch, writer)
                batch = []
        if batch:
            self._finish(batch, writer)

    def _finish(self, batch: Sequence[tuple[Key, Task]], writer: RecordWriter) -> None:
        for (key, _), result in zip(batch, self.work.encode([task for _, task in batch]), strict=True):
            if isinstance(result, DataError):
                self.failed[key] = result
            else:
                writer.write(self.places[key], result)
        self.progress.add(len(batch))


class _Progress:
    """Says after each batch how many sources are done."""

    def __init__(self, report: Report | None, total: int, label: str) -> None:
        self._report, self._total, self._label, self._done = report, total, label, 0
        self.add(0)

    def add(self, count: int) -> None:
        self._done += count
        if self._report:
            self._report(self._done, self._total, self._label)
