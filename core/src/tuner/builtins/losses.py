"""The flow-matching loss of one stream, and its record over noise levels. Only `SigmaBands.flush` waits for the device.

Dimensions: B samples, S tokens of one stream, C latent channels, N bands of sigma, T loss terms.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from itertools import chain, pairwise

import torch
from torch import Tensor

from tuner.interfaces.family import Noise
from tuner.interfaces.losses import LossTerm, LossValue, StepState, token_mask


class FlowMatchingLoss(LossTerm):
    """Mean squared error of the velocity over the tokens that count, per sample, in float32.

    sum(mask · (v - (eps - x0))²) / sum(mask) over tokens and channels; flow matching with a straight path (Lipman et al. 2023,
    arXiv:2210.02747). A sample is counted if it has the stream and any token of it counts; a `clean` stream never. A batch without the
    stream gives zeros that are not counted.
    """

    def __init__(self, stream: str, weight: float = 1.0) -> None:
        self.name = stream
        self.weight = weight

    def __call__(self, state: StepState) -> LossValue:
        """Values (B,) float32, 0 where not counted."""
        stream = state.batch.streams.get(self.name)
        if stream is None:
            return self._absent(state)
        prediction = state.prediction.streams[self.name]
        mask = token_mask(stream)
        # Selecting before squaring: a value that is not finite in a token outside the loss must not reach the sum or the gradient.
        error = torch.where(mask[..., None] > 0, prediction.float() - state.noise.streams[self.name].target, 0.0)
        weights = mask.sum(dim=1)
        values = (error.square().mean(dim=2) * mask).sum(dim=1) / torch.where(weights > 0, weights, 1.0)
        return LossValue(self.name, values, counted=weights > 0, weight=self.weight)

    def _absent(self, state: StepState) -> LossValue:
        other = next(iter(state.prediction.streams.values()))
        values = torch.zeros(other.shape[0], device=other.device)
        return LossValue(self.name, values, counted=torch.zeros_like(values, dtype=torch.bool), weight=self.weight)


class SigmaBands:
    """Running means of the losses, in all and per band of sigma: what a low or high noise level costs is seen apart."""

    def __init__(self, bands: int = 4) -> None:
        self._edges = [index / bands for index in range(bands + 1)]
        self._totals: dict[str, Tensor] = {}
        """Name -> (2, N + 1) float64 on the device: sums of losses and counted samples; the last column is of values without a sigma."""

    def add(self, losses: Iterable[LossValue], noise: Noise) -> None:
        """Accumulates unweighted values on their device; a term named after a stream is split by that stream's sigma."""
        for loss in chain.from_iterable(_with_measured(loss) for loss in losses):
            stream = noise.streams.get(loss.name)
            share = self._membership(loss.values, None if stream is None else stream.sigma)
            values = loss.values.detach().double()
            if loss.counted is not None:
                share = share * loss.counted[:, None]
                values = torch.where(loss.counted, values, 0.0)
            # A product and a sum, not index_add: atomics would add in another order on each run.
            added = torch.stack(((share * values[:, None]).sum(dim=0), share.sum(dim=0)))
            known = self._totals.get(loss.name)
            self._totals[loss.name] = added if known is None else known + added

    def _membership(self, values: Tensor, sigma: Tensor | None) -> Tensor:
        """(B, N + 1) float64: 1 in the band that a sample belongs to."""
        bands = len(self._edges) - 1
        index = torch.full_like(values, bands).long() if sigma is None else (sigma * bands).long().clamp(0, bands - 1)
        return (index[:, None] == torch.arange(bands + 1, device=index.device)).double()

    def totals(self) -> Tensor:
        """(T, 2, N + 1) float64: what was added since the last `take`, in the order of the terms; ranks add theirs up."""
        return torch.stack(list(self._totals.values()))

    def replace(self, totals: Tensor) -> None:
        """Puts sums over ranks in the place of `totals()`."""
        self._totals = dict(zip(self._totals, totals.unbind(), strict=True))

    def take(self) -> dict[str, Tensor]:
        """Means since the last call as scalars on the device, by `loss/<name>` and `loss/<name>/sigma_0.25-0.50`.

        What was never counted is NaN, such as all bands of a term without a sigma: that it was not is known on the device only.
        """
        means: dict[str, Tensor] = {}
        for name, (sums, counts) in self._totals.items():
            mean, count = sums.sum() / counts.sum(), counts.sum()
            # What was counted and is no number is infinite here: NaN says that nothing was counted.
            means[f"loss/{name}"] = torch.where((count > 0) & mean.isnan(), math.inf, mean)
            for (low, high), mean in zip(pairwise(self._edges), (sums / counts).unbind()[:-1], strict=True):
                means[f"loss/{name}/sigma_{low:.2f}-{high:.2f}"] = mean
        self._totals.clear()
        return means

    def flush(self) -> dict[str, float]:
        """`take` as host numbers, in one transfer; what was never counted is left out."""
        means = self.take()
        if not means:
            return {}
        numbers = torch.stack(list(means.values())).tolist()
        return {name: number for name, number in zip(means, numbers, strict=True) if not math.isnan(number)}


def _with_measured(loss: LossValue) -> Iterable[LossValue]:
    """The term, and what is logged beside it as if it were one."""
    yield loss
    for name, values in loss.measured.items():
        yield LossValue(f"{loss.name}/{name}", values, loss.counted)
