"""Samples of one dataset are trained towards what the base model predicts for them, and not towards their own velocity.

    loss = sum over streams of  sum(mask · (v_trained - v_base)²) / sum(mask)      over tokens and channels, v_base with the adapter off

The purpose is that of the class images of DreamBooth (Ruiz et al. 2022, arXiv:2208.12242): what belongs to the dataset's kind stays as the
base model has it, while the other datasets are learned. There the base model's outputs are samples made beforehand; here they are its
predictions at the very points that are trained. In the ordinary losses these samples do not count.

Dimensions: B samples, S tokens of one stream, C latent channels.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import replace
from difflib import get_close_matches
from typing import ClassVar

import torch
from torch import Tensor

from tuner.errors import ConfigError, TunerError
from tuner.interfaces.blocks import BlockSet
from tuner.interfaces.family import Batch, BuildContext, Noise, StreamBatch
from tuner.interfaces.losses import ForwardPasses, LossTerm, LossValue, Regularizer, StepState, TrainingFacts, token_mask
from tuner_prior_preservation.options import PriorPreservationOptions


class PriorPreservation(Regularizer):
    """Holds, for the batch at hand, which samples are kept and what the base model predicts."""

    name = "prior"
    capturable: ClassVar[bool] = True

    def __init__(self, options: PriorPreservationOptions, context: BuildContext) -> None:
        self.options = options
        self.kept: Tensor | None = None
        """(B,) bool: samples of the dataset; None: the batch has none."""
        self.targets: dict[str, Tensor] = {}
        """Stream -> (B, S, C): the base model's prediction."""
        self._passes: ForwardPasses | None = None
        self._buffers: dict[tuple[object, ...], Tensor] = {}
        """One tensor for each name and shape, which every batch is written into: a captured step reads it there."""

    def check(self, facts: TrainingFacts) -> Sequence[TunerError]:
        problems: list[TunerError] = []
        wanted = self.options.prior_dataset
        if facts.full_finetuning:
            problems.append(ConfigError(
                "full fine-tuning leaves no base model to compare with", where="prior_dataset, model_type", value=wanted,
                remedy="set model_type to lora, or leave prior_dataset empty",
            ))  # fmt: skip
        if wanted not in facts.datasets:
            near = get_close_matches(wanted, facts.datasets, 1)
            remedy = f"did you mean {near[0]}?" if near else f"there are: {', '.join(facts.datasets)}"
            problems.append(ConfigError("no dataset that is trained on has this id", where="prior_dataset", value=wanted, remedy=remedy))
        elif len(facts.datasets) == 1:
            problems.append(ConfigError(
                "it is the only dataset, so nothing else would be learned", where="prior_dataset", value=wanted,
                remedy="add a second entry to the dataset file",
            ))  # fmt: skip
        return problems

    def describe(self, facts: TrainingFacts) -> str:
        return f"{self.options.prior_dataset} follows the base model; one forward pass more for batches with it"

    def attach(self, blocks: BlockSet, context: BuildContext) -> None:
        """Nothing: the model stays as it is."""

    def connect(self, passes: ForwardPasses) -> None:
        self._passes = passes

    def loss_terms(self) -> Sequence[LossTerm]:
        return (PriorTerm(self),)

    def weigh(self, values: Sequence[LossValue], state: StepState) -> Sequence[LossValue]:
        """Takes the dataset's samples out of the losses that are named after streams."""
        if self.kept is None:
            return values
        others = ~self.kept
        return [
            replace(value, counted=others if value.counted is None else value.counted & others)
            if value.name in state.noise.streams
            else value
            for value in values
        ]

    def begin_step(self, step: int, batch: Batch, noise: Noise, generator: torch.Generator) -> None:
        """The base model's forward pass, where the batch has samples of the dataset."""
        self.kept, self.targets = None, {}
        kept = [sample.dataset == self.options.prior_dataset for sample in batch.samples]
        if self._passes is None or not any(kept):
            return
        found = self._passes.run(batch, noise, adapter=False).prediction.streams
        device = next(iter(found.values())).device
        self.targets = {name: self._written(name, prediction) for name, prediction in found.items()}
        self.kept = self._written("", torch.tensor(kept).to(device, non_blocking=True))

    def _written(self, name: str, value: Tensor) -> Tensor:
        key = (name, *value.shape, value.dtype)
        if key not in self._buffers:
            self._buffers[key] = torch.empty_like(value)
        return self._buffers[key].copy_(value)

    def graph_key(self) -> Hashable:
        return self.kept is not None

    def detach(self) -> None:
        self._passes, self.kept, self.targets, self._buffers = None, None, {}, {}


class PriorTerm(LossTerm):
    """The term above, for samples of the dataset. Streams that are given whole have none."""

    name = "prior"

    def __init__(self, owner: PriorPreservation) -> None:
        self.owner = owner

    def __call__(self, state: StepState) -> LossValue:
        weight, kept = self.owner.options.prior_weight, self.owner.kept
        if kept is None:
            other = next(iter(state.prediction.streams.values()))
            values = torch.zeros(other.shape[0], device=other.device)
            return LossValue(self.name, values, counted=values > 0, weight=weight)
        errors = [
            stream_error(state.batch.streams[name], state.prediction.streams[name], target)
            for name, target in self.owner.targets.items()
            if not state.batch.streams[name].clean
        ]
        return LossValue(self.name, torch.stack(errors).sum(dim=0), counted=kept, weight=weight)


def stream_error(stream: StreamBatch, prediction: Tensor, target: Tensor) -> Tensor:
    """(B,) float32: mean squared difference over the tokens that the ordinary loss counts; 0 where it counts none."""
    mask = token_mask(stream)
    error = torch.where(mask[..., None] > 0, prediction.float() - target.float(), 0.0)
    weights = mask.sum(dim=1)
    return (error.square().mean(dim=2) * mask).sum(dim=1) / torch.where(weights > 0, weights, 1.0)
