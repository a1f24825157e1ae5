"""Decodes pictures by presentation time and sound aligned to them, into arrays. Runs in worker processes: no torch.

Dimensions: F frames, H W pixels, N samples per channel.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import av
import numpy as np
from av.audio.frame import AudioFrame
from av.video.frame import VideoFrame
from av.video.reformatter import Colorspace, Interpolation, VideoReformatter
from av.video.stream import VideoStream
from numpy.typing import NDArray

from tuner.data.container import (
    TooShort,
    TruncatedMedia,
    UndecodableSound,
    UnreadableMedia,
    count_frames,
    displayed_size,
    open_media,
    picture_stream,
    picture_timeline,
    quarter_turns,
)

DECODE_VERSION = 1
"""Part of every cache key; raised when the same file would give other frames or samples."""
GAP = 0.02
"""Seconds. Timestamps of sound that jump by more are a gap, less is rounding (1 ms in Matroska, a 1024-sample frame is 21 ms)."""
_SCALING = Interpolation.BICUBIC | Interpolation.ACCURATE_RND | Interpolation.FULL_CHR_H_INT
_UNSPECIFIED = 2
"""AVCOL_SPC_UNSPECIFIED."""


def decode_frames(
    path: Path, frames: int, frame_rate: float, size: tuple[int, int] | None = None, start: float = 0.0
) -> NDArray[np.uint8]:
    """(F, H, W, 3) RGB: output frame i is the source frame that is on screen at start + i / frame_rate seconds.

    `size`: (width, height); the picture is scaled to cover it, keeping its aspect, and cropped around the centre. None: its own size.
    Raises `TooShort` with both counts, `TruncatedMedia`, `UnreadableMedia`.
    """
    timeline = picture_timeline(path)
    first = timeline.times[0]
    found = count_frames(timeline.end - first - start, frame_rate, timeline.slack)
    if found < frames:
        raise TooShort(f"too short: {found} of {frames} frames at {frame_rate:g} frames per second", where=str(path))
    targets = [first + start + i / frame_rate + timeline.slack for i in range(frames)]
    shown: list[NDArray[np.uint8]] = []
    with open_media(path) as container:
        stream = picture_stream(container, path)
        to_array = _Scaler(stream, size)
        last: VideoFrame | None = None
        for frame in container.decode(stream):
            time = frame.time
            if time is None:
                raise UnreadableMedia("a frame has no presentation time", where=str(path))
            due = sum(1 for target in targets[len(shown) :] if target < time)
            shown += _repeat(last, due, to_array, path)
            last = frame
            if len(shown) == frames:
                break
        # The header's last frame is on screen until the end; a decoder that stopped before it has lost frames.
        if len(shown) < frames and (last is None or (last.time or 0.0) + timeline.slack < timeline.times[-1]):
            raise TruncatedMedia(f"decoding stopped after {len(shown)} of {frames} frames", where=str(path))
        shown += _repeat(last, frames - len(shown), to_array, path)
    return np.stack(shown)


def _repeat(frame: VideoFrame | None, times: int, to_array: _Scaler, path: Path) -> list[NDArray[np.uint8]]:
    if times <= 0 or frame is None:
        return []
    if frame.is_corrupt:
        raise TruncatedMedia(f"the frame at {frame.time or 0.0:.3f} s is damaged", where=str(path))
    return [to_array(frame)] * times


class _Scaler:
    """Turns decoded frames into upright RGB arrays of one size."""

    def __init__(self, stream: VideoStream, size: tuple[int, int] | None) -> None:
        self._stream = stream
        self._size = size
        self._reformatter = VideoReformatter()

    def __call__(self, frame: VideoFrame) -> NDArray[np.uint8]:
        """(H, W, 3)."""
        width, height = displayed_size(frame, self._stream)
        target_width, target_height = self._size or (width, height)
        scale = max(target_width / width, target_height / height)
        scaled = max(target_width, round(width * scale)), max(target_height, round(height * scale))
        turns = quarter_turns(frame)
        stored_width, stored_height = scaled[::-1] if turns % 2 else scaled
        rgb = self._reformatter.reformat(
            frame, stored_width, stored_height, "rgb24", src_colorspace=_colorspace(frame), interpolation=_SCALING, threads=1
        )
        upright = np.rot90(rgb.to_ndarray(), turns)
        top, left = (scaled[1] - target_height) // 2, (scaled[0] - target_width) // 2
        return np.ascontiguousarray(upright[top : top + target_height, left : left + target_width])


def _colorspace(frame: VideoFrame) -> Colorspace | None:
    """What the frame says; untagged material is BT.709 from 720 lines on and BT.601 below, as players have it."""
    if frame.colorspace != _UNSPECIFIED:
        return None
    return Colorspace.ITU709 if min(frame.width, frame.height) >= 720 else Colorspace.ITU601


@dataclass(frozen=True)
class _Span:
    """Consecutive samples at the output rate, and when they start."""

    start: float
    samples: NDArray[np.float32]


def decode_sound(
    path: Path, seconds: float, sample_rate: int, channels: int, start: float = 0.0, mono: bool = False
) -> tuple[NDArray[np.float32], int] | None:
    """((channels, N) in [-1, 1], how many of N are in the source), N = round(seconds * sample_rate); None without a sound track.

    Sample 0 is heard when the picture at `start` seconds is shown, wherever sound and picture begin in the file; gaps are silent.
    One channel is duplicated, more than two are mixed down. `mono`: mixed to one channel, which then feeds all. Raises `UndecodableSound`.
    """
    origin = picture_timeline(path).times[0] + start
    wanted = round(seconds * sample_rate)
    out: NDArray[np.float32] = np.zeros((channels, wanted), np.float32)
    valid = decoded = 0
    with open_media(path) as container:
        if not container.streams.audio:
            return None
        for span in _spans(container.decode(container.streams.audio[0]), sample_rate, origin + seconds, path):
            decoded += span.samples.shape[1]
            offset = round((span.start - origin) * sample_rate)
            piece = _arrange(span.samples, channels, mono)[:, max(0, -offset) :]
            begin = max(0, offset)
            end = min(wanted, begin + piece.shape[1])
            if begin < end:
                out[:, begin:end] = piece[:, : end - begin]
                valid = max(valid, end)
    if not decoded:
        raise UndecodableSound("not one sample of its sound track can be decoded", where=str(path))
    return np.clip(out, -1, 1), valid


def _spans(frames: Iterator[AudioFrame], sample_rate: int, until: float, path: Path) -> Iterator[_Span]:
    """Resamples runs of consecutive frames; a jump in time or a change of layout starts a new run."""
    run: _Run | None = None
    try:
        for frame in frames:
            time = frame.time if frame.time is not None else (run.next_time if run else 0.0)
            if run is None or not run.continues(frame, time):
                if run:
                    yield run.finish()
                run = _Run(frame, time, sample_rate)
            run.add(frame)
            if run.next_time > until + 0.1:  # beyond the end by more than any resampling filter reaches
                break
    except av.FFmpegError as error:
        raise UndecodableSound(f"its sound cannot be decoded: {error.strerror or error}", where=str(path)) from error
    if run:
        yield run.finish()


class _Run:
    """Consecutive frames of one format on their way through a resampler."""

    def __init__(self, frame: AudioFrame, time: float, sample_rate: int) -> None:
        self._format = _format(frame)
        self._start = self.next_time = time
        # Mixing down keeps the sum of the gains at 1, so that loud surround sound does not clip.
        layout = "mono" if frame.layout.nb_channels == 1 else "stereo"
        self._resampler = av.AudioResampler("fltp", layout, sample_rate, options={"rematrix_maxval": "1.0"})
        self._parts: list[NDArray[np.float32]] = []

    def continues(self, frame: AudioFrame, time: float) -> bool:
        """Whether `frame` follows without a gap, in the same format."""
        return abs(time - self.next_time) <= GAP and self._format == _format(frame)

    def add(self, frame: AudioFrame) -> None:
        self.next_time += frame.samples / frame.sample_rate
        self._parts += [part.to_ndarray() for part in self._resampler.resample(frame)]

    def finish(self) -> _Span:
        self._parts += [part.to_ndarray() for part in self._resampler.resample(None)]
        samples = np.concatenate(self._parts, axis=1) if self._parts else np.zeros((1, 0), np.float32)
        return _Span(self._start, samples.astype(np.float32, copy=False))


def _format(frame: AudioFrame) -> tuple[str, int, str]:
    return frame.layout.name, frame.sample_rate, frame.format.name


def _arrange(samples: NDArray[np.float32], channels: int, mono: bool) -> NDArray[np.float32]:
    """(1 or 2, N) -> (channels, N)."""
    if mono or channels == 1:
        samples = samples.mean(axis=0, keepdims=True)
    if samples.shape[0] < channels:
        samples = np.repeat(samples[:1], channels, axis=0)
    return samples
