"""Noise levels against scipy's distributions and closed forms; independence of batch composition."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy import stats

from tuner.config.settings import TrainSettings
from tuner.interfaces.family import Batch, Sample, StreamBatch, TokenShift
from tuner.train.noise import NoiseSampler, shift_sigma, stretch, target_tokens

SHIFT = TokenShift(base=0.95, top=2.05, base_tokens=1024, top_tokens=4096)
TOKENS = 16


def sample(draw: int, epoch: int = 0) -> Sample:
    return Sample(
        key=f"item{draw}", dataset="clips", draw=draw, epoch=epoch, frame_rate=25.0, frames=1, height=32, width=32, records={}
    )


def batch_of(draws: range | list[int], streams: dict[str, StreamBatch], epoch: int = 0) -> Batch:
    samples = tuple(sample(draw, epoch) for draw in draws)
    return Batch(samples=samples, streams=streams, text={}, frame_rate=(25.0,) * len(samples))


def plain(count: int, tokens: int = TOKENS, channels: int = 1, **fields: object) -> StreamBatch:
    latents = torch.randn(count, tokens, channels, generator=torch.Generator().manual_seed(1))
    return StreamBatch(latents=latents, grid=(tokens, 1, 1), **fields)  # type: ignore[arg-type]


def sampler(**settings: object) -> NoiseSampler:
    return NoiseSampler(TrainSettings(**settings), SHIFT, seed=7)  # type: ignore[arg-type]


def sigmas(count: int = 4000, **settings: object) -> np.ndarray:
    return sampler(**settings).sample(batch_of(range(count), {"video": plain(count)})).streams["video"].sigma.double().numpy()


def test_uniform_sigma_is_uniform() -> None:
    assert stats.kstest(sigmas(sigma_sampler="uniform"), stats.uniform().cdf).pvalue > 0.01


def test_beta_sigma_is_beta_2_2() -> None:
    assert stats.kstest(sigmas(sigma_sampler="beta"), stats.beta(2, 2).cdf).pvalue > 0.01


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_logit_normal_sigma_is_a_shifted_logit_normal(shift: float) -> None:
    drawn = sigmas(sigma_sampler="logit_normal", flow_schedule_shift=shift)
    # logit(S·s / (1 + (S - 1)·s)) = logit(s) + ln S
    assert stats.kstest(np.log(drawn / (1 - drawn)), stats.norm(loc=math.log(shift)).cdf).pvalue > 0.01


def test_shift_maps_one_half_to_its_closed_form() -> None:
    assert shift_sigma(0.5, 3.0) == pytest.approx(0.75)
    assert (shift_sigma(0.0, 3.0), shift_sigma(1.0, 3.0)) == (0.0, 1.0)


def shifted_cdf(x: np.ndarray, mu: float) -> np.ndarray:
    """Distribution function of the default sampler, from the description: 90 % stretched, 10 % uniform in [1e-3, 1)."""
    low, high = 1 / (1 + math.exp(2.5758 - mu)), 1 / (1 + math.exp(-3.0902 - mu))

    def below(y: np.ndarray) -> np.ndarray:
        """P((s - low) / (high - low) <= y) for s = sigmoid(N(mu, 1))."""
        s = np.clip(low + np.asarray(y) * (high - low), 1e-15, 1 - 1e-15)
        return stats.norm(loc=mu).cdf(np.log(s / (1 - s)))

    # Reflection folds y < 1e-3 onto 2e-3 - y, clamping moves what is above 1 onto 1.
    stretched = np.where(x >= 1, 1.0, below(x) - below(2e-3 - x))
    return 0.9 * np.where(x >= 1e-3, stretched, 0.0) + 0.1 * np.clip((x - 1e-3) / (1 - 1e-3), 0, 1)


@pytest.mark.parametrize("tokens", [16, 3000])
def test_shifted_logit_normal_follows_its_distribution(tokens: int) -> None:
    streams = {"video": plain(3000, tokens=tokens)}
    drawn = sampler().sample(batch_of(range(3000), streams)).streams["video"].sigma.double().numpy()
    mu = 0.95 + 1.1 / 3072 * (tokens - 1024)
    # About 0.1 % of the draws are clamped to exactly 1, a jump that the statistic must not see from the left.
    inside = np.where(drawn >= 1, 1 - 1e-9, drawn)
    assert stats.kstest(inside, lambda x: np.minimum(shifted_cdf(x, mu), 1.0)).pvalue > 0.01
    assert drawn.min() >= 1e-3 - 1e-9 and drawn.max() <= 1


@pytest.mark.parametrize("mu", [-1.0, 0.95, 3.0])
def test_stretch_maps_quantiles_to_the_ends(mu: float) -> None:
    def at(z: float) -> float:
        return float(1 / (1 + math.exp(-(mu + z))))

    assert stretch(at(3.0902), mu) == pytest.approx(1.0)
    assert stretch(at(-2.5758), mu) == pytest.approx(2e-3)  # 0 is reflected
    assert stretch(at(4.0), mu) == 1.0
    lowest = -at(-2.5758) / (at(3.0902) - at(-2.5758))
    assert stretch(0.0, mu) == pytest.approx(min(2e-3 - lowest, 1.0))


def test_noisy_tokens_and_target_follow_their_definition() -> None:
    stream = plain(3, channels=5)
    noise = sampler().sample(batch_of(range(3), {"video": stream})).streams["video"]
    sigma = noise.sigma[:, None, None]
    assert torch.equal(noise.noisy, (1 - sigma) * stream.latents + sigma * noise.noise)
    assert torch.equal(noise.target, noise.noise - stream.latents)
    assert {noise.sigma.dtype, noise.target.dtype, noise.noisy.dtype, noise.noise.dtype} == {torch.float32}


def test_noise_is_standard_normal_and_streams_are_independent() -> None:
    streams = {"video": plain(4, tokens=2000), "audio": plain(4, tokens=2000)}
    noise = sampler().sample(batch_of(range(4), streams)).streams
    video, audio = noise["video"].noise.flatten().numpy(), noise["audio"].noise.flatten().numpy()
    assert stats.kstest(video, stats.norm().cdf).pvalue > 0.01
    assert abs(np.corrcoef(video, audio)[0, 1]) < 0.05
    assert not torch.equal(noise["video"].sigma, noise["audio"].sigma)


def test_bfloat16_latents_are_mixed_in_float32() -> None:
    stream = StreamBatch(latents=torch.randn(1, TOKENS, 2).bfloat16(), grid=(TOKENS, 1, 1))
    noise = sampler().sample(batch_of([0], {"video": stream})).streams["video"]
    assert noise.noisy.dtype == torch.float32
    assert torch.equal(noise.target, noise.noise - stream.latents.float())


def test_conditioned_tokens_stay_clean_and_leave_the_count() -> None:
    conditioned = torch.zeros(2, TOKENS, dtype=torch.bool)
    conditioned[0, :4] = True
    stream = plain(2, conditioned=conditioned)
    noise = sampler().sample(batch_of(range(2), {"video": stream})).streams["video"]
    assert torch.equal(noise.noisy[0, :4], stream.latents[0, :4])
    assert not torch.equal(noise.noisy[0, 4:], stream.latents[0, 4:])
    assert [target_tokens(stream, 0), target_tokens(stream, 1)] == [TOKENS - 4, TOKENS]
    free = sampler().sample(batch_of(range(2), {"video": plain(2)})).streams["video"]
    assert noise.sigma[0] != free.sigma[0] and noise.sigma[1] == free.sigma[1]


def test_padding_changes_neither_sigma_nor_noise() -> None:
    """The same sound alone, and padded to a longer one of its batch."""
    channels = 128
    alone = plain(1, tokens=6, channels=channels, loss_mask=torch.ones(1, 6))
    longer = torch.cat([alone.latents, torch.zeros(1, 4, channels)], dim=1)
    padded = StreamBatch(longer, (10, 1, 1), loss_mask=(torch.arange(10) < 6).float()[None])
    first, second = (sampler().sample(batch_of([3], {"audio": stream})).streams["audio"] for stream in (alone, padded))
    assert torch.equal(first.sigma, second.sigma)
    assert torch.equal(first.noisy, second.noisy[:, :6])
    assert (target_tokens(padded, 0), target_tokens(plain(1, loss_mask=torch.zeros(1, TOKENS)), 0)) == (6, 1)


def test_a_clean_stream_is_given_as_it_is() -> None:
    stream = plain(2, clean=True)
    noise = sampler(sigma_pairing="shared").sample(batch_of(range(2), {"audio": stream, "video": plain(2)})).streams["audio"]
    assert torch.equal(noise.sigma, torch.zeros(2))
    assert torch.equal(noise.noisy, stream.latents)


def test_draws_depend_neither_on_the_batch_nor_on_other_streams() -> None:
    together = sampler().sample(batch_of([3, 5, 8], {"video": plain(3), "audio": plain(3)}), step=9).streams["video"]
    alone = sampler().sample(batch_of([5], {"video": StreamBatch(plain(3).latents[1:2], (TOKENS, 1, 1))}), step=2).streams["video"]
    assert torch.equal(together.noise[1:2], alone.noise) and torch.equal(together.sigma[1:2], alone.sigma)
    assert torch.equal(together.noisy[1:2], alone.noisy)


def test_draws_depend_on_epoch_draw_and_seed() -> None:
    streams = {"video": plain(2)}
    first = sampler().sample(batch_of(range(2), streams)).streams["video"].noise
    other_epoch = sampler().sample(batch_of(range(2), streams, epoch=1)).streams["video"].noise
    other_seed = NoiseSampler(TrainSettings(), SHIFT, seed=8).sample(batch_of(range(2), streams)).streams["video"].noise
    assert not torch.equal(first[0], first[1])
    assert not torch.equal(first, other_epoch) and not torch.equal(first, other_seed)


def test_shared_sigma_is_that_of_the_first_present_stream() -> None:
    present = torch.tensor([True, False])
    streams = {"video": plain(2, present=present), "audio": plain(2, tokens=8)}
    shared = sampler(sigma_pairing="shared").sample(batch_of(range(2), streams)).streams
    apart = sampler().sample(batch_of(range(2), streams)).streams
    assert torch.equal(shared["video"].sigma, shared["audio"].sigma)
    assert shared["audio"].sigma[0] == apart["video"].sigma[0]
    assert shared["audio"].sigma[1] == apart["audio"].sigma[1]
