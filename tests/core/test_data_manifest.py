"""The manifest: every clip found has a verdict, every number adds up, every adjustment is said once."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path

import pytest

from core.clips import tone, write_clip
from core.encoders import GEOMETRY
from tuner.config.datasets import DatasetEntry, load_datasets
from tuner.config.settings import DataSettings
from tuner.data.buckets import Bucket
from tuner.data.manifest import Manifest, scan, survey
from tuner.data.media_index import INDEX_NAME
from tuner.data.workers import DecodeWorkers
from tuner.errors import ConfigError, DataError

SETTINGS = DataSettings(resolution=64, cache_dir="cache")


@pytest.fixture(scope="module")
def workers() -> Iterator[DecodeWorkers]:
    with DecodeWorkers(1) as pool:
        yield pool


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Good clips and bad ones, all captioned."""
    folder = tmp_path_factory.mktemp("made")
    write_clip(folder / "a_sound.mp4", frames=25, sound=tone(1, 48000, 2, [(0, 1)]))
    write_clip(folder / "b_silent.mp4", frames=25)
    write_clip(folder / "c_short.mp4", frames=12)
    write_clip(folder / "deep" / "d_sixty.mkv", frames=60, rate=60)
    write_clip(folder / "e_tall.mp4", frames=50, size=(64, 96))
    write_clip(folder / "f_tiny.mp4", frames=25, size=(64, 32))
    (folder / "g_text.mp4").write_text("no film")
    undecodable = write_clip(folder / "h_noise.mkv", frames=25, sound=tone(1, 48000, 2, [(0, 1)]))
    undecodable.write_bytes(undecodable.read_bytes().replace(b"A_AAC", b"A_XYZ"))
    for clip in [path for path in folder.rglob("*") if path.is_file()]:
        clip.with_suffix(".txt").write_text(f"this is {clip.stem}", encoding="utf-8-sig")
    return folder


@pytest.fixture
def clips(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    shutil.copytree(made, tmp_path / "clips")
    (tmp_path / "clips" / ".hidden.mp4").write_text("no clip")
    monkeypatch.chdir(tmp_path)
    return tmp_path / "clips"


def entries(settings: DataSettings = SETTINGS, **changes: object) -> list[DatasetEntry]:
    return read([{"id": "clips", "instance_data_dir": "clips", "video": {"num_frames": 17}, **changes}], settings)


def read(raw: list[dict[str, object]], settings: DataSettings = SETTINGS) -> list[DatasetEntry]:
    Path("datasets.json").write_text(json.dumps(raw))
    return load_datasets(Path("datasets.json"), None, settings, {})


def names(manifest: Manifest) -> list[str]:
    return [item.path.stem for item in manifest.items]


def test_verdicts_reasons_and_totals(clips: Path, workers: DecodeWorkers) -> None:
    settings = SETTINGS.model_copy(update={"minimum_image_size": 40})
    manifest = scan(entries(settings), settings, GEOMETRY, workers=workers)
    assert {v.path.name: (v.status, v.reason) for v in manifest.verdicts} == {
        "a_sound.mp4": ("used", ""), "b_silent.mp4": ("used", ""), "d_sixty.mkv": ("used", ""), "e_tall.mp4": ("used", ""),
        "c_short.mp4": ("skipped", "too short"), "f_tiny.mp4": ("skipped", "too small"),
        "g_text.mp4": ("failed", "unreadable"), "h_noise.mkv": ("failed", "sound cannot be decoded"),
    }  # fmt: skip
    details = {v.path.stem: v.detail for v in manifest.verdicts}
    assert details["c_short"] == "too short: 12 of 17 frames"
    assert manifest.describe() == "found 8 = used 4 + skipped 2 + failed 2"
    assert len(manifest.verdicts) == sum(manifest.count(status) for status in ("used", "skipped", "failed"))  # type: ignore[arg-type]
    assert sum(manifest.reasons().values()) == 4
    ledger = manifest.ledger
    assert (ledger.with_sound, ledger.without_sound, ledger.undecodable, ledger.seconds) == (1, 3, 1, pytest.approx(17 / 25))
    by_name = {item.path.stem: item for item in manifest.items}
    assert by_name["a_sound"].has_audio and not by_name["b_silent"].has_audio
    assert by_name["b_silent"].caption == "this is b_silent"
    assert manifest.bucket_counts() == {Bucket(64, 64, 17): 4} and str(Bucket(64, 64, 17)) == "64x64@17"
    assert "2 skipped" not in manifest.table() and "1 skipped: too short" in manifest.table()


def test_frame_counts(clips: Path, workers: DecodeWorkers) -> None:
    """a, b: 25 frames at 25 a second, c: 12, d: 60 at 60 a second, e: 50."""

    def lengths(**video: object) -> dict[str, int]:
        manifest = survey(entries(video=video), SETTINGS, GEOMETRY, workers=workers)
        return {item.path.stem[0]: item.bucket.frames for item in manifest.items}

    assert lengths(num_frames=21) == {"a": 17, "b": 17, "d": 17, "e": 17, "f": 17}
    assert lengths(num_frames=21, min_frames=21) == lengths(num_frames=21)
    assert lengths(num_frames=33) == {"e": 33}
    assert lengths(num_frames=33, min_frames=9) == {"a": 25, "b": 25, "c": 9, "d": 25, "e": 33, "f": 25}
    assert lengths(num_frames=33, min_frames=9, frame_interval=20) == {"a": 17, "b": 17, "d": 17, "e": 33, "f": 17}
    assert lengths(num_frames=9, max_frames=25) == {"a": 9, "b": 9, "c": 9, "d": 9, "f": 9}
    assert lengths() == {"a": 25, "b": 25, "c": 9, "d": 25, "e": 49, "f": 25}
    own = {"bucket_strategy": "resolution_frames"}
    assert lengths(num_frames=33, **own) == {"a": 25, "b": 25, "c": 9, "d": 25, "e": 33, "f": 25}
    assert lengths(max_frames=33, frame_interval=9, **own) == {"a": 17, "b": 17, "c": 9, "d": 17, "f": 17}
    assert lengths(num_frames=57, frame_rate=60) == {"a": 57, "b": 57, "d": 57, "e": 57, "f": 57}


def test_adjustments_are_said_once(clips: Path, workers: DecodeWorkers) -> None:
    manifest = scan(
        entries(resolution=64, resolution_type="pixel", video={"num_frames": 21}, audio={"duration_interval": 3.0}), SETTINGS, GEOMETRY,
        workers=workers,
    )  # fmt: skip
    assert sum("num_frames 21 -> 17" in notice for notice in manifest.notices) == 1
    assert sum("64x128" in notice or "128x64" in notice for notice in manifest.notices) == 0  # that one is exact
    assert sum("audio.duration_interval" in notice for notice in manifest.notices) == 1
    wider = scan(entries(resolution=70, resolution_type="pixel"), SETTINGS, GEOMETRY, workers=workers)
    assert sum("105x70 -> 96x64" in notice for notice in wider.notices) == 1
    tiny = scan(entries(resolution=7, resolution_type="pixel_area"), SETTINGS, GEOMETRY, workers=workers)
    assert sum("7x7 -> 32x32" in notice for notice in tiny.notices) == 1


def test_strict_makes_skips_and_adjustments_errors(clips: Path, workers: DecodeWorkers) -> None:
    strict = SETTINGS.model_copy(update={"strict": True})
    with pytest.raises(DataError, match="1 skipped: too short"):
        scan(entries(strict), strict, GEOMETRY, workers=workers)
    for name in ("c_short.mp4", "g_text.mp4", "h_noise.mkv"):
        (clips / name).unlink()
    assert scan(entries(strict), strict, GEOMETRY, workers=workers).count("used") == 5
    with pytest.raises(DataError, match="num_frames 20 -> 17"):
        scan(entries(strict, video={"num_frames": 20}), strict, GEOMETRY, workers=workers)


def test_all_missing_captions_are_listed(clips: Path, workers: DecodeWorkers) -> None:
    (clips / "a_sound.txt").unlink()
    (clips / "b_silent.txt").write_text(" \n")
    (clips / "e_tall.txt").write_bytes(b"\xff\xfe\xfa")
    (clips / "f_tiny.txt").unlink()
    (clips / "f_tiny.txt").mkdir()
    with pytest.raises(DataError, match="4 clips have no usable caption") as caught:
        scan(entries(), SETTINGS, GEOMETRY, workers=workers)
    for words in ("a_sound.txt is missing", "b_silent.txt is empty", "e_tall.txt cannot be read as UTF-8", "f_tiny.txt cannot be read:"):
        assert words in str(caught.value)
    assert caught.value.exit_code == 4
    named = scan(entries(caption_strategy="filename"), SETTINGS, GEOMETRY, workers=workers)
    assert {item.caption for item in named.items} >= {"a sound", "b silent"}
    (clips / "a_sound.mp4").rename(clips / os.fsdecode(b"caf\xe9.mp4"))
    with pytest.raises(DataError, match="not written in UTF-8"):
        scan(entries(caption_strategy="filename"), SETTINGS, GEOMETRY, workers=workers)
    prompt = scan(entries(caption_strategy="instanceprompt", instance_prompt="a cat "), SETTINGS, GEOMETRY, workers=workers)
    assert {item.caption for item in prompt.items} == {"a cat"}


def test_links_are_followed_and_those_that_lead_nowhere_are_named(clips: Path, workers: DecodeWorkers) -> None:
    (clips / "deep").rename(clips.parent / "elsewhere")
    (clips / "deep").symlink_to("../elsewhere")
    (clips / "around").symlink_to(".")
    (clips / "gone.mp4").symlink_to("../nothing.mp4")
    (clips / "loop.mp4").symlink_to("loop.mp4")
    found = survey(entries(), SETTINGS, GEOMETRY, workers=workers)
    assert {v.path.name for v in found.verdicts} >= {"d_sixty.mkv", "gone.mp4", "loop.mp4"} and len(found.verdicts) == 10
    lost = {v.path.name: v.detail for v in found.verdicts if v.path.is_symlink()}
    assert "No such file" in lost["gone.mp4"] and "symbolic links" in lost["loop.mp4"]
    (clips / "b_silent.mp4").rename(clips.parent / "b.mp4")
    (clips / "b_silent.mp4").symlink_to("../b.mp4")
    survey(entries(), SETTINGS, GEOMETRY, workers=workers)
    (clips.parent / "b.mp4").unlink()  # the index knows it
    assert survey(entries(), SETTINGS, GEOMETRY, workers=workers).reasons()["failed", "unreadable"] == 4


def test_a_folder_that_cannot_be_read_is_an_error(clips: Path, workers: DecodeWorkers, monkeypatch: pytest.MonkeyPatch) -> None:
    def listed(folder: Path, scandir=os.scandir):  # type: ignore[no-untyped-def]  # root may read everything
        if Path(folder).name == "deep":
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(folder))
        return scandir(folder)

    monkeypatch.setattr(os, "scandir", listed)
    with pytest.raises(DataError, match=r"Permission denied.*deep"):
        survey(entries(), SETTINGS, GEOMETRY, workers=workers)


def test_nothing_usable_is_an_error_with_the_reasons(clips: Path, workers: DecodeWorkers) -> None:
    with pytest.raises(DataError, match="no clip can be used") as caught:
        scan(entries(video={"num_frames": 97}), SETTINGS, GEOMETRY, workers=workers)
    assert "6 skipped: too short" in str(caught.value) and "too short: 50 of 97 frames" in str(caught.value)
    assert caught.value.exit_code == 4
    shutil.rmtree(clips)
    clips.mkdir()
    with pytest.raises(DataError, match="'clips' has no clips"):
        scan(entries(), SETTINGS, GEOMETRY, workers=workers)


def test_sound_options(clips: Path, workers: DecodeWorkers) -> None:
    def sounds(**audio: object) -> dict[str, tuple[bool, bool, bool]]:
        manifest = survey(entries(audio=audio), SETTINGS, GEOMETRY, workers=workers)
        return {item.path.stem: (item.has_audio, item.mono, item.silence) for item in manifest.items}

    assert sounds(channels=1)["a_sound"] == (True, True, False) and sounds(channels=1)["b_silent"] == (False, True, False)
    assert sounds(allow_zero_audio=True)["b_silent"] == (True, False, True)
    off = sounds(auto_split=False)
    assert off["a_sound"] == (False, False, False) and "h_noise" in off  # its sound is not wanted, its picture is good
    assert "a_sound" not in sounds(min_duration_seconds=2) and "b_silent" in sounds(min_duration_seconds=2)
    assert "a_sound" not in sounds(max_duration_seconds=0.5)
    for wrong in ({"sample_rate": 48000}, {"channels": 6}):
        with pytest.raises(ConfigError, match=r"16000 Hz|2 channels"):
            sounds(**wrong)


def test_index_spares_reading_until_a_file_changes(clips: Path, workers: DecodeWorkers) -> None:
    asked: list[int] = []
    first = survey(entries(), SETTINGS, GEOMETRY, workers=workers, progress=lambda done, total, label: asked.append(total))
    assert asked == [8] * 8
    text = Path("cache", INDEX_NAME).read_text()
    assert "sound" not in text.replace("has_audio", "") and str(clips) not in text  # no names, no paths
    asked.clear()
    again = survey(entries(), SETTINGS, GEOMETRY, workers=workers, progress=lambda done, total, label: asked.append(total))
    assert again == first and asked == [1]  # the unreadable one is looked at again
    write_clip(clips / "b_silent.mp4", frames=30, rate=Fraction(25))
    changed = survey(entries(), SETTINGS, GEOMETRY, workers=workers)
    contents = [{i.path.stem: i.content for i in m.items} for m in (first, changed)]
    assert {name for name in contents[0] if contents[0][name] != contents[1][name]} == {"b_silent"}
    Path("cache", INDEX_NAME).write_text("{broken")
    assert survey(entries(), SETTINGS, GEOMETRY, workers=workers) == changed


def test_identity_follows_content_not_place(clips: Path, workers: DecodeWorkers) -> None:
    first = survey(entries(), SETTINGS, GEOMETRY, workers=workers)
    clips.rename(clips.parent / "moved")
    moved = survey(entries(instance_data_dir="moved", id="other"), SETTINGS, GEOMETRY, workers=workers)
    assert moved.digest() == first.digest() and moved.items != first.items
    assert survey(entries(instance_data_dir="moved", repeats=1), SETTINGS, GEOMETRY, workers=workers).digest() != first.digest()
    assert names(first) == ["a_sound", "b_silent", "d_sixty", "e_tall", "f_tiny"]
