"""A small real project: the tiny checkpoint, clips with sound, a configuration; commands run in this process."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from tuner.cli.main import run
from tuner.data.media import write_mp4
from tuner.interfaces.encoders import AudioClip, VideoClip
from tuner_ltxvideo2.tiny import TinyPaths


def moving_picture(frames: int, width: int, height: int, phase: float) -> torch.Tensor:
    """(F, H, W, 3) uint8: a smooth pattern that drifts."""
    y, x = torch.meshgrid(torch.linspace(0, 1, height), torch.linspace(0, 1, width), indexing="ij")
    t = torch.arange(frames)[:, None, None] / 25
    channels = [torch.sin(6.28 * (x * a + y * b + t + phase)) for a, b in ((1, 0), (0, 1), (1, 1))]
    return ((torch.stack(channels, -1) * 0.5 + 0.5) * 255).to(torch.uint8)


def tone(seconds: float, pitch: float, rate: int = 16000) -> AudioClip:
    """A stereo sine."""
    t = torch.arange(round(seconds * rate)) / rate
    samples = (0.4 * torch.sin(2 * math.pi * pitch * t)).expand(2, -1).contiguous()
    return AudioClip(samples, rate, samples.shape[1])


@dataclass(frozen=True)
class Project:
    """A working folder with clips."""

    folder: Path
    tiny: TinyPaths

    def config(self, name: str = "config.json", **changes: object) -> Path:
        """A configuration like the demo's, with changes; None removes a key."""
        values: dict[str, object] = {
            "model_family": "ltxvideo2", "pretrained_model_name_or_path": str(self.tiny.checkpoint),
            "text_encoder_path": str(self.tiny.text_encoder), "mixed_precision": "no", "lora_rank": 4, "lora_alpha": 8,
            "optimizer": "adamw", "learning_rate": 1e-3, "train_batch_size": 2, "max_train_steps": 4, "resolution": 64,
            "data": str(self.folder / "clips"), "cache_dir": str(self.folder / "cache"), "output_dir": str(self.folder / "out"),
            "checkpoint_step_interval": 2, "validation_disable": True,
        }  # fmt: skip
        values.update(changes)
        path = self.folder / name
        path.write_text(json.dumps({key: value for key, value in values.items() if value is not None}))
        return path

    def tuner(self, *arguments: object) -> int:
        """Runs a command line; returns its exit code."""
        return run([str(argument) for argument in arguments])

    def train(self, *arguments: object, **changes: object) -> int:
        """`tuner train` with a changed configuration."""
        return self.tuner("train", "--config", self.config(**changes), *arguments)

    def metrics(self, out: str = "out") -> list[Mapping[str, float]]:
        """The rows of metrics.jsonl."""
        return [json.loads(line) for line in (self.folder / out / "metrics.jsonl").read_text().splitlines()]

    def events(self, kind: str, out: str = "out") -> list[Mapping[str, object]]:
        """The events of one kind."""
        lines = (self.folder / out / "events.jsonl").read_text().splitlines()
        return [event for event in map(json.loads, lines) if event["kind"] == kind]


def add_damaged_clip(folder: Path, name: str) -> Path:
    """A clip whose last frames are lost: its header and first frame look well, decoding it fails."""
    path = folder / f"{name}.mp4"
    write_mp4(path, VideoClip(moving_picture(17, 96, 64, 0.3), 25.0), None)
    content = bytearray(path.read_bytes())
    end = content.index(b"moov") - 4
    content[end - 60 : end] = bytes(60)
    path.write_bytes(content)
    path.with_suffix(".txt").write_text("a pattern that breaks off")
    return path


def add_clip(folder: Path, name: str, *, frames: int = 12, size: tuple[int, int] = (96, 64), sound: bool = True, caption: str = "") -> Path:
    """Writes an mp4 and its caption."""
    folder.mkdir(parents=True, exist_ok=True)
    phase = len(list(folder.iterdir())) / 7
    path = folder / f"{name}.mp4"
    audio = tone(frames / 25, 300 + 400 * phase) if sound else None
    write_mp4(path, VideoClip(moving_picture(frames, *size, phase), 25.0), audio)
    path.with_suffix(".txt").write_text(caption or f"a drifting pattern called {name}")
    return path
