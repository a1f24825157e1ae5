"""What was measured of a media file, and the ways in which a file cannot be used. Imported by worker processes: standard library only."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

from tuner.errors import DataError


class MediaError(DataError):
    """A file that cannot be used; `reason` is what such files are counted under."""

    reason: ClassVar[str] = "unreadable"


class UnreadableMedia(MediaError):
    """Not a media file, or one that cannot be opened or decoded."""


class RefusedMedia(MediaError):
    """A playlist, a network format or an absurd size."""

    reason = "refused"


class TruncatedMedia(MediaError):
    """The file ends before what its header announces, or frames in it are damaged."""

    reason = "truncated or damaged"


class NoVideoStream(MediaError):
    """There is no picture."""

    reason = "no video stream"


class TooShort(MediaError):
    """Fewer frames than asked for."""

    reason = "too short"


class UndecodableSound(MediaError):
    """There is a sound track that cannot be decoded: a failure, never "no sound"."""

    reason = "sound cannot be decoded"


class DecoderFailed(MediaError):
    """The decoder died or did not answer."""

    reason = "decoder died or hung"


@dataclass(frozen=True)
class MediaFacts:
    """What a file holds: a clip (measured from its packets and its first frame), a still picture, or sound alone."""

    seconds: float
    """Duration of the picture; of the sound where there is no picture; 0 for a still picture."""
    width: int
    """Displayed pixels: square, after rotation. 0 for sound alone, like `height` and `frames`."""
    height: int
    frames: int
    fps: float
    """Average; 0 for a still picture and for sound alone."""
    slack: float
    """Seconds by which the container rounds presentation times; see `Timeline`."""
    codec: str
    """Of the picture; empty for sound alone."""
    has_audio: bool
    audio_codec: str = ""
    audio_rate: int = 0
    """Hz."""
    audio_channels: int = 0
    audio_seconds: float = 0.0
    audio_problem: str = ""
    """Why the sound track cannot be decoded; empty: it can."""

    @property
    def kind(self) -> Literal["video", "image", "audio"]:
        """A clip, a still picture, or sound alone. (A clip of a single frame lasts for a while, a picture does not.)"""
        if not self.frames:
            return "audio"
        return "video" if self.seconds else "image"

    def frames_at(self, frame_rate: float, start: float = 0.0) -> int:
        """How many frames the file gives at `frame_rate` from `start` seconds on; a still picture gives one."""
        return count_frames(self.seconds - start, frame_rate, self.slack) if self.kind == "video" else self.frames


def count_frames(seconds: float, frame_rate: float, slack: float) -> int:
    """How many k = 0, 1, ... have k / frame_rate before `seconds`. Twice the slack: the last frame's duration is rounded too."""
    return max(0, math.ceil((seconds - 2 * slack) * frame_rate))
