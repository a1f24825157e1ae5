"""What `crepa_encoder` may be, and what is said where it is nothing: names, repositories, folders, with and without a network."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from huggingface_hub import constants
from safetensors.torch import load_file, save_file

from ltxvideo2.ltx2_hub import COMMIT, FakeHub
from regularizers.teacher_hub import asked, teacher_hub
from tuner.errors import CheckpointError, ConfigError, HubError, TunerError
from tuner_regularizers.teacher_files import NAMES, HubTeacher, LocalTeacher, TeacherShape, find_teacher, tiny_model, write_tiny_teacher


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_teacher(tmp_path_factory.mktemp("written"))


@pytest.fixture
def folder(written: Path, tmp_path: Path) -> Path:
    """One to be spoiled."""
    return Path(shutil.copytree(written, tmp_path / "teacher"))


def test_the_names_of_the_release_are_hub_repositories() -> None:
    assert NAMES["dinov2_vitg14"] == "facebook/dinov2-giant" and NAMES["dinov2_vits14"] == "facebook/dinov2-small"
    assert NAMES["dinov2_vitl14_reg"] == "facebook/dinov2-with-registers-large" and len(NAMES) == 8
    assert all(isinstance(find_teacher(name), HubTeacher) for name in [*NAMES, "somebody/dinov2", "somebody/dinov2@v1"])


def test_a_folder_is_read_as_it_is(folder: Path) -> None:
    teacher = find_teacher(str(folder))
    assert isinstance(teacher, LocalTeacher) and teacher.shape() == TeacherShape(32, 14) and teacher.downloads() == ()
    opened, expected = teacher.open().state_dict(), tiny_model().state_dict()
    assert opened.keys() == expected.keys() and all(torch.equal(opened[name], expected[name]) for name in expected)
    assert not any(p.requires_grad for p in teacher.open().parameters()) and not teacher.open().training


def test_what_is_random_repeats_and_touches_no_generator(tmp_path: Path) -> None:
    before = torch.get_rng_state()
    one, two = (load_file(write_tiny_teacher(tmp_path / name, seed=3) / "model.safetensors") for name in "ab")
    assert all(torch.equal(one[name], two[name]) for name in one) and torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("dinov2_vitb", "there is no such image encoder.*did you mean .*dinov2_vitb14"),
        ("clip", "there is no such image encoder.*use one of dinov2_vits14"),
        ("./nowhere", "there is no such folder"),
        ("/no/where/at/all", "there is no such folder"),
        ("notes.txt", "is a file, no folder"),
    ],
)
def test_a_name_that_is_none_is_a_configuration_error(name: str, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("notes.txt").touch()
    with pytest.raises(ConfigError, match=f"(?s)^crepa_encoder: {words}"):
        find_teacher(name)


def test_a_folder_that_holds_no_teacher_says_what_is_wrong(folder: Path) -> None:
    config = (folder / "config.json").read_text()

    def said(text: str | None) -> str:
        (folder / "config.json").unlink() if text is None else (folder / "config.json").write_text(text)
        with pytest.raises(CheckpointError) as caught:
            find_teacher(str(folder)).shape()
        return str(caught.value)

    assert said(json.dumps({**json.loads(config), "model_type": "bert"})).startswith("crepa_encoder: is no DINOv2 (got 'bert')")
    assert said("{").startswith("crepa_encoder: its config.json is damaged")
    assert said(None).startswith("crepa_encoder: the folder holds no model")
    (folder / "model.safetensors").unlink()
    assert "the folder holds no safetensors weights" in said(config) and said(config).startswith("crepa_encoder")


def test_weights_that_are_missing_or_damaged_are_never_made_up(folder: Path) -> None:
    file = folder / "model.safetensors"
    tensors = load_file(file)
    del tensors["layernorm.weight"]
    save_file(tensors, file, {"format": "pt"})
    with pytest.raises(CheckpointError, match=r"weights are missing.*layernorm\.weight"):
        find_teacher(str(folder)).open()
    file.write_bytes(file.read_bytes()[:-100])
    for use in ("fingerprint", "open"):
        with pytest.raises(CheckpointError, match="crepa_encoder"):
            teacher = find_teacher(str(folder))
            teacher.open() if use == "open" else teacher.fingerprint


# --- the hub -----------------------------------------------------------------------------------------------------
@pytest.fixture
def online(written: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    with teacher_hub(written, tmp_path, monkeypatch) as server:
        yield server


def test_planning_reads_the_configuration_alone_and_the_weights_come_later(online: FakeHub, folder: Path) -> None:
    teacher = find_teacher("dinov2_vits14")
    assert teacher.shape() == TeacherShape(32, 14) and asked(online) == ["config.json"]
    assert teacher.downloads() == (f"0.0 GB in 1 files from facebook/dinov2-small@{COMMIT}",)
    assert teacher.fingerprint == LocalTeacher(folder).fingerprint
    assert asked(online) == ["config.json", "model.safetensors"]
    assert teacher.downloads() == () and torch.equal(teacher.open().state_dict()["layernorm.weight"], torch.ones(32))
    assert find_teacher("facebook/dinov2-small@v1").shape() == TeacherShape(32, 14)


def test_without_a_network_the_cache_answers(online: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = find_teacher("dinov2_vits14").fingerprint
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    offline = find_teacher("dinov2_vits14")
    assert offline.shape() == TeacherShape(32, 14) and offline.downloads() == () and offline.fingerprint == expected
    with pytest.raises(HubError, match=r"^crepa_encoder: facebook/dinov2-base: the hub cannot be reached") as caught:
        find_teacher("dinov2_vitb14").shape()
    assert "give their path" in str(caught.value)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("somebody/nothing", "no such repository"),
        ("facebook/dinov2-small@v9", "no such repository or revision"),
        ("somebody/pickled", "lacks a file.*model.safetensors"),
    ],
)
def test_what_the_hub_does_not_have_is_told_while_planning(online: FakeHub, name: str, words: str) -> None:
    with pytest.raises(TunerError, match=f"(?s)^crepa_encoder: .*{words}"):
        find_teacher(name).shape()
