"""How many blocks keep their activations: what a forecast allows, corrected by what the first steps took; the same numbers always."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from core.mixing import Mixing, item
from tuner.builtins.losses import FlowMatchingLoss
from tuner.interfaces.blocks import BlockState
from tuner.model.runner import BlockRunner
from tuner.testing.blocks import MixingModel, call_mixing_block
from tuner.train.activations import ActivationBudget, corrected, keep_last
from tuner.train.execute import GraphExecution, PlainExecution
from tuner.train.masters import MasterWeights
from tuner.train.step import TrainingModel

DEPTH = 6
BLOCK = 100


def test_the_last_blocks_are_kept() -> None:
    assert [sorted(keep_last(4, kept).recomputed) for kept in (0, 1, 4)] == [[0, 1, 2, 3], [0, 1, 2], []]


@given(st.integers(0, 48), st.integers(0, 20_000), st.integers(1, 20_000), st.integers(1, 500))
def test_a_correction_takes_all_back_that_is_over_and_half_of_what_is_left(kept: int, peak: int, budget: int, block: int) -> None:
    now = corrected(kept, 48, peak, budget, block)
    assert 0 <= now <= 48
    after = peak + (now - kept) * block
    assert after <= budget or now == 0
    if peak <= budget:
        assert now >= kept and (now - kept) * block <= (budget - peak) / 2


class Bench:
    """A model that trains under a budget."""

    def __init__(self, kept: int, budget: int = 10_000) -> None:
        torch.manual_seed(0)
        net, self.family = MixingModel(DEPTH, dropout=0.1), Mixing()
        self.runner = BlockRunner(net.block_set(), self.call, checkpointing=keep_last(DEPTH, kept))
        self.masters = MasterWeights(dict(net.named_parameters()), low_precision=False)
        training = TrainingModel(self.family, net, self.runner, [FlowMatchingLoss("video")])  # type: ignore[arg-type]
        self.peaks: list[int] = []
        self.execution = ActivationBudget(
            PlainExecution(training, self.masters), self.runner, budget=budget, block=BLOCK,
            largest=lambda batch: batch.samples[0].frames == 9, peak=lambda: self.peaks.pop(0),
        )  # fmt: skip

    def call(self, block: nn.Module, state: BlockState) -> BlockState:
        self.family.called += 1
        if self.family.called > self.family.full_after and self.execution.kept:
            raise torch.OutOfMemoryError("planned")
        return call_mixing_block(block, state)

    def step(self, number: int, frames: int = 9) -> list[Tensor]:
        torch.manual_seed(number)
        self.execution([item(number, frames)], number, 1.0)
        found = [parameter.grad.clone() for parameter in self.masters.optimized() if parameter.grad is not None]
        for parameter in self.masters.optimized():
            parameter.grad = None
        return found


def test_the_first_steps_correct_the_forecast_once() -> None:
    bench = Bench(kept=2, budget=1000)
    bench.peaks = [5000, 300, 5000, 500, 5000, 520]  # what was held before a step does not count
    bench.step(0, frames=1)
    bench.step(1)
    assert bench.execution.kept == 2  # one step of the largest shape is not enough
    bench.step(2)
    assert bench.execution.kept == 4  # 480 are left, and half of them used
    bench.step(3)  # nobody asks for a peak any more
    assert bench.execution.kept == 4


def test_what_is_over_is_taken_back_at_once() -> None:
    bench = Bench(kept=5, budget=1000)
    bench.peaks = [0, 1250]
    bench.step(0, frames=1)
    assert bench.execution.kept == 2


def test_batches_of_the_first_step_come_before_the_optimizer_has_states() -> None:
    bench = Bench(kept=2, budget=1000)
    bench.peaks = [0, 300] * 5 + [0, 600]
    for _ in range(4):
        bench.step(0)
    bench.step(1)
    assert bench.execution.kept == 2
    bench.step(1)
    assert bench.execution.kept == 4 and not bench.peaks


def test_what_graphs_will_hold_beside_a_step_is_left_free() -> None:
    """They come after the steps that are watched, with gradients of their own."""
    bench = Bench(kept=2, budget=100_000)
    bench.execution.inner = GraphExecution(bench.execution.training, bench.masters)
    coming = sum(4 * parameter.numel() for parameter in bench.masters.optimized())
    bench.peaks = [0, 0, 0, 0, 0, 100_000 - coming - 450]
    for number in range(3):
        bench.step(number)
    assert bench.execution.inner.to_come == coming and bench.execution.kept == 4  # half of 450


@pytest.mark.parametrize("full_after", [DEPTH + 2, 3], ids=["on the way back", "on the way there"])
def test_a_step_that_does_not_fit_is_carried_out_with_every_block_recomputed(full_after: int) -> None:
    plain, bench = Bench(kept=0), Bench(kept=3)
    plain.peaks, bench.peaks = [0] * 4, [0]
    bench.family.full_after = full_after
    expected = plain.step(0)
    assert all(torch.equal(a, b) for a, b in zip(bench.step(0), expected, strict=True))  # dropout's draws are those of the step, too
    assert bench.execution.kept == 0
    bench.family.full_after = 99
    assert all(torch.equal(a, b) for a, b in zip(bench.step(1), plain.step(1), strict=True))


def test_a_step_that_does_not_fit_anyhow_is_an_error() -> None:
    bench = Bench(kept=0)
    bench.peaks = [0]
    bench.execution.inner = Full(bench.execution.training, bench.masters)
    with pytest.raises(torch.OutOfMemoryError):
        bench.step(0)


class Full(PlainExecution):
    """No step fits."""

    def __call__(self, *_: object) -> list[object]:  # type: ignore[override]
        raise torch.OutOfMemoryError("planned")
