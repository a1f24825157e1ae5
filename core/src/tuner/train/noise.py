"""Noise levels and noise. Every draw is a function of (seed, epoch, draw, stream), never of batch composition or workers.

Dimensions: B samples, S tokens of one stream, C latent channels; n target tokens.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from tuner.config.settings import TrainSettings
from tuner.data.randomness import generator
from tuner.interfaces.family import Batch, Noise, Sample, StreamBatch, StreamNoise, TokenShift

LOW_QUANTILE = 2.5758
"""The standard normal's 0.5 % quantile is at minus this."""
HIGH_QUANTILE = 3.0902
"""The standard normal's 99.9 % quantile."""
SMALLEST_SIGMA = 1e-3
"""Stretched values below it are reflected above it; uniform draws start at it."""
UNIFORM_SHARE = 0.1
"""Share of `shifted_logit_normal` draws replaced by uniform ones, so that no noise level goes untrained."""

SigmaSampler = Callable[[torch.Generator, int], float]
"""(generator, n) -> sigma in [0, 1]."""


def sigmoid(x: float) -> float:
    """1 / (1 + exp(-x)), without overflow for large |x|."""
    return 0.5 * (1.0 + math.tanh(0.5 * x))


def stretch(s: float, mu: float) -> float:
    """Maps the 0.5 % and 99.9 % quantiles of sigmoid(N(mu, 1)) to 0 and 1; below 1e-3 reflected to 2e-3 - y; clamped to [0, 1]."""
    low, high = sigmoid(mu - LOW_QUANTILE), sigmoid(mu + HIGH_QUANTILE)
    y = (s - low) / (high - low)
    if y < SMALLEST_SIGMA:
        y = 2 * SMALLEST_SIGMA - y
    return min(max(y, 0.0), 1.0)


def shift_sigma(s: float, shift: float) -> float:
    """S·s / (1 + (S - 1)·s): resolution-dependent shift of the noise level (Esser et al. 2024, arXiv:2403.03206)."""
    return shift * s / (1.0 + (shift - 1.0) * s)


class NoiseSampler:
    """Draws sigma per sample and stream and mixes noise into the latents, all on the CPU in float32."""

    def __init__(self, settings: TrainSettings, shift: TokenShift, seed: int) -> None:
        self._shift = shift
        self._flow_shift = settings.flow_schedule_shift
        self._shared = settings.sigma_pairing == "shared"
        self._seed = seed
        samplers: dict[str, SigmaSampler] = {
            "shifted_logit_normal": self._shifted_logit_normal,
            "logit_normal": self._logit_normal,
            "uniform": self._uniform,
            "beta": self._beta,
        }
        self._sigma = samplers[settings.sigma_sampler]

    def sample(self, batch: Batch, step: int = 0) -> Noise:
        """The draws for `batch`, whose tensors are on the CPU.

        All floats of the result are float32. `step` decides nothing: a sample's noise is named by its epoch and draw.
        A `clean` stream has sigma 0, `noisy` = x0 and eps = 0.
        """
        return Noise({name: self._stream(batch, name, stream) for name, stream in batch.streams.items()})

    def _stream(self, batch: Batch, name: str, stream: StreamBatch) -> StreamNoise:
        x0 = stream.latents.float()
        if stream.clean:
            return StreamNoise(sigma=torch.zeros(len(x0)), noisy=x0, target=-x0, noise=torch.zeros_like(x0))
        sigma = torch.tensor([self._draw_sigma(batch, name, index) for index in range(len(x0))], dtype=torch.float32)
        eps = torch.stack([self._draw_noise(sample, name, x0.shape[1:]) for sample in batch.samples])
        level = sigma[:, None, None]
        noisy = (1 - level) * x0 + level * eps
        if stream.conditioned is not None:
            noisy = torch.where(stream.conditioned[..., None], x0, noisy)
        return StreamNoise(sigma=sigma, noisy=noisy, target=eps - x0, noise=eps)

    def _draw_sigma(self, batch: Batch, name: str, index: int) -> float:
        source = _first_learned(batch, index, default=name) if self._shared else name
        sample = batch.samples[index]
        draws = generator(self._seed, f"sigma/{source}", sample.epoch, sample.draw)
        return self._sigma(draws, target_tokens(batch.streams[source], index))

    def _draw_noise(self, sample: Sample, name: str, shape: torch.Size) -> Tensor:
        return torch.randn(shape, generator=generator(self._seed, f"noise/{name}", sample.epoch, sample.draw))

    def _shifted_logit_normal(self, draws: torch.Generator, tokens: int) -> float:
        """sigmoid(N(mu(n), 1)), stretched; every tenth draw uniform in [1e-3, 1)."""
        mu = self._shift.mu(tokens)
        stretched = stretch(sigmoid(mu + _normal(draws)), mu)
        choice, flat = _uniforms(draws, 2)
        return SMALLEST_SIGMA + (1.0 - SMALLEST_SIGMA) * flat if choice < UNIFORM_SHARE else stretched

    def _logit_normal(self, draws: torch.Generator, tokens: int) -> float:
        """sigmoid(N(0, 1)), shifted by `flow_schedule_shift`."""
        return shift_sigma(sigmoid(_normal(draws)), self._flow_shift)

    def _uniform(self, draws: torch.Generator, tokens: int) -> float:
        """Uniform in [0, 1)."""
        return _uniforms(draws, 1)[0]

    def _beta(self, draws: torch.Generator, tokens: int) -> float:
        """Beta(2, 2), exactly: the median of three uniform draws (order statistic k of m is Beta(k, m + 1 - k))."""
        return sorted(_uniforms(draws, 3))[1]


def target_tokens(stream: StreamBatch, index: int) -> int:
    """n: how many tokens of sample `index` are noised and learned, at least one.

    Those that are given clean are left out, a reference's with them, and padding, whose amount depends on the rest of the batch.
    """
    learned = torch.ones(stream.latents.shape[1], dtype=torch.bool)
    if stream.loss_mask is not None:
        learned &= stream.loss_mask[index] > 0
    if stream.conditioned is not None:
        learned &= ~stream.conditioned[index]
    return max(1, int(learned.sum()))


def _first_learned(batch: Batch, index: int, default: str) -> str:
    """The first stream that sample `index` has and that is not given clean."""
    for name, stream in batch.streams.items():
        if not stream.clean and (stream.present is None or bool(stream.present[index])):
            return name
    return default


def _normal(draws: torch.Generator) -> float:
    return float(torch.randn((), generator=draws, dtype=torch.float64))


def _uniforms(draws: torch.Generator, count: int) -> list[float]:
    values: list[float] = torch.rand(count, generator=draws, dtype=torch.float64).tolist()
    return values
