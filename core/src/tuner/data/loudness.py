"""How loud sound is: integrated loudness after ITU-R BS.1770-5, and the share of samples that are clipped. No torch: for worker processes.

Dimensions: C channels (mono or left and right, which weigh 1 each), N samples.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Sound = NDArray[np.float32]

BLOCK, OVERLAP = 0.4, 4
"""Seconds of a gating block, and how many blocks hear each moment (BS.1770-5, annex 1: 75 % overlap)."""
ABSOLUTE_GATE, RELATIVE_GATE = -70.0, -10.0
"""LUFS below which a block does not count; LU below the mean of the others below which it does not either."""
OFFSET = -0.691
"""LUFS: makes up for what the K weighting adds at 997 Hz."""
LOWEST_RATE = 8000
"""Hz: the weighting is undefined where its shelf lies near half the rate."""
CHUNK = 200
"""Steps of a tenth of a second that are weighted at once."""
SETTLING = 1.0
"""Seconds after which nothing is heard of the weighting's past: its slowest pole lies at 38 Hz."""
FULL_SCALE, PLATEAU = 0.9999, 3
"""A sample that is this large belongs to a clipped peak where so many of them follow each other; a 16-bit file's largest is 0.99997."""


@dataclass(frozen=True)
class Biquad:
    """H(z) = (b0 + b1/z + b2/z²) / (1 + a1/z + a2/z²)."""

    b: tuple[float, float, float]
    a: tuple[float, float]

    def response(self, z: NDArray[np.complex128]) -> NDArray[np.complex128]:
        """H at `1/z`, which is given as e^(-jw)."""
        return (self.b[0] + z * (self.b[1] + z * self.b[2])) / (1 + z * (self.a[0] + z * self.a[1]))


def k_weighting(rate: int) -> tuple[Biquad, Biquad]:
    """The high shelf of the head and the high pass of BS.1770-5, annex 1, for any sample rate in Hz.

    The recommendation lists coefficients for 48 kHz; these are the analogue filters behind them, brought to `rate` by the bilinear
    transform (B. De Man, Evaluation of Implementations of the EBU R128 Loudness Measurement, AES Convention 145, 2018).
    """
    k = math.tan(math.pi * 1681.974450955533 / rate)
    quality, high = 0.7071752369554196, 10 ** (3.999843853973347 / 20)
    band = high**0.4996667741545416
    norm = 1 + k / quality + k * k
    shelf = Biquad(
        ((high + band * k / quality + k * k) / norm, 2 * (k * k - high) / norm, (high - band * k / quality + k * k) / norm),
        (2 * (k * k - 1) / norm, (1 - k / quality + k * k) / norm),
    )
    k, quality = math.tan(math.pi * 38.13547087602444 / rate), 0.5003270373238773
    norm = 1 + k / quality + k * k
    return shelf, Biquad((1.0, -2.0, 1.0), (2 * (k * k - 1) / norm, (1 - k / quality + k * k) / norm))


def integrated_loudness(sound: Sound, rate: int) -> float | None:
    """LUFS of (C, N) in [-1, 1], at least `LOWEST_RATE`; None: silence, no block is above the absolute gate.

    Sound that is shorter than a block is one block.
    """
    powers = _block_powers(sound, rate)
    powers = powers[powers > _power(ABSOLUTE_GATE)]
    if not len(powers):
        return None
    powers = powers[powers > powers.mean() * 10 ** (RELATIVE_GATE / 10)]
    return OFFSET + 10 * math.log10(powers.mean())


def _power(loudness: float) -> float:
    """The weighted mean square, summed over channels, that has this loudness."""
    return float(10 ** ((loudness - OFFSET) / 10))


def _block_powers(sound: Sound, rate: int) -> NDArray[np.float64]:
    """The power of each gating block. What is left at the end is in no block."""
    step = round(rate * BLOCK / OVERLAP)
    steps = sound.shape[1] // step
    if steps < OVERLAP:
        return np.array([(part**2).sum() / sound.shape[1] for part in _weighted(sound, rate, OVERLAP * step)])
    whole = _weighted(sound[:, : steps * step], rate, CHUNK * step)
    energies = np.concatenate([(part**2).sum(axis=0).reshape(-1, step).sum(axis=1) for part in whole])
    return np.convolve(energies, np.ones(OVERLAP), "valid") / (OVERLAP * step)


def _weighted(sound: Sound, rate: int, chunk: int) -> Iterator[NDArray[np.float64]]:
    """K-weighted sound, so many samples at a time.

    The filters are recursive; here their response is multiplied in the frequency domain, which differs by less than rounding because
    each chunk brings `SETTLING` seconds of its past and as much silence behind it.
    """
    past = round(SETTLING * rate)
    filters = k_weighting(rate)
    for start in range(0, sound.shape[1], chunk):
        begin = max(0, start - past)
        piece = sound[:, begin : start + chunk].astype(np.float64)
        size = 1 << (piece.shape[1] + past).bit_length()
        z = np.exp(-2j * np.pi * np.arange(size // 2 + 1) / size)
        spectrum = np.fft.rfft(piece, size) * filters[0].response(z) * filters[1].response(z)
        yield np.fft.irfft(spectrum, size)[:, start - begin : piece.shape[1]]


def clipped_share(sound: Sound) -> float:
    """Share of the samples of (C, N) that lie on plateaus at full scale, as they are left where sound was recorded or mixed too loud."""
    full = np.abs(sound) >= FULL_SCALE
    count = max(0, sound.shape[1] - PLATEAU + 1)
    if not count:
        return 0.0
    begins = np.logical_and.reduce([full[:, offset : offset + count] for offset in range(PLATEAU)])
    clipped = np.zeros_like(full)
    for offset in range(PLATEAU):
        clipped[:, offset : offset + count] |= begins
    return float(clipped.mean())
