"""Weights w(sigma) of samples in the flow-matching losses.

A sample of a stream lies at x = (1 - sigma) x0 + sigma eps, so its signal-to-noise ratio is ((1 - sigma) / sigma)². Every w has the mean 1
over sigma in [0, 1]: losses stay comparable where noise levels are drawn uniformly. Other draws (`sigma_sampler`) weigh a second time, and
their mean is not divided out, because it hangs on the number of tokens.

- `min_snr`: Hang et al. 2023 (arXiv:2303.09556) weigh the error of x0 by min(SNR, gamma). The velocity v = eps - x0 gives
  x0 = x - sigma v, so its squared error is that of x0 over sigma², and the weight here is

      sigma² min(SNR, gamma) = min((1 - sigma)², gamma sigma²),

  divided by its integral gamma / (3 (1 + sqrt(gamma))²). The two branches meet at sigma = 1 / (1 + sqrt(gamma)).
- `cosmap`: 2 / (pi (1 - 2 sigma + 2 sigma²)), the density of Esser et al. 2024 (arXiv:2403.03206, section 3.1), which is 1 in all.
- `bell`: exp(-(sigma - 1/2)² / (2 width²)), divided by its integral width sqrt(2 pi) erf(1 / (2 sqrt(2) width)).

Dimensions: B samples.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import ClassVar

import torch
from torch import Tensor

from tuner.interfaces.blocks import BlockSet
from tuner.interfaces.family import BuildContext
from tuner.interfaces.losses import LossValue, Regularizer, StepState, TrainingFacts
from tuner_sigma_weighting.options import SigmaWeightingOptions


class SigmaWeighting(Regularizer):
    """Multiplies each stream's loss of each sample by w of its noise level. Terms of other names are left as they are."""

    name = "sigma_weighting"
    capturable: ClassVar[bool] = True

    def __init__(self, options: SigmaWeightingOptions, context: BuildContext) -> None:
        self.options = options

    def describe(self, facts: TrainingFacts) -> str:
        kind, options = self.options.sigma_weighting, self.options
        values = {"min_snr": f" with gamma {options.sigma_weighting_gamma:g}", "bell": f" of width {options.sigma_weighting_width:g}"}
        return f"{kind}{values.get(kind, '')} over the noise levels of {' and '.join(facts.learned_streams)}"

    def attach(self, blocks: BlockSet, context: BuildContext) -> None:
        """Nothing: the model stays as it is."""

    def weigh(self, values: Sequence[LossValue], state: StepState) -> Sequence[LossValue]:
        return [
            replace(value, values=value.values * weight(state.noise.streams[value.name].sigma, self.options))
            if value.name in state.noise.streams
            else value
            for value in values
        ]


def weight(sigma: Tensor, options: SigmaWeightingOptions) -> Tensor:
    """w(sigma), (B,) float32 for sigma (B,) in [0, 1]; ones for `none`."""
    sigma = sigma.float()
    if options.sigma_weighting == "min_snr":
        return min_snr(sigma, options.sigma_weighting_gamma)
    if options.sigma_weighting == "cosmap":
        return 2 / (math.pi * (1 - 2 * sigma + 2 * sigma.square()))
    if options.sigma_weighting == "bell":
        return bell(sigma, options.sigma_weighting_width)
    return torch.ones_like(sigma)


def min_snr(sigma: Tensor, gamma: float) -> Tensor:
    """min((1 - sigma)², gamma sigma²), with mean 1 over [0, 1]."""
    mean = gamma / (3 * (1 + math.sqrt(gamma)) ** 2)
    return torch.minimum((1 - sigma).square(), gamma * sigma.square()) / mean


def bell(sigma: Tensor, width: float) -> Tensor:
    """A normal density around 1/2 with standard deviation `width`, cut to [0, 1], with mean 1 there."""
    mean = width * math.sqrt(2 * math.pi) * math.erf(1 / (2 * math.sqrt(2) * width))
    return torch.exp(-(sigma - 0.5).square() / (2 * width**2)) / mean
