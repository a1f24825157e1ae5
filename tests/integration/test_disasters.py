"""Bad input, broken plugins, full disks, killed processes: what is wrong is named, and what was saved stays good."""

from __future__ import annotations

import fcntl
import json
import os
import random
import shutil
import signal
import sys
from collections import namedtuple
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from integration.processes import KILL_AT, Launcher
from integration.project import Project, add_clip, add_damaged_clip
from tuner.train.saving.checkpoint import load_checkpoint

Capture = pytest.CaptureFixture[str]


def sound_only(path: Path) -> None:
    """A file without picture."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("aac", rate=16000, layout="mono")
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 8000), np.float32), "fltp", "mono")
        frame.sample_rate = 16000
        container.mux(stream.encode(frame))
        container.mux(stream.encode(None))


def undecodable_sound(folder: Path) -> None:
    """A clip whose sound is in a codec that nobody knows."""
    whole = add_clip(folder, "mumble")
    with av.open(str(whole)) as source, av.open(str(folder / "mumble.mkv"), "w") as target:
        streams = {stream.index: target.add_stream_from_template(stream) for stream in source.streams}
        for packet in source.demux():
            if packet.dts is not None:
                packet.stream = streams[packet.stream.index]
                target.mux(packet)
    whole.unlink()
    remade = folder / "mumble.mkv"
    content = remade.read_bytes()
    assert b"A_AAC" in content
    remade.write_bytes(content.replace(b"A_AAC", b"A_XYZ"))


# --- data ----------------------------------------------------------------------------------------------------------
def test_every_bad_clip_is_named_with_its_reason_and_the_others_train(project: Project, capsys: Capture) -> None:
    clips = Path("clips")
    (clips / "hollow.mp4").write_bytes(b"")
    (clips / "list.mp4").write_bytes(b"#EXTM3U\nhttp://example.org/a.ts\n")
    sound_only(clips / "voice.mp4")
    undecodable_sound(clips)
    add_clip(clips, "brief", frames=5)
    add_damaged_clip(clips, "torn")
    for name in ("hollow", "list", "voice"):
        (clips / f"{name}.txt").write_text("a caption")
    before = {path.name: path.read_bytes() for path in clips.iterdir()}
    assert project.train("--strict", "--dry-run") == 4
    assert "strict" in capsys.readouterr().err
    assert project.train(max_train_steps=1) == 0
    shown = capsys.readouterr().out
    for name, reason in {
        "hollow.mp4": "cannot be decoded", "list.mp4": "playlist", "voice.mp4": "no picture", "mumble.mkv": "sound cannot be decoded",
        "brief.mp4": "5 of 9 frames",
    }.items():  # fmt: skip
        assert any(name in line and reason in line for line in shown.splitlines()), name
    assert "found 10 = used 5 + skipped 1 + failed 4" in shown and "1 undecodable" in shown
    cached = project.events("cached")[0]
    assert (cached["found"], cached["failed"]) == (5, 1)
    assert json.dumps(cached["failures"]).count("torn.mp4") == 1
    assert before == {path.name: path.read_bytes() for path in clips.iterdir()}


def test_strict_makes_a_clip_that_fails_while_encoding_an_error(project: Project, capsys: Capture) -> None:
    torn = add_damaged_clip(Path("clips"), "torn")
    assert project.tuner("cache", "--config", project.config(), "--strict") == 4
    error = capsys.readouterr().err
    assert "strict" in error and "torn.mp4" in error
    assert project.train("--strict") == 4
    assert project.events("failed") and not list(Path("out").glob("checkpoint-*"))
    torn.unlink()
    assert project.tuner("cache", "--config", project.config(), "--strict") == 0


def test_adjusted_lengths_and_sizes_are_said_once(project: Project, capsys: Capture) -> None:
    entry = {
        "id": "clips", "type": "local", "dataset_type": "video", "instance_data_dir": "clips", "resolution": 70,
        "resolution_type": "pixel", "video": {"num_frames": 61, "min_frames": 9},
    }  # fmt: skip
    Path("data.json").write_text(json.dumps([entry]))
    asked = {
        "data": None, "data_backend_config": "data.json", "validation_disable": False, "validation_prompt": "x",
        "validation_resolution": "70x100", "validation_num_video_frames": 10,
    }  # fmt: skip
    assert project.train("--dry-run", **asked) == 0
    shown = capsys.readouterr().out
    for said in ("num_frames 61 -> 57", "105x70 -> 96x64", "70x100 -> 64x96", "validation_num_video_frames: 10 -> 9"):
        assert shown.count(said) == 1, said
    assert project.train("--dry-run", "--strict", **asked) == 4
    assert "61 -> 57" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, ["data.json", "does not exist"]),
        ("{", ["data.json", "line 1"]),
        ("[]", ["dataset_type", "video"]),
        ('[{"id": "a", "type": "local", "dataset_type": "video", "instance_data_dir": "clips", "video": {"num_frame": 9}}]',
         ["num_frame", "num_frames"]),
        ('[{"id": "a", "type": "local", "dataset_type": "video", "instance_data_dir": "nowhere"}]', ["nowhere", "instance_data_dir"]),
    ],
    ids=["missing", "broken", "empty", "unknown-key", "missing-folder"],
)  # fmt: skip
def test_mistakes_in_the_dataset_file(project: Project, capsys: Capture, content: str | None, words: list[str]) -> None:
    if content is not None:
        Path("data.json").write_text(content)
    assert project.train("--dry-run", data=None, data_backend_config="data.json") in (2, 4)
    error = capsys.readouterr().err
    assert "Traceback" not in error and all(word in error for word in words), error


# --- adapters and checkpoints ------------------------------------------------------------------------------------------
def test_an_adapter_that_does_not_fit_is_refused_before_anything_is_loaded(project: Project, capsys: Capture) -> None:
    assert project.train(max_train_steps=1) == 0
    whole = load_file("out/lora.safetensors")
    down = next(name for name in whole if name.endswith("to_q.lora_A.weight"))
    save_file({name: t[:, :5].contiguous() if name == down else t for name, t in whole.items()}, "narrow.safetensors")
    config = project.config()
    for command in (["sample", "--prompt", "x", "--lora"], ["export"]):
        assert project.tuner(*command, "narrow.safetensors", "--config", config) == 6
        assert "to_q" in capsys.readouterr().err
    assert project.tuner("export", project.tiny.checkpoint, "--config", config) == 6
    assert "no adapter" in capsys.readouterr().err
    content = Path("out/lora.safetensors").read_bytes()
    for cut in (content[:-100], content[:50], b""):
        Path("out/cut.safetensors").write_bytes(cut)
        assert project.tuner("sample", "--prompt", "x", "--lora", "out/cut.safetensors", "--config", config) == 6
        assert "is damaged, or no safetensors file" in capsys.readouterr().err
    assert project.tuner("export", "nowhere", "--config", config) == 6
    assert not Path("sample.mp4").exists() and sorted(Path().glob("*.safetensors")) == [Path("narrow.safetensors")]


def test_a_refused_run_leaves_the_records_of_the_old_one(project: Project, capsys: Capture) -> None:
    assert project.train(max_train_steps=1) == 0

    def records() -> dict[str, bytes]:
        return {path.name: path.read_bytes() for path in Path("out").iterdir() if path.is_file()}

    before, cached = records(), len(list(Path("cache").rglob("*")))
    assert project.train(resolution=96) == 2
    assert project.train(resume_from_checkpoint="latest", learning_rate=1.0, resolution=96) == 6
    assert project.train(resume_from_checkpoint="checkpoint-7") == 6
    assert project.train("--dry-run") == 2
    assert records() == before
    assert len(list(Path("cache").rglob("*"))) == cached, "a run that is refused encodes nothing"
    Path("clips/amber.txt").write_text("another caption")
    assert project.train(resume_from_checkpoint="latest") == 6
    assert "captions" in capsys.readouterr().err


def test_a_second_run_on_the_same_folder_names_the_first(project: Project, capsys: Capture) -> None:
    Path("out").mkdir()
    with Path("out/.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        lock.write(f"{os.getppid()} here\n")
        lock.flush()
        assert project.train() == 2
    assert f"process {os.getppid()} on here" in capsys.readouterr().err
    assert [path.name for path in Path("out").iterdir()] == [".lock"]


def test_no_space_for_a_checkpoint(project: Project, capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    assert project.train(output_dir="whole") == 0
    capsys.readouterr()
    usage = namedtuple("usage", "total used free")
    asked: list[object] = []

    def fills_up(path: object) -> tuple[int, int, int]:
        asked.append(path)
        return usage(2**40, 0, 2**40) if len(asked) == 1 else usage(2**40, 2**40, 10)

    with monkeypatch.context() as patched:
        patched.setattr(shutil, "disk_usage", fills_up)
        assert project.train() == 9
    assert "10 are free" in capsys.readouterr().err
    assert project.events("failed")[0]["error"] == "DiskError"
    assert [path.name for path in Path("out").glob("*checkpoint-*")] == ["checkpoint-2"]
    assert project.train(resume_from_checkpoint="latest") == 0
    assert project.metrics() == project.metrics("whole")
    assert same_weights("out", "whole", 4)


# --- plugins ---------------------------------------------------------------------------------------------------------
@pytest.fixture
def broken_plugin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two distributions as pip leaves them: one cannot be imported, one offers what cannot be."""
    site = tmp_path / "site"
    for name, code in {
        "rust": "import a_library_that_is_missing\n",
        "mist": (
            "from tuner.component import Component\nfrom tuner.config.options import Options\nfrom tuner.hookspecs import hookimpl\n"
            "@hookimpl\ndef tuner_register_optimizers():\n    return [Component('lion', 'x', Options, 'mist_lost:Lion')]\n"
        ),
    }.items():
        info = site / f"tuner_{name}-1.0.dist-info"
        info.mkdir(parents=True)
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: tuner-{name}\nVersion: 1.0\n")
        (info / "entry_points.txt").write_text(f"[tuner]\n{name} = {name}_plugin\n")
        (site / f"{name}_plugin.py").write_text(code)
    monkeypatch.syspath_prepend(site)
    monkeypatch.delitem(sys.modules, "tuner.cli.train", raising=False)  # a command reads the plugins when its module is imported


@pytest.mark.usefixtures("broken_plugin")
def test_a_broken_plugin_beside_good_ones(project: Project, capsys: Capture) -> None:
    assert project.train(max_train_steps=1) == 0
    assert "rust" in capsys.readouterr().err
    assert project.tuner("plugins", "list") == 0
    shown = capsys.readouterr().out
    assert any("rust" in line and "failed" in line and "a_library_that_is_missing" in line for line in shown.splitlines())
    assert project.train("--dry-run", output_dir="other", model_family="rust") == 10
    assert "a_library_that_is_missing" in capsys.readouterr().err
    assert project.train("--dry-run", output_dir="other", optimizer="lion") == 10
    error = capsys.readouterr().err
    assert "lion" in error and "mist_lost" in error and "Traceback" not in error


# --- killed processes ------------------------------------------------------------------------------------------------
def same_weights(one: str, other: str, step: int) -> bool:
    """Whether two runs ended with the same bits."""
    found = [load_checkpoint(Path(folder) / f"checkpoint-{step}").parts["weights"] for folder in (one, other)]
    return found[0].keys() == found[1].keys() and all(torch.equal(found[0][name], found[1][name]) for name in found[0])


def test_killed_at_random_moments_and_during_a_save_the_end_is_the_same(project: Project, launcher: Launcher) -> None:
    long: dict[str, object] = {"max_train_steps": 8, "checkpoint_step_interval": 2, "lr_scheduler": "cosine"}
    assert project.train(output_dir="whole", **long) == 0
    config = project.config(output_dir=str(Path("parts").absolute()), resume_from_checkpoint="latest", **long)
    chance = random.Random(20)
    # A step opens two files, a save about twenty; the first start is killed before there is any checkpoint.
    moments = ["/metrics.jsonl:2", f"/parts/:{chance.randint(20, 60)}", f".checkpoint-4.tmp:{chance.randint(2, 12)}"]
    for number, moment in enumerate(moments):
        pid = launcher.start(["train", "--config", config], Path(f"{number}.log"), **{KILL_AT: moment})
        assert launcher.wait(pid) == -signal.SIGKILL, Path(f"{number}.log").read_text()
    assert not Path("parts/checkpoint-8").exists()
    pid = launcher.start(["train", "--config", config], Path("last.log"))
    assert launcher.wait(pid) == 0, Path("last.log").read_text()
    assert "going on after step" in Path("last.log").read_text()
    assert same_weights("parts", "whole", 8)
    assert project.metrics("parts") == project.metrics("whole")
    assert not list(Path("parts").glob(".checkpoint*"))
