"""The verdict on one file: what is trained of it, or why it is left out."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from tuner.config.entries import AudioEntry, CaptionedEntry, DatasetEntry, EvalEntry, ImageEntry, PictureEntry, TurnOptions
from tuner.config.linking import trained_alone
from tuner.config.settings import DataSettings
from tuner.data.buckets import Bucket, choose_size
from tuner.data.captions import CaptionProblem, read_caption
from tuner.data.discover import PICTURES
from tuner.data.facts import MediaFacts, NoVideoStream, UndecodableSound
from tuner.data.items import Companion, Item, Kind, Verdict, reason_of
from tuner.data.lengths import LONGEST, Span, Unfit, check_duration, clip_span, cut_by_default, sound_span
from tuner.data.media_index import Examined
from tuner.data.pairing import Companions
from tuner.errors import ConfigError, DataError
from tuner.interfaces.family import Geometry


class _Defect(Exception):
    """The file is damaged."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(detail)
        self.reason, self.detail = reason, detail


class _Sound(NamedTuple):
    """What is trained beside a picture."""

    trained: bool
    silence: bool = False
    mono: bool = False
    companion: tuple[Companion, ...] = ()


NO_SOUND = _Sound(False)


class Judge:
    """Judges files one by one, and collects what was adjusted in `notices`, each once."""

    def __init__(self, settings: DataSettings, geometry: Geometry, companions: Companions) -> None:
        self._settings = settings
        self._geometry = geometry
        self._companions = companions
        self.notices = companions.notices

    def verdict(self, entry: CaptionedEntry, path: Path, examined: Examined | DataError) -> Verdict:
        """Of a file that is trained or held out by itself."""
        if isinstance(examined, DataError):
            return Verdict(entry.id, path, "failed", reason_of(examined), examined.message)
        facts = examined.facts
        try:
            caption = read_caption(entry, path)
            item = self._item(entry, path, examined, caption)
        except CaptionProblem as problem:
            return Verdict(entry.id, path, "failed", problem.reason, problem.message, facts)
        except _Defect as defect:
            return Verdict(entry.id, path, "failed", defect.reason, defect.detail, facts)
        except Unfit as unfit:
            detail = str(unfit)
            return Verdict(entry.id, path, "skipped", detail.partition(":")[0], detail, facts)
        return Verdict(entry.id, path, "held out" if isinstance(entry, EvalEntry) else "used", facts=facts, item=item)

    def _item(self, entry: CaptionedEntry, path: Path, examined: Examined, caption: str) -> Item:
        if not isinstance(entry, PictureEntry) or entry.audio.audio_only:
            return self._sound_alone(entry, path, examined, caption)
        return self._picture(entry, path, examined, caption)

    def _sound_alone(self, entry: CaptionedEntry, path: Path, examined: Examined, caption: str) -> Item:
        if not examined.facts.has_audio:
            raise Unfit("no sound")
        _require_decodable_sound(examined.facts)
        span = sound_span(entry.audio, examined.facts, examined.content)
        sound = _Sound(True, mono=entry.audio.channels == 1)
        return self._make(entry, path, examined, caption, Bucket(0, 0, 0, span.seconds), span, sound)

    def _picture(self, entry: PictureEntry, path: Path, examined: Examined, caption: str) -> Item:
        facts = examined.facts
        still = isinstance(entry, ImageEntry) or path.suffix.lower() in PICTURES
        if facts.kind == "audio":
            raise _Defect(NoVideoStream.reason, "holds no picture")
        _check_size(entry, facts, self._settings)
        frame_rate = self._frame_rate(entry)
        if still:
            span = Span(1, 0.0, 0.0)
        else:
            _check_own_sound(entry, facts)
            span = clip_span(entry.video, entry.audio, facts, frame_rate, examined.content, self._geometry)
            if cut_by_default(entry.video, facts, frame_rate):
                self.notices[f"{entry.id}: of longer clips {LONGEST} frames are used (video.num_frames says how many)"] = None
        bucket = Bucket(*self._size(entry, facts), span.frames)
        sound = NO_SOUND if still else self._sound(entry, path, facts, bucket, span.start)
        beside = (*sound.companion, *self._companions.conditioning(entry, path, bucket, frame_rate, span.start))
        return self._make(entry, path, examined, caption, bucket, span, sound, beside)

    def _sound(self, entry: PictureEntry, path: Path, facts: MediaFacts, bucket: Bucket, start: float) -> _Sound:
        """The sound of a clip: of its own, of another file, or silence."""
        audio = entry.audio
        if not audio.auto_split:
            return NO_SOUND
        if not entry.s2v_datasets:
            silence = audio.allow_zero_audio and not facts.has_audio
            return _Sound(facts.has_audio or silence, silence, audio.channels == 1)
        linked = self._companions.sound(entry, path, bucket, start)
        if linked is not None:
            companion, source = linked
            return _Sound(True, mono=source.audio.channels == 1, companion=(companion,))
        if not audio.allow_zero_audio:
            raise Unfit(f"no linked sound: {path.stem} is in none of {', '.join(entry.s2v_datasets)}")
        return _Sound(True, silence=True)

    def _size(self, entry: PictureEntry, facts: MediaFacts) -> tuple[int, int]:
        step = self._geometry.size_step
        square = entry.crop and entry.crop_aspect == "square"
        width, height = (step, step) if square else (facts.width, facts.height)
        size = choose_size(width, height, entry.resolution, entry.resolution_type, self._geometry)
        if size.asked is not None:
            asked = f"{size.asked[0]}x{size.asked[1]}"
            self.notices[f"{entry.id}: {asked} -> {size.width}x{size.height} (sides are multiples of {step})"] = None
        return size.width, size.height

    def _frame_rate(self, entry: CaptionedEntry) -> float:
        own = entry.video.frame_rate if isinstance(entry, PictureEntry) else None
        return own or self._settings.frame_rate or self._geometry.default_frame_rate

    def _make(
        self, entry: CaptionedEntry, path: Path, examined: Examined, caption: str, bucket: Bucket, span: Span, sound: _Sound,
        companions: tuple[Companion, ...] = (),
    ) -> Item:  # fmt: skip
        turns = entry if isinstance(entry, TurnOptions) else None
        kind: Kind = "audio" if bucket.seconds else "image" if isinstance(entry, ImageEntry) or path.suffix.lower() in PICTURES else "video"
        return Item(
            dataset=entry.id, path=path, content=examined.content, caption=caption, bucket=bucket, frame_rate=self._frame_rate(entry),
            has_audio=sound.trained, mono=sound.mono, silence=sound.silence, repeats=turns.repeats if turns else 0,
            cache_dir=entry.cache_dir, kind=kind, start=span.start, companions=companions,
            probability=turns.probability if turns else 1.0,
            first_frame=kind == "video" and isinstance(entry, PictureEntry) and entry.video.is_i2v,
        )  # fmt: skip


def check_entry(entry: CaptionedEntry, entries: Sequence[DatasetEntry], geometry: Geometry) -> list[str]:
    """What concerns the entry as a whole: notices. Raises `ConfigError` for settings that the family cannot follow."""
    notices, audio = [], entry.audio
    asked = entry.video.num_frames if isinstance(entry, PictureEntry) else None
    if asked is not None and (frames := geometry.snap_frames(asked)) != asked:
        notices.append(f"{entry.id}: num_frames {asked} -> {frames} (valid counts are 1 + k·{geometry.frame_step})")
    if not audio.auto_split:
        return notices
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
    alone = audio.audio_only or (isinstance(entry, AudioEntry) and trained_alone(entry, entries))
    if audio.duration_interval is not None and not alone:
        notices.append(f"{entry.id}: audio.duration_interval has no effect here: sound is as long as its picture")
    if alone and not audio.audio_only:
        notices.append(f"{entry.id}: no entry names it in s2v_datasets, so its sounds are trained alone (as with audio.audio_only)")
    return notices


def _check_size(entry: PictureEntry, facts: MediaFacts, settings: DataSettings) -> None:
    least = settings.minimum_image_size if entry.minimum_image_size is None else entry.minimum_image_size
    megapixels = entry.resolution_type == "area"
    if (facts.width * facts.height / 1e6 if megapixels else min(facts.width, facts.height)) < least:
        unit = "megapixels" if megapixels else "pixels"
        raise Unfit(f"too small: {facts.width}x{facts.height}, minimum_image_size is {least:g} {unit}")
    aspect = facts.width / facts.height
    if aspect < (entry.minimum_aspect_ratio or 0.0):
        raise Unfit(f"too narrow: {facts.width}x{facts.height}, minimum_aspect_ratio is {entry.minimum_aspect_ratio:g}")
    if entry.maximum_aspect_ratio is not None and aspect > entry.maximum_aspect_ratio:
        raise Unfit(f"too wide: {facts.width}x{facts.height}, maximum_aspect_ratio is {entry.maximum_aspect_ratio:g}")


def _check_own_sound(entry: PictureEntry, facts: MediaFacts) -> None:
    """The clip's own track, where it is trained."""
    if entry.audio.auto_split and not entry.s2v_datasets and facts.has_audio:
        _require_decodable_sound(facts)
        check_duration(entry.audio, facts.audio_seconds)


def _require_decodable_sound(facts: MediaFacts) -> None:
    if facts.audio_problem:
        raise _Defect(UndecodableSound.reason, f"its sound cannot be decoded: {facts.audio_problem}")
