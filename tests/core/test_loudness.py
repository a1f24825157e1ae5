"""Loudness against the recommendation's numbers, scipy's recursive filter and ffmpeg's own meter; clipping against counted samples."""

from __future__ import annotations

import math
import re

import av
import numpy as np
import pytest
from numpy.typing import NDArray
from scipy.signal import lfilter

from tuner.data.loudness import clipped_share, integrated_loudness, k_weighting

Sound = NDArray[np.float32]
RATE = 48000


def sine(level: float, seconds: float, rate: int = RATE, pitch: float = 997.0, channels: int = 1) -> Sound:
    """(channels, N): `level` in dB below a full-scale sine."""
    t = np.arange(round(seconds * rate)) / rate
    return np.repeat(10 ** (level / 20) * np.sin(2 * np.pi * pitch * t)[None], channels, axis=0).astype(np.float32)


def loudness(sound: Sound, rate: int = RATE) -> float:
    found = integrated_loudness(sound, rate)
    assert found is not None
    return found


def test_the_filters_are_those_of_the_recommendation() -> None:
    """ITU-R BS.1770-5, annex 1, tables 1 and 2: coefficients at 48 kHz."""
    shelf, high_pass = k_weighting(RATE)
    assert shelf.b == pytest.approx((1.53512485958697, -2.69169618940638, 1.19839281085285), abs=1e-12)
    assert shelf.a == pytest.approx((-1.69065929318241, 0.73248077421585), abs=1e-12)
    assert high_pass.b == (1.0, -2.0, 1.0)
    assert high_pass.a == pytest.approx((-1.99004745483398, 0.99007225036621), abs=1e-12)


@pytest.mark.parametrize("rate", [8000, 16000, 44100, 48000, 96000])
def test_a_full_scale_sine_in_one_channel_has_minus_3_lufs(rate: int) -> None:
    """Annex 1: 0 dB at 997 Hz in one channel is -3.01 LKFS; powers of channels add. The pre-filter was made for 48 kHz."""
    tolerance = 0.02 if rate >= 44100 else 0.25
    assert loudness(sine(0, 2, rate), rate) == pytest.approx(-3.01, abs=tolerance)
    assert loudness(sine(0, 2, rate, channels=2), rate) == pytest.approx(0.0, abs=tolerance)
    assert loudness(sine(-20, 2, rate), rate) == pytest.approx(-23.01, abs=tolerance)


def formula(sound: Sound) -> float:
    """BS.1770-5, annex 1, word by word: blocks of 400 ms every 100 ms, both gates, -0.691 + 10 lg of the mean."""
    weighted = sound.astype(np.float64)
    for part in k_weighting(RATE):
        weighted = lfilter(part.b, (1.0, *part.a), weighted)
    blocks = []
    for start in range(0, sound.shape[1] - 19200 + 1, 4800):
        blocks.append(sum(float((channel[start : start + 19200] ** 2).mean()) for channel in weighted))
    levels = [-0.691 + 10 * math.log10(power) if power else -math.inf for power in blocks]
    first = [power for power, level in zip(blocks, levels, strict=True) if level > -70]
    gate = -0.691 + 10 * math.log10(sum(first) / len(first)) - 10
    second = [power for power, level in zip(blocks, levels, strict=True) if level > -70 and level > gate]
    return -0.691 + 10 * math.log10(sum(second) / len(second))


def test_gating_and_weighting_follow_the_formula() -> None:
    noise = np.random.default_rng(1).normal(0, 0.1, (2, 25 * RATE)).astype(np.float32)
    noise[:, 5 * RATE : 8 * RATE] = 0
    noise[:, 12 * RATE : 14 * RATE] *= 0.02
    noise[1] *= 0.5
    noise = noise[:, : 23 * RATE + 1234]
    assert loudness(noise) == pytest.approx(formula(noise), abs=1e-6)


def test_silence_and_quiet_parts_do_not_count() -> None:
    loud, quiet = sine(-20, 10), sine(-40, 10)
    # 10 s of the tone fill 97 blocks, and three quarters, a half and a quarter of three more.
    heard = -23.01 + 10 * math.log10((97 + 1.5) / 100)
    assert loudness(np.concatenate([loud, np.zeros_like(loud)], axis=1)) == pytest.approx(heard, abs=0.01)
    assert loudness(np.concatenate([loud, quiet], axis=1)) == pytest.approx(heard, abs=0.01)
    # Only 5 dB quieter: not gated, so powers are averaged.
    mean = 10 * math.log10((10**-2.0 + 10**-2.5) / 2) - 3.01
    assert loudness(np.concatenate([loud, sine(-25, 10)], axis=1)) == pytest.approx(mean, abs=0.01)


def test_silence_has_no_loudness_and_short_sound_is_one_block() -> None:
    assert integrated_loudness(np.zeros((2, RATE), np.float32), RATE) is None
    assert integrated_loudness(np.zeros((2, 0), np.float32), RATE) is None
    assert integrated_loudness(sine(-80, 1), RATE) is None
    assert loudness(sine(0, 0.3)) == pytest.approx(-3.01, abs=0.02)
    assert loudness(sine(0, 0.36, 44100, channels=2), 44100) == pytest.approx(0, abs=0.02)


def meter(sound: Sound) -> float:
    """What ffmpeg's ebur128 filter says."""
    graph = av.filter.Graph()
    source = graph.add_abuffer(sample_rate=RATE, format="fltp", layout="stereo", time_base=f"1/{RATE}")
    measure, sink = graph.add("ebur128", "metadata=1"), graph.add("abuffersink")
    source.link_to(measure)
    measure.link_to(sink)
    graph.configure()
    frame = av.AudioFrame.from_ndarray(np.ascontiguousarray(sound), "fltp", "stereo")
    frame.sample_rate, frame.pts = RATE, 0
    graph.push(frame)
    graph.push(None)
    last = ""
    while True:
        try:
            last = str(graph.pull().metadata.get("lavfi.r128.I", last))
        except (av.FFmpegError, EOFError):
            break
    assert re.fullmatch(r"-?\d+(\.\d+)?", last), last
    return float(last)


@pytest.mark.skipif("ebur128" not in av.filter.filters_available, reason="this build of PyAV has no loudness meter to compare with")
def test_ffmpegs_meter_agrees() -> None:
    rng = np.random.default_rng(2)
    for scale in (0.02, 0.3):
        sound = np.clip(np.cumsum(rng.normal(0, scale, (2, 6 * RATE)), axis=1) % 1.0 - 0.5, -1, 1).astype(np.float32)
        sound[:, : 2 * RATE] *= 0.1
        assert loudness(sound) == pytest.approx(meter(sound), abs=0.06)  # it counts in steps of 0.1 LU


def test_clipped_samples_are_counted_where_they_form_plateaus() -> None:
    sound = np.zeros((2, 1000), np.float32)
    sound[0, 10:20], sound[1, 30:33], sound[0, 50], sound[0, 60:62] = 1.0, -1.0, 1.0, -1.0
    assert clipped_share(sound) == pytest.approx(13 / 2000)
    assert clipped_share(sine(0, 1)) == 0
    assert clipped_share(np.clip(2 * sine(0, 1, pitch=440.0), -1, 1)) == pytest.approx(2 / 3, abs=0.01)
    assert clipped_share(np.zeros((1, 2), np.float32)) == 0
