"""Bad luck that costs no work: what was trained until then is kept, and what would be lost is refused."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from integration.project import Project
from tuner.data.dataset import TrainingSet
from tuner.errors import DataError
from tuner.train import caching
from tuner.train.loop import Loop
from tuner.train.run import RunFolder

Capture = pytest.CaptureFixture[str]


@pytest.mark.parametrize("optimizer", ["adamw8bit"])
def test_a_schedule_whose_state_has_tensors_is_resumed(project: Project, optimizer: str) -> None:
    pytest.importorskip("torchao")
    keys = {"optimizer": optimizer, "lr_scheduler": "cosine", "lr_warmup_steps": 1, "max_train_steps": 4}
    assert project.train(**keys, output_dir="whole") == 0
    assert project.train(**keys) == 0
    shutil.rmtree("out/checkpoint-4")
    for path in Path("out").glob("*.safetensors"):
        path.unlink()
    assert project.train("--resume_from_checkpoint", "latest", **keys) == 0
    assert project.metrics() == project.metrics("whole") and len(project.metrics()) == 4


def test_a_damaged_record_keeps_what_was_trained_before(project: Project, monkeypatch: pytest.MonkeyPatch, capsys: Capture) -> None:
    step, load = Loop.step, TrainingSet.load
    damaged = False

    def stepped(loop: Loop, number: int, feed: object) -> None:
        nonlocal damaged
        damaged = number >= 2
        step(loop, number, feed)  # type: ignore[arg-type]

    def loaded(dataset: TrainingSet, *arguments: object) -> object:
        if damaged:
            raise DataError("is damaged", where="a record")
        return load(dataset, *arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(Loop, "step", stepped)
    monkeypatch.setattr(TrainingSet, "load", loaded)
    keys = {"max_train_steps": 8, "checkpoint_step_interval": 0, "dataloader_prefetch": 0}
    assert project.train(**keys) == 4
    assert "is damaged" in capsys.readouterr().err and [path.name for path in Path("out").glob("checkpoint-*")] == ["checkpoint-2"]
    monkeypatch.undo()
    assert project.train("--resume_from_checkpoint", "latest", **keys) == 0 and len(project.metrics()) == 8


def test_a_disk_that_is_full_for_a_moment_ends_no_training(
    project: Project, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    replace = RunFolder._replace_bytes

    def full(folder: RunFolder, name: str, content: bytes, *, durable: bool) -> None:
        if name == "heartbeat.json" and b'"training"' in content:
            raise folder._unwritable(name, OSError(28, "No space left on device"))
        replace(folder, name, content, durable=durable)

    monkeypatch.setattr(RunFolder, "_replace_bytes", full)
    assert project.train(max_train_steps=3) == 0
    shown = capsys.readouterr()
    assert (shown.out + shown.err).count("heartbeat.json was not written") == 1 and len(project.metrics()) == 3


def test_what_a_finished_run_has_left_is_not_written_over(project: Project, capsys: Capture) -> None:
    assert project.train(max_train_steps=2) == 0
    for path in Path("out").glob("checkpoint-*"):
        shutil.rmtree(path)
    before = Path("out/lora.safetensors").read_bytes()
    assert project.train(max_train_steps=2, seed=7) == 2
    assert "the folder already holds lora.safetensors of an earlier run" in capsys.readouterr().err
    assert Path("out/lora.safetensors").read_bytes() == before


def test_a_file_of_the_same_size_and_time_is_looked_at_again(project: Project, capsys: Capture) -> None:
    assert project.train("--dry-run") == 0
    clip, other = Path("clips/amber.mp4"), Path("other.mp4")
    content, found = bytearray(clip.read_bytes()), clip.stat()
    content[-1] ^= 1
    other.write_bytes(content)
    os.utime(other, ns=(found.st_atime_ns, found.st_mtime_ns))
    other.replace(clip)
    assert project.tuner("cache", "--config", project.config()) == 0
    other.write_bytes(bytes(content[:-1]) + bytes([content[-1] ^ 1]))
    os.utime(other, ns=(found.st_atime_ns, found.st_mtime_ns))
    other.replace(clip)
    capsys.readouterr()
    assert project.tuner("cache", "--config", project.config()) == 0
    assert "1 encoded" in " ".join(capsys.readouterr().out.split()), "it is another content, and its records are made"


def test_a_file_that_is_replaced_while_it_is_cached_has_no_record(
    project: Project, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    ahead, clip = caching._ahead, Path("clips/amber.mp4")
    right = clip.read_bytes()

    def replaced(*arguments: Any) -> Any:
        shutil.copyfile("clips/birch.mp4", clip)
        return ahead(*arguments)

    monkeypatch.setattr(caching, "_ahead", replaced)
    project.tuner("cache", "--config", project.config())
    shown = capsys.readouterr()
    assert "was changed since it was examined" in shown.out + shown.err
    monkeypatch.setattr(caching, "_ahead", ahead)
    clip.write_bytes(right)
    assert project.tuner("cache", "--config", project.config()) == 0
    assert "1 encoded" in " ".join(capsys.readouterr().out.split())


def test_epochs_on_the_command_line_take_the_place_of_steps_in_a_file(project: Project, capsys: Capture) -> None:
    assert project.train("--dry-run", "--num_train_epochs", "3", max_train_steps=50) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "max_train_steps: left aside" in shown and "50 steps" not in shown
    assert project.train("--dry-run", "--num_train_epochs", "0", max_train_steps=50) == 0
    assert "50 steps" in capsys.readouterr().out


def test_megapixels_where_pixels_are_meant(project: Project, capsys: Capture) -> None:
    assert project.train("--dry-run", resolution=0.25) == 2
    assert "would be scaled to 0.25 pixels" in capsys.readouterr().err
