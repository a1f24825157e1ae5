"""What every loss term has to keep to, checked in runs of the tiny family."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import replace
from typing import ClassVar

import torch
from torch import Tensor

from tuner.errors import NumericError
from tuner.interfaces.family import Batch, Noise, Prediction, StreamBatch, StreamNoise
from tuner.interfaces.losses import LossTerm, LossValue, StepState
from tuner.plugins.record import Kind
from tuner.testing.conformance import SwitchedComponent, check, equal, same_bits


class LossTermConformance(SwitchedComponent):
    """Subclass it, and say where the term is:

    class TestMine(LossTermConformance):
        plugin = tuner_mine.plugin
        component = "mine"
        options = {"mine_weight": 0.5}
    """

    kind: ClassVar[Kind] = "loss_term"
    zero: ClassVar[Mapping[str, object] | None] = None
    """Keys at which it must change nothing; None: it has no such setting."""
    per_sample: ClassVar[bool] = True
    """Whether a sample's value depends on that sample alone; off for terms that compare the samples of a batch."""

    def term(self) -> LossTerm:
        """The term, built as a run builds it."""
        built = self.build()
        assert isinstance(built, LossTerm)
        return built

    def state(self, **keys: object) -> StepState:
        """A batch of two clips, the second without sound, with a prediction that is wrong."""
        trial = self.plain_trial(**keys)
        batch, noise = next(found for index in range(4) if _has_silent(found := trial.batch(index)))
        draws = torch.Generator().manual_seed(0)
        wrong = {n: one.target + torch.randn(one.target.shape, generator=draws) for n, one in noise.streams.items()}
        return StepState(batch, noise, Prediction(wrong))

    def test_values_are_one_number_a_sample(self) -> None:
        state = self.state()
        value, count = self.term()(state), len(state.batch.samples)
        check(
            tuple(value.values.shape) == (count,),
            f"values have the shape {tuple(value.values.shape)} instead of ({count},): losses are unreduced",
        )
        check(value.values.dtype == torch.float32, f"values are {value.values.dtype}: sums of squares in 16 bits lose the small ones")
        if value.counted is not None:
            fits = tuple(value.counted.shape) == (count,) and value.counted.dtype == torch.bool
            check(fits, f"counted is {value.counted.dtype} {tuple(value.counted.shape)}: it must be bool, one a sample")
        check(
            bool(value.values.isfinite().all()), f"a sample without sound gives {value.values.tolist()}: count it out, with a finite value"
        )

    def test_it_leaves_the_batch_alone(self) -> None:
        state = self.state()
        before, term = copy.deepcopy(state), self.term()
        first, again = term(state), term(state)
        check(
            equal(first.values, again.values), "two calls with the same batch give different values: what it draws or keeps must not matter"
        )
        changed = same_bits(dict(state.prediction.streams), dict(before.prediction.streams))
        changed += [n for n, one in state.noise.streams.items() if not equal(one.target, before.noise.streams[n].target)]
        check(not changed, f"it changes tensors of {changed} in place: other terms read the same ones")

    def test_a_sample_is_judged_by_itself(self) -> None:
        if not self.per_sample:
            return
        state, term = self.state(), self.term()
        together = term(state)
        for index in range(len(state.batch.samples)):
            alone = term(_single(state, index))
            close = torch.allclose(alone.values, together.values[index : index + 1], rtol=1e-5, atol=1e-7)
            check(
                close or not _counts(together, index),
                f"sample {index} gives {alone.values.item():.6g} alone, {together.values[index].item():.6g} in a batch: reduce over tokens "
                "and channels, not over samples; a term that compares samples says per_sample = False",
            )

    def test_batches_without_a_stream_are_taken(self) -> None:
        trial = self.trial(train_batch_size=1)
        try:
            trial.steps(4)
        except (KeyError, NumericError) as error:
            raise AssertionError(
                f"a batch without sound ends in {type(error).__name__}: {error}; give values that do not count"
            ) from error
        named = [row for row in trial.rows if f"loss/{self.component}" in row]
        check(bool(named), f"no step logged loss/{self.component}: the term was never counted")

    def test_it_teaches_something(self) -> None:
        trial, plain = self.trial(), self.plain_trial()
        trial.steps(2)
        plain.steps(2)
        check(bool(same_bits(trial.weights(), plain.weights())), "training with it gives the very weights of training without it")

    def test_at_zero_it_changes_nothing(self) -> None:
        if self.zero is None:
            return
        trial, plain = self.trial(**self.zero), self.plain_trial()
        trial.steps(3)
        plain.steps(3)
        wrong = same_bits(trial.weights(), plain.weights())
        check(not wrong, f"with {dict(self.zero)} {len(wrong)} trained weights are others than without the term")


def _has_silent(found: tuple[Batch, Noise]) -> bool:
    sound = found[0].streams.get("audio")
    return sound is not None and sound.present is not None


def _counts(value: LossValue, index: int) -> bool:
    return value.counted is None or bool(value.counted[index])


def _single(state: StepState, index: int) -> StepState:
    """The state of one sample of the batch."""
    part = slice(index, index + 1)
    batch = replace(
        state.batch, samples=state.batch.samples[part], streams={n: _one_stream(s, part) for n, s in state.batch.streams.items()},
        text={n: t[part] for n, t in state.batch.text.items()}, frame_rate=state.batch.frame_rate[part],
        extras={n: t[part] for n, t in state.batch.extras.items()},
    )  # fmt: skip
    noise = Noise({n: _one_noise(s, part) for n, s in state.noise.streams.items()})
    return StepState(batch, noise, Prediction({n: p[part] for n, p in state.prediction.streams.items()}), {}, state.step)


def _one_stream(stream: StreamBatch, part: slice) -> StreamBatch:
    return replace(
        stream, latents=stream.latents[part], loss_mask=_part(stream.loss_mask, part), present=_part(stream.present, part),
        conditioned=_part(stream.conditioned, part),
    )  # fmt: skip


def _part(mask: Tensor | None, part: slice) -> Tensor | None:
    return None if mask is None else mask[part]


def _one_noise(stream: StreamNoise, part: slice) -> StreamNoise:
    return StreamNoise(stream.sigma[part], stream.noisy[part], stream.target[part], stream.noise[part])
