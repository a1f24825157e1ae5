"""What commands promise beside training well: nothing written by a dry run, no secret kept, quiet screens, trackers, full fine-tuning."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import ClassVar
from unittest.mock import Mock

import pytest
import torch
from safetensors import safe_open

from integration.project import Project
from tuner.cli.train import Terminal
from tuner.component import Component
from tuner.config.options import Options
from tuner.config.resolve import resolve
from tuner.data.media import probe
from tuner.errors import ConfigError, PluginError
from tuner.hookspecs import hookimpl
from tuner.interfaces.services import Tracker
from tuner.plugins.loader import load_plugins
from tuner.plugins.registry import Registry
from tuner.train.saving.checkpoint import load_checkpoint
from tuner.train.session import train
from tuner_ltxvideo2.family import LTX2Family

Capture = pytest.CaptureFixture[str]
TOKEN = "hf_" + "Z" * 34


def everything(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


# --- what is written, and what is not --------------------------------------------------------------------------------
@pytest.mark.parametrize("flavour", ["", "tiny"])
def test_a_dry_run_writes_nothing_at_all(project: Project, flavour: str) -> None:
    config = project.config(**({"model_flavour": flavour, "pretrained_model_name_or_path": None} if flavour else {}))
    before = everything(project.folder)
    assert project.tuner("train", "--config", config, "--dry-run") == 0
    assert everything(project.folder) == before


def test_a_cache_needs_no_length_of_a_run(project: Project, capsys: Capture) -> None:
    config = project.config(max_train_steps=None, lr_warmup_steps=10)
    assert project.tuner("cache", "--config", config) == 0
    shown = capsys.readouterr()
    assert " 0 steps" not in shown.out and "lr_warmup_steps" not in shown.out + shown.err
    assert project.tuner("train", "--config", config) == 2
    assert "max_train_steps: the length of the run is not given" in capsys.readouterr().err


def test_after_cache_training_encodes_nothing(project: Project, capsys: Capture) -> None:
    assert project.tuner("cache", "--config", project.config()) == 0
    assert not Path("out").exists() and "8" not in capsys.readouterr().err
    assert project.train(max_train_steps=1) == 0
    cached = project.events("cached")[0]
    assert (cached["found"], cached["cached"], cached["encoded"]) == (4, 4, 0)
    assert (cached["captions_cached"], cached["captions_encoded"]) == (4, 0)


def test_records_hold_no_secret_and_adapters_no_caption_and_no_path(
    project: Project, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    for variable in ("TUNER_HUB_TOKEN", "HF_TOKEN", "WANDB_API_KEY"):
        monkeypatch.setenv(variable, TOKEN)
    assert project.train(max_train_steps=1, tracker_run_name=f"run {TOKEN}", validation_prompt="amber in a private place") == 0
    for path in Path("out").rglob("*"):
        content = path.read_bytes() if path.is_file() else b""
        assert TOKEN.encode() not in content, path
        if path.suffix == ".safetensors":
            assert all(word not in content for word in (b"drifting pattern", b"private place", str(project.folder).encode())), path
    assert "HUB_TOKEN" in capsys.readouterr().out
    with safe_open("out/lora.safetensors", framework="pt") as file:
        assert {"base_model", "family", "variant"} <= set(file.metadata())


# --- commands ----------------------------------------------------------------------------------------------------------
def test_export_and_sample_say_where_they_wrote(project: Project, capsys: Capture) -> None:
    assert project.train(max_train_steps=1) == 0
    config = project.config()
    capsys.readouterr()
    Path("share").mkdir()
    for arguments, expected in (
        (["out"], "out/lora-universal.safetensors"),
        (["out/checkpoint-1", "--layout", "peft", "-o", "share"], "share/lora-peft.safetensors"),
        (["out/lora.safetensors", "-o", "deep/er/mine.safetensors"], "deep/er/mine.safetensors"),
    ):
        assert project.tuner("export", *arguments, "--config", config) == 0
        assert capsys.readouterr().out.strip() == expected and Path(expected).is_file()
    small = ["--validation_resolution", "70x64", "--validation_num_video_frames", 9, "--validation_num_inference_steps", 1]
    sample = ["sample", "--config", config, "--prompt", "a pattern", *small]
    for bad in ("share", "clip.webm"):
        assert project.tuner(*sample, "-o", bad) == 2
        assert bad in capsys.readouterr().err
    assert project.tuner(*sample, "--lora", "out", "-o", "new/clip.mp4") == 0
    shown = capsys.readouterr()
    assert shown.out.strip() == "new/clip.mp4" and "70x64 -> 64x64" in shown.err
    assert (probe(Path("new/clip.mp4")).width, probe(Path("new/clip.mp4")).has_audio) == (64, True)
    for place in ("out", "out/lora.safetensors", "out/checkpoint-1"):  # the run knows its model
        assert project.tuner("sample", "--prompt", "a pattern", *small, "--lora", place, "--no-sound", "-o", "known.mp4") == 0
    assert project.tuner("sample", "--prompt", "a pattern", *small, "--lora", "deep/er/mine.safetensors", "-o", "never.mp4") == 2
    assert "no model family was chosen" in capsys.readouterr().err
    assert project.tuner("sample", "--prompt", "a pattern", "--lora", "otu") == 2
    assert "--lora: there is no such file or folder (got 'otu')" in capsys.readouterr().err
    assert project.tuner(*sample, "--lora", "out", "--no-sound", "-o", "silent.mp4") == 0, "its layers for sound are left out"
    assert not probe(Path("silent.mp4")).has_audio


def test_an_adapter_is_scaled_as_asked_or_refused(project: Project, capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    assert project.train(max_train_steps=1, learning_rate=0.05) == 0
    small = ["--validation_resolution", "64x64", "--validation_num_video_frames", 9, "--validation_num_inference_steps", 1]
    sample = ["sample", "--config", project.config(), "--prompt", "a pattern", *small, "--no-sound", "-o", "clip.mp4"]
    made = set()
    for strength in (1, 0, -3):
        assert project.tuner(*sample, "--lora", "out", "--strength", strength) == 0
        made.add(Path("clip.mp4").read_bytes())
    assert len(made) == 3, "a negative scale is a scale"
    capsys.readouterr()
    for arguments, said in (
        (["--lora", "out", "--strength", "nan"], "--strength: must be a finite number"),
        (["--lora", "out", "--strength", "inf"], "--strength: must be a finite number"),
        (["--strength", 2], "--strength: is the scale of an adapter, and none is given"),
    ):
        assert project.tuner(*sample, *arguments) == 2
        assert said in capsys.readouterr().err
    for error in (MemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate memory"), torch.OutOfMemoryError("CUDA out of memory")):
        monkeypatch.setattr(LTX2Family, "sample", Mock(side_effect=error))
        assert project.tuner(*sample) == 5
        assert "memory for a clip of 64x64 and 9 frames" in capsys.readouterr().err


@pytest.mark.parametrize(
    "changes",
    [
        {"model_type": "full", "optimizer": "adamw_bf16", "mixed_precision": "bf16"},
        {"model_type": "full", "optimizer": "adamw8bit"},
        {"optimizer": "adamw8bit", "mixed_precision": "bf16"},
    ],
    ids=["full-bf16", "full-8bit", "lora-8bit"],
)
def test_ways_to_train(project: Project, changes: dict[str, object]) -> None:
    # 32 pixels: convolutions in bf16 are slow on a CPU.
    assert project.train(max_train_steps=2, resolution=32, **changes) == 0
    rows = project.metrics()
    assert len(rows) == 2 and all(0 < row["loss"] < 100 and row["grad_norm"] > 0 for row in rows)
    name = "transformer.safetensors" if "model_type" in changes else "lora.safetensors"
    with safe_open(f"out/{name}", framework="pt") as file:
        assert all(torch.isfinite(file.get_tensor(key)).all() for key in file.keys())  # noqa: SIM118 - no mapping


def test_checkpointing_changes_no_number(project: Project, capsys: Capture) -> None:
    ways: dict[str, dict[str, object]] = {
        "all": {}, "none": {"gradient_checkpointing": False}, "third": {"gradient_checkpointing_interval": 3},
        "auto": {"gradient_checkpointing": "auto"},
    }  # fmt: skip
    for out, changes in ways.items():
        assert project.train(output_dir=out, max_train_steps=2, **changes) == 0
    capsys.readouterr()
    assert project.train(gradient_checkpointing="perhaps") == 2 and "gradient_checkpointing" in capsys.readouterr().err
    first = load_checkpoint(Path("all/checkpoint-2")).parts["weights"]
    for out in ("none", "third", "auto"):
        other = load_checkpoint(Path(out) / "checkpoint-2").parts["weights"]
        # The same operations on the same numbers; only the order in which gradients are added up may differ.
        assert all(torch.allclose(first[name], other[name], rtol=0, atol=1e-6) for name in first)


def test_libraries_are_quiet_unless_debugging() -> None:
    start = "import sys, logging; from tuner.cli.main import build; build().main(sys.argv[1:], standalone_mode=False)"
    imports = "import tuner.train.session; from diffusers.quantizers import torchao; logging.getLogger('torchao').error('a real error')"
    level = "print(logging.getLogger('torchao').level, file=sys.stderr)"

    def errors(code: str, *arguments: str) -> str:
        command = [sys.executable, "-c", f"{start}; {code}", *arguments, "options", "lora_rank"]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        return subprocess.run(command, capture_output=True, text=True, check=True, env=environment).stderr.strip()

    assert errors(imports) == "a real error"
    assert errors(level, "--debug") == str(logging.NOTSET)


# --- trackers ------------------------------------------------------------------------------------------------------------
class Memory(Tracker):
    """Keeps what it is told, for the test to see."""

    name = "memory"
    told: ClassVar[list[tuple[str, object]]] = []

    def __init__(self, options: Options, folder: Path) -> None:
        self.told.append(("made", folder.name))

    def start(self, settings: Mapping[str, object]) -> None:
        """With the run's name."""
        self.told.append(("start", (settings["tracker_run_name"], settings["lora_rank"])))

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Remembers the step."""
        self.told.append(("log", step))
        assert metrics["loss"] > 0 and metrics["lr"] > 0

    def close(self) -> None:
        """The last word."""
        self.told.append(("close", None))


class Grumpy(Memory):
    """Fails at the first row."""

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Fails."""
        raise ConnectionError("the server is asleep")


def tracker_plugin(*components: Component) -> Registry:
    return load_plugins(extra=[("watchers", SimpleNamespace(tuner_register_trackers=hookimpl(lambda: list(components))))])


MEMORY = Component("memory", "remembers", Options, f"{__name__}:Memory")
GRUMPY = Component("grumpy", "fails", Options, f"{__name__}:Grumpy")
LOST = Component("lost", "cannot be imported", Options, "no_such_module:Tracker")


def train_with(registry: Registry, project: Project, report_to: str) -> int:
    settings = resolve(registry.option_types, config_file=project.config(report_to=report_to, max_train_steps=2))
    return train(registry, settings, Terminal(settings)).exit_code


def test_trackers_hear_every_row_and_one_that_fails_is_said_once(project: Project, capsys: Capture) -> None:
    Memory.told.clear()
    assert train_with(tracker_plugin(MEMORY, GRUMPY), project, "memory, grumpy,memory") == 0
    mine = [entry for entry in Memory.told if entry != ("made", "out")]
    assert mine.count(("start", ("out", 4))) == 2
    assert [entry for entry in mine if entry[0] in ("log", "close")] == [("log", 1), ("log", 2), ("close", None)]
    assert capsys.readouterr().out.count("the server is asleep") == 1
    assert "the server is asleep" in json.dumps(project.events("tracker"))
    assert [row["step"] for row in project.metrics()] == [1, 2]


def test_unknown_and_lost_trackers_stop_the_run_before_it_begins(project: Project) -> None:
    registry = tracker_plugin(MEMORY, LOST)
    with pytest.raises(ConfigError, match="memori") as unknown:
        train_with(registry, project, "memori")
    assert "did you mean memory" in str(unknown.value) and unknown.value.where == "report_to"
    with pytest.raises(PluginError, match="no_such_module"):
        train_with(registry, project, "memory,lost")
    assert not Path("out").exists()
