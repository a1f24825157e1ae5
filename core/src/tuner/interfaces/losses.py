"""Loss terms and regularizers: what is minimised, and the techniques that attach to the seam.

Dimensions: B samples, S tokens, D channels.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar, Literal

import torch
from torch import Tensor, nn

from tuner.errors import TunerError
from tuner.interfaces.blocks import BlockSet, BlockState
from tuner.interfaces.encoders import LatentEncoder
from tuner.interfaces.family import Batch, ClipShape, Noise, Prediction, StreamBatch

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
    measured: Mapping[str, Tensor] = field(default_factory=dict)
    """Name -> (B,) float32 without a graph: what is logged beside the term, as `loss/<term>/<name>`, over the counted samples.
    The same names for every batch: ranks add up their sums in one tensor."""

    def reduced(self) -> Tensor:
        """weight · mean over counted samples; shape ()."""
        if self.counted is None:
            return self.values.mean() * self.weight
        counted = self.counted.to(self.values.dtype)
        return torch.where(self.counted, self.values, 0.0).sum() / counted.sum().clamp(min=1) * self.weight


def token_mask(stream: StreamBatch) -> Tensor:
    """(B, S) float32 on the latents' device: the weight of each token in the stream's loss."""
    shape, device = stream.latents.shape[:2], stream.latents.device
    if stream.clean:
        return torch.zeros(shape, device=device)
    mask = torch.ones(shape, device=device) if stream.loss_mask is None else stream.loss_mask.float()
    if stream.conditioned is not None:
        mask = mask * ~stream.conditioned
    if stream.present is not None:
        mask = mask * stream.present[:, None]
    return mask


class LossTerm(ABC):
    """A function of a forward pass. What depends on the number of the step cannot be replayed, so with a plugin's terms no step is."""

    name: str
    """Of no stream, and no other term of the run."""

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


@dataclass(frozen=True)
class TrainingFacts:
    """What a regularizer can be checked against before anything is loaded."""

    blocks: int
    """Of the transformer."""
    trained_blocks: tuple[int, ...]
    """Those with weights that are trained, ascending."""
    streams: tuple[str, ...]
    """Those that are computed."""
    learned_streams: tuple[str, ...]
    """Those of them that have a loss."""
    shapes: tuple[ClipShape, ...]
    """The different shapes of the items that are trained on."""
    full_finetuning: bool
    datasets: tuple[str, ...] = ()
    """Ids of the datasets that are trained on."""


@dataclass(frozen=True)
class ExtraPass:
    """What a forward pass beside the step's own gives; without a graph."""

    prediction: Prediction
    taps: Mapping[str, TapValue]


class ForwardPasses(ABC):
    """Forward passes beside the step's own, for teachers: without gradients, transforms and dropout. The core implements it.

    Only from `Regularizer.begin_step`, where no pass is under way: streamed weights come and go in one order.
    """

    @abstractmethod
    def run(
        self, batch: Batch, noise: Noise, *, adapter: bool = True, weights: Mapping[str, Tensor] | None = None, taps: Sequence[Tap] = ()
    ) -> ExtraPass:
        """`adapter` False: the base model alone. `weights`: used in place of the trained ones of the same names, for this pass.

        Raises `ValueError` for `adapter` False where every weight is trained, for weights of other names or shapes, and between the walks
        forward and back of a step.
        """

    @abstractmethod
    def trained(self) -> Mapping[str, Tensor]:
        """The model's trained weights by name, in full precision: live, to be read only. Modules of regularizers are not among them."""


class Regularizer(ABC):
    """A training technique: one object, asked once what it needs and then called through plain methods."""

    name: str
    capturable: ClassVar[bool] = False
    """Whether a CUDA graph may replay what it does between `begin_step` and `after_step`: device work alone, reading per step only tensors
    of its own that `begin_step` writes in place, the same objects for batches of the same shapes and the same `graph_key`."""

    def check(self, facts: TrainingFacts) -> Sequence[TunerError]:
        """What speaks against it in this run, naming the keys. Called while planning; all problems are shown together."""
        return ()

    def describe(self, facts: TrainingFacts) -> str:
        """What it does in this run: one line of the plan, behind its name."""
        return ""

    @abstractmethod
    def attach(self, blocks: BlockSet, context: BuildContext) -> None:
        """Called once, after adapters and memory strategy. Resolves block indices; raises `ConfigError` that names the key."""

    def connect(self, passes: ForwardPasses) -> None:
        """Called once, when everything is built, before a resume restores it: for who needs forward passes beside the step's own, or the
        trained weights. Who implements this has its steps replayed as CUDA graphs only where all weights stay on the device."""

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

    def weigh(self, values: Sequence[LossValue], state: StepState) -> Sequence[LossValue]:
        """Changes what the terms contribute to the loss, such as samples' weights; all terms, those of plugins too. Not what is logged."""
        return values

    def trainable(self) -> nn.Module | None:
        """A module trained along and saved beside the run, never inside the adapter file."""
        return None

    def begin_step(self, step: int, batch: Batch, noise: Noise, generator: torch.Generator) -> None:
        """Before the forward pass of each batch: the place for random draws. `generator`: on the CPU, seeded for this batch."""

    def graph_key(self) -> Hashable:
        """What of the coming step's work depends on the host, after `begin_step`: one graph is captured for each value."""
        return None

    def after_step(self, step: int) -> None:
        """After the optimizer step."""

    def state_dict(self) -> Mapping[str, Tensor]:
        """What resume needs beside `trainable`."""
        return {}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Inverse of `state_dict`."""

    def detach(self) -> None:
        """Leaves the model as it was."""
