"""Forward passes beside a step's own, for regularizers with a teacher: the base model alone, or other values of the trained weights."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor, nn

from tuner.interfaces.family import Batch, Noise
from tuner.interfaces.losses import ExtraPass, ForwardPasses, Tap
from tuner.model.adapters import without_adapters
from tuner.train.masters import MasterWeights
from tuner.train.step import TrainingModel


class ExtraPasses(ForwardPasses):
    """Runs them over the model that trains, blocks under their memory strategy."""

    def __init__(self, training: TrainingModel, masters: MasterWeights, trained: Mapping[str, nn.Parameter]) -> None:
        """`trained`: the model's own trained parameters, by the names that `masters` knows them by."""
        self._training = training
        self._masters = masters
        self._trained = dict(trained)

    def run(
        self, batch: Batch, noise: Noise, *, adapter: bool = True, weights: Mapping[str, Tensor] | None = None, taps: Sequence[Tap] = ()
    ) -> ExtraPass:
        run = self._training
        if run.blocks.under_way:
            raise ValueError("a step is under way: forward passes beside it belong into begin_step")
        with torch.no_grad(), ExitStack() as stack:
            stack.enter_context(evaluating(run.model))
            if not adapter:
                stack.enter_context(without_adapters(run.model))
            if weights:
                stack.enter_context(self._replaced(weights))
            state, found = run.blocks.observe(run.family.enter(run.model, batch, noise), taps)
            return ExtraPass(run.family.exit(run.model, state), found)

    def trained(self) -> Mapping[str, Tensor]:
        state = self._masters.state()
        return {name: state[name] for name in self._trained}

    @contextmanager
    def _replaced(self, weights: Mapping[str, Tensor]) -> Iterator[None]:
        if wrong := [n for n, w in weights.items() if n not in self._trained or w.shape != self._trained[n].shape]:
            raise ValueError(f"no trained weight has this name and shape: {wrong[0]} {tuple(weights[wrong[0]].shape)}")
        own = {name: self._trained[name].data for name in weights}
        try:
            for name, weight in weights.items():
                self._trained[name].data = weight.to(own[name].device, own[name].dtype)
            yield
        finally:
            for name, data in own.items():  # the very storage that it had: a captured step points there
                self._trained[name].data = data


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode inside: no dropout, in adapters neither."""
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)
