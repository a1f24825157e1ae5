"""The teacher's features of a clip, as a record: one map for each latent frame, on the grid of the video's tokens.

Special here: what is cached is already on that grid. A map of the encoder's own patches would be several times larger (66 MB a
clip of 16 latent frames against 19 MB on a 16 x 24 grid, at 1,536 channels) and say nothing more where it is compared.

Dimensions: F latent frames, H W pixels, E channels of a feature, h w rows and columns of the token grid.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Final, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from tuner.interfaces.encoders import LatentEncoder, Record, Source, VideoClip
from tuner.interfaces.family import Geometry
from tuner_regularizers.matching import resized
from tuner_regularizers.teacher_files import Teacher

MEAN: Final = (0.485, 0.456, 0.406)
DEVIATION: Final = (0.229, 0.224, 0.225)
"""Of ImageNet's pictures (red, green, blue in 0..1): what DINOv2 was trained with."""
VERSION: Final = 1
"""Raised when the same clip and weights would give other records."""


class TeacherEncoder(LatentEncoder):
    """A clip -> {"features": (F, h, w, E) float16}: the encoder's patch features (not the class token) after its final norm.

    Of the clip's frames those are taken that close a latent frame: 0, s, 2s, ... with s = `geometry.frame_step`. In a batch they are
    `extras["crepa.features"]`, (B, F, h, w, E).
    """

    name: ClassVar[str] = "crepa"
    reads: ClassVar[Literal["video", "audio", "text"]] = "video"

    def __init__(self, teacher: Teacher, image_size: int, geometry: Geometry, at_once: int = 0) -> None:
        """`image_size`: side of a square input, in pixels. `at_once`: frames that go through the encoder together; below 1: all."""
        self._teacher = teacher
        self._image_size = image_size
        self._geometry = geometry
        self._at_once = at_once
        self._given = 0
        self._model: Any = None
        self._device = torch.device("cpu")

    def settings(self) -> Mapping[str, str | int | float | bool]:
        steps = {"frame_step": self._geometry.frame_step, "size_step": self._geometry.size_step}
        return {"encoder": self._teacher.fingerprint, "image_size": self._image_size, **steps, "version": VERSION}

    def downloads(self) -> Sequence[str]:
        return self._teacher.downloads()

    def load(self, device: torch.device) -> None:
        """In float32, so that features do not depend on the precision of a run."""
        self._device = device
        self._model = self._teacher.open().to(device)

    def unload(self) -> None:
        self._model = None

    def reduce_memory(self) -> str | None:
        now = self._given if self._at_once < 1 else min(self._at_once, self._given)
        if now <= 1:
            return None
        self._at_once = now // 2
        return f"crepa_encoder_frames_batch_size is lowered to {self._at_once}"

    @torch.no_grad()
    def encode(self, sources: Sequence[Source]) -> list[Record]:
        clips = [source for source in sources if isinstance(source, VideoClip)]
        assert len(clips) == len(sources), "this encoder reads pictures"
        chosen = torch.stack([clip.frames[:: self._geometry.frame_step] for clip in clips])
        frames = chosen.flatten(0, 1)
        self._given = len(frames)
        parts = torch.split(frames, self._at_once if self._at_once > 0 else len(frames))
        features = torch.cat([self._features(part) for part in parts])
        return [Record({"features": item.clone()}) for item in torch.split(features, chosen.shape[1])]

    def _features(self, frames: Tensor) -> Tensor:
        """(M, H, W, 3) uint8 -> (M, h, w, E) float16 on the CPU."""
        height, width = frames.shape[1:3]
        grid = patch_grid(height, width, self._image_size, self._patch)
        pixels = prepared(frames.to(self._device), grid[0] * self._patch, grid[1] * self._patch)
        maps = patch_features(self._model, pixels)
        step = self._geometry.size_step
        return resized(maps, max(1, height // step), max(1, width // step)).movedim(1, -1).half().cpu()

    @property
    def _patch(self) -> int:
        return self._teacher.shape().patch


def patch_grid(height: int, width: int, image_size: int, patch: int) -> tuple[int, int]:
    """Rows and columns of patches for a picture of that shape: about the area of `image_size`², in whole patches."""
    side, aspect = image_size / patch, math.sqrt(width / height)
    return max(1, round(side / aspect)), max(1, round(side * aspect))


def prepared(frames: Tensor, height: int, width: int) -> Tensor:
    """(M, H, W, 3) uint8 -> (M, 3, height, width) float32, normalised as DINOv2 expects."""
    pixels = frames.movedim(-1, 1).float() / 255
    if pixels.shape[-2:] != (height, width):
        pixels = functional.interpolate(pixels, (height, width), mode="bicubic", align_corners=False, antialias=True).clamp(0, 1)
    mean, deviation = (torch.tensor(values, device=pixels.device)[:, None, None] for values in (MEAN, DEVIATION))
    return (pixels - mean) / deviation


def patch_features(model: nn.Module, pixels: Tensor) -> Tensor:
    """(M, 3, height, width) -> (M, E, rows, columns) after the final norm, without class and register tokens."""
    config: Any = model.config
    tokens: Tensor = model(pixels).last_hidden_state
    rows, columns = (size // config.patch_size for size in pixels.shape[-2:])
    return tokens[:, tokens.shape[1] - rows * columns :].movedim(1, -1).reshape(len(pixels), -1, rows, columns)
