"""Made clips: moving pictures and tones, as tensors and as files."""

from __future__ import annotations

import math
from pathlib import Path

import torch
from torch import Tensor

from tuner.data.media import write_mp4
from tuner.interfaces.encoders import AudioClip, VideoClip


def moving_picture(frames: int, width: int, height: int, phase: float = 0.0) -> Tensor:
    """(F, H, W, 3) uint8: waves that drift."""
    y, x = torch.meshgrid(torch.linspace(0, 1, height), torch.linspace(0, 1, width), indexing="ij")
    time = torch.arange(frames)[:, None, None] / 25
    waves = [torch.sin(2 * math.pi * (x * a + y * b + time + phase)) for a, b in ((1, 0), (0, 1), (1, 1))]
    return ((torch.stack(waves, -1) + 1) * 127.5).round().to(torch.uint8)


def tone(seconds: float, pitch: float = 440.0, sample_rate: int = 16000, channels: int = 2) -> AudioClip:
    """A sine that swells."""
    time = torch.arange(round(seconds * sample_rate)) / sample_rate
    wave = 0.5 * torch.sin(2 * math.pi * pitch * time) * torch.linspace(0.2, 1, len(time))
    return AudioClip(wave.expand(channels, -1).contiguous(), sample_rate, len(time))


def write_clip(folder: Path, name: str, *, frames: int = 9, size: tuple[int, int] = (64, 64), sound: bool = True) -> Path:
    """Writes `name`.mp4 (`size`: width, height; 25 frames a second) and its caption `name`.txt. Raises `DiskError`."""
    phase = sum(name.encode()) / 100
    path = folder / f"{name}.mp4"
    picture = VideoClip(moving_picture(frames, *size, phase), 25.0)
    write_mp4(path, picture, tone(frames / 25, 200 + 40 * (phase % 10)) if sound else None)
    path.with_suffix(".txt").write_text(f"drifting waves called {name}", encoding="utf-8")
    return path
