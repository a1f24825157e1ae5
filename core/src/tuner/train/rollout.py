"""Scheduled sampling: some samples are trained at points that the model itself reached, not at points on the straight path.

In training the model sees x_sigma = (1 - sigma) x0 + sigma eps, in sampling what its own steps led to: the errors of the steps before
are in it (exposure bias; Bengio et al. 2015, arXiv:1506.03099). So a sample starts k steps of a sampling schedule earlier, at
x_h = (1 - h) x0 + h eps with h > sigma, and takes those k Euler steps with the current weights, without gradients:

    x <- x + (s' - s) v(x, s)        from s = h down to s' = sigma.

Where it ends, x^, the velocity that leads to the clip in one go is v* = (x^ - x0) / sigma, since x^ - sigma v* = x0. With the noise
eps^ = x0 + v* the point is x^ = (1 - sigma) x0 + sigma eps^ and the target v* = eps^ - x0: all that holds for draws holds on.

The schedule is that of sampling without its terminal: t in equal steps of 1/N, s(t) = e^mu t / (1 + (e^mu - 1) t), with mu from the number
of tokens of the first stream that is learned; a rollout that would begin before t = 1 begins there. Streams move together, each from its
own noise level to its own, through the same k forward passes. Lengths are drawn per sample, by counter.

Dimensions: B samples, S tokens of one stream, C latent channels, K the longest rollout of the batch.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields, replace
from typing import Final, TypeVar

import torch
from torch import Tensor

from tuner.config.rollout_settings import RolloutSettings
from tuner.data.randomness import uniform
from tuner.interfaces.family import Batch, Noise, Sample, StreamBatch, StreamNoise, TokenShift
from tuner.train.passes import evaluating
from tuner.train.step import TrainingModel

NoiseTransform = Callable[[Batch, Noise, int], Noise]
"""(batch, its draws, optimizer step) -> the draws that are trained on. On the device; no gradients, no host synchronisation."""

LOWEST_SIGMA: Final = 0.05
"""Below it a stream keeps its draw: the target divides by sigma, so an error of the rollout would count more than twentyfold."""

T = TypeVar("T")


class Rollout:
    """Rolls samples of a batch out; a `NoiseTransform`."""

    def __init__(self, settings: RolloutSettings, run: TrainingModel, shift: TokenShift, seed: int) -> None:
        self.settings = settings
        self._run = run
        self._shift = shift
        self._seed = seed

    def __call__(self, batch: Batch, noise: Noise, step: int) -> Noise:
        share = self.share(step)
        lengths = [self.length(sample, share) for sample in batch.samples]
        rows = [row for row, length in enumerate(lengths) if length]
        if not rows or all(stream.clean for stream in batch.streams.values()):
            return noise
        chosen, draws = select(batch, rows), Noise({name: select_rows(part, rows) for name, part in noise.streams.items()})
        reached = self._walk(chosen, draws, [lengths[row] for row in rows])
        return Noise({
            name: _scattered(part, _reached(chosen.streams[name], draws.streams[name], reached.get(name)), rows)
            for name, part in noise.streams.items()
        })  # fmt: skip

    def share(self, step: int) -> float:
        """The probability that a sample is rolled out in optimizer step `step`."""
        s = self.settings
        if step < s.scheduled_sampling_start_step:
            return 0.0
        if not s.scheduled_sampling_ramp_steps:
            return s.scheduled_sampling_probability
        done = min(1.0, (step - s.scheduled_sampling_start_step) / s.scheduled_sampling_ramp_steps)
        if s.scheduled_sampling_ramp_shape == "cosine":
            done = (1.0 - math.cos(math.pi * done)) / 2
        return s.scheduled_sampling_prob_start + (s.scheduled_sampling_prob_end - s.scheduled_sampling_prob_start) * done

    def length(self, sample: Sample, share: float) -> int:
        """k: 0 where the sample is not rolled out, else 1 to the longest that is allowed. A function of the sample's draw alone."""

        def drawn(purpose: str) -> float:
            return uniform(self._seed, f"rollout/{purpose}", sample.epoch, sample.draw)

        if drawn("share") >= share:
            return 0
        place = drawn("length")
        if self.settings.scheduled_sampling_strategy == "biased_early":
            place = min(place, drawn("second length"))
        elif self.settings.scheduled_sampling_strategy == "biased_late":
            place = max(place, drawn("second length"))
        return 1 + int(place * self.settings.scheduled_sampling_max_step_offset)

    @torch.no_grad()
    def _walk(self, batch: Batch, draws: Noise, lengths: Sequence[int]) -> dict[str, Tensor]:
        """Stream -> (B, S, C) where each sample arrives after its `lengths` steps."""
        moving = {name: part for name, part in draws.streams.items() if not batch.streams[name].clean}
        grid = next(batch.streams[name].grid for name in moving)
        levels = {name: self._levels(part.sigma, lengths, math.prod(grid)) for name, part in moving.items()}
        places = {name: _point(batch.streams[name], part, levels[name][0]) for name, part in moving.items()}
        with evaluating(self._run.model):
            for turn in range(max(lengths)):
                velocity = self._velocity(batch, draws, places, {name: level[turn] for name, level in levels.items()})
                for name, place in places.items():
                    moved = place + (levels[name][turn + 1] - levels[name][turn])[:, None, None] * velocity[name].float()
                    places[name] = _given_clean(batch.streams[name], moved)
        return places

    def _velocity(
        self, batch: Batch, draws: Noise, places: Mapping[str, Tensor], levels: Mapping[str, Tensor]
    ) -> Mapping[str, Tensor]:
        """One forward pass at `places`; streams that are given whole stay as they were drawn."""
        run = self._run
        here = {name: replace(draws.streams[name], noisy=place, sigma=levels[name]) for name, place in places.items()}
        state = run.family.enter(run.model, batch, Noise({**draws.streams, **here}))
        return run.family.exit(run.model, run.blocks.run(state)).streams

    def _levels(self, sigma: Tensor, lengths: Sequence[int], tokens: int) -> Tensor:
        """(K + 1, B) float32: the noise levels that the samples pass, the last of them `sigma` itself.

        A sample whose rollout is shorter than the longest waits at its own first level: steps of length 0.
        """
        longest = max(lengths)
        left = [[min(longest - turn, length) for length in lengths] for turn in range(longest)]
        back = torch.tensor(left, dtype=torch.float64).to(sigma.device, non_blocking=True)
        stretch = math.exp(self._shift.mu(tokens))
        exact = sigma.double()
        time = exact / (stretch * (1.0 - exact) + exact)
        earlier = (time + back / self.settings.scheduled_sampling_schedule_steps).clamp(max=1.0)
        passed = stretch * earlier / (1.0 + (stretch - 1.0) * earlier)
        return torch.cat([passed.float(), sigma.float()[None]])


# --- points ------------------------------------------------------------------------------------------------------
def _given_clean(stream: StreamBatch, place: Tensor) -> Tensor:
    """Tokens that are given stay what they are."""
    return place if stream.conditioned is None else torch.where(stream.conditioned[..., None], stream.latents.float(), place)


def _point(stream: StreamBatch, draw: StreamNoise, sigma: Tensor) -> Tensor:
    """(1 - sigma) x0 + sigma eps."""
    level = sigma[:, None, None]
    return _given_clean(stream, (1.0 - level) * stream.latents.float() + level * draw.noise)


def _reached(stream: StreamBatch, draw: StreamNoise, place: Tensor | None) -> StreamNoise:
    """The draw that leads through `place`; the draw as it was where sigma is too small, or where the stream is given whole (None)."""
    if place is None:
        return replace(draw, drift=torch.zeros_like(draw.noise))
    x0, level = stream.latents.float(), draw.sigma[:, None, None].float()
    kept = level < LOWEST_SIGMA
    if stream.conditioned is not None:
        kept = kept | stream.conditioned[..., None]
    target = torch.where(kept, draw.target, (place - x0) / level.clamp(min=LOWEST_SIGMA))
    noisy = torch.where(kept, draw.noisy, place)
    return replace(draw, noisy=noisy, target=target, noise=torch.where(kept, draw.noise, x0 + target), drift=noisy - draw.noisy)


# --- rows of a batch ---------------------------------------------------------------------------------------------
def select(batch: Batch, rows: Sequence[int]) -> Batch:
    """Those samples alone."""
    if len(rows) == len(batch.samples):
        return batch
    return replace(
        batch,
        samples=tuple(batch.samples[row] for row in rows),
        frame_rate=tuple(batch.frame_rate[row] for row in rows),
        streams={name: select_rows(stream, rows) for name, stream in batch.streams.items()},
        text={name: _rows(text, rows) for name, text in batch.text.items()},
        extras={name: _rows(extra, rows) for name, extra in batch.extras.items()},
    )


def select_rows(value: T, rows: Sequence[int]) -> T:
    """A dataclass with those rows of all its tensors."""
    tensors = {field.name: found for field in fields(value) if isinstance(found := getattr(value, field.name), Tensor)}  # type: ignore[arg-type]
    return replace(value, **{name: _rows(tensor, rows) for name, tensor in tensors.items()})  # type: ignore[type-var]


def _rows(tensor: Tensor, rows: Sequence[int]) -> Tensor:
    """Rows by slices: an index tensor would have to travel to the device."""
    return tensor if len(rows) == len(tensor) else torch.cat([tensor[row : row + 1] for row in rows])


def _scattered(whole: StreamNoise, part: StreamNoise, rows: Sequence[int]) -> StreamNoise:
    """`whole` with `rows` taken from `part`."""
    assert part.drift is not None
    changed = {"noisy": part.noisy, "target": part.target, "noise": part.noise, "drift": part.drift}
    base = replace(whole, drift=torch.zeros_like(whole.noise) if whole.drift is None else whole.drift)
    result = {name: getattr(base, name).clone() for name in changed}
    for index, row in enumerate(rows):
        for name, values in changed.items():
            result[name][row] = values[index]
    return replace(base, **result)
