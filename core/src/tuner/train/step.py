"""One training step, from a batch to its losses: the page to read first. Plugins are plain objects here, built once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from tuner.errors import PluginError
from tuner.interfaces.blocks import BlockState
from tuner.interfaces.family import Batch, ModelFamily, Noise
from tuner.interfaces.losses import LossTerm, LossValue, Regularizer, StepState, TapValue
from tuner.model.runner import BlockRunner


@dataclass(frozen=True)
class TrainingModel:
    """Everything a forward pass touches."""

    family: ModelFamily
    model: nn.Module
    blocks: BlockRunner
    loss_terms: Sequence[LossTerm]
    regularizers: Sequence[Regularizer] = ()


@dataclass(frozen=True)
class StepResult:
    """`loss`: shape (), with the graph. `terms`: per sample and unreduced."""

    loss: Tensor
    terms: tuple[LossValue, ...]
    """As the terms gave them; the loss is of what the regularizers made of them."""
    entered: BlockState | None = None
    """What went into the first block."""


@dataclass(frozen=True)
class Item:
    """One prepared batch with its draws."""

    batch: Batch
    noise: Noise


def train_step(run: TrainingModel, batch: Batch, noise: Noise, step: int = 0) -> StepResult:
    """Forward pass and losses; the caller calls `loss.backward()`."""
    return train_together(run, [Item(batch, noise)], step)[0]


def train_together(run: TrainingModel, items: Sequence[Item], step: int = 0) -> list[StepResult]:
    """The same for several batches that each block takes one after the other while its weights are there.

    The caller calls `backward` on the sum of the losses.
    """
    entered = [run.family.enter(run.model, item.batch, item.noise) for item in items]
    passed = run.blocks.run_all(entered)
    return [_losses(run, item, start, *end, step) for item, start, end in zip(items, entered, passed, strict=True)]


def _losses(
    run: TrainingModel, item: Item, entered: BlockState, after: BlockState, taps: Mapping[str, TapValue], step: int
) -> StepResult:
    prediction = run.family.exit(run.model, after)
    seen = StepState(item.batch, item.noise, prediction, taps, step)
    samples = len(next(iter(prediction.streams.values())))
    terms = tuple(_checked(term.name, term(seen), samples) for term in run.loss_terms)
    weighed: Sequence[LossValue] = terms
    for regularizer in run.regularizers:
        weighed = regularizer.weigh(weighed, seen)
    return StepResult(torch.stack([value.reduced() for value in weighed]).sum(), terms, entered)


def _checked(name: str, value: LossValue, samples: int) -> LossValue:
    """What a loss term gave. Raises `PluginError` for something that it may not give; looks at no number."""
    if not isinstance(value, LossValue):
        raise PluginError("must give a LossValue", where=f"loss term {name}", value=type(value).__name__)
    for tensor in (value.values, *value.measured.values()):
        if tuple(tensor.shape) != (samples,) or tensor.dtype != torch.float32:
            found = f"{tuple(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')}"
            raise PluginError(f"must give a number for each sample, ({samples},) float32", where=f"loss term {name}", value=found)
    if value.counted is not None and (tuple(value.counted.shape) != (samples,) or value.counted.dtype != torch.bool):
        raise PluginError(f"`counted` must be ({samples},) bool", where=f"loss term {name}", value=tuple(value.counted.shape))
    return value
