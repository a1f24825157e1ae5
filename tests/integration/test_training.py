"""`tuner train` end to end: what it writes, what it says, what it refuses."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from safetensors import safe_open

from integration.project import Project, add_clip
from tuner.data.media import probe

PHASES = ["imports", "device", "plan", "cache", "data", "load", "adapters", "attach", "optimizer", "first step"]
"""In which a start is told, in order."""


def test_a_run_leaves_adapter_sample_and_records(project: Project, capsys: pytest.CaptureFixture[str]) -> None:
    code = project.train(
        validation_disable=False, validation_prompt="a drifting pattern", validation_resolution="64x64",
        validation_num_video_frames=9, validation_num_inference_steps=2, validation_guidance=2,
    )  # fmt: skip
    shown = capsys.readouterr().out
    assert code == 0
    assert "Plan" in shown and "lora.safetensors" in shown and "sample.mp4" in shown
    out = Path("out")
    for name in ("run.json", "config.resolved.json", "events.jsonl", "metrics.jsonl", "heartbeat.json", "pytorch_lora_weights.safetensors"):
        assert (out / name).exists(), name
    with safe_open(out / "lora.safetensors", framework="pt") as file:
        keys = list(file.keys())
    assert keys and all(key.startswith("diffusion_model.") and key.endswith((".lora_A.weight", ".lora_B.weight")) for key in keys)
    sample = probe(next(out.glob("validation/*/*.mp4")))
    assert (sample.width, sample.height, sample.has_audio) == (64, 64, True)
    rows = project.metrics()
    assert [row["step"] for row in rows] == [1, 2, 3, 4]
    assert all("loss/video" in row and "loss/audio" in row and "grad_norm" in row and row["lr"] == 1e-3 for row in rows)
    resolved = json.loads((out / "config.resolved.json").read_text())
    assert resolved["lora_rank"] == {"value": 4, "origin": "file"} and resolved["seed"]["origin"] == "default"
    cached = project.events("cached")[0]
    assert cached["found"] == cached["cached"] + cached["encoded"] + cached["failed"]
    start = project.events("start")[0]
    assert isinstance(start["seconds"], dict) and list(start["seconds"]) == PHASES
    assert sum(start["seconds"].values()) == pytest.approx(start["total"], abs=0.01)
    assert not any(".tmp" in path.name or path.name.endswith(".part") for path in out.rglob("*"))


def test_a_second_run_encodes_nothing_and_switching_back_neither(project: Project, capsys: pytest.CaptureFixture[str]) -> None:
    def encoded(**changes: object) -> int:
        shutil.rmtree("out", ignore_errors=True)
        assert project.train(max_train_steps=1, **changes) == 0
        return int(str(project.events("cached")[0]["encoded"]))

    assert encoded() > 0
    assert encoded() == 0
    assert encoded(resolution=96) > 0
    assert encoded() == 0


def test_without_sound_only_the_video_side_is_loaded(project: Project, capsys: pytest.CaptureFixture[str]) -> None:
    for path in Path("clips").iterdir():
        path.unlink()
    for name in ("elm", "fir"):
        add_clip(Path("clips"), name, sound=False)
    assert project.train() == 0
    assert "audio" not in json.dumps(list(project.metrics()[0]))
    with safe_open("out/lora.safetensors", framework="pt") as file:
        assert not any("audio" in key for key in file.keys())  # noqa: SIM118


def test_dry_run_checks_and_writes_nothing(project: Project, capsys: pytest.CaptureFixture[str]) -> None:
    assert project.train("--dry-run") == 0
    assert "Plan" in capsys.readouterr().out and not Path("out").exists()


@pytest.mark.parametrize(
    ("changes", "code", "words"),
    [
        ({"model_family": "ltxvideo3"}, 2, ["ltxvideo3", "ltxvideo2"]),
        ({"lora_ranc": 4}, 2, ["lora_ranc", "lora_rank"]),
        ({"train_batch_size": 0}, 2, ["train_batch_size", "1"]),
        ({"model_flavour": "nonesuch", "pretrained_model_name_or_path": None}, 2, ["model_flavour", "nonesuch"]),
        ({"optimizer": "adamx"}, 2, ["adamx", "adamw"]),
        ({"data": "nowhere", "pretrained_model_name_or_path": "not/there"}, 4, ["nowhere"]),  # said before a model is looked for
        ({"data": None}, 2, ["--data"]),
        ({"max_train_steps": 0}, 2, ["max_train_steps"]),
        ({"peft_lora_target_modules": ["to_z"]}, 2, ["to_z", "peft_lora_target_modules"]),
        ({"base_model_precision": "int8wo-quanto"}, 2, ["base_model_precision", "int8-quanto"]),
        ({"validation_disable": False, "validation_prompt": "x", "validation_resolution": "wide"}, 2, ["validation_resolution", "wide"]),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else None,
)
def test_mistakes_are_named(
    project: Project, capsys: pytest.CaptureFixture[str], changes: dict[str, object], code: int, words: list[str]
) -> None:
    assert project.train(**changes) == code
    error = capsys.readouterr().err
    assert "Traceback" not in error
    for word in words:
        assert word in error


def test_an_empty_folder_and_unusable_clips(project: Project, capsys: pytest.CaptureFixture[str]) -> None:
    Path("empty").mkdir()
    assert project.train(data="empty") == 4
    assert "empty" in capsys.readouterr().err
    Path("clips/amber.txt").unlink()
    assert project.train() == 4
    assert "amber" in capsys.readouterr().err


def test_a_broken_clip_is_counted_and_the_others_train(project: Project, capsys: pytest.CaptureFixture[str]) -> None:
    whole = Path("clips/amber.mp4").read_bytes()
    Path("clips/amber.mp4").write_bytes(whole[: len(whole) // 2])
    assert project.train(max_train_steps=1) == 0
    assert "amber" in capsys.readouterr().out
    assert Path("clips/amber.mp4").read_bytes() == whole[: len(whole) // 2]


def test_a_checkpoint_with_a_missing_and_an_unknown_key(project: Project, capsys: pytest.CaptureFixture[str]) -> None:
    from safetensors.torch import load_file, save_file

    with safe_open(project.tiny.checkpoint, framework="pt") as file:
        metadata = file.metadata()
    tensors = load_file(project.tiny.checkpoint)
    gone = next(key for key in tensors if key.endswith("transformer_blocks.0.attn1.to_q.weight"))
    tensors["model.diffusion_model.unheard_of.weight"] = tensors.pop(gone)
    save_file(tensors, "damaged.safetensors", metadata=metadata)
    assert project.train(pretrained_model_name_or_path="damaged.safetensors") == 6
    error = capsys.readouterr().err
    assert "unheard_of" in error and "attn1.to_q" in error
