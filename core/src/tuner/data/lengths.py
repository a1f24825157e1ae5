"""How much of a file is used, and from where: frames of a clip, seconds of a sound alone."""

from __future__ import annotations

import math
from typing import NamedTuple

from tuner.config.entries import AudioOptions, VideoOptions
from tuner.data.facts import MediaFacts, TooShort
from tuner.data.randomness import uniform
from tuner.interfaces.family import Geometry

LONGEST = 121
"""Frames that are taken at most where an entry does not say `num_frames`: about five seconds, what one card can train."""
DURATION_INTERVAL = 3.0
"""Seconds: sound alone is cut to a multiple of it where an entry does not say `audio.duration_interval`."""
SHORTEST_SOUND = 0.04
"""Seconds: sound shorter than an interval is cut to a multiple of it, one frame at 25 a second."""
SLACK = 1e-3
"""Seconds by which a sound may miss a multiple: containers round durations to milliseconds. It is filled with silence."""


class Span(NamedTuple):
    """The part of a file that is used."""

    frames: int
    """0 for sound alone."""
    seconds: float
    """Of sound alone; 0 for a clip: its frames tell."""
    start: float
    """Seconds into the file."""


class Unfit(Exception):
    """The file is left out; the message is "reason: numbers"."""


def clip_span(video: VideoOptions, audio: AudioOptions, facts: MediaFacts, frame_rate: float, content: str, geometry: Geometry) -> Span:
    """The frames of a clip, counted at `frame_rate`. `content`: its sha256, which decides a random part. Raises `Unfit`."""
    available = facts.frames_at(frame_rate)
    problem = _length_problem(video, available, geometry)
    if problem:
        raise Unfit(problem)
    frames = _length(video, available, geometry)
    skipped = _first_unit(audio, available - frames, content, "frames", frames, round(frame_rate * 1000))
    # Times are rounded in most containers, so the last start that was counted may be a hair too late.
    while skipped and facts.frames_at(frame_rate, _seconds(skipped, frame_rate)) < frames:
        skipped -= 1
    return Span(frames, 0.0, _seconds(skipped, frame_rate))


def cut_by_default(video: VideoOptions, facts: MediaFacts, frame_rate: float) -> bool:
    """Whether a clip is longer than what is taken where nothing is said."""
    return _says_nothing(video) and facts.frames_at(frame_rate) > LONGEST


def sound_span(audio: AudioOptions, facts: MediaFacts, content: str) -> Span:
    """The seconds of sound alone: whole intervals, or, where there is not even one, whole `SHORTEST_SOUND`. Raises `Unfit`."""
    check_duration(audio, facts.audio_seconds)
    interval = audio.duration_interval or DURATION_INTERVAL
    seconds = _multiple(facts.audio_seconds, interval) or _multiple(facts.audio_seconds, SHORTEST_SOUND)
    if not seconds:
        raise Unfit(f"sound too short: {facts.audio_seconds:.3f} of {SHORTEST_SOUND:g} seconds")
    # Hundredths of a second: the part that is used begins at a sample of every usual rate.
    spare = math.floor(max(0.0, facts.audio_seconds - seconds) * 100)
    return Span(0, seconds, _first_unit(audio, spare, content, "seconds", round(seconds * 1000)) / 100)


def check_duration(audio: AudioOptions, seconds: float) -> None:
    """Raises `Unfit` for a sound outside the entry's limits."""
    least, most = audio.min_duration_seconds, audio.max_duration_seconds
    if least is not None and seconds < least:
        raise Unfit(f"sound too short: {seconds:.2f} of {least:g} seconds")
    if most is not None and seconds > most:
        raise Unfit(f"sound too long: {seconds:.2f} seconds, at most {most:g}")


def _seconds(frames: int, frame_rate: float) -> float:
    return round(frames / frame_rate, 6)


def _multiple(seconds: float, step: float) -> float:
    """The largest multiple of `step` that is not above `seconds`."""
    return round(math.floor((seconds + SLACK) / step) * step, 6)


def _first_unit(audio: AudioOptions, spare: int, content: str, unit: str, *counters: int) -> int:
    """How many of `spare` units are left out at the beginning. Random: a draw from the file and what is taken of it, the same in every run,
    so that its record stays valid."""
    if spare <= 0 or audio.truncation_mode == "beginning":
        return 0
    if audio.truncation_mode == "end":
        return spare
    return int(uniform(0, f"truncation/{unit}", int(content[:16], 16), spare, *counters) * (spare + 1))


def _says_nothing(video: VideoOptions) -> bool:
    return video.num_frames is None and (video.max_frames is None or video.bucket_strategy == "aspect_ratio")


def _most(video: VideoOptions, geometry: Geometry) -> int:
    """Frames taken at most."""
    own_lengths = video.bucket_strategy == "resolution_frames"
    return geometry.snap_frames(video.num_frames or (video.max_frames if own_lengths else None) or LONGEST)


def _length_problem(video: VideoOptions, available: int, geometry: Geometry) -> str:
    shortest = 1 + geometry.frame_step
    own_lengths = video.bucket_strategy == "resolution_frames"
    least = video.min_frames or geometry.snap_frames(shortest if own_lengths else video.num_frames or shortest)
    if video.max_frames is not None and available > video.max_frames:
        return f"too long: {available} frames, at most {video.max_frames}"
    if available < _most(video, geometry):
        least = max(least, video.frame_interval or 1)
    return f"{TooShort.reason}: {available} of {least} frames" if available < least else ""


def _length(video: VideoOptions, available: int, geometry: Geometry) -> int:
    """Frames taken from a clip that has `available` of them."""
    most = _most(video, geometry)
    if available >= most:
        return most
    interval = video.frame_interval or 1
    return geometry.snap_frames(available // interval * interval)
