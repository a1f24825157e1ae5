"""Replayed steps against plain ones, on the processor: a tape of every operation stands for a CUDA graph, at the same addresses."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor

from core.mixing import Mixing, item
from core.taped import Tape, tape
from tuner.builtins.losses import FlowMatchingLoss
from tuner.errors import EnvironmentProblem
from tuner.model.runner import BlockRunner
from tuner.testing.blocks import MixingModel, call_mixing_block
from tuner.train import execute
from tuner.train.activations import ActivationBudget, keep_last
from tuner.train.execute import GRAPHS_KEPT, PLAIN_FIRST, Execution, GraphExecution, PlainExecution
from tuner.train.masters import MasterWeights
from tuner.train.step import StepResult, TrainingModel

DEPTH = 6


@pytest.fixture
def taped(monkeypatch: pytest.MonkeyPatch) -> None:
    tape(monkeypatch)


class Bench:
    """A model of `dtype`, trained with batches of two shapes."""

    def __init__(
        self, make: Callable[[TrainingModel, MasterWeights], Execution], dtype: torch.dtype = torch.float32, stream: str = "video"
    ) -> None:
        torch.manual_seed(0)
        net, self.family = MixingModel(DEPTH).to(dtype), Mixing(dtype)
        self.runner = BlockRunner(net.block_set(), call_mixing_block, checkpointing=keep_last(DEPTH, 2))
        self.masters = MasterWeights(dict(net.named_parameters()), low_precision=False)
        self.execution = make(TrainingModel(self.family, net, self.runner, [FlowMatchingLoss(stream)]), self.masters)  # type: ignore[arg-type]

    def step(self, number: int, accumulation: int) -> list[Tensor]:
        """The losses of its batches, and the gradients."""
        losses = []
        for micro in range(accumulation):
            (result,) = self.execution([item(number * accumulation + micro, 9)], number, 1 / accumulation)
            losses.append(result.loss.clone())
        gradients = [parameter.grad.clone() for parameter in self.masters.optimized() if parameter.grad is not None]
        for parameter in self.masters.optimized():
            parameter.grad = None
        return [*losses, *gradients]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["own masters", "copied masters"])
@pytest.mark.parametrize("accumulation", [1, 2, 3, 4])
def test_replayed_steps_are_the_plain_ones(taped: None, accumulation: int, dtype: torch.dtype) -> None:
    """A shape is captured at its fourth batch: at the first one of a step, or at one whose step has gradients already."""
    plain, replayed = Bench(PlainExecution, dtype), Bench(GraphExecution, dtype)
    for number in range(5):
        expected, given = plain.step(number, accumulation), replayed.step(number, accumulation)
        assert all(torch.equal(a, b) for a, b in zip(given, expected, strict=True)), f"step {number}"
    assert isinstance(replayed.execution, GraphExecution) and replayed.execution.captured == 1


def test_shapes_beyond_the_limit_are_carried_out_plainly_which_is_said(taped: None, caplog: pytest.LogCaptureFixture) -> None:
    bench, plain = Bench(GraphExecution), Bench(PlainExecution)
    for share in (1.0, 0.5, 0.25, 0.2, 0.1, 0.05):  # each is captured on its own, like a shape of batch
        for number in range(PLAIN_FIRST + 2):
            losses = [one.execution([item(number, 9)], number, share)[0].loss.clone() for one in (bench, plain)]
            assert torch.equal(*losses)
            for one in (bench, plain):
                for parameter in one.masters.optimized():
                    parameter.grad = None
    assert bench.execution.captured == GRAPHS_KEPT  # type: ignore[attr-defined]
    assert caplog.text.count(f"{GRAPHS_KEPT} shapes of batches are replayed as CUDA graphs") == 1


def test_a_batch_that_teaches_nothing_is_replayed_like_any_other(taped: None) -> None:
    """Without sound, where only sound is learned."""
    benches = [Bench(kind, stream="audio") for kind in (PlainExecution, GraphExecution)]
    for bench in benches:
        bench.runner.checkpointing = keep_last(DEPTH, DEPTH)
        assert [len(bench.step(number, 1)) for number in range(PLAIN_FIRST + 2)] == [1] * (PLAIN_FIRST + 2)
    assert benches[1].execution.captured == 1  # type: ignore[attr-defined]


class Failing(Tape):
    """A capture that breaks off behind the backward pass."""

    error: RuntimeError = RuntimeError("planned\nmore")

    def __exit__(self, *state: Any) -> None:
        super().__exit__(*state)
        raise self.error


@pytest.mark.parametrize("error", [RuntimeError("planned"), torch.OutOfMemoryError("planned")])
def test_a_step_that_cannot_be_captured_is_carried_out_plainly_with_the_gradients_before_it(
    taped: None, error: RuntimeError, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Failing)
    monkeypatch.setattr(Failing, "error", error)
    plain, optional = Bench(PlainExecution), Bench(lambda run, masters: GraphExecution(run, masters, required=False))
    for number in range(4):
        expected, given = plain.step(number, 2), optional.step(number, 2)
        assert all(torch.equal(a, b) for a, b in zip(given, expected, strict=True)), f"step {number}"
    required = Bench(GraphExecution)
    kind = torch.OutOfMemoryError if isinstance(error, torch.OutOfMemoryError) else EnvironmentProblem
    with pytest.raises(kind, match="planned"):
        required.step(0, PLAIN_FIRST + 1)


def test_a_full_device_is_known_behind_the_error_of_ending_the_capture(taped: None, monkeypatch: pytest.MonkeyPatch) -> None:
    full = torch.OutOfMemoryError("planned")
    later = RuntimeError("the capture was invalidated")
    later.__context__ = full
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Failing)
    monkeypatch.setattr(Failing, "error", later)
    with pytest.raises(torch.OutOfMemoryError, match="planned"):
        Bench(GraphExecution).step(0, PLAIN_FIRST + 1)


def test_results_hold_no_graph() -> None:
    """Kept until the next step's arrive, they would keep what that step has no memory for."""
    bench = Bench(PlainExecution)
    (result,) = bench.execution([item(0, 9)], 0, 1.0)
    assert isinstance(result, StepResult) and result.entered is None
    assert not result.loss.requires_grad and not any(term.values.requires_grad for term in result.terms)


def test_a_step_that_does_not_fit_beside_graphs_makes_them_go(taped: None) -> None:
    def make(run: TrainingModel, masters: MasterWeights) -> Execution:
        inner = GraphExecution(run, masters)
        return ActivationBudget(inner, run.blocks, budget=10_000, block=5000, largest=lambda batch: False, peak=lambda: 0)

    plain, bench = Bench(PlainExecution), Bench(make)
    graphs = bench.execution.inner  # type: ignore[attr-defined]
    for number in range(PLAIN_FIRST + 1):
        assert all(torch.equal(a, b) for a, b in zip(bench.step(number, 1), plain.step(number, 1), strict=True))
    assert graphs.captured == 1 and bench.execution.release() and not bench.execution.release()
    for number in range(PLAIN_FIRST + 1):
        assert all(torch.equal(a, b) for a, b in zip(bench.step(number, 1), plain.step(number, 1), strict=True))
    assert graphs.captured == 1
    bench.runner.checkpointing = plain.runner.checkpointing = keep_last(DEPTH, 0)
    call, calls = graphs.plain, [0]

    def full_once(*given: Any) -> list[StepResult]:
        calls[0] += 1
        if calls[0] == 1:
            raise torch.OutOfMemoryError("planned")
        return call(*given)  # type: ignore[no-any-return]

    graphs.plain = full_once
    larger = item(20, 9)
    (result,) = bench.execution([larger, larger], 9, 0.5)[:1]
    assert graphs.captured == 0 and calls == [2] and result.loss.isfinite()


def test_a_plain_step_that_does_not_fit_beside_graphs_is_carried_out_without_them(taped: None, caplog: pytest.LogCaptureFixture) -> None:
    """Also where nobody watches a budget. Half of an optimizer step cannot be repeated."""
    plain, bench = Bench(PlainExecution), Bench(GraphExecution)
    graphs = bench.execution
    assert isinstance(graphs, GraphExecution)
    for number in range(PLAIN_FIRST + 1):
        assert all(torch.equal(a, b) for a, b in zip(bench.step(number, 1), plain.step(number, 1), strict=True))
    assert graphs.captured == 1
    full = full_next(bench.family)
    (expected,), (found,) = (one.execution([item(20, 9), item(21, 9)], 9, 0.5)[:1] for one in (plain, bench))
    assert full == [True] and torch.equal(found.loss, expected.loss) and graphs.captured == 0
    assert [summed(master) for master in bench.masters.optimized()] == [summed(master) for master in plain.masters.optimized()]
    assert caplog.text.count("carried out plainly") == 1
    full_next(bench.family)
    with pytest.raises(torch.OutOfMemoryError, match="planned"):
        bench.execution([item(22, 9)], 9, 0.5)


def summed(master: Tensor) -> float | None:
    return None if master.grad is None else float(master.grad.double().sum())


def full_next(family: Mixing) -> list[bool]:
    """Lets the family's next end of a forward pass meet a full device; filled when it does."""
    leave, met = Mixing.exit, list[bool]()

    def exit(model: Any, state: Any) -> Any:
        if not met:
            met.append(True)
            raise torch.OutOfMemoryError("planned")
        return leave(family, model, state)

    family.exit = exit  # type: ignore[method-assign]
    return met


@pytest.mark.parametrize("ended", [False, True])
def test_a_capture_that_cannot_be_ended_is_ended_for_the_allocator(ended: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else memory that it holds is never given back, and no other that is cached, either."""
    told: list[str] = []

    @contextmanager
    def graph(made: object, **keys: object) -> Iterator[None]:
        yield
        raise RuntimeError("the capture was invalidated")

    def end(device: int, pool: object) -> None:
        if ended:
            raise RuntimeError("not currently recording to mempool_id")
        told.append("end")

    for name, stand_in in {
        "graph": graph, "stream": nullcontext, "current_stream": lambda: None, "synchronize": lambda: None, "current_device": lambda: 0,
    }.items():  # fmt: skip
        monkeypatch.setattr(torch.cuda, name, stand_in)
    monkeypatch.setattr(torch._C, "_cuda_endAllocateToPool", end, raising=False)
    monkeypatch.setattr(torch._C, "_cuda_releasePool", lambda device, pool: told.append("release"), raising=False)
    with pytest.raises(RuntimeError, match="invalidated"), execute.recording(object(), (0, 1)):  # type: ignore[arg-type]
        pass
    assert told == ([] if ended else ["end", "release"])
