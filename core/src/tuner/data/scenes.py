"""Has worker processes look at every file of a manifest, as training decodes it; what cannot be decoded drops out by name."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from tuner.data.discover import Report
from tuner.data.facts import MediaFacts
from tuner.data.items import Item, Verdict, reason_of
from tuner.data.lengths import LONGEST
from tuner.data.looks import Look, Picture, Scene, Sound, look
from tuner.data.loudness import LOWEST_RATE
from tuner.data.manifest import Manifest
from tuner.data.records import audio_source, video_source
from tuner.data.workers import DecodeWorkers
from tuner.errors import DataError

USUAL_RATE = 48000
"""Hz, where a file's own rate is not known or too low to be measured."""
GLANCE = 30.0
"""Seconds of sound that are drawn at most of a file that is not trained."""


@dataclass(frozen=True)
class Viewed:
    """A manifest after decoding, and what was seen of each of its verdicts."""

    manifest: Manifest
    looks: tuple[Look | None, ...]
    """None: nothing was looked at, or nothing could be."""


def view(manifest: Manifest, workers: DecodeWorkers, *, progress: Report | None = None, thumbnails: int = 0) -> Viewed:
    """Decodes what is used or held out. What fails is failed in the manifest that comes back, as caching would fail it.

    `thumbnails`: so many verdicts keep their small pictures, from the first on; among them also files that are skipped.
    """
    facts = {verdict.path: verdict.facts for verdict in manifest.verdicts if verdict.facts}
    scenes = {number: scene for number, verdict in enumerate(manifest.verdicts) if (scene := _scene(verdict, facts, number < thumbnails))}
    looks: list[Look | None] = [None] * len(manifest.verdicts)
    verdicts = list(manifest.verdicts)
    found = workers.map(look, [(verdicts[number].path, scene) for number, scene in scenes.items()])
    for done, (number, result) in enumerate(zip(scenes, found, strict=True), 1):
        if not isinstance(result, DataError):
            looks[number] = result
        elif verdicts[number].item is not None:
            verdicts[number] = failed(verdicts[number], result)
        if progress:
            progress(done, len(scenes), "decoding files")
    return Viewed(replace(manifest, verdicts=tuple(verdicts)), tuple(looks))


def failed(verdict: Verdict, error: DataError) -> Verdict:
    """The verdict on a file that decoding showed to be unusable."""
    return replace(verdict, status="failed", reason=reason_of(error), detail=error.message, item=None)


def _scene(verdict: Verdict, facts: Mapping[Path, MediaFacts], thumbnails: bool) -> Scene | None:
    if verdict.item is not None:
        return Scene(_pictures(verdict.item), _sound(verdict.item, facts), thumbnails)
    return _glance(verdict.path, verdict.facts) if verdict.facts and thumbnails and not verdict.companion else None


def _pictures(item: Item) -> tuple[Picture, ...]:
    """The item's own, then those of files that belong to it."""
    roles = ["clip", *(companion.role for companion in item.companions if companion.role != "sound")]
    sources = [(role, video_source(item, role)) for role in roles]
    return tuple(Picture(role, s.path, s.frames, s.frame_rate, (s.width, s.height), s.start) for role, s in sources if s)


def _sound(item: Item, facts: Mapping[Path, MediaFacts]) -> Sound | None:
    """What is trained; None also for silence that is made."""
    source = audio_source(item)
    if source is None or not source.content:
        return None
    rate, channels = _format(facts.get(source.path))
    return Sound(source.path, source.seconds, rate, 1 if source.mono else channels, source.start, source.mono, source.alone)


def _format(facts: MediaFacts | None) -> tuple[int, int]:
    """(Hz, channels) to decode with."""
    rate = facts.audio_rate if facts and facts.audio_rate >= LOWEST_RATE else USUAL_RATE
    return rate, 1 if facts and facts.audio_channels == 1 else 2


def _glance(path: Path, facts: MediaFacts) -> Scene:
    """A file that is not trained."""
    pictures: Sequence[Picture] = ()
    if facts.kind != "audio":
        rate = facts.fps or 1.0
        pictures = [Picture("clip", path, max(1, min(facts.frames_at(rate), LONGEST)), rate, (facts.width, facts.height))]
    sound = None
    if facts.has_audio and not facts.audio_problem:
        rate, channels = _format(facts)
        sound = Sound(path, min(facts.audio_seconds, GLANCE), rate, channels, alone=facts.kind == "audio")
    return Scene(tuple(pictures), sound, thumbnails=True)
