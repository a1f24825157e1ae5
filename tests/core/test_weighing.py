"""What regularizers make of the loss terms, and when a captured step may be replayed for them."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, cast

import pytest
import torch
from torch import Tensor, nn

from tuner.interfaces.blocks import BlockSet, BlockState, TokenStream
from tuner.interfaces.family import Batch, BuildContext, ModelFamily, Noise, Prediction, Sample, StreamBatch, StreamNoise
from tuner.interfaces.losses import ForwardPasses, LossTerm, LossValue, Regularizer, StepState
from tuner.interfaces.memory import MemorySession
from tuner.model.runner import BlockRunner
from tuner.train.execute import PLAIN_FIRST, GraphExecution, reasons_against_graphs
from tuner.train.masters import MasterWeights
from tuner.train.step import Item, TrainingModel, train_step

CUDA = torch.device("cuda")


class Slope(nn.Module):
    """v = weight · x."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(2.0))
        self.block = nn.Identity()


class Line:
    """A family over `Slope`."""

    def enter(self, model: Slope, batch: Batch, noise: Noise) -> BlockState:
        return BlockState({"video": TokenStream(model.weight * noise.streams["video"].noisy)})

    def call_block(self, block: nn.Module, state: BlockState) -> BlockState:
        return state

    def exit(self, model: Slope, state: BlockState) -> Prediction:
        return Prediction({"video": state.streams["video"].hidden})


class Square(LossTerm):
    """v² per sample."""

    name = "video"

    def __call__(self, state: StepState) -> LossValue:
        return LossValue(self.name, state.prediction.streams["video"].square().mean((1, 2)))


class Neutral(Regularizer):
    """Does nothing."""

    name = "neutral"
    capturable: ClassVar[bool] = True

    def attach(self, blocks: BlockSet, context: BuildContext) -> None:
        pass


@dataclass
class Times(Neutral):
    """Multiplies every term's samples by a factor per sample."""

    factors: Tensor

    def weigh(self, values: Sequence[LossValue], state: StepState) -> Sequence[LossValue]:
        return [replace(value, values=value.values * self.factors) for value in values]


class OnlyLarge(Neutral):
    """Counts samples above 10, so it matters who comes first."""

    def weigh(self, values: Sequence[LossValue], state: StepState) -> Sequence[LossValue]:
        return [replace(value, counted=value.values.detach() > 10) for value in values]


def item(first: float = 1.0, tokens: int = 1) -> Item:
    x = torch.tensor([first, 2.0])[:, None, None].expand(-1, tokens, 1).contiguous()
    batch = Batch((Sample("k", "d", 0, 0, 25.0, 9, 32, 32, {}),) * 2, {"video": StreamBatch(x, (1, 1, tokens))}, {}, (25.0,) * 2)
    return Item(batch, Noise({"video": StreamNoise(torch.full((2,), 0.5), x, x, x)}))


def training(*regularizers: Regularizer) -> tuple[TrainingModel, Slope]:
    model, family = Slope(), Line()
    runner = BlockRunner(BlockSet.of(model, [model.block]), family.call_block)
    return TrainingModel(cast(ModelFamily, family), model, runner, [Square()], regularizers), model


@pytest.mark.parametrize(
    ("regularizers", "expected"),
    [
        ((), (4 + 16) / 2),
        ((Neutral(),), (4 + 16) / 2),
        ((Times(torch.tensor([1.0, 0.5])),), (4 + 8) / 2),
        ((Times(torch.tensor([3.0, 0.5])), OnlyLarge()), 12),
        ((OnlyLarge(), Times(torch.tensor([3.0, 0.5]))), 8),
    ],
)
def test_the_loss_is_of_what_each_makes_of_the_one_before(regularizers: tuple[Regularizer, ...], expected: float) -> None:
    run, model = training(*regularizers)
    result = train_step(run, item().batch, item().noise)
    assert result.loss.item() == expected
    assert result.terms[0].values.tolist() == [4.0, 16.0] and result.terms[0].counted is None  # what is logged
    result.loss.backward()
    torch.testing.assert_close(model.weight.grad, torch.tensor(float(expected)))  # d(w² x²)/dw = 2 w x² = w² x² at w = 2


def test_terms_may_be_added_and_taken_away() -> None:
    class Swap(Neutral):
        def weigh(self, values: Sequence[LossValue], state: StepState) -> Sequence[LossValue]:
            return [LossValue("new", torch.ones(2), weight=3.0), LossValue("other", torch.ones(2))]

    run, _ = training(Swap())
    result = train_step(run, item().batch, item().noise)
    assert result.loss.item() == 4 and [term.name for term in result.terms] == ["video"]


# --- replayed steps ----------------------------------------------------------------------------------------------
class Keyed(Neutral):
    """Its work depends on a value that a test sets."""

    key: Hashable = None

    def graph_key(self) -> Hashable:
        return self.key


class Counting(GraphExecution):
    """Writes down what would be captured, which needs a GPU; those steps run plainly."""

    attempts: ClassVar[list[Hashable]] = []

    def _capture(self, items: Sequence[Item], step: int, share: float) -> None:
        self.attempts.append((items[0].noise.streams["video"].noisy.shape[1], share, *(r.graph_key() for r in self.training.regularizers)))


def test_each_key_shape_and_share_has_a_graph_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Counting, "attempts", [])
    regularizer = Keyed()
    run, model = training(Neutral(), regularizer)
    execution = Counting(run, MasterWeights({"weight": model.weight}, low_precision=False))
    rounds = [("a", 1, 1.0), ("b", 1, 1.0), ("a", 3, 1.0), ("a", 1, 0.5)]
    for step in range(PLAIN_FIRST + 1):
        assert not Counting.attempts
        for key, tokens, share in rounds:
            regularizer.key = key
            (result,) = execution([item(float(step), tokens)], step, share)
            assert result.loss.item() == (4 * step**2 + 16) / 2
    assert Counting.attempts == [(tokens, share, None, key) for key, tokens, share in rounds]


class Passing(Neutral):
    """Asks for forward passes."""

    name = "passing"

    def connect(self, passes: ForwardPasses) -> None:
        pass


def test_forward_passes_speak_against_graphs_only_where_weights_come_and_go() -> None:
    run, _ = training()
    assert reasons_against_graphs(run.blocks, CUDA, (Passing(), Neutral()), 0) == []
    run.blocks.session = type("Streaming", (MemorySession,), {})()
    assert reasons_against_graphs(run.blocks, CUDA, (Neutral(),), 0) == []
    (reason,) = reasons_against_graphs(run.blocks, CUDA, (Passing(), Neutral()), 0)
    assert "the forward passes of passing leave other weights on the device" in reason


def test_who_does_not_say_that_it_is_capturable_is_not_replayed() -> None:
    class Unsure(Neutral):
        name = "unsure"
        capturable = Regularizer.capturable

    run, _ = training()
    assert reasons_against_graphs(run.blocks, CUDA, (Unsure(), Neutral()), 0) == ["unsure may do something else in every step"]
