"""The loss of files that are never trained on, on a grid that is the same in every run: file x noise level x noise.

Special here: nothing depends on the run's seed, its batch size or the other files, so figures of two runs over the same files can be
compared. Levels lie at the middles of n equal parts of (0, 1), the same for all streams of a file; its noise is named by its bytes,
the stream and the level. Each file goes through the model alone, once for each level, without dropout, transforms and gradients.

Dimensions: B = 1 sample, S tokens of one stream, C latent channels.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from tuner.builtins.losses import FlowMatchingLoss
from tuner.data.items import Item
from tuner.data.randomness import generator
from tuner.data.records import RecordPlaces
from tuner.interfaces.encoders import Record
from tuner.interfaces.family import Batch, Noise, Sample, StreamBatch, StreamNoise
from tuner.interfaces.losses import StepState
from tuner.train.placement import to_device
from tuner.train.step import TrainingModel

SEED = 20240601
"""Of the noise, in every run."""


@dataclass(frozen=True)
class HeldOutLosses:
    """Means over files and levels, by stream; and over files alone, by stream and level."""

    mean: Mapping[str, float]
    by_level: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    """Stream -> "0.125" -> loss."""
    items: int = 0

    def finite(self) -> bool:
        """Whether all are numbers."""
        return all(math.isfinite(value) for value in self.mean.values())


def levels(count: int) -> list[float]:
    """(2k + 1) / 2n for k = 0 .. n - 1."""
    return [(2 * k + 1) / (2 * count) for k in range(count)]


@torch.no_grad()
def held_out_losses(
    run: TrainingModel,
    places: RecordPlaces,
    items: Sequence[Item],
    count: int,
    streams: Sequence[str],
    device: torch.device,
    stopped: Callable[[], bool] = lambda: False,
) -> HeldOutLosses | None:
    """Computes them on `count` levels; None where `stopped` said so between two files.

    `run.model` must be in evaluation mode. Raises `MissingRecord` for a file whose records are not in the cache.
    """
    terms = {name: FlowMatchingLoss(name) for name in run.family.learned_streams(streams)}
    rows: list[Tensor] = []
    for item in items:
        if stopped():
            return None
        batch = run.family.collate_fixed([held_out_sample(item, places.read(item, item.caption))], streams)
        noises = [fixed_noise(batch, item.content, place, sigma) for place, sigma in enumerate(levels(count))]
        batch = to_device(batch, device)
        rows += [_losses(run, terms, batch, to_device(noise, device)) for noise in noises]
    if not rows:
        return HeldOutLosses({})
    numbers = torch.stack(rows).cpu().view(len(items), count, len(terms), 2)
    return _averaged(numbers, list(terms), levels(count), len(items))


def _losses(run: TrainingModel, terms: Mapping[str, FlowMatchingLoss], batch: Batch, noise: Noise) -> Tensor:
    """(terms, 2) float64: the loss of the sample, and 1 where it is counted, else 0."""
    state, _ = run.blocks.observe(run.family.enter(run.model, batch, noise))
    seen = StepState(batch, noise, run.family.exit(run.model, state))
    values = [term(seen) for term in terms.values()]
    ones = torch.ones(1, dtype=torch.bool, device=values[0].values.device)
    counted = torch.stack([ones if value.counted is None else value.counted for value in values])[:, 0]
    losses = torch.stack([value.values for value in values])[:, 0].double()
    return torch.stack([torch.where(counted, losses, 0.0), counted.double()], dim=1)


def _averaged(numbers: Tensor, names: Sequence[str], sigmas: Sequence[float], items: int) -> HeldOutLosses:
    """`numbers`: (items, levels, terms, 2). A stream that no file has is left out."""
    sums = numbers.sum(dim=0)
    mean, by_level = {}, {}
    for index, name in enumerate(names):
        losses, counts = sums[:, index].unbind(dim=1)
        if counts.sum() > 0:
            mean[name] = float(losses.sum() / counts.sum())
            by_level[name] = {f"{sigma:.4g}": float(loss / n) for sigma, loss, n in zip(sigmas, losses, counts, strict=True)}
    return HeldOutLosses(mean, by_level, items)


def held_out_sample(item: Item, records: Mapping[str, Record]) -> Sample:
    """An item as a sample that was drawn first in the first epoch."""
    return Sample(
        key=item.key, dataset=item.dataset, draw=0, epoch=0, frame_rate=item.frame_rate, frames=item.bucket.frames,
        height=item.bucket.height, width=item.bucket.width, records=records, caption=item.caption, kind=item.kind, seconds=item.seconds,
        first_frame=item.first_frame,
    )  # fmt: skip


def fixed_noise(batch: Batch, content: str, place: int, sigma: float) -> Noise:
    """x_sigma = (1 - sigma) · x0 + sigma · eps for a batch of one, on the CPU; `content` and `place` (of the level) name eps."""
    draws = {name: generator(SEED, f"held out/{name}/{content}", place) for name in batch.streams}
    return Noise({name: _fixed(stream, draws[name], sigma) for name, stream in batch.streams.items()})


def _fixed(stream: StreamBatch, draws: torch.Generator, sigma: float) -> StreamNoise:
    x0 = stream.latents.float()
    if stream.clean:
        return StreamNoise(sigma=torch.zeros(len(x0)), noisy=x0, target=-x0, noise=torch.zeros_like(x0))
    eps = torch.randn(x0.shape, generator=draws)
    noisy = (1 - sigma) * x0 + sigma * eps
    if stream.conditioned is not None:
        noisy = torch.where(stream.conditioned[..., None], x0, noisy)
    return StreamNoise(sigma=torch.full((len(x0),), sigma), noisy=noisy, target=eps - x0, noise=eps)
