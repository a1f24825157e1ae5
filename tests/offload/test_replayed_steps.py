"""Replayed steps with streamed weights, between passes that leave the slots elsewhere. On the processor: a tape stands for the graph."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from core.mixing import Mixing, item
from core.taped import Tape, tape
from tuner.builtins.losses import FlowMatchingLoss
from tuner.interfaces.losses import LossValue, StepState
from tuner.interfaces.memory import MemorySession
from tuner.model.runner import BlockRunner, Checkpointing
from tuner.testing.blocks import MixingModel, call_mixing_block
from tuner.train.execute import GraphExecution, PlainExecution
from tuner.train.masters import MasterWeights
from tuner.train.step import TrainingModel
from tuner_offload.leaf import LeafSession
from tuner_offload.streamed import HostStore, StreamedBlocks
from tuner_offload.transfer import HostLink

DEPTH = 6
CPU = torch.device("cpu")


class TapedLink(HostLink):
    """Knows when its copies are recorded."""

    drained_while_recording = 0

    @property
    def capturing(self) -> bool:
        return Tape.recording

    def drain(self) -> None:
        super().drain()
        self.drained_while_recording += Tape.recording


def ring() -> MemorySession:
    link = TapedLink(CPU)
    return StreamedBlocks(tuple((index,) for index in range(1, DEPTH)), 2, link, HostStore(link, "key"))


def leaves() -> MemorySession:
    return LeafSession(TapedLink(CPU), "key", stream=True, choose=lambda _, found: [c for c in found if c.name != "to_q"], smallest=0)


class Bench:
    """One layer of each block is trained, the others may be streamed."""

    def __init__(self, kind: type[PlainExecution] | type[GraphExecution], session: MemorySession | None = None) -> None:
        torch.manual_seed(0)
        self.net, self.family = MixingModel(DEPTH), Mixing()
        for name, parameter in self.net.named_parameters():
            parameter.requires_grad_("to_q" in name and "blocks.0" not in name)
        blocks = self.net.block_set()
        if session is not None:
            session.attach(blocks)
        trained = {name: parameter for name, parameter in self.net.named_parameters() if parameter.requires_grad}
        self.runner = BlockRunner(blocks, self.call, checkpointing=Checkpointing.every(DEPTH, 3), session=session)
        self.masters = MasterWeights(trained, low_precision=False)
        self.broken = False
        self.execution = kind(TrainingModel(self.family, self.net, self.runner, [FlowMatchingLoss("video")]), self.masters)  # type: ignore[arg-type]

    def call(self, block: torch.nn.Module, state: object) -> object:
        if self.broken and block is self.runner.blocks.blocks[3]:
            raise torch.OutOfMemoryError("planned")
        return call_mixing_block(block, state)  # type: ignore[arg-type]

    def step(self, number: int) -> list[Tensor]:
        (result,) = self.execution([item(number, 9)], number, 1.0)
        found = [result.loss.clone()]
        for parameter in self.masters.optimized():
            assert parameter.grad is not None
            found.append(parameter.grad.clone())
            with torch.no_grad():
                parameter -= 0.1 * parameter.grad
            parameter.grad = None
        self.masters.publish()
        return found

    @torch.no_grad()
    def observe(self, number: int) -> Tensor:
        given = item(number, 9)
        return self.runner.observe(self.family.enter(self.net, given.batch, given.noise))[0].streams["video"].hidden


def observed(bench: Bench) -> None:
    bench.observe(70)


def broken_off(bench: Bench) -> None:
    """As validation does where a sample fails."""
    bench.broken = True
    with pytest.raises(torch.OutOfMemoryError):
        bench.observe(70)
    bench.broken = False
    bench.runner.session.begin_step(DEPTH)
    bench.runner.session.end_step()


def saved(bench: Bench) -> None:
    bench.runner.session.materialize()


@pytest.mark.parametrize("between", [observed, broken_off, saved])
@pytest.mark.parametrize("session", [ring, leaves])
def test_replays_are_right_whatever_ran_between(
    session: Callable[[], MemorySession], between: Callable[[Bench], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    tape(monkeypatch)
    plain, replayed = Bench(PlainExecution), Bench(GraphExecution, session())
    for number in range(10):
        expected, given = plain.step(number), replayed.step(number)
        assert all(torch.equal(a, b) for a, b in zip(given, expected, strict=True)), f"step {number}"
        if number in (2, 5, 7):
            between(replayed)
    assert isinstance(replayed.execution, GraphExecution) and replayed.execution.captured == 1
    assert torch.equal(replayed.observe(80), plain.observe(80))


@pytest.mark.parametrize("session", [ring, leaves])
def test_a_pass_from_which_nothing_is_learned_ends_like_any_other(
    session: Callable[[], MemorySession], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without the stream that has a loss there is no walk back; the weights must still be where a replay looks for them."""
    tape(monkeypatch)
    plain, replayed = Bench(PlainExecution), Bench(GraphExecution, session())
    learning, execution = replayed.execution.training, replayed.execution
    assert isinstance(execution, GraphExecution)
    for number in range(14):
        if number % 2:
            expected, given = plain.step(number), replayed.step(number)
            assert all(torch.equal(a, b) for a, b in zip(given, expected, strict=True)), f"step {number}"
            continue
        execution.training = execution.plain.training = replace(learning, loss_terms=[FlowMatchingLoss("audio")])
        (result,) = execution([item(number, 9)], number, 0.25)  # another share: a graph of its own
        execution.training = execution.plain.training = learning
        assert not float(result.loss) and not replayed.runner.under_way
    assert execution.captured == 2
    assert torch.equal(replayed.observe(80), plain.observe(80))


def test_an_error_behind_the_blocks_ends_the_pass_before_the_capture_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else the copies' stream would be away, and the capture could not be ended."""
    tape(monkeypatch)
    plain, replayed = Bench(PlainExecution), Bench(GraphExecution, ring())
    execution = replayed.execution
    assert isinstance(execution, GraphExecution)
    execution._required = False

    class FailingTerm(FlowMatchingLoss):
        def __call__(self, state: StepState) -> LossValue:
            if Tape.recording:
                raise RuntimeError("planned")
            return super().__call__(state)

    execution.training = execution.plain.training = replace(execution.training, loss_terms=[FailingTerm("video")])
    for number in range(6):
        expected, given = plain.step(number), replayed.step(number)
        assert all(torch.equal(a, b) for a, b in zip(given, expected, strict=True)), f"step {number}"
    assert execution.captured == 0 and replayed.runner.session.link.drained_while_recording == 1  # type: ignore[attr-defined]
