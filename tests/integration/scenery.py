"""Clips that are nice to look at, made here: pages with pictures of them can be shown in the docs, and nobody's work is in them.

Coordinates: `x` in [0, width / height], `y` in [0, 1] from the top, `t` in [0, 1] over the clip. A colour is RGB in [0, 1].
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from tuner.data.media import write_mp4
from tuner.interfaces.encoders import AudioClip, VideoClip

Array = NDArray[np.float64]
RATE = 16000


class Canvas:
    """A frame (H, W, 3) that is painted on from back to front."""

    def __init__(self, width: int, height: int, above: str, below: str) -> None:
        """Begins as a sky: the colour `above` fades into the colour `below`."""
        self.x, self.y = np.meshgrid(np.arange(width) / height, np.arange(height) / height)
        self.edge = 1.2 / height
        self.pixels = colour(above) + (colour(below) - colour(above)) * self.y[..., None]

    def paint(self, cover: Array, tint: str) -> None:
        """Covers with a colour: 0 nothing, 1 all of a pixel."""
        self.pixels += np.clip(cover, 0, 1)[..., None] * (colour(tint) - self.pixels)

    def below(self, line: Array | float, tint: str) -> None:
        """Everything lower than `line`, with a smooth edge."""
        self.paint((self.y - line) / self.edge, tint)

    def disc(self, x: float, y: float, radius: float, tint: str, glow: float = 0.0) -> None:
        """A disc; `glow`: how far its light reaches."""
        distance = np.hypot(self.x - x, self.y - y) - radius
        if glow:
            self.paint(0.7 * np.exp(-np.maximum(distance, 0) / glow), tint)
        self.paint(-distance / self.edge, tint)

    def shape(self, corners: list[tuple[float, float]], tint: str) -> None:
        """A convex polygon, corners clockwise."""
        cover = np.ones_like(self.x)
        for (x0, y0), (x1, y1) in zip(corners, [*corners[1:], corners[0]], strict=True):
            inside = (x1 - x0) * (self.y - y0) - (y1 - y0) * (self.x - x0)
            cover = np.minimum(cover, inside / np.hypot(x1 - x0, y1 - y0) / self.edge)
        self.paint(cover, tint)


def colour(tint: str) -> Array:
    """`ff8800` as (3,)."""
    return np.array([int(tint[at : at + 2], 16) / 255 for at in (0, 2, 4)])


def sunset(c: Canvas, t: float) -> None:
    """The sun sinks into a calm sea."""
    c.disc(0.95, 0.42 + 0.16 * t, 0.13, "ffd27a", glow=0.22)
    c.below(0.6, "5b3a6e")
    near = np.maximum(c.y - 0.6, 0) / 0.4
    ripples = np.sin(2 * np.pi * (9 * near**0.6 - 2 * t) + 2 * np.sin(11 * c.x + 9 * near)) > 0.2
    c.paint(0.75 * (near > 0) * ripples * np.exp(-(((c.x - 0.95) / (0.12 + 0.3 * near)) ** 2)), "ffb867")


def balloon(c: Canvas, t: float) -> None:
    """A balloon rises over hills."""
    x, y = 0.75 + 0.1 * t, 0.48 - 0.16 * t
    c.below(0.72 + 0.07 * np.sin(3 * c.x + 1), "8fb98a")
    c.below(0.8 + 0.06 * np.sin(4 * c.x + 3), "5f9468")
    c.shape([(x - 0.045, y + 0.27), (x + 0.045, y + 0.27), (x + 0.035, y + 0.34), (x - 0.035, y + 0.34)], "6b4a2f")
    c.shape([(x - 0.16, y + 0.06), (x + 0.16, y + 0.06), (x + 0.05, y + 0.25), (x - 0.05, y + 0.25)], "d8483e")
    c.disc(x, y, 0.18, "d8483e")
    inside = np.clip((0.178 - np.hypot(c.x - x, c.y - y)) / c.edge, 0, 1)
    c.paint(inside * np.clip((0.5 - np.abs(np.sin((c.x - x) * 26))) * 8, 0, 1), "f7e3c0")


def aurora(c: Canvas, t: float) -> None:
    """Northern lights over mountains."""
    stars = np.random.default_rng(3).random(c.x.shape) > 0.997
    c.paint(stars * 0.8, "ffffff")
    for index, tint in enumerate(("2fe0a0", "58c7f0", "b07cf0")):
        line = 0.3 + 0.07 * index + 0.08 * np.sin(3.2 * c.x + 2 * np.pi * t * 0.5 + 2.1 * index)
        fall = np.exp(-np.maximum(line - c.y, 0) / 0.16) * np.exp(-np.maximum(c.y - line, 0) / 0.025)
        rays = 0.5 + 0.15 * np.sin(23 * c.x + 5 * t + index) + 0.15 * np.sin(41 * c.x * (1 + 0.1 * index) - 3 * t)
        c.paint(fall * rays, tint)
    for height, peaks, tint in ((0.6, (0.25, 0.75, 1.3), "26385c"), (0.74, (0.05, 0.5, 1.05, 1.45), "141f38")):
        ridges = [height + 0.04 * (index % 3) + 0.55 * np.abs(c.x - peak) for index, peak in enumerate(peaks)]
        c.below(np.minimum.reduce(ridges), tint)


def boat(c: Canvas, t: float) -> None:
    """A paper boat on waves."""
    x = 0.55 + 0.4 * t
    y = 0.58 + 0.03 * np.sin(6 * x - 4 * np.pi * t)
    c.disc(1.35, 0.2, 0.08, "fff3c9", glow=0.1)
    c.below(0.6 + 0.025 * np.sin(8 * c.x + 4 * np.pi * t), "6fb7cf")
    c.shape([(x, y - 0.24), (x + 0.15, y), (x - 0.15, y)], "e9edf2")
    c.shape([(x - 0.25, y - 0.06), (x + 0.25, y - 0.06), (x + 0.14, y + 0.1), (x - 0.14, y + 0.1)], "ffffff")
    c.below(0.65 + 0.03 * np.sin(6 * c.x - 4 * np.pi * t), "3f8fb5")
    c.below(0.8 + 0.03 * np.sin(5 * c.x + 4 * np.pi * t + 2), "2a6f98")


def snowfall(c: Canvas, t: float) -> None:
    """Snow falls on firs."""
    c.disc(1.25, 0.22, 0.09, "f4efdc", glow=0.12)
    c.below(0.74 + 0.03 * np.sin(3 * c.x), "8497b8")
    for x, size in ((0.2, 0.5), (0.55, 0.36), (0.95, 0.44), (1.45, 0.54)):
        for step in range(3):
            top, half = 0.82 - size * (1 - step * 0.25), size * (0.16 + 0.07 * step)
            c.shape([(x, top), (x + half, top + size * 0.42), (x - half, top + size * 0.42)], ("2f5a52", "28504a", "214540")[step])
    c.below(0.8 + 0.03 * np.sin(4 * c.x + 2), "e8eef7")
    flakes = np.random.default_rng(7).random((70, 3))
    for x, y, size in flakes:
        c.disc(1.7 * x + 0.02 * np.sin(2 * np.pi * (t + y)), (y + t * (0.25 + 0.3 * size)) % 1, 0.004 + 0.007 * size, "ffffff")


def lighthouse(c: Canvas, t: float) -> None:
    """A lighthouse turns its beam over the sea."""
    turn = 0.5 - 1.2 * t
    away = (c.x - 0.45) * np.cos(turn) + (c.y - 0.3) * np.sin(turn)
    aside = np.abs((c.y - 0.3) * np.cos(turn) - (c.x - 0.45) * np.sin(turn))
    c.paint(np.where(away > 0, 0.8 * np.exp(-away) * (aside < 0.03 + 0.16 * away), 0), "ffe9a8")
    c.below(0.74 + 0.012 * np.sin(14 * c.x + 2 * np.pi * t), "1d4560")
    c.below(0.7 + 0.55 * np.abs(c.x - 0.45) ** 1.3, "24303a")
    c.shape([(0.41, 0.34), (0.49, 0.34), (0.53, 0.74), (0.37, 0.74)], "eef0f0")
    c.shape([(0.403, 0.44), (0.497, 0.44), (0.508, 0.54), (0.392, 0.54)], "c8433b")
    c.shape([(0.41, 0.26), (0.49, 0.26), (0.49, 0.34), (0.41, 0.34)], "ffe9a8")
    c.shape([(0.45, 0.2), (0.5, 0.26), (0.4, 0.26)], "c8433b")


SCENES: Mapping[str, tuple[Callable[[Canvas, float], None], tuple[str, str], str]] = {
    "aurora": (aurora, ("0b1230", "2c4a6e"), "Northern lights sway over a dark mountain range. A low, glassy hum."),
    "balloon": (balloon, ("6fb4e8", "e3f1f4"), "A red balloon with pale stripes rises over green hills. A burner hisses, far away."),
    "boat": (boat, ("a9d8ea", "eef3e4"), "A white paper boat crosses gentle waves in the morning. Water laps at it."),
    "lighthouse": (lighthouse, ("16223f", "52627f"), "A lighthouse turns its beam over the sea at dusk. Wind, and a distant horn."),
    "snowfall": (snowfall, ("3a4a74", "a5b3cf"), "Snow falls on four firs under a full moon. It is nearly silent."),
    "sunset": (sunset, ("41306b", "f59a62"), "The sun sinks into a calm violet sea. Slow waves roll onto the shore."),
}
"""Name -> scene, colours of its sky at the top and at the bottom, caption."""


def murmur(seconds: float, pitch: float, swells: float, seed: int) -> AudioClip:
    """Surf that comes in `swells` times a second, over a soft chord; stereo."""
    t = np.arange(round(seconds * RATE)) / RATE
    noise = np.random.default_rng(seed).standard_normal((2, t.size + 31))
    surf = np.stack([np.convolve(side, np.ones(32) / 32, "valid") for side in noise]) * (0.15 + np.sin(np.pi * swells * t) ** 4)
    chord = sum(np.sin(2 * np.pi * pitch * factor * t) for factor in (1, 1.25, 1.5)) * np.exp(-2 * t)
    return AudioClip(torch.from_numpy((0.7 * surf + 0.12 * chord).astype(np.float32).clip(-1, 1)), RATE, t.size)


def write_scene(folder: Path, name: str, *, frames: int = 25, size: tuple[int, int] = (240, 160), sound: bool = True) -> Path:
    """The clip `name` of `SCENES`, 25 frames a second, and its caption. Without `sound` it has a track of silence."""
    draw, sky, caption = SCENES[name]
    pictures = []
    for index in range(frames):
        canvas = Canvas(*size, *sky)
        draw(canvas, index / max(1, frames - 1))
        pictures.append((np.clip(canvas.pixels, 0, 1) * 255).astype(np.uint8))
    seed, seconds = list(SCENES).index(name), frames / 25
    heard = murmur(seconds, 165 * 1.12**seed, 1 + seed / 2, seed)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.mp4"
    write_mp4(path, VideoClip(torch.from_numpy(np.stack(pictures)), 25.0), heard if sound else replace(heard, samples=heard.samples * 0))
    path.with_suffix(".txt").write_text(caption)
    return path
