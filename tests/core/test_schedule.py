"""Learning rates against formulas written out."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import nn

from tuner.builtins.optimizers import AdamWBF16
from tuner.builtins.options import AdamOptions
from tuner.config.settings import OptimizerSettings
from tuner.train.schedule import make_schedule

TOTAL, WARMUP, PEAK = 20, 4, 1e-8  # a peak below the end that transformers' polynomial assumes


def optimizer() -> torch.optim.Optimizer:
    weight = nn.Parameter(torch.ones(2))
    weight.grad = torch.ones(2)
    return AdamWBF16([weight], PEAK, AdamOptions())


def rates(settings: OptimizerSettings, steps: int = TOTAL) -> list[float]:
    stepped = optimizer()
    schedule = make_schedule(stepped, settings, TOTAL)
    found = []
    for _ in range(steps):
        found.append(stepped.param_groups[0]["lr"])
        stepped.step()
        schedule.step()
    return found


def progress(step: int) -> float:
    return (step - WARMUP) / (TOTAL - WARMUP)


SHAPES: dict[str, Callable[[int], float]] = {
    "constant": lambda step: 1.0,
    "constant_with_warmup": lambda step: 1.0,
    "linear": lambda step: 1 - progress(step),
    "cosine": lambda step: 0.5 * (1 + math.cos(math.pi * progress(step))),
    "cosine_with_restarts": lambda step: 0.5 * (1 + math.cos(math.pi * ((2 * progress(step)) % 1))),
    "polynomial": lambda step: (1 - progress(step)) ** 3,
}


@pytest.mark.parametrize("name", SHAPES)
def test_warms_up_and_follows_its_formula(name: str) -> None:
    settings = OptimizerSettings(lr_scheduler=name, lr_warmup_steps=WARMUP, lr_num_cycles=2, lr_power=3.0)  # type: ignore[arg-type]
    expected = [PEAK * (step / WARMUP if step < WARMUP else SHAPES[name](step)) for step in range(TOTAL)]
    assert rates(settings) == pytest.approx(expected, rel=1e-6, abs=1e-14)


def test_constant_without_warmup_starts_at_the_peak() -> None:
    assert rates(OptimizerSettings(lr_scheduler="constant"), steps=3) == [PEAK] * 3


def test_resumed_is_uninterrupted() -> None:
    settings = OptimizerSettings(lr_scheduler="cosine", lr_warmup_steps=WARMUP)
    through = rates(settings)
    first = optimizer()
    schedule = make_schedule(first, settings, TOTAL)
    for _ in range(7):
        first.step()
        schedule.step()
    resumed = optimizer()
    later = make_schedule(resumed, settings, TOTAL)
    resumed.load_state_dict(first.state_dict())
    later.load_state_dict(schedule.state_dict())
    found = []
    for _ in range(7, TOTAL):
        found.append(resumed.param_groups[0]["lr"])
        resumed.step()
        later.step()
    assert found == through[7:]


@pytest.mark.filterwarnings("ignore")  # torchao's at import
def test_steers_an_optimizer_whose_rate_is_a_tensor() -> None:
    pytest.importorskip("torchao")
    from tuner.builtins.optimizers import AdamW8bit

    weight = nn.Parameter(torch.ones(2))
    weight.grad = torch.ones(2)
    stepped = AdamW8bit([weight], 0.5, AdamOptions())
    schedule = make_schedule(stepped, OptimizerSettings(lr_scheduler="linear"), 4)
    stepped.step()
    schedule.step()
    assert float(stepped.param_groups[0]["lr"]) == pytest.approx(0.375)
    stepped.step()
