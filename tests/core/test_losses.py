"""The flow-matching loss against sums written out, and the bands of sigma."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tuner.builtins.losses import FlowMatchingLoss, SigmaBands
from tuner.interfaces.family import Batch, Noise, Prediction, Sample, StreamBatch, StreamNoise
from tuner.interfaces.losses import LossValue, StepState

B, S, C = 3, 6, 4


def step_state(prediction: Tensor, target: Tensor, sigma: Tensor | None = None, **fields: object) -> StepState:
    count = len(target)
    sample = Sample(key="k", dataset="d", draw=0, epoch=0, frame_rate=25.0, frames=1, height=32, width=32, records={})
    latents = torch.zeros_like(target)
    stream = StreamBatch(latents=latents, grid=(S, 1, 1), **fields)  # type: ignore[arg-type]
    batch = Batch(samples=(sample,) * count, streams={"video": stream}, text={}, frame_rate=(25.0,) * count)
    level = torch.full((count,), 0.5) if sigma is None else sigma
    noise = Noise({"video": StreamNoise(sigma=level, noisy=latents, target=target, noise=target)})
    return StepState(batch=batch, noise=noise, prediction=Prediction({"video": prediction}))


@pytest.fixture
def tensors() -> tuple[Tensor, Tensor]:
    draws = torch.Generator().manual_seed(0)
    return torch.randn(B, S, C, generator=draws), torch.randn(B, S, C, generator=draws)


def test_without_masks_it_is_the_mean_squared_error(tensors: tuple[Tensor, Tensor]) -> None:
    prediction, target = tensors
    loss = FlowMatchingLoss("video")(step_state(prediction, target))
    assert loss.name == "video" and loss.counted is not None and bool(loss.counted.all())
    assert torch.allclose(loss.reduced(), torch.nn.functional.mse_loss(prediction, target))


def test_masks_weigh_tokens(tensors: tuple[Tensor, Tensor]) -> None:
    prediction, target = tensors
    mask = torch.tensor([[1, 1, 0, 0, 1, 0], [0.5, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1]])
    conditioned = torch.zeros(B, S, dtype=torch.bool)
    conditioned[2, :2] = True
    loss = FlowMatchingLoss("video", weight=0.5)(step_state(prediction, target, loss_mask=mask, conditioned=conditioned))
    for index in range(B):
        total = weights = 0.0
        for token in range(S):
            weight = 0.0 if conditioned[index, token] else float(mask[index, token])
            for channel in range(C):
                total += weight * float(prediction[index, token, channel] - target[index, token, channel]) ** 2
                weights += weight
        assert float(loss.values[index]) == pytest.approx(total / weights, rel=1e-5)
    assert float(loss.reduced()) == pytest.approx(0.5 * float(loss.values.mean()), rel=1e-6)


def test_absent_samples_and_what_they_hold_change_nothing(tensors: tuple[Tensor, Tensor]) -> None:
    prediction, target = tensors
    prediction[1] = float("nan")
    prediction.requires_grad_(True)
    loss = FlowMatchingLoss("video")(step_state(prediction, target, present=torch.tensor([True, False, True])))
    assert loss.counted is not None and loss.counted.tolist() == [True, False, True]
    expected = torch.nn.functional.mse_loss(prediction[[0, 2]], target[[0, 2]])
    assert torch.allclose(loss.reduced(), expected)
    loss.reduced().backward()
    assert prediction.grad is not None and torch.equal(prediction.grad[1], torch.zeros(S, C))


@pytest.mark.parametrize("fields", [{"loss_mask": torch.zeros(B, S)}, {"present": torch.zeros(B, dtype=torch.bool)}, {"clean": True}])
def test_nothing_to_learn_is_zero(tensors: tuple[Tensor, Tensor], fields: dict[str, object]) -> None:
    prediction, target = tensors
    prediction.requires_grad_(True)
    loss = FlowMatchingLoss("video")(step_state(prediction, target, **fields))
    assert loss.reduced().item() == 0.0 and loss.counted is not None and not bool(loss.counted.any())
    loss.reduced().backward()
    assert prediction.grad is not None and torch.equal(prediction.grad, torch.zeros(B, S, C))


def test_partial_sound_is_not_diluted_by_its_padding(tensors: tuple[Tensor, Tensor]) -> None:
    """An error of e in every token that counts is a loss of e², however few they are; the mean goes over the clips with sound."""
    target = tensors[1]
    errors = torch.tensor([1.0, 2.0, 3.0])
    mask = (torch.arange(S) < torch.tensor([[1], [S], [4]])).float()
    prediction = target + errors[:, None, None] + (1 - mask)[..., None] * 100
    state = step_state(prediction, target, loss_mask=mask, present=torch.tensor([True, True, False]))
    assert float(FlowMatchingLoss("video")(state).reduced()) == pytest.approx((1.0**2 + 2.0**2) / 2, rel=1e-5)


def test_a_batch_without_the_stream_counts_nothing(tensors: tuple[Tensor, Tensor]) -> None:
    loss = FlowMatchingLoss("audio", weight=2.0)(step_state(*tensors))
    assert loss.counted is not None and loss.counted.tolist() == [False] * B
    assert (loss.name, loss.values.tolist(), loss.reduced().item()) == ("audio", [0.0] * B, 0.0)


def test_bfloat16_predictions_are_compared_in_float32(tensors: tuple[Tensor, Tensor]) -> None:
    prediction, target = tensors[0].bfloat16(), tensors[1]
    loss = FlowMatchingLoss("video")(step_state(prediction, target))
    assert loss.values.dtype == torch.float32
    assert torch.allclose(loss.values, (prediction.float() - target).square().mean(dim=(1, 2)))


def test_bands_hold_the_means_by_sigma() -> None:
    bands = SigmaBands()
    assert bands.flush() == {}
    sigma = torch.tensor([0.0, 0.2, 0.25, 1.0])
    noise = Noise({"video": StreamNoise(sigma, torch.zeros(4, 1, 1), torch.zeros(4, 1, 1), torch.zeros(4, 1, 1))})
    values = torch.tensor([1.0, 2.0, 3.0, float("nan")])
    bands.add([LossValue("video", values, counted=torch.tensor([True, True, True, False]), weight=7.0)], noise)
    bands.add([LossValue("video", torch.full((4,), 6.0)), LossValue("extra", torch.tensor([5.0, 7.0]))], noise)
    assert bands.flush() == pytest.approx({
        "loss/video": (1 + 2 + 3 + 4 * 6) / 7, "loss/video/sigma_0.00-0.25": (1 + 2 + 6 + 6) / 4, "loss/video/sigma_0.25-0.50": 4.5,
        "loss/video/sigma_0.75-1.00": 6.0, "loss/extra": 6.0,
    })
    assert bands.flush() == {}


def banded(sigma: float) -> Noise:
    zero = torch.zeros(1, 1, 1)
    return Noise({"audio": StreamNoise(torch.tensor([sigma]), zero, zero, zero)})


@pytest.mark.parametrize("first", [True, False])
def test_batches_without_a_stream_leave_its_bands_as_they_are(first: bool) -> None:
    absent = LossValue("audio", torch.zeros(1), counted=torch.tensor([False]))
    given = [([absent], Noise({})), ([LossValue("audio", torch.tensor([3.0]))], banded(0.4))]
    bands = SigmaBands(bands=2)
    for losses, noise in given if first else reversed(given):
        bands.add(losses, noise)
    assert bands.flush() == {"loss/audio": 3.0, "loss/audio/sigma_0.00-0.50": 3.0}


@pytest.mark.parametrize("main", [0, 1])
def test_totals_of_ranks_add_up_to_those_of_one(main: int) -> None:
    """One rank has sound, the other has not: their totals have one layout, and their sum gives the means over all samples on both."""
    ranks, one = [SigmaBands(), SigmaBands()], SigmaBands()
    absent = LossValue("audio", torch.zeros(1), counted=torch.tensor([False]))
    for own, value, noise in zip(ranks, (LossValue("audio", torch.tensor([3.0])), absent), (banded(0.4), Noise({})), strict=True):
        for bands in (own, one):
            bands.add([value, LossValue("extra", torch.tensor([5.0]))], noise)
    summed = ranks[0].totals() + ranks[1].totals()
    ranks[main].replace(summed)
    assert ranks[main].flush() == one.flush() == {"loss/audio": 3.0, "loss/audio/sigma_0.25-0.50": 3.0, "loss/extra": 5.0}


def test_bands_leave_out_what_was_never_counted() -> None:
    bands = SigmaBands(bands=2)
    noise = Noise({"video": StreamNoise(torch.tensor([0.4]), torch.zeros(1, 1, 1), torch.zeros(1, 1, 1), torch.zeros(1, 1, 1))})
    bands.add([LossValue("video", torch.tensor([1.0]), counted=torch.tensor([False]))], noise)
    assert bands.flush() == {}


def test_taken_means_stay_on_the_device_and_are_nan_where_nothing_was_counted() -> None:
    bands = SigmaBands(bands=2)
    noise = Noise({"video": StreamNoise(torch.tensor([0.4]), torch.zeros(1, 1, 1), torch.zeros(1, 1, 1), torch.zeros(1, 1, 1))})
    bands.add([LossValue("video", torch.tensor([3.0], requires_grad=True))], noise)
    taken = bands.take()
    assert {name: (mean.shape, mean.requires_grad) for name, mean in taken.items()} == dict.fromkeys(taken, (torch.Size([]), False))
    assert taken["loss/video"].item() == taken["loss/video/sigma_0.00-0.50"].item() == 3.0
    assert bool(taken["loss/video/sigma_0.50-1.00"].isnan())
    assert bands.take() == {}


def test_what_is_logged_beside_a_term_is_a_mean_over_the_same_samples() -> None:
    noise = Noise({"video": StreamNoise(torch.tensor([0.1, 0.9]), *[torch.zeros(2, 1, 1)] * 3)})
    bands = SigmaBands()
    measured = {"cosine": torch.tensor([0.25, float("nan")])}
    for _ in range(2):
        bands.add([LossValue("term", torch.tensor([3.0, 5.0]), torch.tensor([True, False]), 7.0, measured)], noise)
    assert bands.flush() == {"loss/term": 3.0, "loss/term/cosine": 0.25}
