"""The losses of ReflexFlow, for samples that were rolled out (Huang et al. 2025, arXiv:2512.04904; later 2606.28226).

Two things are added to scheduled sampling. Anti-drift rectification: the predicted velocity at the point that the model reached shall
point to the clip, whatever its length. Frequency compensation: the squared error counts more where the rollout went off further, since
what a model lacks there, low frequencies at high noise above all, is what its own drift consists of.

Per stream, with x^ the point reached, x the one that was drawn, v* = (x^ - x0) / sigma, and all sums over the tokens that count:

    beta2 · mean( (1 + alpha · |x^ - x| / mean|x^ - x|) · (v - v*)^2 )  +  beta1 · | v / |v| - v* / |v*| |^2

Norms are of a sample's whole stream, so the second factor is 2 - 2 cos and lies in [0, 4]. The paper takes the drift of predicted
velocities; that of the points costs no further forward pass. Samples that were not rolled out have the plain loss.

Dimensions: B samples, S tokens of one stream, C latent channels.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from tuner.builtins.losses import FlowMatchingLoss
from tuner.config.rollout_settings import RolloutSettings
from tuner.interfaces.family import Noise, Prediction, StreamBatch, StreamNoise
from tuner.interfaces.losses import LossTerm, LossValue, StepState, token_mask


class CompensatedLoss(FlowMatchingLoss):
    """The flow-matching loss, weighted by how far the rollout went off."""

    def __init__(self, stream: str, weight: float, alpha: float, beta: float) -> None:
        super().__init__(stream, weight)
        self.alpha = alpha
        self.beta = beta

    def __call__(self, state: StepState) -> LossValue:
        stream, draw = state.batch.streams.get(self.name), state.noise.streams.get(self.name)
        if stream is None or draw is None or draw.drift is None:
            return super().__call__(state)
        # Both sides times the root of the weight: the squared error then has the weight itself.
        root = drift_weights(stream, draw.drift, self.alpha, self.beta).sqrt()
        predicted = {**state.prediction.streams, self.name: state.prediction.streams[self.name].float() * root}
        noise = {**state.noise.streams, self.name: replace(draw, target=draw.target * root)}
        return super().__call__(replace(state, prediction=Prediction(predicted), noise=Noise(noise)))


class DirectionLoss(LossTerm):
    """| v / |v| - v* / |v*| |^2 of the samples that were rolled out, (B,) float32 in [0, 4]."""

    def __init__(self, stream: str, weight: float) -> None:
        self.name = f"{stream}_direction"
        self.stream = stream
        self.weight = weight

    def __call__(self, state: StepState) -> LossValue:
        stream, draw = state.batch.streams.get(self.stream), state.noise.streams.get(self.stream)
        some = next(iter(state.prediction.streams.values()))
        if stream is None or draw is None or draw.drift is None:
            nothing = torch.zeros(len(some), device=some.device)
            return LossValue(self.name, nothing, counted=nothing > 0, weight=self.weight)
        counts = (token_mask(stream) > 0)[..., None]
        found, wanted = (
            _unit(torch.where(counts, side.float(), 0.0)) for side in (state.prediction.streams[self.stream], draw.target)
        )
        values = (found - wanted).square().sum(dim=(1, 2))
        return LossValue(self.name, values, counted=_was_rolled(draw) & counts.any(dim=1)[:, 0], weight=self.weight)


def stream_losses(streams: Sequence[str], weights: Mapping[str, float], settings: RolloutSettings) -> list[LossTerm]:
    """The terms of each stream, in place of its flow-matching loss."""
    alpha, beta = settings.scheduled_sampling_reflexflow_alpha, settings.scheduled_sampling_reflexflow_beta2
    plain: list[LossTerm] = [CompensatedLoss(stream, weights.get(stream, 1.0), alpha, beta) for stream in streams]
    direction = settings.scheduled_sampling_reflexflow_beta1
    return plain + [DirectionLoss(stream, direction * weights.get(stream, 1.0)) for stream in streams]


def drift_weights(stream: StreamBatch, drift: Tensor, alpha: float, beta: float) -> Tensor:
    """(B, S, C): beta · (1 + alpha · |drift| / its mean over the tokens that count); 1 for samples without a drift."""
    counts = (token_mask(stream) > 0)[..., None]
    size = torch.where(counts, drift.abs(), 0.0)
    mean = size.sum(dim=(1, 2), keepdim=True) / (counts.sum(dim=(1, 2), keepdim=True) * drift.shape[2]).clamp(min=1)
    rolled = mean > 0
    return torch.where(rolled, beta * (1.0 + alpha * size / torch.where(rolled, mean, 1.0)), 1.0)


def _was_rolled(draw: StreamNoise) -> Tensor:
    """(B,) bool."""
    assert draw.drift is not None
    return draw.drift.abs().amax(dim=(1, 2)) > 0


def _unit(values: Tensor) -> Tensor:
    """(B, S, C) of length 1 per sample; 0 stays 0."""
    lengths = values.square().sum(dim=(1, 2), keepdim=True).clamp(min=1e-12).sqrt()
    return values / lengths
