"""Decodes clips by presentation time, sound aligned to them or alone, and still pictures, into arrays. Runs in worker processes: no torch.

Dimensions: F frames, H W pixels, N samples per channel.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

import av
import numpy as np
from av.audio.frame import AudioFrame
from av.container import InputContainer
from av.video.frame import VideoFrame
from av.video.reformatter import Colorspace, Interpolation, VideoReformatter
from av.video.stream import VideoStream
from numpy.typing import NDArray

from tuner.data.container import (
    Timeline,
    TooShort,
    TruncatedMedia,
    UndecodableSound,
    UnreadableMedia,
    count_frames,
    displayed_size,
    is_picture,
    open_media,
    picture_stream,
    picture_timeline,
    quarter_turns,
    shows_pictures,
)
from tuner.data.pictures import decode_picture

DECODE_VERSION = 2
"""Part of every cache key; raised when the same file would give other frames or samples."""
GAP = 0.02
"""Seconds. Timestamps of sound that jump by more are a gap, less is rounding (1 ms in Matroska, a 1024-sample frame is 21 ms)."""
SEEK = 5.0
"""Seconds. What begins later is looked for by the container's index instead of decoding everything before it."""
_SCALING = Interpolation.BICUBIC | Interpolation.ACCURATE_RND | Interpolation.FULL_CHR_H_INT
_UNSPECIFIED = 2
"""AVCOL_SPC_UNSPECIFIED."""


def decode_frames(
    path: Path, frames: int, frame_rate: float, size: tuple[int, int] | None = None, start: float = 0.0, still: bool = False
) -> NDArray[np.uint8]:
    """(F, H, W, 3) RGB: output frame i is the source frame that is on screen at start + i / frame_rate seconds.

    `size`: (width, height); the picture is scaled to cover it, keeping its aspect, and cropped around the centre. None: its own size.
    A still picture is one frame; `still`: it is shown throughout. Transparent pixels show white.
    Raises `TooShort` with both counts, `TruncatedMedia`, `UnreadableMedia`.
    """
    if is_picture(path):
        if frames > 1 and not still:
            raise TooShort(f"too short: a still picture in place of {frames} frames", where=str(path))
        return np.repeat(decode_picture(path, size)[None], frames, axis=0)
    timeline = picture_timeline(path)
    first = timeline.times[0] + start
    found = count_frames(timeline.end - first, frame_rate, timeline.slack)
    if found < frames:
        raise TooShort(f"too short: {found} of {frames} frames at {frame_rate:g} frames per second", where=str(path))
    return _Shown(path, timeline, size).at([first + i / frame_rate + timeline.slack for i in range(frames)])


class _Shown:
    """What is on screen of one file at given times."""

    def __init__(self, path: Path, timeline: Timeline, size: tuple[int, int] | None) -> None:
        self._path = path
        self._timeline = timeline
        self._size = size

    def at(self, targets: list[float]) -> NDArray[np.uint8]:
        """(F, H, W, 3) at these seconds, which ascend."""
        out: NDArray[np.uint8] | None = None
        count = 0
        for frame, times in self._runs(targets):
            if frame.is_corrupt:
                raise TruncatedMedia(f"the frame at {frame.time or 0.0:.3f} s is damaged", where=str(self._path))
            image = self._to_array(frame)
            if out is None:  # filled in place: a list of frames and their stack would take the memory twice
                out = np.empty((len(targets), *image.shape), np.uint8)
            out[count : count + times] = image
            count += times
        if out is None or count < len(targets):
            raise TruncatedMedia(f"decoding stopped after {count} of {len(targets)} frames", where=str(self._path))
        return out

    def _runs(self, targets: list[float]) -> Iterator[tuple[VideoFrame, int]]:
        """Each frame that is needed, and for how many of the targets."""
        last: VideoFrame | None = None
        done = 0
        for frame in self._frames(targets[0]):
            due = sum(1 for target in targets[done:] if target < _time(frame, self._path))
            if last is not None and due:
                yield last, due
                done += due
            last = frame
            if done == len(targets):
                return
        # The header's last frame is on screen until the end; a decoder that stopped before it has lost frames.
        if last is not None and _time(last, self._path) + self._timeline.slack >= self._timeline.times[-1]:
            yield last, len(targets) - done

    def _frames(self, target: float) -> Iterator[VideoFrame]:
        """From a key frame that is on screen before `target` where the container finds one, else from the beginning."""
        if target - self._timeline.times[0] > SEEK:
            with open_media(self._path) as container:
                stream = picture_stream(container, self._path)
                frames = _decode_from(container, stream, target - 1.0)
                first = next(frames, None)
                if first is not None and first.time is not None and first.time <= target:
                    self._to_array = _Scaler(stream, self._size)
                    yield from chain((first,), frames)
                    return
        with open_media(self._path) as container:
            stream = picture_stream(container, self._path)
            self._to_array = _Scaler(stream, self._size)
            yield from container.decode(stream)


def _decode_from(container: InputContainer, stream: VideoStream, seconds: float) -> Iterator[VideoFrame]:
    """From the key frame before `seconds`; nothing where the container cannot seek."""
    try:
        container.seek(int(seconds / (stream.time_base or 1)), stream=stream)
    except av.FFmpegError:
        return iter(())
    return container.decode(stream)


def _time(frame: VideoFrame, path: Path) -> float:
    if frame.time is None:
        raise UnreadableMedia("a frame has no presentation time", where=str(path))
    return frame.time


class _Scaler:
    """Turns decoded frames into upright RGB arrays of one size; what is transparent becomes white."""

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
        transparent = any(component.is_alpha for component in frame.format.components)
        rgb = self._reformatter.reformat(
            frame, stored_width, stored_height, "rgba" if transparent else "rgb24",
            src_colorspace=_colorspace(frame), interpolation=_SCALING, threads=1,
        )  # fmt: skip
        pixels = np.asarray(rgb.to_ndarray(), np.uint8)
        upright = np.rot90(_over_white(pixels) if transparent else pixels, turns)
        top, left = (scaled[1] - target_height) // 2, (scaled[0] - target_width) // 2
        return np.ascontiguousarray(upright[top : top + target_height, left : left + target_width])


def _over_white(pixels: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """(H, W, 4) with straight alpha -> (H, W, 3)."""
    alpha = pixels[..., 3:].astype(np.float32) / 255
    return (pixels[..., :3] * alpha + 255 * (1 - alpha)).round().astype(np.uint8)


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
    path: Path, seconds: float, sample_rate: int, channels: int, start: float = 0.0, mono: bool = False, alone: bool = False
) -> tuple[NDArray[np.float32], int] | None:
    """((channels, N) in [-1, 1], how many of N are in the source), N = round(seconds * sample_rate); None without a sound track.

    Sample 0 is heard when the picture at `start` seconds is shown, wherever sound and picture begin in the file; gaps are silent.
    Without a picture, and for `alone`, `start` counts from where the sound begins.
    One channel is duplicated, more than two are mixed down. `mono`: mixed to one channel, which then feeds all. Raises `UndecodableSound`.
    """
    alone = alone or not shows_pictures(path)
    origin = None if alone else picture_timeline(path).times[0] + start
    wanted = round(seconds * sample_rate)
    out: NDArray[np.float32] = np.zeros((channels, wanted), np.float32)
    valid = decoded = 0
    with open_media(path) as container:
        if not container.streams.audio:
            return None
        frames = container.decode(container.streams.audio[0])
        if origin is None:
            frames, begin = _begin(frames, path)
            origin = begin + start
        for span in _spans(frames, sample_rate, origin + seconds, path):
            decoded += span.samples.shape[1]
            offset = round((span.start - origin) * sample_rate)
            piece = _arrange(span.samples, channels, mono)[:, max(0, -offset) :]
            at = max(0, offset)
            end = min(wanted, at + piece.shape[1])
            if at < end:
                out[:, at:end] = piece[:, : end - at]
                valid = max(valid, end)
    if not decoded:
        raise UndecodableSound("not one sample of its sound track can be decoded", where=str(path))
    return np.clip(out, -1, 1), valid


def _begin(frames: Iterator[AudioFrame], path: Path) -> tuple[Iterator[AudioFrame], float]:
    """The same frames, and when the first of them is heard."""
    try:
        first = next(frames, None)
    except av.FFmpegError as error:
        raise UndecodableSound(f"its sound cannot be decoded: {error.strerror or error}", where=str(path)) from error
    return (iter(()), 0.0) if first is None else (chain((first,), frames), first.time or 0.0)


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
