"""dataset.json: sums, and a picture or a wave of clips spread over the dataset."""

from __future__ import annotations

import base64
import io
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image

from core.clips import tone, write_clip
from core.encoders import GEOMETRY
from core.watched import small_sound
from tuner.config.datasets import load_datasets
from tuner.config.settings import DataSettings
from tuner.data.manifest import Manifest, survey
from tuner.data.workers import DecodeWorkers
from tuner.inspect import dataset_sheet
from tuner.inspect.dataset_sheet import COLUMNS, describe_clip, describe_dataset, spread, wave


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    folder = tmp_path_factory.mktemp("made")
    write_clip(folder / "a.mp4", frames=25, sound=tone(1, 48000, 2, [(0, 1)]))
    write_clip(folder / "b.mp4", frames=25)
    write_clip(folder / "short.mp4", frames=3)
    for name in ("a", "b", "short"):
        (folder / f"{name}.txt").write_text("word " * 100)
    settings = DataSettings(resolution=64, cache_dir=str(folder / "cache"))
    with DecodeWorkers(1) as workers:
        return survey(load_datasets(None, folder, settings, {}), settings, GEOMETRY, workers=workers)


def test_sums_and_pictures(manifest: Manifest) -> None:
    found = describe_dataset(manifest, 1, 0)
    assert found["counts"] == {status: manifest.count(status) for status in ("used", "skipped", "failed", "held out")}  # type: ignore[arg-type]
    assert found["summary"] == manifest.describe() and found["items"] == len(manifest.items) == len(found["clips"])  # type: ignore[arg-type]
    clip = found["clips"][0]  # type: ignore[index]
    assert (clip["name"], clip["kind"], clip["sound"], clip["held_out"]) == ("a.mp4", "video", "yes", False)
    assert clip["caption"] == ("word " * 100)[:300] + "..."
    picture = Image.open(io.BytesIO(base64.b64decode(clip["picture"])))
    bucket = manifest.items[0].bucket
    assert picture.format == "JPEG" and picture.width * picture.height <= 1.1 * dataset_sheet.AREA
    assert picture.width / picture.height == pytest.approx(bucket.width / bucket.height, rel=0.05)
    assert str(manifest.items[0].path.parent) not in str(found)


def test_time_and_number_are_bounded(manifest: Manifest, monkeypatch: pytest.MonkeyPatch) -> None:
    late = describe_dataset(manifest, 1, 0, seconds=0)
    assert all(clip["picture"] == "" for clip in late["clips"])  # type: ignore[attr-defined]
    items = list(manifest.items) * 50
    assert spread(items, 10) == [items[index * len(items) // 10] for index in range(10)] and spread(items[:3], 10) == items[:3]
    monkeypatch.setattr(dataset_sheet, "SHOWN", 1)
    assert len(describe_dataset(manifest, 1, 0)["clips"]) == 1  # type: ignore[arg-type]


def test_a_file_that_is_gone_has_no_picture(manifest: Manifest, tmp_path: Path) -> None:
    item = replace(manifest.items[0], path=tmp_path / "gone.mp4")
    assert describe_clip(item, False, picture=True)["picture"] == ""
    sound = replace(manifest.items[0], path=small_sound(tmp_path / "hum.wav"), kind="audio")
    columns = wave(sound)
    assert len(columns) == COLUMNS and all(-1 <= low <= high <= 1 for low, high in columns) and max(high for _, high in columns) > 0.9
    assert describe_clip(sound, True, picture=True) | {"wave": []} == describe_clip(sound, True, picture=False)
    assert wave(replace(sound, path=tmp_path / "gone.wav")) == []
