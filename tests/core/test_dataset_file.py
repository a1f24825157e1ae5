"""The dataset file: the quickstart's own file loads, and every mistake is named with its entry and key."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tuner.config.datasets import TextEntry, VideoEntry, load_datasets
from tuner.config.settings import DataSettings
from tuner.errors import ConfigError, DataError

QUICKSTART: list[dict[str, object]] = [
    {
        "id": "my-video-dataset", "type": "local", "dataset_type": "video", "instance_data_dir": "datasets/videos",
        "caption_strategy": "textfile", "resolution": 512,
        "video": {"num_frames": 61, "min_frames": 61, "frame_rate": 25, "bucket_strategy": "aspect_ratio"},
        "audio": {"auto_split": True, "sample_rate": 16000, "channels": 1, "duration_interval": 3.0},
        "repeats": 10,
    },
    {
        "id": "text-embeds", "type": "local", "dataset_type": "text_embeds", "default": True,
        "cache_dir": "cache/text/{model_family}/{id}", "disabled": False,
    },
]  # fmt: skip


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "datasets" / "videos").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def load(entries: object, settings: DataSettings | None = None) -> list[VideoEntry | TextEntry]:
    path = Path("datasets.json")
    path.write_text(json.dumps(entries))
    return load_datasets(path, None, settings or DataSettings(), {"model_family": "somefamily", "output_dir": "out"})


def video(**changes: object) -> dict[str, object]:
    return {"id": "clips", "instance_data_dir": "datasets/videos", **changes}


def test_quickstart_file(folder: Path) -> None:
    clips, text = load(QUICKSTART)
    assert isinstance(clips, VideoEntry) and isinstance(text, TextEntry)
    assert (clips.resolution, clips.resolution_type, clips.repeats) == (512, "pixel_area", 10)
    assert (clips.video.num_frames, clips.video.min_frames, clips.video.frame_rate) == (61, 61, 25)
    assert (clips.audio.channels, clips.audio.sample_rate) == (1, 16000)
    assert clips.cache_dir == Path("cache")
    assert text.cache_dir == Path("cache/text/somefamily/text-embeds")


def test_numbers_and_booleans_may_be_strings_and_empty_means_default(folder: Path) -> None:
    (entry,) = load([video(repeats="3", resolution="", cache_dir=None, video={"num_frames": "17", "is_i2v": "false", "max_frames": None})])
    assert isinstance(entry, VideoEntry)
    assert (entry.repeats, entry.resolution, entry.video.num_frames, entry.video.max_frames) == (3, 512, 17, None)


def test_entry_overrides_settings(folder: Path) -> None:
    settings = DataSettings(resolution=0.25, resolution_type="area", cache_dir="elsewhere")
    first, second = load([video(), video(id="b", resolution=480, resolution_type="pixel", cache_dir="own/{id}")], settings)
    assert isinstance(first, VideoEntry) and isinstance(second, VideoEntry)
    assert (first.resolution, first.resolution_type, first.cache_dir) == (0.25, "area", Path("elsewhere"))
    assert (second.resolution, second.resolution_type, second.cache_dir) == (480, "pixel", Path("own/b"))


def test_folder_alone_is_one_video_entry(folder: Path) -> None:
    (entry,) = load_datasets(None, Path("datasets/videos"), DataSettings(), {})
    assert isinstance(entry, VideoEntry)
    assert (entry.instance_data_dir, entry.caption_strategy, entry.audio.auto_split) == (Path("datasets/videos"), "textfile", True)


def test_disabled_entries_are_left_out_whatever_they_hold(folder: Path) -> None:
    assert len(load([video(), {"id": "later", "dataset_type": "image", "nonsense": 1, "disabled": "true"}])) == 1


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"dataset_type": "image"}, ["dataset_type", "image", "not supported in this version"]),
        ({"dataset_type": "audio"}, ["dataset_type", "audio", "not supported in this version"]),
        ({"dataset_type": "eval"}, ["dataset_type", "not supported in this version"]),
        ({"dataset_type": "image_embeds"}, ["dataset_type", "not supported in this version"]),
        ({"dataset_type": "vido"}, ["dataset_type", "did you mean `video`"]),
        ({"type": "s3"}, ["type", "s3", "not supported in this version"]),
        ({"probability": 0.5}, ["probability", "repeats"]),
        ({"video": {"bucket_strategy": "resolution_frames"}}, ["video.bucket_strategy", "resolution_frames"]),
        ({"video": {"is_i2v": True}}, ["video.is_i2v"]),
        ({"audio": {"audio_only": True}}, ["audio.audio_only"]),
        ({"audio": {"truncation_mode": "random"}}, ["audio.truncation_mode", "random"]),
        ({"s2v_datasets": ["speech"]}, ["s2v_datasets"]),
        ({"caption_strategy": "instanceprompt"}, ["instance_prompt", "required"]),
        ({"caption_strategy": "parquet"}, ["caption_strategy", "parquet"]),
        ({"video": {"num_frame": 61}}, ["video.num_frame", "`num_frames`"]),
        ({"num_frames": 61}, ["num_frames", "inside `video`"]),
        ({"captions_strategy": "textfile"}, ["captions_strategy", "`caption_strategy`"]),
        ({"video": {"num_frames": 0}}, ["video.num_frames", "got 0"]),
        ({"video": {"min_frames": 9, "max_frames": 5}}, ["video.min_frames", "max_frames"]),
        ({"repeats": -1}, ["repeats", "got -1"]),
        ({"cache_dir": "cache/{model}"}, ["cache_dir", "{model}", "{model_family}"]),
    ],
)  # fmt: skip
def test_mistakes_name_entry_key_and_value(folder: Path, changes: dict[str, object], words: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        load([video(**changes)])
    for word in ["'clips'", *words]:
        assert word in str(caught.value)
    assert caught.value.exit_code == 2


def test_all_problems_are_shown_together(folder: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        first = video(wrong=1, video={"num_frames": "many"})
        load([first, video(), {"id": "c", "type": "csv"}, 7, {"instance_data_dir": "datasets/videos"}])
    text = str(caught.value)
    for part in ("wrong: unknown key", "video.num_frames", "used twice", "csv", "entry 4: must be an object", "entry 5: id: is required"):
        assert part in text


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ('[{"id": 1,]', ["line 1, column 11"]),
        ('{"id": "x"}', ["list of entries"]),
        ("[]", ["nothing to train on"]),
        ('[{"id": "t", "dataset_type": "text_embeds"}]', ["nothing to train on"]),
    ],
)
def test_file_that_is_no_list_of_clips(folder: Path, content: str, words: list[str]) -> None:
    Path("d.json").write_text(content)
    with pytest.raises(ConfigError) as caught:
        load_datasets(Path("d.json"), None, DataSettings(), {})
    assert all(word in str(caught.value) for word in [*words, "d.json"])


def test_missing_file_and_missing_folder(folder: Path) -> None:
    with pytest.raises(ConfigError, match="does not exist"):
        load_datasets(Path("none.json"), None, DataSettings(), {})
    with pytest.raises(DataError, match="'clips': nowhere"):
        load([video(instance_data_dir="nowhere")])
    with pytest.raises(ConfigError, match="exactly one"):
        load_datasets(Path("none.json"), Path("datasets"), DataSettings(), {})
