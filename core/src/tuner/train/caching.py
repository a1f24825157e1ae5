"""Fills the cache: one encoder in memory at a time, clips decoded ahead in worker processes, equal shapes encoded together."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch

from tuner.data.decode import decode_frames, decode_sound
from tuner.data.manifest import Item, Manifest, Report
from tuner.data.records import Place, RecordPlaces
from tuner.data.workers import DecodeWorkers
from tuner.errors import DataError, OutOfMemoryError, PluginError
from tuner.interfaces.encoders import AudioClip, LatentEncoder, Source, VideoClip
from tuner.interfaces.family import Geometry

Key = TypeVar("Key", Item, str)


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

    @property
    def failed(self) -> int:
        """How many items dropped out."""
        return len(self.failures)

    def describe(self) -> str:
        """One line for people, one more for each failure."""
        lines = [
            f"cache: {self.found} clips = {self.cached} cached + {self.encoded} encoded + {self.failed} failed; "
            f"captions: {self.captions_cached} cached + {self.captions_encoded} encoded"
        ]
        return "\n".join(lines + [f"  failed: {item.path}: {error.message}" for item, error in self.failures.items()])

    def facts(self) -> dict[str, object]:
        """The numbers, and the failed clips' names and reasons, for the run's record."""
        return {
            "found": self.found, "cached": self.cached, "encoded": self.encoded, "failed": self.failed,
            "captions_cached": self.captions_cached, "captions_encoded": self.captions_encoded,
            "failures": [{"dataset": i.dataset, "clip": i.path.name, "reason": e.message} for i, e in self.failures.items()],
        }  # fmt: skip


class _Tally:
    """What happened so far."""

    def __init__(self) -> None:
        self.encoded: set[Item] = set()
        self.failures: dict[Item, DataError] = {}
        self.captions_cached = self.captions_encoded = 0

    def summary(self, manifest: Manifest) -> CacheSummary:
        found, encoded = len(manifest.items), len(self.encoded - self.failures.keys())
        return CacheSummary(
            manifest.without(self.failures), found, found - encoded - len(self.failures), encoded, dict(self.failures),
            self.captions_cached, self.captions_encoded,
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
            items = [item for item in manifest.items if item not in tally.failures]
            if encoder.reads == "text":
                captions = dict.fromkeys([item.caption for item in items] + [""] * with_empty_caption)
                _fill_captions(encoder, list(captions), items, places, device, batch_size, report, tally)
            else:
                _fill_clips(encoder, items, places, device, batch_size, report, tally, own)
    finally:
        if workers is None:
            own.close()
    summary = tally.summary(manifest)
    if not summary.manifest.items:
        raise DataError("no clip could be encoded: " + summary.manifest.table(), where="datasets")
    return summary


def _fill_captions(
    encoder: LatentEncoder, captions: Sequence[str], items: Sequence[Item], places: RecordPlaces, device: torch.device, batch_size: int,
    report: Report | None, tally: _Tally,
) -> None:  # fmt: skip
    missing = {text: place for text in captions if not (place := places.caption(text, encoder.name)).filled()}
    tally.captions_cached += len(captions) - len(missing)
    tally.captions_encoded += len(missing)
    failed: dict[str, DataError] = {}
    if missing:
        _encode_all(encoder, iter([(text, text) for text in missing]), missing, device, batch_size, report, failed)
    for item in items:
        if item.caption in failed:
            tally.failures[item] = failed[item.caption]
        elif item.caption in missing:
            tally.encoded.add(item)
    if "" in failed:
        raise failed[""]


def _fill_clips(
    encoder: LatentEncoder, items: Sequence[Item], places: RecordPlaces, device: torch.device, batch_size: int,
    report: Report | None, tally: _Tally, workers: DecodeWorkers,
) -> None:  # fmt: skip
    wanted = {item: place for item in items if (place := places.clip(item, encoder.name)) is not None}
    missing = {item: place for item, place in wanted.items() if not place.filled()}
    # The same clip in two entries, or twice in one folder, is decoded and encoded once.
    first: dict[tuple[Path, str], Item] = {}
    for item, place in missing.items():
        first.setdefault((place.cache.folder, place.key), item)
    unique = sorted(first.values(), key=lambda item: item.group)
    failed: dict[Item, DataError] = {}
    if unique:
        sources = _decode_ahead(encoder, unique, places.geometry, workers, failed)
        _encode_all(encoder, sources, {item: missing[item] for item in unique}, device, batch_size, report, failed)
    for item, place in missing.items():
        error = failed.get(first[place.cache.folder, place.key])
        if error is not None:
            tally.failures[item] = error
        else:
            tally.encoded.add(item)


def _decode_ahead(
    encoder: LatentEncoder, items: Sequence[Item], geometry: Geometry, workers: DecodeWorkers, failed: dict[Item, DataError]
) -> Iterator[tuple[Item, Source]]:
    """Decoded clips, in order; those that cannot be decoded go to `failed`."""
    if encoder.reads == "video":
        frames = workers.map(decode_frames, [(i.path, i.bucket.frames, i.frame_rate, (i.bucket.width, i.bucket.height)) for i in items])
        for item, pixels in zip(items, frames, strict=True):
            if isinstance(pixels, DataError):
                failed[item] = pixels
            else:
                yield item, VideoClip(torch.from_numpy(pixels), item.frame_rate)
        return
    rate, channels = geometry.sample_rate, geometry.audio_channels
    silent = [item for item in items if item.silence]
    for item in silent:
        count = round(item.seconds * rate)
        yield item, AudioClip(torch.zeros(channels, count), rate, count)
    heard = [item for item in items if not item.silence]
    sounds = workers.map(decode_sound, [(i.path, i.seconds, rate, channels, 0.0, i.mono) for i in heard])
    for item, sound in zip(heard, sounds, strict=True):
        if isinstance(sound, DataError):
            failed[item] = sound
        elif sound is None:
            failed[item] = DataError("its sound track is gone since the clip was examined", where=str(item.path))
        else:
            yield item, AudioClip(torch.from_numpy(sound[0]), rate, sound[1])


def _encode_all(
    encoder: LatentEncoder, sources: Iterator[tuple[Key, Source]], places: Mapping[Key, Place], device: torch.device, batch_size: int,
    report: Report | None, failed: dict[Key, DataError],
) -> None:  # fmt: skip
    """Loads the encoder, encodes `sources` in batches of equal shape, writes the records, unloads. Failures go to `failed`."""
    label = f"encoding {encoder.name}"
    waiting: dict[tuple[int, ...], list[tuple[Key, Source]]] = {}
    loaded = False
    done = _Progress(report, len(places), label)
    try:
        for key, source in sources:
            if not loaded:  # not earlier: where no clip can be decoded, nothing is loaded
                loaded = True
                encoder.load(device)
            batch = waiting.setdefault(_shape(source), [])
            batch.append((key, source))
            if len(batch) == batch_size:
                done.add(_encode_batch(encoder, waiting.pop(_shape(source)), places, failed))
        for batch in waiting.values():
            done.add(_encode_batch(encoder, batch, places, failed))
    except torch.OutOfMemoryError as error:
        raise OutOfMemoryError(
            f"not enough device memory to encode with {encoder.name!r}", where="caching", remedy="lower vae_batch_size or resolution"
        ) from error
    finally:
        if loaded:
            encoder.unload()


class _Progress:
    """Says after each batch how many records there are."""

    def __init__(self, report: Report | None, total: int, label: str) -> None:
        self._report, self._total, self._label, self._done = report, total, label, 0
        self.add(0)

    def add(self, count: int) -> None:
        self._done += count
        if self._report:
            self._report(self._done, self._total, self._label)


def _shape(source: Source) -> tuple[int, ...]:
    """Sources of one shape are encoded together; captions all are."""
    if isinstance(source, VideoClip):
        return tuple(source.frames.shape)
    return tuple(source.samples.shape) if isinstance(source, AudioClip) else ()


def _encode_batch(
    encoder: LatentEncoder, batch: Sequence[tuple[Key, Source]], places: Mapping[Key, Place], failed: dict[Key, DataError]
) -> int:
    """How many records were written. A source that the encoder declines is set apart, the others of the batch are encoded singly."""
    try:
        records = encoder.encode([source for _, source in batch])
    except DataError as error:
        if len(batch) == 1:
            failed[batch[0][0]] = error
            return 0
        return sum(_encode_batch(encoder, [one], places, failed) for one in batch)
    if len(records) != len(batch):
        raise PluginError(f"encoder {encoder.name!r} returned {len(records)} records for {len(batch)} sources")
    for (key, _), record in zip(batch, records, strict=True):
        places[key].cache.write(places[key].key, record)
    return len(records)
