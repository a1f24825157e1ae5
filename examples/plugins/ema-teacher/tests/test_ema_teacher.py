"""The average and the term against formulas written out here; the teacher sees less noise, learns nothing, and is resumed exactly."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from torch import Tensor

from tuner.errors import CheckpointError
from tuner.interfaces.family import Batch, BuildContext, Noise, Prediction, Sample, StreamBatch, StreamNoise
from tuner.interfaces.losses import ExtraPass, ForwardPasses, StepState, Tap, TapValue, TrainingFacts
from tuner.testing import RegularizerConformance
from tuner_ema_teacher import plugin
from tuner_ema_teacher.options import EmaTeacherOptions
from tuner_ema_teacher.teacher import STUDENT, EmaTeacher, chosen_blocks, with_less_noise

FACTS = TrainingFacts(6, tuple(range(6)), ("video", "audio"), ("video", "audio"), (), False, ("clips",))
CONTEXT = BuildContext(torch.device("cpu"), torch.float32, 0, 0, Path())
TOKENS, CHANNELS = 5, 3


def options(**changes: object) -> EmaTeacherOptions:
    return EmaTeacherOptions.model_validate({"ema_teacher_weight": 0.5, "ema_teacher_decay": 0.75, **changes})


class Matrix(ForwardPasses):
    """A model of one matrix: a tap's tokens are the noisy ones times it, each channel bent; it is what is trained."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        self.weight = torch.randn(CHANNELS, CHANNELS, generator=torch.Generator().manual_seed(3)).to(dtype).requires_grad_()
        self.seen: list[tuple[Noise, tuple[Tap, ...]]] = []

    def tokens(self, noise: Noise, weight: Tensor) -> Tensor:
        return (noise.streams["video"].noisy @ weight.float()).sin()

    @torch.no_grad()
    def run(
        self, batch: Batch, noise: Noise, *, adapter: bool = True, weights: Mapping[str, Tensor] | None = None, taps: Sequence[Tap] = ()
    ) -> ExtraPass:
        assert adapter and weights is not None and weights.keys() == {"w"}
        self.seen.append((noise, tuple(taps)))
        value = TapValue(self.tokens(noise, weights["w"]), (1, 1, TOKENS), None)
        return ExtraPass(Prediction({}), {tap.name: value for tap in taps})

    def trained(self) -> Mapping[str, Tensor]:
        return {"w": self.weight.detach()}


def draw(seed: int = 0, count: int = 2, **fields: object) -> tuple[Batch, Noise]:
    drawn = torch.Generator().manual_seed(seed)
    x0, eps = torch.randn(2, count, TOKENS, CHANNELS, generator=drawn)
    sigma = torch.linspace(0.3, 0.9, count)
    noisy = (1 - sigma)[:, None, None] * x0 + sigma[:, None, None] * eps
    stream = StreamBatch(x0, (1, 1, TOKENS), **fields)  # type: ignore[arg-type]
    samples = (Sample("k", "d", 0, 0, 25.0, 9, 32, 32, {}),) * count
    return Batch(samples, {"video": stream}, {}, (25.0,) * count), Noise({"video": StreamNoise(sigma, noisy, eps - x0, eps)})


def built(model: Matrix, **changes: object) -> EmaTeacher:
    teacher = EmaTeacher(options(**changes), CONTEXT)
    teacher.connect(model)
    return teacher


def begin(teacher: EmaTeacher, batch: Batch, noise: Noise) -> None:
    teacher.begin_step(0, batch, noise, torch.Generator())


def cosine(a: Tensor, b: Tensor) -> Tensor:
    return (a * b).sum(-1) / (a.norm(dim=-1) * b.norm(dim=-1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_average_follows_the_weights(dtype: torch.dtype) -> None:
    model = Matrix(dtype)
    teacher = built(model)
    expected = model.weight.detach().float().clone()
    for step in range(5):
        with torch.no_grad():
            model.weight.add_(torch.randn(CHANNELS, CHANNELS, generator=torch.Generator().manual_seed(step)))
        teacher.after_step(step)
        expected = 0.75 * expected + 0.25 * model.weight.detach().float()
    found = teacher.state_dict()["w"]
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, expected)


def test_the_term_is_the_mean_cosine_with_the_averaged_teacher() -> None:
    model, (batch, noise) = Matrix(), draw()
    teacher = built(model)
    with torch.no_grad():
        model.weight.mul_(-0.5)
    teacher.after_step(0)
    average = teacher.state_dict()["w"].clone()
    begin(teacher, batch, noise)
    (term,) = teacher.loss_terms()
    student = model.tokens(noise, model.weight)
    value = term(StepState(batch, noise, Prediction({}), {STUDENT: TapValue(student, (1, 1, TOKENS), None)}))
    video, x0 = noise.streams["video"], batch.streams["video"].latents
    level = video.sigma[:, None, None] / 2
    target = (((1 - level) * x0 + level * video.noise) @ average).sin()
    torch.testing.assert_close(value.values, 1 - cosine(student, target).mean(dim=1))
    value.reduced().backward()
    copy = model.weight.detach().clone().requires_grad_()
    (0.5 * (1 - cosine(model.tokens(noise, copy), target).mean())).backward()
    torch.testing.assert_close(model.weight.grad, copy.grad)
    assert not any(tensor.requires_grad for tensor in teacher.state_dict().values())


def test_inside_a_route_each_token_is_compared_with_the_same_one() -> None:
    model, (batch, noise) = Matrix(), draw()
    teacher = built(model)
    begin(teacher, batch, noise)
    (term,) = teacher.loss_terms()
    ids = torch.tensor([[4, 0], [1, 3]])
    hidden = torch.randn(2, 2, CHANNELS, generator=torch.Generator().manual_seed(9))
    value = term(StepState(batch, noise, Prediction({}), {STUDENT: TapValue(hidden, (1, 1, TOKENS), ids)}))
    assert teacher.target is not None
    expected = [1 - cosine(hidden[row], teacher.target[row, ids[row]]).mean() for row in range(2)]
    torch.testing.assert_close(value.values, torch.stack(expected))


def test_the_teacher_sees_less_noise_but_given_tokens_as_they_are() -> None:
    given = torch.tensor([[True, False, False, False, False]] * 2)
    batch, noise = draw(conditioned=given)
    cleaner = with_less_noise(batch, noise, 0.25).streams["video"]
    video, x0 = noise.streams["video"], batch.streams["video"].latents
    torch.testing.assert_close(cleaner.sigma, video.sigma / 4)
    level = (video.sigma / 4)[:, None, None]
    torch.testing.assert_close(cleaner.noisy[:, 1:], ((1 - level) * x0 + level * video.noise)[:, 1:])
    assert torch.equal(cleaner.noisy[:, 0], x0[:, 0])
    assert with_less_noise(batch, noise, 1.0) is noise
    whole, _ = draw(clean=True)
    assert with_less_noise(whole, noise, 0.25).streams["video"] is noise.streams["video"]


def test_batches_of_one_shape_write_into_one_tensor() -> None:
    """A captured step reads the targets where they lay when it was captured."""
    model = Matrix()
    teacher = built(model)
    places = []
    for seed, count in ((0, 2), (1, 3), (2, 2)):
        begin(teacher, *draw(seed, count))
        assert teacher.target is not None
        places.append((teacher.target.data_ptr(), teacher.target.shape[0]))
        torch.testing.assert_close(teacher.target, model.tokens(model.seen[-1][0], model.weight.detach()))
    assert places[0] == places[2] != places[1]
    assert teacher.graph_key() is None


def test_without_the_stream_there_is_no_pass_and_nothing_counts() -> None:
    model, (batch, noise) = Matrix(), draw()
    teacher = built(model, ema_teacher_stream="audio")
    begin(teacher, batch, noise)
    (term,) = teacher.loss_terms()
    value = term(StepState(batch, noise, Prediction({"video": torch.zeros(2, TOKENS, CHANNELS)})))
    assert not model.seen and value.reduced().item() == 0
    teacher = built(model)
    begin(teacher, batch, noise)
    half = replace(batch, streams={"video": replace(batch.streams["video"], present=torch.tensor([True, False]))})
    (term,) = teacher.loss_terms()
    tap = TapValue(model.tokens(noise, model.weight), (1, 1, TOKENS), None)
    assert term(StepState(half, noise, Prediction({}), {STUDENT: tap})).counted is half.streams["video"].present


def test_its_state_comes_back_and_other_weights_are_refused() -> None:
    model = Matrix()
    first, second = built(model), built(model)
    with torch.no_grad():
        model.weight.add_(1)
    first.after_step(0)
    saved = {name: tensor.clone() for name, tensor in first.state_dict().items()}
    second.load_state_dict(saved)
    for teacher in (first, second):
        teacher.after_step(1)
    assert torch.equal(first.state_dict()["w"], second.state_dict()["w"])
    for wrong in ({}, {"w": torch.zeros(2)}, {**saved, "v": torch.zeros(1)}):
        with pytest.raises(CheckpointError, match="ema_teacher_weight"):
            second.load_state_dict(wrong)
    second.detach()
    assert second.state_dict() == {} and second.target is None


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"ema_teacher_block": 6}, ["ema_teacher_block", "0 to 5", "6"]),
        ({"ema_teacher_target_block": -7}, ["ema_teacher_target_block", "-6 to -1"]),
        ({"ema_teacher_stream": "sound"}, ["ema_teacher_stream", "sound", "video, audio"]),
    ],
)
def test_mistakes_are_named_while_planning(changes: dict[str, object], words: list[str]) -> None:
    (problem,) = EmaTeacher(options(**changes), CONTEXT).check(FACTS)
    assert all(word in str(problem) for word in words)


def test_a_block_below_all_that_is_trained_is_refused() -> None:
    (problem,) = EmaTeacher(options(), CONTEXT).check(replace(FACTS, trained_blocks=(4, 5)))
    assert "ema_teacher_block" in str(problem) and "from 4 on" in str(problem)
    assert not EmaTeacher(options(), CONTEXT).check(FACTS)
    assert "of block 2 follow block 4 of an average (decay 0.75) at 0.5 of" in EmaTeacher(options(), CONTEXT).describe(FACTS)
    assert chosen_blocks(options(), 48) == (16, 32) and chosen_blocks(options(ema_teacher_block=-1), 6) == (5, 4)


def test_it_is_off_unless_asked_for() -> None:
    assert not EmaTeacherOptions().enabled() and options().enabled()


class TestConformance(RegularizerConformance):
    plugin = plugin
    component = "ema_teacher"
    options: ClassVar = {"ema_teacher_weight": 0.5, "ema_teacher_decay": 0.5}
    zero: ClassVar = {"ema_teacher_weight": 0.0}
    refused: ClassVar = [({"ema_teacher_block": -5}, "ema_teacher_block"), ({"ema_teacher_stream": "sound"}, "ema_teacher_stream")]


class TestConformanceOnSound(RegularizerConformance):
    plugin = plugin
    component = "ema_teacher"
    options: ClassVar = {"ema_teacher_weight": 0.5, "ema_teacher_stream": "audio", "ema_teacher_sigma_scale": 1.0}
