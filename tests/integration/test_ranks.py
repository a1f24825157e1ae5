"""Two processes train one model: the same weights as one process, one writer, and nobody left waiting."""

from __future__ import annotations

import os
import signal
import socket
from pathlib import Path

import pytest
import torch

from integration.processes import KILL_AT, Launcher
from integration.project import Project, add_damaged_clip
from tuner.train.saving.checkpoint import load_checkpoint

TRAIN = {"train_batch_size": 1, "checkpoint_step_interval": 0, "max_train_steps": 3}


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class Pair:
    """Two ranks of one command, as `torchrun` starts them."""

    def __init__(self, launcher: Launcher, *arguments: object, first: dict[str, str] | None = None) -> None:
        world = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
        self.launcher = launcher
        self.logs = [Path(f"rank{rank}.log") for rank in (0, 1)]
        for log in self.logs:
            log.unlink(missing_ok=True)
        self.pids = [
            launcher.start(arguments, log, RANK=str(rank), LOCAL_RANK=str(rank), **world, **extra)
            for rank, (log, extra) in enumerate(zip(self.logs, (first or {}, {}), strict=True))
        ]

    def wait(self) -> list[int]:
        """The exit codes."""
        return [self.launcher.wait(pid) for pid in self.pids]

    def said(self, rank: int) -> str:
        """What a rank wrote on the screen."""
        return self.logs[rank].read_text()


def weights(folder: str, step: int) -> dict[str, torch.Tensor]:
    return load_checkpoint(Path(folder) / f"checkpoint-{step}").parts["weights"]


def test_two_ranks_train_what_one_process_trains(project: Project, launcher: Launcher) -> None:
    add_damaged_clip(Path("clips"), "elder")
    pair = Pair(launcher, "train", "--config", project.config(output_dir="two", **TRAIN))
    assert pair.wait() == [0, 0], pair.said(0) + pair.said(1)
    assert "elder" in pair.said(0) and project.events("cached", "two")[0]["failed"] == 1
    assert "2 devices" in pair.said(0) and "lora.safetensors" in pair.said(0)
    assert pair.said(1) == ""
    for kind in ("started", "cached", "training", "checkpoint", "finished"):
        assert len(project.events(kind, "two")) == 1, kind
    assert [row["step"] for row in project.metrics("two")] == [1, 2, 3]
    assert project.train(output_dir="one", gradient_accumulation_steps=2, **TRAIN) == 0
    # In one of the steps a rank has the clip without sound; its modules get their gradient from the other.
    for alone, together in zip(project.metrics("one"), project.metrics("two"), strict=True):
        for name in ("loss", "grad_norm", "loss/video", "loss/audio"):
            assert together[name] == pytest.approx(alone[name], rel=1e-4), name
    one, two = weights("one", 3), weights("two", 3)
    # Sums of two gradients in another order than the accumulation's.
    assert one.keys() == two.keys() and all(torch.allclose(one[name], two[name], rtol=0, atol=1e-6) for name in one)


def test_the_first_rank_alone_makes_samples_while_the_other_waits(project: Project, launcher: Launcher) -> None:
    assert project.tuner("cache", "--config", project.config()) == 0
    sampling = {"validation_disable": False, "validation_prompt": "waves", "validation_resolution": "64x64", "validation_step_interval": 1,
                "validation_num_video_frames": 9, "validation_num_inference_steps": 1, "validation_guidance": 1}  # fmt: skip
    rows = []
    for out, keys in (("plain", {"validation_disable": True}), ("sampled", sampling)):
        pair = Pair(launcher, "train", "--config", project.config(output_dir=out, **{**TRAIN, "max_train_steps": 2, **keys}))
        assert pair.wait() == [0, 0], pair.said(0) + pair.said(1)
        rows.append(project.metrics(out))
    assert [row["step"] for row in project.events("sample", "sampled")] == [0, 1, 2] and not project.events("sample_failed", "sampled")
    assert rows[0] == rows[1] and pair.said(1) == ""


def test_a_signal_to_one_rank_stops_both_after_the_same_step_and_the_rest_is_exact(project: Project, launcher: Launcher) -> None:
    assert project.tuner("cache", "--config", project.config()) == 0
    long = {**TRAIN, "max_train_steps": 200, "checkpoint_step_interval": 1, "checkpoints_total_limit": 2}
    pair = Pair(launcher, "train", "--config", project.config(output_dir="two", **long))
    metrics = Path("two/metrics.jsonl")
    while not (metrics.exists() and metrics.read_text().count("\n") >= 2):
        os.kill(pair.pids[1], 0)
    os.kill(pair.pids[1], signal.SIGTERM)
    assert pair.wait() == [143, 143], pair.said(0) + pair.said(1)
    stopped = int(str(project.events("stopped", "two")[0]["step"]))
    assert 2 <= stopped < 200 and Path(f"two/checkpoint-{stopped}").exists()
    more = {**long, "max_train_steps": stopped + 1, "resume_from_checkpoint": "latest"}
    assert Pair(launcher, "train", "--config", project.config(output_dir="two", **more)).wait() == [0, 0]


def test_what_fails_on_one_rank_ends_both_with_its_exit_code(project: Project, launcher: Launcher) -> None:
    assert project.tuner("cache", "--config", project.config()) == 0
    bad = Pair(launcher, "train", "--config", project.config(optimizer="adamx"))
    assert bad.wait() == [2, 2]
    assert "adamx" in bad.said(0) and "rank 0 failed" in bad.said(1)
    assert not Path("out").exists()
    Path("out/.checkpoint-3.tmp-").mkdir(parents=True)
    Path("out/.lock").mkdir()
    unlocked = Pair(launcher, "train", "--config", project.config(**TRAIN))
    assert unlocked.wait() == [9, 9]
    assert "rank 0 failed" in unlocked.said(1) and "Traceback" not in unlocked.said(0) + unlocked.said(1)


def test_a_rank_that_is_killed_does_not_leave_the_other_waiting(project: Project, launcher: Launcher) -> None:
    assert project.tuner("cache", "--config", project.config()) == 0
    pair = Pair(launcher, "train", "--config", project.config(**TRAIN), first={KILL_AT: "metrics.jsonl:3"})
    first, second = pair.wait()
    assert first == -signal.SIGKILL and second not in (0, first)
