"""Small clips for tests. Every frame carries its number as eight black or white blocks, which survive compression and scaling.

Frame `n` of a clip with sound is white for flashes: there the tone is on as well, so that picture and sound can be compared.
"""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from numpy.typing import NDArray

TONE = 440.0
GREY = 90
COLUMNS, ROWS = 4, 2


def picture(number: int, width: int, height: int, *, flash: bool = False) -> NDArray[np.uint8]:
    """(H, W, 3): 4 x 2 blocks in the middle half hold the bits of `number`, lowest first; white around them for a flash, else grey."""
    image = np.full((height, width, 3), 255 if flash else GREY, np.uint8)
    for bit in range(COLUMNS * ROWS):
        image[_block(bit, width, height)] = 255 if number >> bit & 1 else 0
    return image


def read_number(image: NDArray[np.uint8]) -> int:
    """Inverse of `picture`, at any size of the same aspect ratio."""
    height, width = image.shape[:2]
    return sum(1 << bit for bit in range(COLUMNS * ROWS) if image[_block(bit, width, height, margin=0.25)].mean() > 127)


def is_flash(image: NDArray[np.uint8]) -> bool:
    """Whether the border is white."""
    return float(image[: image.shape[0] // 8].mean()) > 175


def _block(bit: int, width: int, height: int, margin: float = 0.0) -> tuple[slice, slice]:
    row, column = divmod(bit, COLUMNS)
    w, h = width / 2 / COLUMNS, height / 2 / ROWS
    x, y = width / 4 + column * w, height / 4 + row * h
    return slice(round(y + margin * h), round(y + (1 - margin) * h)), slice(round(x + margin * w), round(x + (1 - margin) * w))


def tone(seconds: float, rate: int, channels: int, on: Sequence[tuple[float, float]]) -> NDArray[np.float32]:
    """(channels, N): a sine that sounds during the given (start, end) seconds, silence elsewhere."""
    t = np.arange(round(seconds * rate)) / rate
    gate = np.zeros_like(t)
    for start, end in on:
        gate[(t >= start) & (t < end)] = 0.5
    return np.repeat((gate * np.sin(2 * np.pi * TONE * t))[None], channels, axis=0).astype(np.float32)


def write_clip(
    path: Path,
    *,
    frames: int = 25,
    rate: Fraction | int = 25,
    size: tuple[int, int] = (96, 64),
    times: Sequence[float] | None = None,
    flashes: Sequence[int] = (),
    sound: NDArray[np.float32] | None = None,
    sound_rate: int = 48000,
    layout: str = "stereo",
    sound_start: float = 0.0,
    codec: str = "libx264",
    pix_fmt: str = "yuv420p",
    sound_codec: str = "aac",
    aspect: Fraction | None = None,
    key_every: int | None = None,
) -> Path:
    """Writes numbered frames. `times`: presentation times in seconds (variable rate); `sound_start`: when the sound begins;
    `key_every`: frames from one key frame to the next."""
    path.parent.mkdir(parents=True, exist_ok=True)
    width, height = size
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=Fraction(rate), options={"crf": "12"} if codec == "libx264" else {})
        stream.width, stream.height, stream.pix_fmt = width, height, pix_fmt
        if aspect:
            stream.codec_context.sample_aspect_ratio = aspect
        if key_every:
            stream.codec_context.gop_size = key_every
        base = Fraction(1, 90000) if times else 1 / Fraction(rate)
        stream.codec_context.time_base = base
        voice = container.add_stream(sound_codec, rate=sound_rate, layout=layout) if sound is not None else None
        for index in range(frames):
            frame = av.VideoFrame.from_ndarray(picture(index, width, height, flash=index in flashes), format="rgb24")
            frame.pts, frame.time_base = round(times[index] / base) if times else index, base
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
        if voice is not None and sound is not None:
            _write_sound(container, voice, sound, sound_rate, layout, sound_start)
    return path


def _write_sound(container, voice, sound, rate, layout, start):  # type: ignore[no-untyped-def]
    chunk = 1024
    for begin in range(0, sound.shape[1], chunk):
        piece = np.ascontiguousarray(sound[:, begin : begin + chunk])
        packed = voice.codec_context.format.name in ("s16", "flt")
        data = (piece.T.reshape(1, -1) * 32767).astype(np.int16) if packed else piece
        frame = av.AudioFrame.from_ndarray(data, "s16" if packed else "fltp", layout)
        frame.sample_rate, frame.time_base, frame.pts = rate, Fraction(1, rate), round(start * rate) + begin
        container.mux(voice.encode(frame))
    container.mux(voice.encode(None))


TURNS = {1: (0, 1, -1, 0), 2: (-1, 0, 0, -1), 3: (0, -1, 1, 0)}
"""Clockwise quarter turns -> (a, b, c, d) of x' = a·x + c·y, y' = b·x + d·y."""


def turn_clockwise(path: Path, quarters: int = 1) -> Path:
    """Makes players show the mp4 at `path` turned clockwise, as phones do for upright films: the matrix in the picture track's header,
    in 16.16 fixed point."""
    data = bytearray(path.read_bytes())
    at = data.index(b"tkhd") + 4
    version = data[at]
    matrix = at + (4 + 8 + 8 + 4 + 4 + 8 if version else 4 + 4 + 4 + 4 + 4 + 4) + 8 + 2 + 2 + 2 + 2
    a, b, c, d = (value << 16 for value in TURNS[quarters])
    values = (a, b, 0, c, d, 0, 0, 0, 1 << 30)
    data[matrix : matrix + 36] = b"".join(v.to_bytes(4, "big", signed=True) for v in values)
    path.write_bytes(bytes(data))
    return path


def write_sound(path: Path, sound: NDArray[np.float32], rate: int, codec: str, cover: NDArray[np.uint8] | None = None) -> Path:
    """Writes sound alone, (1 or 2, N). `cover`: a picture to attach, as music files have it."""
    layout = "mono" if sound.shape[0] == 1 else "stereo"
    with av.open(str(path), "w") as container:
        voice = container.add_stream(codec, rate=rate, layout=layout)
        if cover is not None:
            art = container.add_stream("png", rate=1)
            art.height, art.width, art.pix_fmt = cover.shape[0], cover.shape[1], "rgb24"
            art.disposition = av.stream.Disposition.attached_pic
            container.mux(art.encode(av.VideoFrame.from_ndarray(cover, format="rgb24")))
            container.mux(art.encode(None))
        resampler = av.AudioResampler(voice.codec_context.format.name, layout, rate)
        frame = av.AudioFrame.from_ndarray(np.ascontiguousarray(sound), "fltp", layout)
        frame.sample_rate, frame.time_base, frame.pts = rate, Fraction(1, rate), 0
        size = voice.codec_context.frame_size or 1024
        fifo = av.AudioFifo()
        for part in resampler.resample(frame):
            fifo.write(part)
        while (piece := fifo.read(size, partial=True)) is not None:
            container.mux(voice.encode(piece))
        container.mux(voice.encode(None))
    return path
