"""Uninterrupted == resumed, bit for bit, and != a cold start; a stopped run saves and goes on exactly."""

from __future__ import annotations

import os
import signal
import threading
from pathlib import Path

import pytest
import torch

from integration.project import Project
from tuner.train.saving.checkpoint import load_checkpoint
from tuner_ltxvideo2.tiny import write_tiny


def weights(project: Project, out: str, step: int) -> dict[str, torch.Tensor]:
    return load_checkpoint(project.folder / out / f"checkpoint-{step}").parts["weights"]


def equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        # 32 pixels: convolutions in bf16 are slow on a CPU.
        {
            "mixed_precision": "bf16", "lora_dropout": 0.3, "gradient_accumulation_steps": 2, "resolution": 32,
            "scheduled_sampling_max_step_offset": 2, "scheduled_sampling_ramp_steps": 3, "scheduled_sampling_reflexflow": True,
        },
        {"mixed_precision": "bf16", "optimizer": "adamw_bf16", "resolution": 32},
        {"model_type": "full", "caption_dropout_probability": 0.5, "lr_scheduler": "cosine", "lr_warmup_steps": 1},
    ],
    ids=["lora", "bf16-masters-dropout-accumulation-rollouts", "bf16-stochastic", "full-cosine"],
)
def test_resumed_equals_uninterrupted_and_differs_from_a_cold_start(project: Project, changes: dict[str, object]) -> None:
    long = {"lr_scheduler": "constant"} | changes
    assert project.train(output_dir="whole", **long) == 0
    assert project.train(output_dir="parts", **long, **({} if "cosine" in long.values() else {"max_train_steps": 2})) in (0,)
    if "cosine" in long.values():
        # The schedule depends on the length: go back to the first checkpoint of a whole run instead.
        assert project.train(output_dir="parts", resume_from_checkpoint="checkpoint-2", **long) == 0
    else:
        assert project.train(output_dir="parts", resume_from_checkpoint="latest", **long) == 0
    assert equal(weights(project, "parts", 4), weights(project, "whole", 4))
    assert project.metrics("parts") == project.metrics("whole")
    assert not equal(weights(project, "whole", 2), weights(project, "whole", 4))
    if not changes:
        assert project.train(output_dir="cold", seed=7, **long) == 0
        assert not equal(weights(project, "cold", 4), weights(project, "whole", 4))


def test_a_signal_finishes_the_step_saves_and_the_rest_is_exact(project: Project) -> None:
    assert project.train(output_dir="whole", checkpoint_step_interval=0) == 0

    def interrupt_after_first_step() -> None:
        path = project.folder / "parts" / "metrics.jsonl"
        while not (path.exists() and path.read_text().count("\n")):
            pass
        os.kill(os.getpid(), signal.SIGTERM)

    watcher = threading.Thread(target=interrupt_after_first_step)
    watcher.start()
    code = project.train(output_dir="parts", checkpoint_step_interval=0, max_train_steps=4)
    watcher.join()
    assert code == 143
    stopped = project.events("stopped", "parts")[0]["step"]
    assert isinstance(stopped, int) and 1 <= stopped < 4
    assert project.train(output_dir="parts", checkpoint_step_interval=0, resume_from_checkpoint="latest") == 0
    assert equal(weights(project, "parts", 4), weights(project, "whole", 4))
    assert project.metrics("parts") == project.metrics("whole")


def test_a_resume_that_cannot_be_exact_is_refused_with_the_differences(project: Project, capsys: pytest.CaptureFixture[str]) -> None:
    assert project.train(max_train_steps=2) == 0
    assert project.train(resume_from_checkpoint="latest", learning_rate=5e-4, train_batch_size=1) == 6
    error = capsys.readouterr().err
    assert "learning_rate" in error and "train_batch_size" in error and "0.001" in error


def test_a_fresh_run_does_not_mix_with_an_old_one(project: Project, capsys: pytest.CaptureFixture[str]) -> None:
    assert project.train(max_train_steps=2) == 0
    assert project.train() == 2
    assert "checkpoint-2" in capsys.readouterr().err
    assert Path("out/checkpoint-2/COMPLETE").exists()


def test_captions_through_another_encoder_are_another_dataset(project: Project, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert project.train(max_train_steps=2) == 0
    other = write_tiny(tmp_path / "other", seed=5)
    assert project.train(resume_from_checkpoint="latest", text_encoder_path=str(other.text_encoder)) == 6
    assert "captions" in capsys.readouterr().err
