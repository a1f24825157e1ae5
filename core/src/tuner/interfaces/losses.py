"""Loss terms and regularizers: what is minimised, and the techniques that attach to the seam.

Dimensions: B samples, S tokens, D channels.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor, nn

from tuner.interfaces.blocks import BlockSet, BlockState
from tuner.interfaces.encoders import LatentEncoder
from tuner.interfaces.family import Batch, Noise, Prediction

if TYPE_CHECKING:
    from tuner.interfaces.family import BuildContext


@dataclass(frozen=True)
class TapValue:
    """A stream's tokens after a block, with the graph: gradients flow back into the block."""

    hidden: Tensor
    """(B, S, D), or (B, K, D) where tokens were selected."""
    grid: tuple[int, int, int]
    """Of the first F·H·W positions; tokens at positions behind them lie on no place of it (`TokenStream.extra_tokens`)."""
    token_ids: Tensor | None
    """(B, K) positions in the full sequence; None: all, in order."""


@dataclass(frozen=True)
class StepState:
    """What a loss term sees of one forward pass."""

    batch: Batch
    noise: Noise
    prediction: Prediction
    taps: Mapping[str, TapValue] = field(default_factory=dict)
    step: int = 0


@dataclass(frozen=True)
class LossValue:
    """One term, per sample and unreduced: contributes weight · mean over counted samples."""

    name: str
    values: Tensor
    """(B,) float32."""
    counted: Tensor | None = None
    """(B,) bool; None: all. No sample counted: the term is 0, never NaN."""
    weight: float | Tensor = 1.0

    def reduced(self) -> Tensor:
        """weight · mean over counted samples; shape ()."""
        if self.counted is None:
            return self.values.mean() * self.weight
        counted = self.counted.to(self.values.dtype)
        return (self.values * counted).sum() / counted.sum().clamp(min=1) * self.weight


class LossTerm(ABC):
    """A function of a forward pass."""

    name: str

    @abstractmethod
    def __call__(self, state: StepState) -> LossValue:
        """The term for this batch. No host synchronisation."""


@dataclass(frozen=True)
class Transform:
    """Changes the state before or after a block, outside the checkpointed region; `apply` must be differentiable."""

    block: int
    when: Literal["before", "after"]
    apply: Callable[[BlockState], BlockState]


@dataclass(frozen=True)
class Tap:
    """Hands out one stream's tokens after a block, as `StepState.taps[name]`."""

    name: str
    block: int
    stream: str


class Regularizer(ABC):
    """A training technique: one object, asked once what it needs and then called through plain methods."""

    name: str

    @abstractmethod
    def attach(self, blocks: BlockSet, context: BuildContext) -> None:
        """Called once, after adapters and memory strategy. Resolves block indices; raises `ConfigError` that names the key."""

    def encoders(self) -> Sequence[LatentEncoder]:
        """Encoders whose records it wants cached with the latents (a teacher's features)."""
        return ()

    def transforms(self) -> Sequence[Transform]:
        """Fixed for the whole run."""
        return ()

    def taps(self) -> Sequence[Tap]:
        """Fixed for the whole run."""
        return ()

    def loss_terms(self) -> Sequence[LossTerm]:
        """Added to the family's."""
        return ()

    def trainable(self) -> nn.Module | None:
        """A module trained along and saved beside the run, never inside the adapter file."""
        return None

    def begin_step(self, step: int, batch: Batch, noise: Noise, generator: torch.Generator) -> None:
        """Before the forward pass: the place for random draws."""

    def after_step(self, step: int) -> None:
        """After the optimizer step."""

    def state_dict(self) -> Mapping[str, Tensor]:
        """What resume needs beside `trainable`."""
        return {}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Inverse of `state_dict`."""

    def detach(self) -> None:
        """Leaves the model as it was."""
