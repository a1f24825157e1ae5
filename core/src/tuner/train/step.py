"""One training step, from a batch to its losses: the page to read first. Plugins are plain objects here, built once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from tuner.interfaces.blocks import BlockState
from tuner.interfaces.family import Batch, ModelFamily, Noise
from tuner.interfaces.losses import LossTerm, LossValue, Regularizer, StepState
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


def train_step(run: TrainingModel, batch: Batch, noise: Noise, step: int = 0) -> StepResult:
    """Forward pass and losses; the caller calls `loss.backward()`."""
    entered = run.family.enter(run.model, batch, noise)
    state = run.blocks.run(entered)
    prediction = run.family.exit(run.model, state)
    seen = StepState(batch, noise, prediction, run.blocks.tapped, step)
    terms = tuple(term(seen) for term in run.loss_terms)
    weighed: Sequence[LossValue] = terms
    for regularizer in run.regularizers:
        weighed = regularizer.weigh(weighed, seen)
    return StepResult(torch.stack([value.reduced() for value in weighed]).sum(), terms, entered)
