"""The dataset file: the quickstart's own file loads, and every mistake is named with its entry and key."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import pytest

from tuner.config.datasets import (
    AudioEntry,
    ConditioningEntry,
    DatasetEntry,
    EvalEntry,
    ImageEntry,
    PictureEntry,
    TextEntry,
    VideoEntry,
    load_datasets,
)
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


def load(entries: object, settings: DataSettings | None = None) -> list[DatasetEntry]:
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
    assert len(load([video(), {"id": "later", "dataset_type": "image", "nonsense": 1, "disabled": "true"}, {"disable": True}])) == 1


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"dataset_type": "vido"}, ["dataset_type", "did you mean `video`"]),
        ({"dataset_type": "conditioning_image_embeds"}, ["dataset_type", "not supported in this version"]),
        ({"type": "s3"}, ["type", "s3", "not supported in this version"]),
        ({"type": "huggingface"}, ["type", "not supported in this version"]),
        ({"probability": 0}, ["probability", "greater than 0"]),
        ({"probability": 1.5}, ["probability", "got 1.5"]),
        ({"video": {"bucket_strategy": "duration"}}, ["video.bucket_strategy", "'aspect_ratio' or 'resolution_frames'"]),
        ({"audio": {"truncation_mode": "middle"}}, ["audio.truncation_mode", "middle"]),
        ({"audio": {"audio_only": True, "allow_zero_audio": True}}, ["audio.allow_zero_audio", "silence alone"]),
        ({"audio": {"audio_only": True, "auto_split": False}}, ["audio.auto_split", "nothing to learn"]),
        ({"audio": {"min_duration_seconds": 3, "max_duration_seconds": 2}}, ["audio.min_duration_seconds", "max_duration_seconds"]),
        ({"audio": {"auto_split": False}, "s2v_datasets": "speech"}, ["s2v_datasets", "no sound is trained"]),
        ({"conditioning_data": ["clips"]}, ["conditioning_data", "'clips' is an entry of dataset_type `video`"]),
        ({"conditioning_data": ["klips"]}, ["conditioning_data", "no entry 'klips'", "did you mean 'clips'"]),
        ({"text_embeds": "nowhere"}, ["text_embeds", "no entry 'nowhere'"]),
        ({"dataset_type": "image", "video": {"num_frames": 9}}, ["video", "still picture"]),
        ({"dataset_type": "audio", "video": {"num_frames": 9}}, ["video: unknown key"]),
        ({"dataset_type": "conditioning", "conditioning_type": "controlnet"}, ["conditioning_type", "controlnet", "'mask'"]),
        ({"dataset_type": "conditioning"}, ["conditioning_type: is required"]),
        ({"dataset_type": "conditioning", "conditioning_type": "mask", "reference_downscale": 3}, ["reference_downscale", "1, 2 or 4"]),
        ({"dataset_type": "conditioning", "conditioning_type": "mask"}, ["no entry names it in `conditioning_data`"]),
        ({"crop_style": "random"}, ["crop_style", "random", "'center'"]),
        ({"crop_aspect": "closest"}, ["crop_aspect", "'preserve' or 'square'"]),
        ({"minimum_aspect_ratio": 2, "maximum_aspect_ratio": 1}, ["minimum_aspect_ratio", "maximum_aspect_ratio"]),
        ({"caption_filter_list": "words.txt"}, ["caption_filter_list", "not supported in this version"]),
        ({"start_epoch": "2"}, ["start_epoch", "not supported in this version"]),
        ({"prepend_instance_prompt": True}, ["instance_prompt", "required by prepend_instance_prompt"]),
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
        first = video(wrong=1, video={"num_frames": "many"}, max_num_samples=5)
        load([first, video(conditioning_data=["c", "nowhere"]), {"id": "c", "type": "csv"}, 7, {"instance_data_dir": "datasets/videos"}])
    text = str(caught.value)
    for part in (
        "wrong: unknown key", "max_num_samples", "video.num_frames", "used twice", "csv", "entry 4: must be an object",
        "entry 5: id: is required", "no entry 'nowhere'",
    ):  # fmt: skip
        assert part in text


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ('[{"id": 1,]', ["line 1, column 11"]),
        ('{"id": "x"}', ["list of entries"]),
        ("[]", ["nothing to train on"]),
        ('[{"id": "t", "dataset_type": "text_embeds"}]', ["nothing to train on"]),
        ('[{"id": "x",}]', ["take out the comma"]),
        ('[{"id": "x", "repeats": 1, "repeats": 2}]', ["holds repeats twice"]),
        ('[{"id": "x", "video": {"num_frames": 9, "num_frames": 17}}]', ["video: holds num_frames twice"]),
        ('[{"id": "x", "probability": NaN}]', ["NaN is not a number"]),
        ("[" * 100_000, ["nested too deeply"]),
    ],
)
def test_file_that_is_no_list_of_clips(folder: Path, content: str, words: list[str]) -> None:
    Path("d.json").write_text(content)
    with pytest.raises(ConfigError) as caught:
        load_datasets(Path("d.json"), None, DataSettings(), {})
    assert all(word in str(caught.value) for word in [*words, "d.json"])


def test_editors_may_leave_a_mark(folder: Path) -> None:
    Path("d.json").write_text(json.dumps([video()]), encoding="utf-8-sig")
    (clips,) = load_datasets(Path("d.json"), None, DataSettings(), {"model_family": "somefamily", "output_dir": "out"})
    assert clips.id == "clips"


def test_missing_file_and_missing_folder(folder: Path) -> None:
    with pytest.raises(ConfigError, match="does not exist"):
        load_datasets(Path("none.json"), None, DataSettings(), {})
    with pytest.raises(DataError, match="'clips': nowhere"):
        load([video(instance_data_dir="nowhere")])
    with pytest.raises(ConfigError, match="exactly one"):
        load_datasets(Path("none.json"), Path("datasets"), DataSettings(), {})


def linked(**kinds: Mapping[str, object]) -> list[dict[str, object]]:
    return [{"id": name.replace("_", "-"), "instance_data_dir": "datasets/videos", **keys} for name, keys in kinds.items()]


def test_every_kind_of_entry(folder: Path) -> None:
    entries = load(
        linked(
            films={"conditioning_data": "before", "s2v_datasets": ["speech"], "cache_dir_vae": "here"},
            photos={"dataset_type": "image", "image_embeds": "b"},
            speech={"dataset_type": "audio", "audio": {"bucket_strategy": "duration"}},
            test={"dataset_type": "eval"},
            before={"dataset_type": "conditioning", "conditioning_type": "reference_strict", "reference_downscale": "2"},
            where={"dataset_type": "conditioning", "conditioning_type": "mask", "source_dataset_id": "films"},
        )
        + [{"id": name, "dataset_type": "image_embeds", "cache_dir": f"kept/{name}"} for name in ("a", "b")]
    )
    films, photos, speech, test, before, where = entries[:6]
    assert isinstance(films, VideoEntry) and films.conditioning_data == ("before", "where") and films.s2v_datasets == ("speech",)
    assert isinstance(photos, ImageEntry) and isinstance(speech, AudioEntry) and isinstance(test, EvalEntry)
    assert isinstance(before, ConditioningEntry) and (before.role, before.reference_downscale) == ("reference", 2)
    assert isinstance(where, ConditioningEntry) and where.role == "mask"
    assert [str(e.cache_dir) for e in (films, photos, test)] == ["here", "kept/b", "kept/a"]
    assert all(entry.notes == () for entry in entries)


def test_links_that_lead_nowhere(folder: Path) -> None:
    mask = {"dataset_type": "conditioning", "conditioning_type": "mask"}
    with pytest.raises(ConfigError, match=r"'b'.*disabled"):
        load(linked(a={"conditioning_data": "b"}, b={**mask, "disabled": True}))
    with pytest.raises(ConfigError, match="one mask at most"):
        load(linked(a={"conditioning_data": ["b", "c"]}, b=mask, c=mask))
    with pytest.raises(ConfigError, match=r"truncation_mode: with conditioning_data only `beginning`"):
        load(linked(a={"conditioning_data": "b", "audio": {"truncation_mode": "end"}}, b=mask))
    two = [{"id": name, "dataset_type": "text_embeds"} for name in ("t", "u")]
    with pytest.raises(ConfigError, match=r"kept in one place, here 't'"):
        load([video(text_embeds="u"), *two])
    assert len(load([video(text_embeds="t"), *two])) == 3


def test_keys_of_other_tools_without_effect_are_notices(folder: Path) -> None:
    harmless = {"is_regularisation_data": False, "start_epoch": "1", "slider_strength": 0.0, "crop": False, "crop_style": "center"}
    entry, text, sounds = load([
        video(metadata_backend="discovery", delete_unwanted_images=True, maximum_image_size=480, **harmless),
        {"id": "t", "dataset_type": "text_embeds", "write_batch_size": 128},
        {"id": "s", "dataset_type": "audio", "instance_data_dir": "datasets/videos", "resolution": 512},
    ])  # fmt: skip
    assert [note.split(":")[1].split()[0] for note in entry.notes] == ["metadata_backend", "delete_unwanted_images", "maximum_image_size"]
    assert "no file of a dataset is ever changed or deleted" in entry.notes[1]
    assert text.notes[0].startswith("t: write_batch_size has no effect")
    assert sounds.notes == ("s: resolution has no effect: sound has no picture",)
    assert isinstance(entry, PictureEntry) and not entry.crop
