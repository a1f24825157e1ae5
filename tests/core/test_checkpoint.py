"""Checkpoints: what was saved comes back, damage is named, and nothing is lost to a full disk or a changed run."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from tuner.errors import CheckpointError, DiskError
from tuner.train.saving import checkpoint
from tuner.train.saving.checkpoint import (
    checkpoints,
    differences,
    find_checkpoint,
    load_checkpoint,
    require_exact,
    save_checkpoint,
    verify_checkpoint,
)

FACTS = {"exact": {"seed": 1, "rate": 0.1}, "list": [1, None, "x"], "infinite": float("inf")}


def tensors(step: int) -> dict[str, dict[str, torch.Tensor]]:
    """Two parts whose content depends on the step."""
    generator = torch.Generator().manual_seed(step)
    return {
        "weights": {"a.weight": torch.randn(4, 5, generator=generator), "b": torch.randn(7, generator=generator).bfloat16()},
        "optimizer": {"step": torch.tensor(float(step)), "empty": torch.empty(0, 3), "codes": torch.arange(9, dtype=torch.uint8)},
    }


def save(folder: Path, step: int, keep: int = 0, extra: Callable[[Path], None] | None = None) -> Path:
    return save_checkpoint(folder, step, tensors(step), FACTS, keep=keep, extra=extra)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def assert_holds(path: Path, step: int) -> None:
    """Bit for bit what `save` wrote."""
    loaded = load_checkpoint(path)
    assert loaded.step == step
    assert loaded.facts == FACTS
    expected = tensors(step)
    assert loaded.parts.keys() == expected.keys()
    for part, content in expected.items():
        assert loaded.parts[part].keys() == content.keys()
        for name, tensor in content.items():
            assert loaded.parts[part][name].dtype == tensor.dtype
            assert torch.equal(loaded.parts[part][name], tensor)


def test_what_was_saved_comes_back(tmp_path: Path) -> None:
    def extra(folder: Path) -> None:
        save_file({"lora_A": torch.ones(2)}, folder / "adapter.safetensors")
        (folder / "notes").mkdir()
        (folder / "notes" / "card.md").write_text("a card")

    path = save(tmp_path / "run", 12, extra=extra)
    assert path == tmp_path / "run" / "checkpoint-12"
    assert names(tmp_path / "run") == ["checkpoint-12"]
    assert names(path) == [
        "COMPLETE", "adapter.safetensors", "manifest.json", "notes", "optimizer.safetensors", "state.json", "weights.safetensors",
    ]  # fmt: skip
    assert_holds(path, 12)
    assert torch.equal(load_file(path / "adapter.safetensors")["lora_A"], torch.ones(2))
    files = json.loads((path / "manifest.json").read_text())["files"]
    assert sorted(files) == ["adapter.safetensors", "notes/card.md", "optimizer.safetensors", "state.json", "weights.safetensors"]
    assert all(entry["bytes"] == (path / name).stat().st_size for name, entry in files.items())


def test_views_tied_and_trained_tensors_are_stored_by_value(tmp_path: Path) -> None:
    base = torch.arange(12.0).reshape(3, 4)
    trained = torch.nn.Parameter(base.clone())
    broadcast = torch.ones(1).expand(5)
    weights = {"base": base, "tied": base, "row": base[1], "turned": base.T, "broadcast": broadcast, "trained": trained}
    loaded = load_checkpoint(save_checkpoint(tmp_path, 1, {"weights": weights}, {}, keep=0)).parts["weights"]
    assert loaded.keys() == weights.keys()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in weights.items())


def test_same_step_is_replaced(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, 5, {"weights": {"a": torch.zeros(3)}}, {}, keep=1)
    save(tmp_path, 5, keep=1)
    assert names(tmp_path) == ["checkpoint-5"]
    assert_holds(tmp_path / "checkpoint-5", 5)


@pytest.mark.parametrize(("keep", "left"), [(0, [8, 9, 10, 11, 100]), (1, [100]), (2, [11, 100]), (9, [8, 9, 10, 11, 100])])
def test_oldest_are_pruned_by_number(tmp_path: Path, keep: int, left: list[int]) -> None:
    for step in (8, 9, 10, 11):
        save(tmp_path, step)
    save(tmp_path, 100, keep=keep)
    assert [step for step, _ in checkpoints(tmp_path)] == left
    assert len(names(tmp_path)) == len(left)


def test_the_one_just_written_is_never_pruned(tmp_path: Path) -> None:
    for step in (200, 300):
        save(tmp_path, step)
    save(tmp_path, 100, keep=2)
    assert [step for step, _ in checkpoints(tmp_path)] == [100, 300]


def test_damaged_ones_and_strangers_take_no_place_and_are_left_alone(tmp_path: Path) -> None:
    for step in (1, 2, 3):
        save(tmp_path, step)
    (tmp_path / "checkpoint-2" / "COMPLETE").unlink()
    (tmp_path / "checkpoint-99").mkdir()
    (tmp_path / "checkpoint-99" / "mine.txt").write_text("mine")
    save(tmp_path, 4, keep=2)
    assert names(tmp_path) == ["checkpoint-2", "checkpoint-3", "checkpoint-4", "checkpoint-99"]


def test_leftovers_of_killed_saves_are_ignored_then_cleaned(tmp_path: Path) -> None:
    save(tmp_path, 1)
    shutil.copytree(tmp_path / "checkpoint-1", tmp_path / ".checkpoint-9.tmp-123")
    shutil.copytree(tmp_path / "checkpoint-1", tmp_path / ".checkpoint-0.pruned-123")
    assert find_checkpoint(tmp_path, "latest") == tmp_path / "checkpoint-1"
    save(tmp_path, 2)
    assert names(tmp_path) == ["checkpoint-1", "checkpoint-2"]


def test_interrupted_replacement_is_found_and_brought_back(tmp_path: Path) -> None:
    save(tmp_path, 1)
    (tmp_path / "checkpoint-1").rename(tmp_path / ".checkpoint-1.old-123")
    found = find_checkpoint(tmp_path, "latest")
    assert found is not None
    assert_holds(found, 1)
    save(tmp_path, 2)
    assert names(tmp_path) == ["checkpoint-1", "checkpoint-2"]
    assert_holds(tmp_path / "checkpoint-1", 1)


# --- damage --------------------------------------------------------------------------------------------------------
def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


DAMAGE: dict[str, tuple[Callable[[Path], None], str]] = {
    "a bit": (lambda folder: flip(folder / "optimizer.safetensors"), "optimizer.safetensors"),
    "the facts": (lambda folder: flip(folder / "state.json"), "state.json"),
    "a short file": (lambda folder: os.truncate(folder / "weights.safetensors", 10), "weights.safetensors"),
    "a missing file": (lambda folder: (folder / "weights.safetensors").unlink(), "weights.safetensors"),
    "no guard": (lambda folder: (folder / "COMPLETE").unlink(), "COMPLETE"),
    "a short guard": (lambda folder: os.truncate(folder / "COMPLETE", 5), "manifest.json"),
    "no manifest": (lambda folder: (folder / "manifest.json").unlink(), "manifest.json"),
    "a short manifest": (lambda folder: os.truncate(folder / "manifest.json", 40), "manifest.json"),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_damage_is_named_and_the_one_before_is_found(tmp_path: Path, kind: str, caplog: pytest.LogCaptureFixture) -> None:
    hurt, named = DAMAGE[kind]
    save(tmp_path, 1)
    bad = save(tmp_path, 2)
    hurt(bad)
    with pytest.raises(CheckpointError, match=f"{named} is damaged") as error:
        load_checkpoint(bad)
    assert error.value.where == str(bad / named)
    assert error.value.exit_code == 6
    with pytest.raises(CheckpointError, match=named):
        find_checkpoint(tmp_path, "checkpoint-2")
    assert find_checkpoint(tmp_path, "latest") == tmp_path / "checkpoint-1"
    assert "checkpoint-2 is damaged" in caplog.text
    (tmp_path / "checkpoint-1").rename(tmp_path / "elsewhere")
    with pytest.raises(CheckpointError, match="none is whole: checkpoint-2"):
        find_checkpoint(tmp_path, "latest")


def test_manifest_cannot_point_outside(tmp_path: Path) -> None:
    path = save(tmp_path / "run", 1)
    outside = tmp_path / "run" / "private"
    outside.write_text("x")
    entry = {"bytes": 1, "sha256": checkpoint._digest(outside)}
    (path / "manifest.json").write_text(json.dumps({"format": 1, "files": {"../private": entry}}))
    (path / "COMPLETE").write_text(checkpoint._digest(path / "manifest.json"))
    with pytest.raises(CheckpointError, match="private is damaged"):
        verify_checkpoint(path)


def test_newer_format_is_refused(tmp_path: Path) -> None:
    path = save(tmp_path, 1)
    manifest = json.loads((path / "manifest.json").read_text()) | {"format": 2}
    (path / "manifest.json").write_text(json.dumps(manifest))
    (path / "COMPLETE").write_text(checkpoint._digest(path / "manifest.json"))
    with pytest.raises(CheckpointError, match="newer version, in format 2"):
        load_checkpoint(path)


# --- finding -------------------------------------------------------------------------------------------------------
def test_find_by_name_path_and_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert find_checkpoint(tmp_path / "absent", "latest") is None
    assert find_checkpoint(tmp_path, "latest") is None
    for step in (9, 10):
        save(tmp_path / "run", step)
    run = tmp_path / "run"
    assert find_checkpoint(run, "") is None
    assert find_checkpoint(run, "latest") == run / "checkpoint-10"
    assert find_checkpoint(run, "checkpoint-9") == run / "checkpoint-9"
    assert find_checkpoint(tmp_path / "other", str(run / "checkpoint-9")) == run / "checkpoint-9"
    monkeypatch.chdir(tmp_path)
    assert find_checkpoint(tmp_path / "other", "run/checkpoint-9") == Path("run/checkpoint-9")


def test_wanted_but_missing_is_an_error_that_lists_what_is_there(tmp_path: Path) -> None:
    save(tmp_path, 3)
    with pytest.raises(CheckpointError, match="there are: checkpoint-3") as error:
        find_checkpoint(tmp_path, "checkpoint-4")
    assert error.value.value == "checkpoint-4"


# --- failures of the disk ------------------------------------------------------------------------------------------
def test_no_room_is_seen_before_anything_is_written(tmp_path: Path) -> None:
    save(tmp_path, 1)
    huge = {"weights": {"a": torch.zeros(1).expand(2**50)}}
    with pytest.raises(DiskError, match=r"needs \d+ bytes and \d+ are free") as error:
        save_checkpoint(tmp_path, 2, huge, {}, keep=1)
    assert error.value.exit_code == 9
    assert "checkpoints_total_limit" in error.value.remedy
    with pytest.raises(DiskError, match="are free"):
        save_checkpoint(tmp_path, 2, {}, {}, keep=1, extra_bytes=2**60)
    assert names(tmp_path) == ["checkpoint-1"]
    assert_holds(tmp_path / "checkpoint-1", 1)


def test_disk_that_fills_up_at_any_sync_leaves_the_older_ones(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(tmp_path, 1)
    before_rename = 0
    for failing in range(100):
        left = failing
        sync = os.fsync

        def full(descriptor: int, sync: Callable[[int], None] = sync) -> None:
            nonlocal left
            if left == 0:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            left -= 1
            sync(descriptor)

        with monkeypatch.context() as patched:
            patched.setattr(os, "fsync", full)
            try:
                save(tmp_path, 2, keep=1)
            except DiskError as error:
                assert "filled up" in str(error) or "No space left" in str(error)
            else:
                break
        assert not [name for name in names(tmp_path) if name.startswith(".")]
        assert_holds(tmp_path / "checkpoint-1", 1)
        before_rename += "checkpoint-2" not in names(tmp_path)
    # weights, optimizer, state, manifest, guard, folder; the seventh sync is the parent's, after the rename
    assert before_rename == 6
    assert names(tmp_path) == ["checkpoint-2"]


def test_full_disk_reported_by_safetensors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(tensors: object, path: Path) -> None:
        path.write_bytes(b"half")
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    save(tmp_path, 1)
    with monkeypatch.context() as patched:
        patched.setattr(checkpoint, "save_file", full)
        with pytest.raises(DiskError, match="No space left on device"):
            save(tmp_path, 2, keep=1)
    assert names(tmp_path) == ["checkpoint-1"]


def test_disk_that_returns_other_bytes_keeps_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(tmp_path, 1)
    sync = checkpoint._sync

    def lie(path: Path) -> None:
        sync(path)
        if path == tmp_path:
            flip(tmp_path / "checkpoint-1" / "weights.safetensors")

    monkeypatch.setattr(checkpoint, "_sync", lie)
    with pytest.raises(DiskError, match=r"weights\.safetensors"):
        save(tmp_path, 1)
    assert names(tmp_path) == ["checkpoint-1"]
    assert_holds(tmp_path / "checkpoint-1", 1)


def test_error_in_extra_passes_and_leaves_nothing(tmp_path: Path) -> None:
    def extra(folder: Path) -> None:
        (folder / "half").write_text("half")
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        save(tmp_path, 1, extra=extra)
    assert names(tmp_path) == []


@pytest.mark.parametrize("name", ["../x", "a/b", "", ".hidden", "taken"])
def test_part_names_are_plain_and_free(tmp_path: Path, name: str) -> None:
    with pytest.raises(ValueError, match="cannot name a part"):
        save_checkpoint(tmp_path, 1, {name: {}}, {}, keep=0, extra=lambda folder: (folder / "taken.safetensors").touch())
    assert names(tmp_path) == []


# --- exact resume --------------------------------------------------------------------------------------------------
def test_differences_name_each_fact() -> None:
    before = {"seed": 1, "rate": 0.1, "api_token": "a", "shape": [1, 2], "strict": True}
    after = {"seed": 2, "rate": 0.1, "api_token": "b", "shape": (1, 2), "strict": 1}
    saved = {"settings": before, "versions": {"x": "1"}, "same": float("nan")}
    current = {"settings": after, "versions": {"y": "1"}, "same": float("nan")}
    assert differences(saved, current) == [
        "settings.seed: 1 in the checkpoint, 2 now",
        "settings.api_token: differs",
        "settings.strict: True in the checkpoint, 1 now",
        "versions.x: '1' in the checkpoint, absent now",
        "versions.y: absent in the checkpoint, '1' now",
    ]
    assert differences(saved, current, frozenset({"versions", "settings.seed", "settings.api_token"})) == [
        "settings.strict: True in the checkpoint, 1 now"
    ]


def test_exact_facts_survive_the_file(tmp_path: Path) -> None:
    facts = {"rate": 1e-4 / 3, "betas": (0.9, 0.999), "none": None, "big": 2**60, "infinite": float("inf"), "not": float("nan")}
    loaded = load_checkpoint(save_checkpoint(tmp_path, 1, {}, facts, keep=0))
    require_exact(loaded.facts, facts)


def test_inexact_resume_is_an_error_with_all_differences() -> None:
    with pytest.raises(CheckpointError) as error:
        require_exact({"seed": 1, "lr": 0.1}, {"seed": 2, "lr": 0.2}, where="checkpoint-3")
    assert error.value.exit_code == 6
    assert error.value.where == "checkpoint-3"
    assert "seed: 1 in the checkpoint, 2 now" in error.value.message
    assert "lr: 0.1 in the checkpoint, 0.2 now" in error.value.message
    require_exact({"seed": 1, "folder": "a"}, {"seed": 1, "folder": "b"}, frozenset({"folder"}))
