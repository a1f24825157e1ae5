"""Scheduled sampling against closed forms: where a rollout arrives, what it then asks for, how often and how long it is drawn."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from tuner.builtins.losses import FlowMatchingLoss
from tuner.config.resolve import resolve
from tuner.config.rollout_settings import RolloutSettings
from tuner.errors import ConfigError
from tuner.interfaces.blocks import BlockSet, BlockState, TokenStream
from tuner.interfaces.family import Batch, Noise, Prediction, Sample, StreamBatch, StreamNoise, TokenShift
from tuner.interfaces.losses import StepState, Tap, Transform
from tuner.interfaces.memory import MemorySession
from tuner.model.runner import BlockRunner, Checkpointing
from tuner.testing.blocks import MixingModel, call_mixing_block
from tuner.train.reflexflow import CompensatedLoss, DirectionLoss, drift_weights, stream_losses
from tuner.train.rollout import LOWEST_SIGMA, Rollout
from tuner.train.step import TrainingModel, train_step

SHIFT = TokenShift(base=0.95, top=2.05, base_tokens=1024, top_tokens=4096)
STEPS = 8
CHANNELS = 3
PREFIX = "scheduled_sampling_"


def settings(**changes: object) -> RolloutSettings:
    """Rolls everything out, up to 3 of 8 steps, where nothing else is asked for."""
    values: dict[str, object] = {"max_step_offset": 3, "schedule_steps": STEPS, "probability": 1.0} | changes
    return RolloutSettings(**{PREFIX + key: value for key, value in values.items()})  # type: ignore[arg-type]


def normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def sample(draw: int, epoch: int = 0) -> Sample:
    return Sample(key=f"s{draw}", dataset="d", draw=draw, epoch=epoch, frame_rate=25.0, frames=9, height=32, width=32, records={})


def drawn(
    sigmas: Mapping[str, list[float]], tokens: Mapping[str, int], draws: list[int] | None = None, **fields: object
) -> tuple[Batch, Noise]:
    """A batch as the loop has it. `fields`: of the first stream."""
    streams, noises = {}, {}
    for index, (name, levels) in enumerate(sigmas.items()):
        count = len(levels)
        x0, eps = (torch.stack([normal(tokens[name], CHANNELS, seed=100 * (draws or range(count))[row] + 10 * index + part)
                                for row in range(count)]) for part in (0, 1))  # fmt: skip
        sigma = torch.tensor(levels)
        given = StreamBatch(x0, (tokens[name], 1, 1), **(fields if index == 0 else {}))  # type: ignore[arg-type]
        noisy = (1 - sigma[:, None, None]) * x0 + sigma[:, None, None] * eps
        if given.conditioned is not None:
            noisy = torch.where(given.conditioned[..., None], x0, noisy)
        streams[name], noises[name] = given, StreamNoise(sigma, noisy, eps - x0, eps)
    samples = tuple(sample(draw) for draw in (draws or range(len(levels))))
    text = {name: normal(len(samples), 2, CHANNELS, seed=5) for name in streams}
    return Batch(samples, streams, text, (25.0,) * len(samples)), Noise(noises)


# --- a model whose velocity can be written down ------------------------------------------------------------------
@dataclass
class Linear:
    """v = slope · x + sigma + 0.1 · mean of the other streams' tokens; the slope is learned."""

    calls: int = 0

    def enter(self, model: nn.Module, batch: Batch, noise: Noise) -> BlockState:
        self.calls += 1
        streams = {}
        for name, draw in noise.streams.items():
            given = batch.streams[name]
            others = [other.noisy.mean(dim=(1, 2), keepdim=True) for key, other in noise.streams.items() if key != name]
            hidden = draw.noisy if not given.clean else given.latents
            shift = draw.sigma[:, None, None] + 0.1 * sum(others, torch.zeros(1))
            streams[name] = TokenStream(model.weight * hidden + shift, {}, given.grid)
        return BlockState(streams)

    def call_block(self, block: nn.Module, state: BlockState) -> BlockState:
        return state

    def exit(self, model: nn.Module, state: BlockState) -> Prediction:
        return Prediction({name: stream.hidden for name, stream in state.streams.items()})


class Slope(nn.Module):
    def __init__(self, value: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(value))
        self.block = nn.Identity()


def linear(value: float = 0.4) -> tuple[TrainingModel, Linear]:
    family, model = Linear(), Slope(value)
    runner = BlockRunner(BlockSet.of(model, [model.block]), family.call_block)
    return TrainingModel(family, model, runner, [FlowMatchingLoss("video")]), family  # type: ignore[arg-type]


def schedule(sigma: float, k: int, tokens: int) -> list[float]:
    """The noise levels from k steps before down to sigma, written out."""
    stretch = math.exp(SHIFT.mu(tokens))
    time = sigma / (stretch * (1 - sigma) + sigma)
    times = [min(1.0, time + back / STEPS) for back in range(k, 0, -1)]
    return [stretch * t / (1 + (stretch - 1) * t) for t in times] + [sigma]


def test_where_it_arrives_is_the_product_of_its_steps() -> None:
    """Two streams with noise levels of their own, lengths of their own, one of them beginning at pure noise."""
    levels, tokens = {"video": [0.3, 0.6, 0.97], "audio": [0.5, 0.2, 0.4]}, {"video": 4, "audio": 2}
    run, family = linear()
    rollout = Rollout(settings(), run, SHIFT, seed=7)
    lengths = [2, 1, 3]
    batch, noise = drawn(levels, tokens, [next(n for n in range(99) if rollout.length(sample(n), 1.0) == k) for k in lengths])
    found = rollout(batch, noise, step=0)
    assert family.calls == 3
    for row, k in enumerate(lengths):
        passed = {name: schedule(levels[name][row], k, 4) for name in levels}  # of the first stream's tokens
        place = {}
        for name in levels:
            x0, eps = batch.streams[name].latents[row].double().numpy(), noise.streams[name].noise[row].double().numpy()
            place[name] = (1 - passed[name][0]) * x0 + passed[name][0] * eps
        for turn in range(k):
            means = {name: values.mean() for name, values in place.items()}
            place = {
                name: values + (passed[name][turn + 1] - passed[name][turn])
                * (0.4 * values + passed[name][turn] + 0.1 * sum(mean for key, mean in means.items() if key != name))
                for name, values in place.items()
            }  # fmt: skip
        for name, expected in place.items():
            np.testing.assert_allclose(found.streams[name].noisy[row].numpy(), expected, atol=2e-6)


def test_what_it_asks_for_leads_to_the_clip() -> None:
    batch, noise = drawn({"video": [0.3, 0.9], "audio": [0.5, 0.2]}, {"video": 4, "audio": 2})
    found = Rollout(settings(), linear()[0], SHIFT, seed=7)(batch, noise, step=0)
    for name, draw in found.streams.items():
        x0, sigma = batch.streams[name].latents, draw.sigma[:, None, None]
        torch.testing.assert_close(draw.noisy - sigma * draw.target, x0, atol=1e-6, rtol=0)
        torch.testing.assert_close(draw.noisy, (1 - sigma) * x0 + sigma * draw.noise, atol=1e-6, rtol=0)
        torch.testing.assert_close(draw.target, draw.noise - x0, atol=1e-6, rtol=0)
        torch.testing.assert_close(draw.drift, draw.noisy - noise.streams[name].noisy)
        assert torch.equal(draw.sigma, noise.streams[name].sigma)


def test_a_perfect_model_stays_on_the_path() -> None:
    """v = eps - x0 everywhere: the rollout ends at the point that was drawn, and asks for the same velocity."""

    class Perfect(Linear):
        def exit(self, model: nn.Module, state: BlockState) -> Prediction:
            return Prediction({name: draw.target for name, draw in noise.streams.items()})

    batch, noise = drawn({"video": [0.3, 0.9, 1.0]}, {"video": 4})
    run = replace(linear()[0], family=Perfect())  # type: ignore[arg-type]
    found = Rollout(settings(), run, SHIFT, seed=7)(batch, noise, step=0).streams["video"]
    torch.testing.assert_close(found.noisy, noise.streams["video"].noisy, atol=1e-6, rtol=0)
    torch.testing.assert_close(found.target, noise.streams["video"].target, atol=1e-5, rtol=0)


def test_pure_noise_and_almost_none_are_left_alone() -> None:
    batch, noise = drawn({"video": [1.0, 0.0, LOWEST_SIGMA - 1e-3]}, {"video": 4})
    found = Rollout(settings(), linear()[0], SHIFT, seed=7)(batch, noise, step=0).streams["video"]
    for part in ("noisy", "target", "noise"):
        torch.testing.assert_close(getattr(found, part), getattr(noise.streams["video"], part), atol=1e-6, rtol=0)
    assert torch.isfinite(found.target).all()


def test_given_tokens_and_given_streams_stay_clean() -> None:
    conditioned = torch.tensor([[True, False, False, True], [False] * 4])
    batch, noise = drawn({"video": [0.3, 0.6], "audio": [0.5, 0.2]}, {"video": 4, "audio": 2}, conditioned=conditioned)
    found = Rollout(settings(), linear()[0], SHIFT, seed=7)(batch, noise, step=0).streams["video"]
    assert torch.equal(found.noisy[conditioned], batch.streams["video"].latents[conditioned])
    assert torch.equal(found.target[conditioned], noise.streams["video"].target[conditioned])
    assert not torch.equal(found.noisy[~conditioned], noise.streams["video"].noisy[~conditioned])
    clean = replace(batch.streams["audio"], clean=True)
    given = replace(noise.streams["audio"], sigma=torch.zeros(2), noisy=clean.latents, target=-clean.latents)
    batch = replace(batch, streams={**batch.streams, "audio": clean})
    kept = Rollout(settings(), linear()[0], SHIFT, seed=7)(batch, Noise({**noise.streams, "audio": given}), step=0).streams["audio"]
    assert all(torch.equal(getattr(kept, part), getattr(given, part)) for part in ("sigma", "noisy", "target", "noise"))


# --- how often, how long -----------------------------------------------------------------------------------------
def test_nothing_drawn_is_nothing_done() -> None:
    batch, noise = drawn({"video": [0.3, 0.6]}, {"video": 4})
    run, family = linear()
    assert Rollout(settings(start_step=10), run, SHIFT, seed=7)(batch, noise, step=9) is noise
    assert family.calls == 0


def test_a_sample_does_not_depend_on_its_batch() -> None:
    run, family = linear()
    rollout = Rollout(settings(probability=0.5), run, SHIFT, seed=7)
    draws = list(range(6))
    lengths = [rollout.length(sample(draw), 0.5) for draw in draws]
    assert 0 in lengths and max(lengths) > 1
    levels = [0.3 + 0.1 * draw for draw in draws]
    batch, noise = drawn({"video": levels}, {"video": 4}, draws)
    together = rollout(batch, noise, step=0).streams["video"]
    assert family.calls == max(lengths)
    for row, draw in enumerate(draws):
        alone = rollout(*drawn({"video": [levels[row]]}, {"video": 4}, [draw]), step=0).streams["video"]
        torch.testing.assert_close(together.noisy[row], alone.noisy[0])
        torch.testing.assert_close(together.target[row], alone.target[0])
        if lengths[row] == 0:
            assert torch.equal(together.noisy[row], noise.streams["video"].noisy[row])
            assert together.drift is not None and not together.drift[row].any()


@pytest.mark.parametrize(("strategy", "below"), [
    ("uniform", lambda share: share), ("biased_early", lambda share: 1 - (1 - share) ** 2), ("biased_late", lambda share: share**2),
])  # fmt: skip
def test_lengths_have_their_distribution(strategy: str, below) -> None:
    rollout = Rollout(settings(max_step_offset=4, strategy=strategy), linear()[0], SHIFT, seed=7)
    lengths = np.array([rollout.length(sample(draw), 1.0) for draw in range(4000)])
    assert lengths.min() == 1 and lengths.max() == 4
    for k in range(1, 4):  # 4 standard deviations of a share of 4,000
        assert np.mean(lengths <= k) == pytest.approx(below(k / 4), abs=4 * 0.5 / math.sqrt(4000))


def test_the_share_is_met() -> None:
    rollout = Rollout(settings(), linear()[0], SHIFT, seed=7)
    rolled = [rollout.length(sample(draw), 0.3) > 0 for draw in range(4000)]
    assert np.mean(rolled) == pytest.approx(0.3, abs=4 * math.sqrt(0.3 * 0.7 / 4000))
    assert not any(rollout.length(sample(draw), 0.0) for draw in range(100))


def test_the_ramp() -> None:
    ramp = {"ramp_steps": 10, "prob_start": 0.2, "prob_end": 0.6, "start_step": 5}
    line = Rollout(settings(**ramp), linear()[0], SHIFT, seed=7)
    assert [line.share(step) for step in (4, 5, 10, 15, 99)] == pytest.approx([0.0, 0.2, 0.4, 0.6, 0.6])
    bent = Rollout(settings(ramp_shape="cosine", **ramp), linear()[0], SHIFT, seed=7)
    quarter = (1 - math.cos(math.pi * 0.2)) / 2
    assert [bent.share(step) for step in (5, 7, 10, 15)] == pytest.approx([0.2, 0.2 + 0.4 * quarter, 0.4, 0.6])


# --- the runner, checkpointing, memory ---------------------------------------------------------------------------
class Counted(MemorySession):
    """Notes the events."""

    def __init__(self) -> None:
        self.said: list[str] = []

    def begin_step(self, first_backward: int) -> None:
        self.said.append(f"begin {first_backward}")

    def end_step(self) -> None:
        self.said.append("end")

    def before_backward(self, index: int) -> None:
        self.said.append("backward")


class Mixing:
    """The kit's two-stream model as a family."""

    def enter(self, model: nn.Module, batch: Batch, noise: Noise) -> BlockState:
        video = noise.streams["video"]
        sigma = video.sigma[:, None].expand(video.noisy.shape[:2])
        return model.enter(video.noisy, noise.streams["audio"].noisy, batch.text["video"], sigma)

    def exit(self, model: nn.Module, state: BlockState) -> Prediction:
        return Prediction(model.exit(state))


def mixing(
    session: MemorySession | None = None, checkpointing: Checkpointing | None = None, seen: list[BlockState] | None = None
) -> TrainingModel:
    torch.manual_seed(0)
    model = MixingModel(depth=3, width=8, channels=CHANNELS, dropout=0.5).train()

    def note(state: BlockState) -> BlockState:
        assert seen is not None
        seen.append(state)
        return state

    runner = BlockRunner(
        model.block_set(), call_mixing_block, session=session, checkpointing=checkpointing,
        transforms=[Transform(1, "before", note)] if seen is not None else [], taps=[Tap("t", 1, "video")],
    )  # fmt: skip
    return TrainingModel(Mixing(), model, runner, [FlowMatchingLoss("video"), FlowMatchingLoss("audio")])  # type: ignore[arg-type]


def test_its_passes_are_those_of_sampling() -> None:
    """No gradients, no transforms, no dropout, no draw of the global generator; then the step trains as ever."""
    session, seen = Counted(), []
    run = mixing(session, Checkpointing.every(3), seen)
    batch, noise = drawn({"video": [0.3, 0.6], "audio": [0.5, 0.2]}, {"video": 4, "audio": 2})
    rollout = Rollout(settings(), run, SHIFT, seed=7)
    passes = max(rollout.length(one, 1.0) for one in batch.samples)
    before = torch.get_rng_state()
    found = rollout(batch, noise, step=0)
    assert torch.equal(torch.get_rng_state(), before)
    assert session.said == ["begin 3", "end"] * passes and not seen
    assert run.model.training and not found.streams["video"].noisy.requires_grad
    again = rollout(batch, noise, step=0)
    assert torch.equal(found.streams["video"].noisy, again.streams["video"].noisy)
    train_step(run, batch, found).loss.backward()
    assert session.said[4 * passes :] == ["begin 0", "backward", "backward", "backward", "end"] and len(seen) >= 1
    assert all(parameter.grad is not None for parameter in run.model.parameters())


def test_an_error_in_a_pass_leaves_the_model_training() -> None:
    run = mixing()
    batch, noise = drawn({"video": [0.3], "audio": [0.5]}, {"video": 4, "audio": 2})
    with pytest.raises(KeyError):
        Rollout(settings(), run, SHIFT, seed=7)(replace(batch, text={}), noise, step=0)
    assert run.model.training


# --- ReflexFlow --------------------------------------------------------------------------------------------------
def reflex_state(mask: Tensor | None = None) -> tuple[StepState, Tensor]:
    """Two samples of which the second was rolled out."""
    batch, noise = drawn({"video": [0.5, 0.5]}, {"video": 4}, loss_mask=mask)
    draw = noise.streams["video"]
    drift = torch.stack([torch.zeros(4, CHANNELS), normal(4, CHANNELS, seed=9)])
    noise = Noise({"video": replace(draw, drift=drift, noisy=draw.noisy + drift)})
    prediction = normal(2, 4, CHANNELS, seed=11).requires_grad_()
    return StepState(batch, noise, Prediction({"video": prediction})), drift


def test_the_compensated_loss_by_hand() -> None:
    mask = torch.tensor([[1.0, 1, 1, 1], [1, 1, 0, 1]])
    state, drift = reflex_state(mask)
    found = CompensatedLoss("video", 1.0, alpha=0.7, beta=2.0)(state).values.detach()
    counted = [0, 1, 3]
    sizes = drift[1, counted].abs().double()
    weights = 2.0 * (1 + 0.7 * sizes / sizes.mean())
    error = (state.prediction.streams["video"] - state.noise.streams["video"].target).detach().double().square()
    assert float(found[0]) == pytest.approx(float(error[0].mean()), rel=1e-5)
    assert float(found[1]) == pytest.approx(float((weights * error[1, counted]).mean()), rel=1e-5)
    assert float(drift_weights(state.batch.streams["video"], drift, 0.7, 2.0)[1, counted].mean()) == pytest.approx(2.0 * 1.7, rel=1e-5)


def test_the_loss_of_direction_by_hand() -> None:
    mask = torch.tensor([[1.0, 1, 1, 1], [1, 1, 0, 1]])
    state, _ = reflex_state(mask)
    found = DirectionLoss("video", 10.0)(state)
    value = float(found.values.detach()[1])
    sides = state.prediction.streams["video"], state.noise.streams["video"].target
    a, b = (side[1, [0, 1, 3]].detach().double().flatten() for side in sides)
    assert found.counted is not None and found.counted.tolist() == [False, True]
    assert value == pytest.approx(2 - 2 * float(a @ b / a.norm() / b.norm()), rel=1e-5)
    assert float(found.reduced().detach()) == pytest.approx(10 * value)
    found.reduced().backward()
    assert torch.isfinite(state.prediction.streams["video"].grad).all()  # type: ignore[union-attr]


def test_without_rollouts_the_losses_are_the_plain_ones() -> None:
    state, _ = reflex_state()
    draw = state.noise.streams["video"]
    for drift in (None, torch.zeros_like(draw.noise)):
        plain = replace(state, noise=Noise({"video": replace(draw, drift=drift)}))
        terms = [term(plain) for term in stream_losses(["video"], {}, settings())]
        assert torch.equal(terms[0].values, FlowMatchingLoss("video")(plain).values)
        assert float(terms[1].reduced().detach()) == 0
    batch, noise = drawn({"audio": [0.5]}, {"audio": 2})
    other = StepState(batch, noise, Prediction({"audio": noise.streams["audio"].target}))
    assert [float(term(other).reduced()) for term in stream_losses(["video"], {}, settings())] == [0, 0]


# --- keys --------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(("given", "words"), [
    ({"probability": 0.5, "sampler": "unipc"}, "scheduled_sampling_sampler: must be 'euler'"),
    ({"probability": 0.5, "order": 2}, "scheduled_sampling_order: must be 1"),
    ({"strategy": "sometimes", "probability": 1}, "scheduled_sampling_strategy: must be 'uniform', 'biased_early' or 'biased_late'"),
    ({}, "nothing would ever be rolled out"),
    ({"probability": 1, "ramp_steps": 5, "prob_end": 0}, "nothing would ever be rolled out"),
])  # fmt: skip
def test_what_cannot_be_done_is_an_error(given: dict[str, object], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        resolve([RolloutSettings], flags={PREFIX + key: value for key, value in {"max_step_offset": 4, **given}.items()})


def test_other_keys_mean_nothing_while_it_is_off() -> None:
    found = resolve([RolloutSettings], flags={PREFIX + "sampler": "unipc", PREFIX + "order": 2, PREFIX + "reflexflow": False})
    assert not found.get(RolloutSettings).enabled() and settings().enabled()
