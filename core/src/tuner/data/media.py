"""Clips as tensors: decoding from files, and writing them as mp4 or wav. Reading goes by presentation time, never by frame number.

`av` is imported here, so this module is imported only where clips are really read or written.
"""

from __future__ import annotations

import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import torch
from av.container import OutputContainer
from av.video.reformatter import ColorRange, Colorspace, Interpolation

from tuner.data.container import MediaFacts, probe
from tuner.data.decode import decode_frames, decode_sound
from tuner.errors import DataError, DiskError
from tuner.interfaces.encoders import AudioClip, VideoClip

__all__ = ["MediaFacts", "decode_audio", "decode_video", "probe", "write_mp4", "write_wav"]


def decode_video(path: Path, *, frames: int, frame_rate: float, size: tuple[int, int] | None = None, start: float = 0.0) -> VideoClip:
    """`frames` frames at `frame_rate` from `start` seconds on, covering `size` (width, height); see `decode.decode_frames`."""
    return VideoClip(torch.from_numpy(decode_frames(path, frames, frame_rate, size, start)), frame_rate)


def decode_audio(
    path: Path, *, seconds: float, sample_rate: int, channels: int, start: float = 0.0, mono: bool = False
) -> AudioClip | None:
    """The sound to the picture from `start` on, None without a sound track; see `decode.decode_sound`."""
    decoded = decode_sound(path, seconds, sample_rate, channels, start, mono)
    return None if decoded is None else AudioClip(torch.from_numpy(decoded[0]), sample_rate, decoded[1])


def write_mp4(path: Path, video: VideoClip, sound: AudioClip | None = None) -> None:
    """Writes H.264 (yuv420p, BT.709) and AAC; the file appears under its name only when it is whole.

    Raises `DataError` for odd sides, which yuv420p cannot hold, and `DiskError`.
    """
    _, height, width, _ = video.frames.shape
    if width % 2 or height % 2:
        raise DataError("H.264 in yuv420p needs even sides", where=str(path), value=f"{width}x{height}")
    with _whole(path, "mp4") as container:
        _write_streams(container, video, sound)


def write_wav(path: Path, sound: AudioClip) -> None:
    """Writes 16-bit PCM, the first two channels; the file appears under its name only when it is whole. Raises `DiskError`."""
    layout = "mono" if sound.samples.shape[0] == 1 else "stereo"
    numbers = (sound.samples[:2].cpu().float() * 32768).round().clamp(-32768, 32767).to(torch.int16)
    with _whole(path, "wav") as container:
        voice = container.add_stream("pcm_s16le", rate=sound.sample_rate, layout=layout)
        samples = av.AudioFrame.from_ndarray(numbers.T.reshape(1, -1).contiguous().numpy(), "s16", layout)
        samples.sample_rate, samples.pts, samples.time_base = sound.sample_rate, 0, Fraction(1, sound.sample_rate)
        container.mux(voice.encode(samples))
        container.mux(voice.encode(None))


@contextmanager
def _whole(path: Path, layout: str) -> Iterator[OutputContainer]:
    """A container that becomes `path` when all of it is on the disk. Raises `DiskError`."""
    temporary = path.with_name(f".{path.stem}.{uuid.uuid4().hex}.{layout}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with av.open(str(temporary), "w", format=layout) as container:
            yield container
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
    except (OSError, av.FFmpegError) as error:  # of the latter some are no OSError, such as those of an encoder's own library
        raise DiskError(f"the clip cannot be written: {error.strerror or error}", where=str(path)) from error
    finally:
        with suppress(OSError):
            temporary.unlink()


def _write_streams(container: OutputContainer, video: VideoClip, sound: AudioClip | None) -> None:
    rate = Fraction(video.frame_rate).limit_denominator(1001)
    # Without mbtree, with which x264 (165, PyAV 18.1) now and then writes other bytes for the same pictures.
    picture = container.add_stream("libx264", rate=rate, options={"crf": "16", "x264-params": "mbtree=0"})
    picture.height, picture.width, picture.pix_fmt = video.frames.shape[1], video.frames.shape[2], "yuv420p"
    picture.codec_context.colorspace, picture.codec_context.color_range = Colorspace.ITU709, ColorRange.MPEG
    layout = "mono" if sound and sound.samples.shape[0] == 1 else "stereo"
    voice = container.add_stream("aac", rate=sound.sample_rate, layout=layout) if sound else None
    for index, image in enumerate(video.frames.cpu().numpy()):
        frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(image), format="rgb24").reformat(
            format="yuv420p", dst_colorspace=Colorspace.ITU709, dst_color_range=ColorRange.MPEG, interpolation=Interpolation.BICUBIC
        )
        frame.pts, frame.time_base = index, 1 / rate
        container.mux(picture.encode(frame))
    container.mux(picture.encode(None))
    if voice is not None and sound is not None:
        samples = av.AudioFrame.from_ndarray(sound.samples[:2].cpu().float().clamp(-1, 1).contiguous().numpy(), "fltp", layout)
        samples.sample_rate, samples.pts, samples.time_base = sound.sample_rate, 0, Fraction(1, sound.sample_rate)
        container.mux(voice.encode(samples))
        container.mux(voice.encode(None))
