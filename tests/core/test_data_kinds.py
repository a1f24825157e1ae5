"""Pictures, sounds, held-out files, companions: every file found has a verdict, per entry, and every item says what is trained of it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from core.clips import tone, write_clip, write_sound
from core.encoders import GEOMETRY
from tuner.config.datasets import load_datasets
from tuner.config.settings import DataSettings
from tuner.data.buckets import Bucket
from tuner.data.items import Item
from tuner.data.manifest import Manifest, require_usable, scan, survey
from tuner.data.workers import DecodeWorkers
from tuner.errors import DataError

SETTINGS = DataSettings(resolution=64, cache_dir="cache")


@pytest.fixture(scope="module")
def workers() -> Iterator[DecodeWorkers]:
    with DecodeWorkers(1) as pool:
        yield pool


def picture(path: Path, width: int, height: int, shade: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((height, width, 3), shade, np.uint8)).save(path)


def sound(path: Path, seconds: float) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_sound(path, tone(seconds, 16000, 1, [(0, seconds)]), 16000, "pcm_s16le")


@pytest.fixture(scope="module")
def media(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Captioned: films/{one,two,deep/three}.mp4 of 25 frames, one and two with sound; photos; sounds. Not captioned: what belongs to
    films."""
    folder = tmp_path_factory.mktemp("media")
    write_clip(folder / "films" / "one.mp4", frames=25, sound=tone(1, 48000, 2, [(0, 1)]))
    write_clip(folder / "films" / "two (ä).MP4", frames=26, sound=tone(1, 48000, 2, [(0, 0.5)]))
    write_clip(folder / "films" / "deep" / "three.mp4", frames=27)
    (folder / "films" / ".thumbs").mkdir()
    (folder / "films" / ".thumbs" / "no.mp4").write_text("hidden")
    (folder / "films" / "remarks.PDF").write_text("no clip")
    picture(folder / "photos" / "wide.png", 200, 40, 10)
    picture(folder / "photos" / "square.jpg", 80, 80, 20)
    picture(folder / "photos" / "tall.bmp", 40, 80, 30)
    (folder / "photos" / "torn.webp").write_text("no picture")
    for name, seconds in (("long", 2.3), ("short", 0.73), ("tiny", 0.02)):
        sound(folder / "sounds" / f"{name}.wav", seconds)
    sound(folder / "voices" / "one.wav", 1.5)
    sound(folder / "voices" / "deep" / "three.wav", 0.7)
    sound(folder / "voices" / "stranger.wav", 0.7)
    write_clip(folder / "before" / "one.mkv", frames=30, size=(64, 48))
    write_clip(folder / "before" / "two (ä).mkv", frames=12, size=(64, 48))
    picture(folder / "masks" / "one.png", 96, 64, 255)
    picture(folder / "masks" / "one.webp", 96, 64, 0)
    write_clip(folder / "masks" / "deep" / "three.mp4", frames=27, size=(96, 64))
    for file in [path for name in ("films", "photos", "sounds") for path in (folder / name).rglob("*") if path.is_file()]:
        file.with_suffix(".txt").write_text(f"first line\nof {file.stem}\n", encoding="utf-8")
    return folder


@pytest.fixture
def survey_of(media: Path, workers: DecodeWorkers, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):  # type: ignore[no-untyped-def]
    """Surveys the given entries; each is named after its folder."""
    monkeypatch.chdir(tmp_path)

    def make(**kinds: dict[str, object]) -> Manifest:
        raw = [{"id": name, "instance_data_dir": str(media / name), **keys} for name, keys in kinds.items()]
        Path("d.json").write_text(json.dumps(raw))
        return survey(load_datasets(Path("d.json"), None, SETTINGS, {}), SETTINGS, GEOMETRY, workers=workers)

    return make


def by_stem(manifest: Manifest) -> dict[str, Item]:
    return {item.path.stem: item for item in manifest.items}


def details(manifest: Manifest) -> dict[str, str]:
    return {v.path.name: f"{v.status} {v.detail}".strip() for v in manifest.verdicts}


FILMS: dict[str, object] = {"video": {"num_frames": 17}}
PHOTOS: dict[str, object] = {"dataset_type": "image"}
REFERENCE: dict[str, object] = {"dataset_type": "conditioning", "conditioning_type": "reference"}
MASK: dict[str, object] = {"dataset_type": "conditioning", "conditioning_type": "mask"}


def test_pictures(survey_of) -> None:  # type: ignore[no-untyped-def]
    manifest = survey_of(photos={**PHOTOS, "repeats": 2})
    assert {name: (i.kind, i.bucket, i.has_audio, i.seconds) for name, i in by_stem(manifest).items()} == {
        "wide": ("image", Bucket(128, 32, 1), False, 0.04), "square": ("image", Bucket(64, 64, 1), False, 0.04),
        "tall": ("image", Bucket(32, 128, 1), False, 0.04),
    }  # fmt: skip
    assert by_stem(manifest)["wide"].caption == "first line\nof wide" and manifest.streams_available == {"video"}
    assert manifest.describe() == "found 4 = used 3 + skipped 0 + failed 1"
    limits = {"minimum_image_size": 50, "maximum_aspect_ratio": 2, "minimum_aspect_ratio": 0.4}
    assert details(survey_of(photos={**PHOTOS, **limits}))["wide.png"] == "skipped too small: 200x40, minimum_image_size is 50 pixels"
    assert details(survey_of(photos={**PHOTOS, **limits, "minimum_image_size": 0}))["wide.png"].startswith("skipped too wide: 200x40")
    assert details(survey_of(photos={**PHOTOS, "minimum_aspect_ratio": 0.6}))["tall.bmp"].startswith("skipped too narrow: 40x80")
    area = {"resolution_type": "area", "resolution": 0.004096, "minimum_image_size": 0.005}
    assert details(survey_of(photos={**PHOTOS, **area}))["tall.bmp"].startswith("skipped too small: 40x80")
    square = survey_of(photos={**PHOTOS, "crop": True, "crop_aspect": "square"})
    assert {item.bucket for item in square.items} == {Bucket(64, 64, 1)}
    assert len(survey_of(photos={**PHOTOS, "crop": True, "crop_aspect": "preserve"}).bucket_counts()) == 3


def test_captions(survey_of) -> None:  # type: ignore[no-untyped-def]
    prompt = {"instance_prompt": "sks,", "prepend_instance_prompt": True}
    assert by_stem(survey_of(photos={**PHOTOS, **prompt}))["wide"].caption == "sks, first line\nof wide"
    named = {**prompt, "caption_strategy": "filename"}
    assert by_stem(survey_of(films={**FILMS, **named}))["two (ä)"].caption == "sks, two (ä)"


def test_what_is_no_clip_is_counted_in_one_notice(survey_of) -> None:  # type: ignore[no-untyped-def]
    manifest = survey_of(films=FILMS)
    assert [item.path.name for item in manifest.items] == ["three.mp4", "one.mp4", "two (ä).MP4"]
    assert [n for n in manifest.notices if "ignored" in n] == ["films: ignored files that are no clips: 1 .pdf"]


def test_sound_alone(survey_of) -> None:  # type: ignore[no-untyped-def]
    def spans(**audio: object) -> dict[str, tuple[float, float]]:
        manifest = survey_of(sounds={"dataset_type": "audio", "audio": {"audio_only": True, **audio}})
        assert all(i.kind == "audio" and i.has_audio and i.bucket[:3] == (0, 0, 0) for i in manifest.items)
        return {item.path.stem: (item.seconds, item.start) for item in manifest.items}

    assert spans(duration_interval=1) == {"long": (2.0, 0.0), "short": (0.72, 0.0)}
    assert spans() == {"long": (2.28, 0.0), "short": (0.72, 0.0)}  # three seconds are in none
    assert spans(duration_interval=0.5, truncation_mode="end") == {"long": (2.0, 0.3), "short": (0.5, 0.23)}
    drawn = spans(duration_interval=0.5, truncation_mode="random")
    assert drawn == spans(duration_interval=0.5, truncation_mode="random") and 0 < drawn["long"][1] < 0.3
    assert spans(min_duration_seconds=1, duration_interval=1) == {"long": (2.0, 0.0)}
    manifest = survey_of(sounds={"dataset_type": "audio", "audio": {"max_duration_seconds": 2}})
    assert details(manifest)["long.wav"] == "skipped sound too long: 2.30 seconds, at most 2"
    assert details(manifest)["tiny.wav"].startswith("skipped sound too short: 0.020")
    assert any("sounds are trained alone" in notice for notice in manifest.notices)
    assert manifest.streams_available == {"audio"} and manifest.ledger.alone == 1 and manifest.ledger.with_sound == 0


def test_only_the_sound_of_clips(survey_of) -> None:  # type: ignore[no-untyped-def]
    manifest = survey_of(films={"audio": {"audio_only": True, "duration_interval": 0.5, "channels": 1}})
    assert {i.path.stem: (i.kind, i.seconds, i.mono) for i in manifest.items} == {
        "one": ("audio", 1.0, True), "two (ä)": ("audio", 1.0, True),
    }  # fmt: skip
    assert details(manifest)["three.mp4"] == "skipped no sound" and manifest.streams_available == {"audio"}


def test_part_of_longer_clips(survey_of) -> None:  # type: ignore[no-untyped-def]
    def starts(mode: str) -> dict[str, float]:
        return {i.path.stem: i.start for i in survey_of(films={**FILMS, "audio": {"truncation_mode": mode}}).items}

    assert starts("beginning") == {"one": 0, "two (ä)": 0, "three": 0}
    assert starts("end") == {"one": 8 / 25, "two (ä)": 9 / 25, "three": 10 / 25}
    drawn = starts("random")
    assert drawn == starts("random") and all(0 <= drawn[name] <= last for name, last in starts("end").items())
    assert all(round(start * 25, 6) == round(start * 25) for start in drawn.values()) and len(set(drawn.values())) > 1
    assert all(i.first_frame for i in survey_of(films={"video": {"num_frames": 17, "is_i2v": True}}).items)


def test_linked_sound(survey_of) -> None:  # type: ignore[no-untyped-def]
    voices: dict[str, object] = {"dataset_type": "audio", "audio": {"channels": 1}}
    manifest = survey_of(films={**FILMS, "s2v_datasets": ["voices"]}, voices=voices)
    one, three = by_stem(manifest)["one"], by_stem(manifest)["three"]
    assert [(c.role, c.path.name, c.bucket) for c in one.companions] == [("sound", "one.wav", one.bucket)]
    assert three.has_audio and three.mono and not three.silence and one.group == three.group
    assert details(manifest) == {
        "one.mp4": "used", "three.mp4": "used", "two (ä).MP4": "skipped no linked sound: two (ä) is in none of voices",
        "one.wav": "used", "three.wav": "used", "stranger.wav": "skipped belongs to no file: no file of its name is used with it",
    }  # fmt: skip
    assert manifest.describe() == "found 6 = used 4 + skipped 2 + failed 0 (2 of the used belong to others)"
    assert "films: found 3 = used 2 + skipped 1 + failed 0" in manifest.table()
    assert "voices: found 3 = used 2 + skipped 1 + failed 0" in manifest.table()
    assert manifest.companions == frozenset() and manifest.count("used") == 4 and len(manifest.items) == 2
    silent = survey_of(films={**FILMS, "s2v_datasets": "voices", "audio": {"allow_zero_audio": True}}, voices=voices)
    assert by_stem(silent)["two (ä)"].silence and silent.ledger.silence == 1
    limited = survey_of(films={**FILMS, "s2v_datasets": "voices"}, voices={**voices, "audio": {"min_duration_seconds": 1}})
    assert details(limited)["three.mp4"].startswith("skipped sound too short: 0.70")
    both = survey_of(films={**FILMS, "s2v_datasets": "voices"}, voices={"dataset_type": "audio", "audio": {"audio_only": True}},
                     sounds={"dataset_type": "audio", "audio": {"audio_only": True}, "caption_strategy": "filename"})  # fmt: skip
    assert {v.status for v in both.verdicts if v.dataset == "voices"} == {"failed"}  # trained alone they need captions


def test_references_and_masks(survey_of) -> None:  # type: ignore[no-untyped-def]
    manifest = survey_of(films={**FILMS, "conditioning_data": "before"}, before={**REFERENCE, "reference_downscale": 4})
    (one,) = manifest.items
    assert [(c.role, c.path.name, c.bucket) for c in one.companions] == [("reference", "one.mkv", Bucket(32, 32, 17))]
    assert one.bucket == Bucket(64, 64, 17) and manifest.companions == {"reference"}
    assert "before: reference_downscale 4 -> 2 at 64x64 (sides are multiples of 32)" in manifest.notices
    assert details(manifest)["two (ä).MP4"] == "skipped reference too short: two (ä).mkv has 12 of 17 frames"
    assert details(manifest)["three.mp4"] == "skipped no reference: nothing is called deep/three in before"
    masked = survey_of(films={**FILMS, "conditioning_data": ["masks"]}, masks=MASK)
    items = by_stem(masked)
    assert {name: (i.companions[0].path.name, i.companions[0].bucket) for name, i in items.items()} == {
        "one": ("one.png", Bucket(64, 64, 17)), "three": ("three.mp4", Bucket(64, 64, 17)),
    }  # fmt: skip
    assert details(masked)["one.webp"].startswith("skipped belongs to no file: another file of the same name")
    assert masked.companions == {"mask"} and items["one"].group != one.group
    assert len({item.key for item in (one, items["one"])}) == 2


def test_held_out(survey_of, media: Path) -> None:  # type: ignore[no-untyped-def]
    manifest = survey_of(films=FILMS, photos={"dataset_type": "eval"})
    assert {i.path.stem: i.kind for i in manifest.held_out} == {"wide": "image", "square": "image", "tall": "image"}
    assert {i.dataset for i in manifest.items} == {"films"}
    assert manifest.describe() == "found 7 = used 3 + skipped 0 + failed 1 + held out 3"
    assert "  photos: found 4 = used 0 + skipped 0 + failed 1 + held out 3" in manifest.table()
    with pytest.raises(DataError, match="strict is on"):
        require_usable(manifest, strict=True)
    leaked = survey_of(films=FILMS, other={"dataset_type": "eval", "instance_data_dir": str(media / "films"), **FILMS})
    assert sum("held out and trained on as well" in notice and "three.mp4" in notice for notice in leaked.notices) == 1
    twice = survey_of(films=FILMS, again={"instance_data_dir": str(media / "films" / "deep"), **FILMS})
    assert len(twice.items) == 4 and [n for n in twice.notices if "twice" in n] == [
        f"the same file twice, so it is trained on twice: {media}/films/deep/three.mp4 (films) and {media}/films/deep/three.mp4 (again)"
    ]
    other_size = survey_of(films=FILMS, again={"instance_data_dir": str(media / "films" / "deep"), "video": {"num_frames": 9}})
    assert not any("twice" in notice for notice in other_size.notices)


def test_mixed_streams_and_the_ledger(survey_of) -> None:  # type: ignore[no-untyped-def]
    manifest = survey_of(films={**FILMS, "repeats": 1}, photos=PHOTOS, sounds={"dataset_type": "audio", "audio": {"audio_only": True}})
    assert manifest.streams_available == {"video", "audio"}
    ledger = manifest.ledger
    assert (ledger.with_sound, ledger.without_sound, ledger.alone, ledger.undecodable) == (2, 1, 2, 0)
    assert ledger.seconds == pytest.approx(2 * 17 / 25 + 2.28 + 0.72)
    alone = survey_of(films={**FILMS, "audio": {"audio_only": True}}).ledger
    assert (alone.with_sound, alone.without_sound, alone.alone) == (0, 0, 2)  # counted once
    # Single draws: 4 of 6 of the films have sound, no picture has, both sounds have.
    assert manifest.describe_sound(1, seed=0).endswith(f"in {6 / 11:.0%} of the batches")
    assert manifest.batches_per_epoch(6) == 1 + 3 + 2


def test_a_folder_without_files_of_its_kind(media: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("d.json").write_text(json.dumps([{"id": "x", "dataset_type": "image", "instance_data_dir": str(media / "sounds")}]))
    with pytest.raises(DataError, match=r"'x' has no pictures(.|\n)*\.bmp"):
        scan(load_datasets(Path("d.json"), None, SETTINGS, {}), SETTINGS, GEOMETRY)
