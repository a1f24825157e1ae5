"""Opens media files and tells what is in them. Runs in worker processes, so it imports no torch.

Nothing but the file itself is read: demuxers that follow references to other files or to the network (playlists, concatenation
scripts) are not admitted, whatever the file's name says.
"""

from __future__ import annotations

import os
from bisect import insort
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import av
from av.container import InputContainer
from av.video.frame import VideoFrame
from av.video.stream import VideoStream

from tuner.data.facts import (
    DecoderFailed,
    MediaError,
    MediaFacts,
    NoVideoStream,
    RefusedMedia,
    TooShort,
    TruncatedMedia,
    UndecodableSound,
    UnreadableMedia,
    count_frames,
)
from tuner.data.pictures import is_picture, probe_picture

__all__ = [
    "DecoderFailed", "MediaError", "MediaFacts", "NoVideoStream", "RefusedMedia", "Timeline", "TooShort", "TruncatedMedia",
    "UndecodableSound", "UnreadableMedia", "count_frames", "displayed_size", "is_picture", "open_media", "picture_stream",
    "picture_timeline", "probe", "quarter_turns", "shows_pictures",
]  # fmt: skip

FORMATS = "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,gif,flac,wav,w64,aiff,mp3,aac,ogg"
"""Demuxers that are admitted, under the names that libavformat gives them."""
EXACT_LENGTHS = frozenset({"flac", "aiff"})
"""Sound formats whose header states the length: one that holds less was cut off. (Of wav the size is compared; the others are a row
of frames that may end anywhere.)"""
LARGEST = 8192 * 8192
"""Pixels of a frame beyond which a file is taken for damaged or hostile: decoding one frame would need gigabytes."""
PLAYLIST_MARKS = (b"#EXTM3U", b"ffconcat", b"<?xml", b"<MPD", b"[playlist]", b"RTSPtext")


@dataclass
class Timeline:
    """Presentation times of one picture track, in seconds, sorted."""

    tick: float
    times: list[float] = field(default_factory=list)
    last_duration: float = 0.0
    packets: int = 0

    def add(self, time: float, duration: float, *, discard: bool) -> None:
        """Takes in one packet; `discard`: it is decoded but not shown."""
        self.packets += 1
        if discard:
            return
        insort(self.times, time)
        if time == self.times[-1]:
            self.last_duration = duration

    @property
    def end(self) -> float:
        """When the last frame stops being shown."""
        return self.times[-1] + (self.last_duration or self.interval)

    @property
    def interval(self) -> float:
        """Mean seconds between frames."""
        return (self.times[-1] - self.times[0]) / (len(self.times) - 1) if len(self.times) > 1 else self.last_duration or 0.04

    @property
    def slack(self) -> float:
        """Times and their origin are each rounded to half a tick (1 ms in Matroska), so times are compared with one tick of
        tolerance; never more than an eighth of a frame, since some containers tick once a frame."""
        return min(self.tick, self.interval / 8)


@contextmanager
def open_media(path: Path) -> Iterator[InputContainer]:
    """Opens `path` for reading. Raises `RefusedMedia`, `UnreadableMedia`; decoding errors inside the block become `UnreadableMedia`."""
    options = {"protocol_whitelist": "file", "format_whitelist": FORMATS}
    try:
        # Titles and handler names of old files are often not UTF-8; nothing here reads them.
        with av.open(os.path.realpath(path), container_options=options, metadata_errors="replace") as container:
            yield container
    except av.FFmpegError as error:
        raise _refusal(path) or UnreadableMedia(f"cannot be decoded: {error.strerror or error}", where=str(path)) from error


def _refusal(path: Path) -> RefusedMedia | None:
    """Whether a file that did not open is a playlist in disguise."""
    try:
        with path.open("rb") as file:
            head = file.read(64).lstrip(b"\xef\xbb\xbf \r\n\t")
    except OSError:
        return None
    if not head.startswith(PLAYLIST_MARKS):
        return None
    return RefusedMedia("is a playlist, not a clip: it names other files or addresses", where=str(path), remedy="remove it")


def picture_stream(container: InputContainer, path: Path) -> VideoStream:
    """The first moving picture (cover art is none). Raises `NoVideoStream`, `RefusedMedia`."""
    stream = _moving_picture(container)
    if stream is None:
        raise NoVideoStream("holds no picture", where=str(path), remedy="sound alone belongs into an entry of dataset_type `audio`")
    if stream.codec_context is None:
        raise UnreadableMedia("no decoder for its picture", where=str(path))
    if stream.codec_context.width * stream.codec_context.height > LARGEST:
        size = f"{stream.codec_context.width}x{stream.codec_context.height}"
        raise RefusedMedia("its frames are unreasonably large", where=str(path), value=size)
    # One thread each: several clips are decoded at once, and a process is easier to end without threads.
    stream.codec_context.thread_count = 1
    return stream


def _moving_picture(container: InputContainer) -> VideoStream | None:
    streams = container.streams.video
    return next((stream for stream in streams if not stream.disposition & av.stream.Disposition.attached_pic), None)


def shows_pictures(path: Path) -> bool:
    """Whether the file holds a moving picture beside its sound. Raises `MediaError`."""
    with open_media(path) as container:
        return _moving_picture(container) is not None


def picture_timeline(path: Path) -> Timeline:
    """Reads all packets of the picture, decoding none."""
    return _read_packets(path)[0]


def probe(path: Path) -> MediaFacts:
    """What the file at `path` holds; its content decides, not its name. Raises `MediaError`.

    Of a clip all packets are read, the first frame and some sound are decoded; a picture and sound alone are decoded whole.
    """
    if is_picture(path):
        return probe_picture(path)
    if not shows_pictures(path):
        return _probe_sound(path)
    timeline, audio_seconds = _read_packets(path)
    with open_media(path) as container:
        stream = picture_stream(container, path)
        first = next(container.decode(stream), None)
        if first is None:
            raise UnreadableMedia("not one frame of its picture can be decoded", where=str(path))
        width, height = displayed_size(first, stream)
        codec = stream.codec_context.name
        sound = next(iter(container.streams.audio), None)
        context = sound.codec_context if sound else None
        seconds = timeline.end - timeline.times[0]
        return MediaFacts(
            seconds=seconds, width=width, height=height, frames=len(timeline.times), fps=len(timeline.times) / seconds,
            slack=timeline.slack, codec=codec, has_audio=sound is not None, audio_codec=context.name if context else "",
            audio_rate=(context.rate or 0) if context else 0, audio_channels=context.channels if context else 0,
            audio_seconds=audio_seconds, audio_problem=_sound_problem(path) if sound else "",
        )  # fmt: skip


def _probe_sound(path: Path) -> MediaFacts:
    """Of a file without moving picture. Lengths in headers of compressed sound are estimates, so all of it is decoded."""
    with open_media(path) as container:
        stream = next(iter(container.streams.audio), None)
        if stream is None:
            raise NoVideoStream("holds neither picture nor sound", where=str(path))
        if stream.codec_context is None:
            raise UndecodableSound("no decoder for its codec", where=str(path))
        _require_indexed_bytes(container, path)
        if container.format.name == "wav":
            _require_riff_bytes(path)
        begin, end, announced = None, 0.0, (container.duration or 0) / av.time_base
        for frame in container.decode(stream):
            if frame.is_corrupt:
                raise TruncatedMedia("its sound is damaged", where=str(path))
            time = frame.time if frame.time is not None else end
            begin = time if begin is None else begin
            end = time + frame.samples / frame.sample_rate
        if begin is None:
            raise UndecodableSound("not one sample of its sound can be decoded", where=str(path))
        if container.format.name in EXACT_LENGTHS and end - begin < announced - 0.1:
            raise TruncatedMedia(f"the file ends early: {end - begin:.2f} of {announced:.2f} seconds are there", where=str(path))
        context = stream.codec_context
        return MediaFacts(
            seconds=end - begin, width=0, height=0, frames=0, fps=0.0, slack=0.0, codec="", has_audio=True, audio_codec=context.name,
            audio_rate=context.rate or 0, audio_channels=context.channels, audio_seconds=end - begin,
        )  # fmt: skip


def displayed_size(frame: VideoFrame, stream: VideoStream) -> tuple[int, int]:
    """(width, height) in square pixels, after the rotation that the container asks players for."""
    aspect = stream.sample_aspect_ratio
    width = round(frame.width * float(aspect)) if aspect else frame.width
    return (frame.height, width) if quarter_turns(frame) % 2 else (width, frame.height)


def quarter_turns(frame: VideoFrame) -> int:
    """Counter-clockwise quarter turns to show the frame upright, 0 to 3."""
    return round(frame.rotation / 90) % 4


def _read_packets(path: Path) -> tuple[Timeline, float]:
    """The picture's times and the seconds of the first sound track. Raises `TruncatedMedia` when the file ends early."""
    with open_media(path) as container:
        picture = picture_stream(container, path)
        sound = next(iter(container.streams.audio), None)
        _require_indexed_bytes(container, path)
        timeline, heard, last_end = Timeline(float(picture.time_base or 0)), 0.0, 0.0
        for packet in container.demux():
            stamp = packet.pts if packet.pts is not None else packet.dts
            if stamp is None or packet.stream is None:
                continue
            if packet.is_corrupt and packet.stream in (picture, sound):
                raise TruncatedMedia("the file ends inside a frame", where=str(path))
            time, duration = float(stamp * packet.time_base), float((packet.duration or 0) * packet.time_base)
            last_end = max(last_end, time + duration)
            if packet.stream == sound:
                heard += duration
            elif packet.stream == picture:
                timeline.add(time, duration, discard=packet.is_discard)
        _require_whole(container, picture, timeline, last_end, path)
        return timeline, heard


def _require_indexed_bytes(container: InputContainer, path: Path) -> None:
    """The index at the head of an mp4 tells where each frame lies: all must lie within the file. (Frames are not simply counted,
    because a clip that was trimmed by an edit list rightly shows fewer than it holds.)"""
    size = path.stat().st_size
    for stream in container.streams:
        beyond = sum(1 for entry in stream.index_entries if entry.pos + entry.size > size)
        if beyond:
            raise TruncatedMedia(f"the file ends early: {beyond} of {len(stream.index_entries)} frames are missing", where=str(path))


def _require_riff_bytes(path: Path) -> None:
    """A wav states its size in bytes 4 to 8; 0 and the largest number say that whoever wrote it did not know."""
    with path.open("rb") as file:
        head = file.read(8)
    announced, there = int.from_bytes(head[4:8], "little"), path.stat().st_size - 8
    if head[:4] == b"RIFF" and announced != 0xFFFFFFFF and there < announced:
        raise TruncatedMedia(f"the file ends early: {there} of {announced} bytes are there", where=str(path))


def _require_whole(container: InputContainer, picture: VideoStream, timeline: Timeline, last_end: float, path: Path) -> None:
    """Compares what was found with what the header announces, for formats whose index comes last and is lost with the end."""
    if not timeline.times:
        raise UnreadableMedia("holds no frames", where=str(path))
    if container.format.name == "avi" and timeline.packets < picture.frames:
        raise TruncatedMedia(f"the file ends early: {timeline.packets} of {picture.frames} frames are there", where=str(path))
    announced = (container.duration or 0) / av.time_base
    if "matroska" in container.format.name and last_end < announced - max(0.1, 2 * timeline.interval):
        raise TruncatedMedia(f"the file ends early: {last_end:.2f} of {announced:.2f} seconds are there", where=str(path))


def _sound_problem(path: Path) -> str:
    """Why no sound can be decoded, or an empty string."""
    try:
        with open_media(path) as container:
            stream = container.streams.audio[0]
            if stream.codec_context is None:
                return "no decoder for its codec"
            return "" if next(container.decode(stream), None) is not None else "not one sample can be decoded"
    except UnreadableMedia as error:
        return error.message
