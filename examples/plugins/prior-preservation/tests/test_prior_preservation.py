"""Which samples count where, towards what they are trained, and what is refused."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from torch import Tensor

from tuner.interfaces.family import Batch, BuildContext, Noise, Prediction, Sample, StreamBatch, StreamNoise
from tuner.interfaces.losses import ExtraPass, ForwardPasses, LossValue, StepState, Tap, TrainingFacts
from tuner.testing import RegularizerConformance
from tuner.testing.conformance import shared_folder
from tuner_prior_preservation import plugin
from tuner_prior_preservation.options import PriorPreservationOptions
from tuner_prior_preservation.prior import PriorPreservation

FACTS = TrainingFacts(4, (0, 1, 2, 3), ("video",), ("video",), (), False, ("anna", "faces"))
CONTEXT = BuildContext(torch.device("cpu"), torch.float32, 0, 0, Path())
TOKENS, CHANNELS = 4, 3


def options(**changes: object) -> PriorPreservationOptions:
    return PriorPreservationOptions.model_validate({"prior_dataset": "faces", "prior_weight": 0.5, **changes})


class Line(ForwardPasses):
    """A model whose velocity is (base + adapter) · x; the adapter is what is trained."""

    def __init__(self) -> None:
        self.base, self.adapter = 0.7, torch.tensor(0.2, requires_grad=True)
        self.passes = 0

    def predict(self, noise: Noise, adapter: bool) -> dict[str, Tensor]:
        return {name: (self.base + self.adapter * adapter) * draw.noisy for name, draw in noise.streams.items()}

    @torch.no_grad()
    def run(
        self, batch: Batch, noise: Noise, *, adapter: bool = True, weights: Mapping[str, Tensor] | None = None, taps: Sequence[Tap] = ()
    ) -> ExtraPass:
        assert not adapter and weights is None and not taps
        self.passes += 1
        return ExtraPass(Prediction(self.predict(noise, False)), {})

    def trained(self) -> Mapping[str, Tensor]:
        return {"adapter": self.adapter.detach()}


def draw(datasets: Sequence[str], streams: Sequence[str] = ("video",), seed: int = 0) -> tuple[Batch, Noise]:
    drawn, count = torch.Generator().manual_seed(seed), len(datasets)
    samples = tuple(Sample("k", dataset, 0, 0, 25.0, 9, 32, 32, {}) for dataset in datasets)
    parts, noises = {}, {}
    for name in streams:
        noisy = torch.randn(count, TOKENS, CHANNELS, generator=drawn)
        parts[name], noises[name] = StreamBatch(noisy, (TOKENS, 1, 1)), StreamNoise(torch.full((count,), 0.5), noisy, noisy, noisy)
    return Batch(samples, parts, {}, (25.0,) * count), Noise(noises)


def built(**changes: object) -> tuple[PriorPreservation, Line]:
    technique, model = PriorPreservation(options(**changes), CONTEXT), Line()
    technique.connect(model)
    return technique, model


def value(technique: PriorPreservation, model: Line, batch: Batch, noise: Noise) -> tuple[LossValue, StepState]:
    technique.begin_step(0, batch, noise, torch.Generator())
    state = StepState(batch, noise, Prediction(model.predict(noise, True)))
    (term,) = technique.loss_terms()
    return term(state), state


def test_samples_of_the_dataset_are_drawn_to_the_base_model() -> None:
    technique, model = built()
    batch, noise = draw(["anna", "faces", "faces"], ("video", "audio"))
    found, _ = value(technique, model, batch, noise)
    assert found.counted is not None and found.counted.tolist() == [False, True, True] and model.passes == 1
    # v - v_base = adapter · x
    expected = sum((0.2 * draw.noisy[1:]).square().mean() for draw in noise.streams.values())
    torch.testing.assert_close(found.reduced(), 0.5 * expected)
    found.reduced().backward()
    slope = sum(2 * 0.2 * draw.noisy[1:].square().mean() for draw in noise.streams.values())
    torch.testing.assert_close(model.adapter.grad, 0.5 * slope)


def test_tokens_and_streams_outside_the_loss_do_not_count() -> None:
    technique, model = built()
    batch, noise = draw(["faces", "faces"], ("video", "audio"))
    given = torch.tensor([[True, False, False, False]] * 2)
    mask = torch.tensor([[1.0, 1.0, 0.5, 0.0]] * 2)
    video = replace(batch.streams["video"], conditioned=given, loss_mask=mask, present=torch.tensor([True, False]))
    batch = replace(batch, streams={"video": video, "audio": replace(batch.streams["audio"], clean=True)})
    found, _ = value(technique, model, batch, noise)
    squares = (0.2 * noise.streams["video"].noisy[0]).square().mean(dim=1)
    torch.testing.assert_close(found.values, torch.stack([(squares[1] + 0.5 * squares[2]) / 1.5, torch.tensor(0.0)]))


def test_they_are_taken_out_of_the_ordinary_losses_alone() -> None:
    technique, model = built()
    batch, noise = draw(["anna", "faces", "anna"])
    own, state = value(technique, model, batch, noise)
    ordinary = LossValue("video", torch.tensor([1.0, 100.0, 3.0]))
    some = replace(ordinary, counted=torch.tensor([True, True, False]))
    weighed = technique.weigh([ordinary, some, own], state)
    assert weighed[0].reduced() == 2.0 and weighed[1].reduced() == 1.0 and weighed[2] is own
    assert ordinary.reduced() > 30


def test_a_batch_without_them_costs_nothing_and_changes_nothing() -> None:
    technique, model = built()
    batch, noise = draw(["anna", "anna"])
    own, state = value(technique, model, batch, noise)
    values = [LossValue("video", torch.ones(2)), own]
    assert model.passes == 0 and own.reduced() == 0 and technique.weigh(values, state) is values
    keys = [technique.graph_key()]
    value(technique, model, *draw(["faces", "anna"]))
    keys.append(technique.graph_key())
    assert keys == [False, True]


def test_batches_of_one_shape_write_into_the_same_tensors() -> None:
    """A captured step reads them where they lay when it was captured."""
    technique, model = built()
    places, masks = [], []
    for seed, datasets in enumerate((["faces", "anna"], ["faces"], ["anna", "faces"])):
        value(technique, model, *draw(datasets, seed=seed))
        assert technique.kept is not None
        places.append((technique.kept.data_ptr(), technique.targets["video"].data_ptr()))
        masks.append(technique.kept.tolist())
    assert places[0] == places[2] != places[1] and masks == [[True, False], [True], [False, True]]


@pytest.mark.parametrize(
    ("changes", "facts", "words"),
    [
        ({"prior_dataset": "face"}, {}, ["prior_dataset", "'face'", "did you mean faces?"]),
        ({"prior_dataset": "other"}, {}, ["prior_dataset", "there are: anna, faces"]),
        ({}, {"full_finetuning": True}, ["prior_dataset, model_type", "no base model", "model_type to lora"]),
        ({}, {"datasets": ("faces",)}, ["prior_dataset", "only dataset", "second entry"]),
    ],
)
def test_mistakes_are_named_while_planning(changes: dict[str, object], facts: dict[str, object], words: list[str]) -> None:
    (problem,) = PriorPreservation(options(**changes), CONTEXT).check(replace(FACTS, **facts))  # type: ignore[arg-type]
    assert all(word in str(problem) for word in words)
    assert not PriorPreservation(options(), CONTEXT).check(FACTS)
    assert PriorPreservation(options(), CONTEXT).describe(FACTS).startswith("faces follows the base model")


def test_it_is_off_unless_asked_for() -> None:
    assert not PriorPreservationOptions().enabled() and options().enabled()


class TestConformance(RegularizerConformance):
    plugin = plugin
    component = "prior"
    refused: ClassVar = [({"prior_dataset": "face"}, "prior_dataset"), ({"model_type": "full"}, "prior_dataset, model_type")]

    @property
    def options(self) -> Mapping[str, object]:  # type: ignore[override]
        """Every clip is in both datasets."""
        file = shared_folder() / "prior.json"
        file.write_text(json.dumps([{"id": name, "instance_data_dir": str(shared_folder() / "clips")} for name in ("anna", "faces")]))
        return {"prior_dataset": "faces", "data": None, "data_backend_config": str(file)}
