"""Looks at a clip as it is trained: a few small pictures, how it moves, how loud it is. Runs in worker processes: no torch.

The file is decoded as for training, only smaller, so what fails there fails here. Dimensions: F frames, H W pixels, C channels, N samples.
"""

from __future__ import annotations

import io
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from tuner.data.decode import decode_frames, decode_sound
from tuner.data.facts import UndecodableSound
from tuner.data.loudness import clipped_share, integrated_loudness
from tuner.data.similarity import Hash, difference_hash, means

SIDE = 144
"""Pixels of the longer side of what is looked at."""
NARROWEST = 24
"""Pixels of the shorter side at least."""
QUALITY = 60
"""Of the JPEG pictures: about 4 kB each."""
COLUMNS = 120
"""Of a waveform."""
MOTION_GRID = (9, 16)
"""Places whose means are compared from frame to frame: small enough for a moving mouth, large enough to average noise away."""
WEIGHTS = np.array([0.299, 0.587, 0.114], np.float32)
"""Of red, green and blue in brightness (BT.601)."""


@dataclass(frozen=True)
class Picture:
    """A picture track or still picture to look at; see `decode.decode_frames`."""

    role: str
    """"clip", or what it is to the clip: "reference", "mask"."""
    path: Path
    frames: int
    frame_rate: float
    size: tuple[int, int]
    """(width, height) that is trained."""
    start: float = 0.0


@dataclass(frozen=True)
class Sound:
    """A sound to listen to; see `decode.decode_sound`."""

    path: Path
    seconds: float
    rate: int
    """Hz: its own, so that nothing is resampled."""
    channels: int
    start: float = 0.0
    mono: bool = False
    alone: bool = False


@dataclass(frozen=True)
class Scene:
    """What belongs to one clip, picture or sound."""

    pictures: tuple[Picture, ...]
    """Its own first."""
    sound: Sound | None
    thumbnails: bool
    """Whether the small pictures and the waveform are kept."""


@dataclass(frozen=True)
class Seen:
    """A picture track or still picture."""

    role: str
    thumbnails: tuple[bytes, ...]
    """JPEG: first, middle and last frame, or the only one."""
    hashes: tuple[Hash, ...]
    """Of the same frames."""
    brightness: float
    """Mean over all frames, 0 to 1."""
    motion: float
    """Largest difference from the first frame of any place in any frame, 0 to 1."""


@dataclass(frozen=True)
class Heard:
    """A sound."""

    loudness: float | None
    """LUFS; None: silence."""
    peak: float
    """Largest sample, 0 to 1."""
    clipped: float
    """Share of the samples."""
    wave: tuple[tuple[float, float], ...]
    """(lowest, highest) of all channels in each column; empty without thumbnails."""


@dataclass(frozen=True)
class Look:
    """What was seen and heard."""

    seen: tuple[Seen, ...]
    heard: Heard | None


def look(path: Path, scene: Scene) -> Look:
    """For a worker process; `path` names the clip in errors. Raises `MediaError` where training could not decode it."""
    sound = _listen(scene.sound, scene.thumbnails) if scene.sound else None
    return Look(tuple(_watch(picture, scene.thumbnails) for picture in scene.pictures), sound)


def _watch(picture: Picture, thumbnails: bool) -> Seen:
    pixels = decode_frames(
        picture.path, picture.frames, picture.frame_rate, small_size(picture.size), picture.start, still=picture.role == "mask"
    )
    grey = pixels.astype(np.float32) @ WEIGHTS
    chosen = sorted({0, (len(pixels) - 1) // 2, len(pixels) - 1})
    places = means(grey, *MOTION_GRID)
    return Seen(
        picture.role, tuple(jpeg(pixels[index]) for index in chosen) if thumbnails else (),
        tuple(difference_hash(grey[index]) for index in chosen),
        brightness=float(grey.mean() / 255), motion=float(np.abs(places - places[0]).max() / 255),
    )  # fmt: skip


def small_size(size: tuple[int, int]) -> tuple[int, int]:
    """The same shape with a longer side of `SIDE`; smaller ones stay."""
    scale = min(1.0, SIDE / max(size))
    width, height = (max(NARROWEST, round(side * scale)) for side in size)
    return width, height


def jpeg(pixels: NDArray[np.uint8]) -> bytes:
    """(H, W, 3) as a small file."""
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "JPEG", quality=QUALITY)
    return file.getvalue()


def _listen(sound: Sound, thumbnails: bool) -> Heard:
    decoded = decode_sound(sound.path, sound.seconds, sound.rate, sound.channels, sound.start, sound.mono, sound.alone)
    if decoded is None:
        raise UndecodableSound("its sound track is gone since the clip was examined", where=str(sound.path))
    samples, valid = decoded
    samples = samples[:, :valid]  # what was filled up with silence is not measured
    peak = float(np.abs(samples).max()) if valid else 0.0
    return Heard(integrated_loudness(samples, sound.rate), peak, clipped_share(samples), wave(samples) if thumbnails else ())


def wave(samples: NDArray[np.float32]) -> tuple[tuple[float, float], ...]:
    """(lowest, highest) of (C, N), for at most `COLUMNS` pieces of equal length."""
    pieces = np.array_split(samples, min(COLUMNS, samples.shape[1]) or 1, axis=1)
    return tuple((round(float(piece.min()), 3), round(float(piece.max()), 3)) for piece in pieces if piece.size)
