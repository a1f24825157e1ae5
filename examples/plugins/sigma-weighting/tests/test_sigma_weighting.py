"""The weights are the formulas of the papers, with mean 1, and reach the streams' losses alone."""

from __future__ import annotations

import math
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from torch import Tensor

from tuner.interfaces.family import Batch, BuildContext, Noise, Prediction, Sample, StreamBatch, StreamNoise
from tuner.interfaces.losses import LossValue, StepState, TrainingFacts
from tuner.testing import RegularizerConformance
from tuner_sigma_weighting import plugin
from tuner_sigma_weighting.options import SigmaWeightingOptions
from tuner_sigma_weighting.weighting import SigmaWeighting, weight

KINDS = ["min_snr", "cosmap", "bell"]
GRID = (torch.arange(200_000, dtype=torch.float64) + 0.5) / 200_000


def options(kind: str, **changes: float) -> SigmaWeightingOptions:
    return SigmaWeightingOptions.model_validate({"sigma_weighting": kind, **changes})


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("changes", [{}, {"sigma_weighting_gamma": 1.0, "sigma_weighting_width": 0.05}, {"sigma_weighting_width": 3.0}])
def test_the_mean_over_all_levels_is_one(kind: str, changes: dict[str, float]) -> None:
    assert weight(GRID, options(kind, **changes)).double().mean().item() == pytest.approx(1.0, abs=1e-5)


@pytest.mark.parametrize("gamma", [1.0, 5.0, 20.0])
def test_min_snr_is_that_of_the_paper_for_the_error_of_the_clean_sample(gamma: float) -> None:
    """w · |v - v'|² is in proportion to min(SNR, gamma) · |x0 - x0'|², where x0' = x - sigma v'."""
    sigma = torch.linspace(0.02, 1, 50, dtype=torch.float64)
    x0, eps, wrong = torch.randn(3, 50, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    x, v = (1 - sigma) * x0 + sigma * eps, eps - x0 + wrong
    paper = (((1 - sigma) / sigma) ** 2).clamp(max=gamma) * (x0 - (x - sigma * v)).square()
    ours = weight(sigma, options("min_snr", sigma_weighting_gamma=gamma)).double() * (v - (eps - x0)).square()
    ratio = (ours / paper)[:-1]  # at sigma 1 both are 0
    torch.testing.assert_close(ratio, torch.full_like(ratio, 3 * (1 + math.sqrt(gamma)) ** 2 / gamma), rtol=1e-4, atol=0)
    assert ours[-1] == 0 and weight(torch.zeros(1), options("min_snr")).item() == 0


def test_cosmap_and_bell_are_densities() -> None:
    sigma = torch.tensor([0.0, 0.25, 0.5, 1.0])
    expected = torch.tensor([2 / math.pi, 2 / (math.pi * 0.625), 4 / math.pi, 2 / math.pi])
    torch.testing.assert_close(weight(sigma, options("cosmap")), expected)
    found = weight(sigma, options("bell", sigma_weighting_width=0.25))
    assert (found[1] / found[2]).item() == pytest.approx(math.exp(-0.5)) and found[0] == found[3]


def state(sigma: Tensor) -> StepState:
    latents = torch.zeros(len(sigma), 2, 3)
    batch = Batch((Sample("k", "d", 0, 0, 25.0, 9, 32, 32, {}),) * len(sigma), {"video": StreamBatch(latents, (1, 1, 2))}, {}, (25.0,))
    return StepState(batch, Noise({"video": StreamNoise(sigma, latents, latents, latents)}), Prediction({"video": latents}))


def test_streams_are_weighed_and_nothing_else(tmp_path: Path) -> None:
    sigma = torch.tensor([0.2, 0.9])
    context = BuildContext(torch.device("cpu"), torch.float32, 0, 0, tmp_path)
    counted, values = torch.tensor([True, False]), torch.tensor([3.0, 5.0], requires_grad=True)
    other = LossValue("alignment", torch.ones(2))
    given = [LossValue("video", values, counted, weight=0.5), other]
    weighed, same = SigmaWeighting(options("bell"), context).weigh(given, state(sigma))
    assert same is other and weighed.counted is counted and weighed.weight == 0.5
    factor = weight(sigma, options("bell"))
    torch.testing.assert_close(weighed.reduced(), 0.5 * factor[0] * 3.0)
    weighed.reduced().backward()
    torch.testing.assert_close(values.grad, torch.tensor([0.5 * factor[0].item(), 0.0]))


def test_it_is_off_unless_asked_for() -> None:
    assert not SigmaWeightingOptions().enabled() and options("cosmap").enabled()
    assert torch.equal(weight(torch.rand(3), SigmaWeightingOptions()), torch.ones(3))


def test_the_plan_says_what_it_does() -> None:
    facts = TrainingFacts(4, (0, 1, 2, 3), ("video", "audio"), ("video", "audio"), (), False)
    context = BuildContext(torch.device("cpu"), torch.float32, 0, 0, Path())
    said = {kind: SigmaWeighting(options(kind), context).describe(facts) for kind in KINDS}
    assert said["min_snr"] == "min_snr with gamma 5 over the noise levels of video and audio"
    assert said["cosmap"].startswith("cosmap over") and "bell of width 0.2" in said["bell"]


class TestConformance(RegularizerConformance):
    plugin = plugin
    component = "sigma_weighting"
    options: ClassVar = {"sigma_weighting": "cosmap"}
    zero: ClassVar = {"sigma_weighting": "none"}
