"""A mistake in a plugin is that plugin's, by name; what others have made is kept; what takes no part is no matter."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import nn

from core import faulty
from core.faulty import FaultOptions, Fine, FineTerm, Plugin
from tuner.builtins.formats import PeftFormat
from tuner.component import Component
from tuner.errors import NumericError, PluginError, TunerError
from tuner.hookspecs import hookimpl
from tuner.interfaces.losses import LossValue, StepState, Tap, Transform
from tuner.interfaces.memory import QuantizedPart, Quantizer
from tuner.interfaces.services import AdapterState
from tuner.testing.project import TinyProject
from tuner.train.saving.resume import exact_facts

ON = {"fault": "yes", "max_train_steps": 2}


class Named(FineTerm):
    name = "video"


class NamedEncoder(faulty.FineEncoder):
    name = "video"


class Gives(FineTerm):
    """What `given` makes of a right value."""

    given: ClassVar[Any] = None

    def __call__(self, state: StepState) -> LossValue:
        return type(self).given(super().__call__(state))


class BrokenValues(FineTerm):
    def __call__(self, state: StepState) -> LossValue:
        value = super().__call__(state)
        return replace(value, values=value.values * float("nan"))


class Unchecked(Fine):
    def check(self, facts: object) -> Any:
        return ["a text"]


class Raises(Fine):
    def check(self, facts: object) -> Any:
        return facts.nothing  # type: ignore[attr-defined]


class Elsewhere(Fine):
    def taps(self) -> Sequence[Tap]:
        return (Tap("tokens", 1, "vidoe"),)


class Sometime(Fine):
    def transforms(self) -> Sequence[Transform]:
        return (Transform(1, "during", lambda state: state),)  # type: ignore[arg-type]


class Swaps(Quantizer):
    """Puts another module in the place of each layer."""

    name = "swaps"

    def __init__(self, options: FaultOptions, context: object) -> None:
        pass

    def quantize(self, block: nn.Module) -> QuantizedPart:
        name = next(name for name, module in block.named_modules() if isinstance(module, nn.Linear))
        parent, _, own = name.rpartition(".")
        setattr(block.get_submodule(parent), own, nn.Identity())
        return QuantizedPart((name,), 2, 1)

    def bytes_of(self, weight: torch.Size, dtype: torch.dtype) -> int:
        return weight.numel()


class BrokenFormat(PeftFormat):
    name = "fine"

    def write(self, path: Path, adapter: AdapterState, facts: Any) -> None:
        raise KeyError("planned")


class NoFormat(BrokenFormat):
    def write(self, path: Path, adapter: AdapterState, facts: Any) -> None:
        pass


class Quantizers:
    """A plugin with `Swaps`."""

    @hookimpl
    def tuner_register_quantizers(self) -> list[Component]:
        return [Component("swaps", "a fault", FaultOptions, f"{__name__}:Swaps")]


@pytest.mark.parametrize(("kind", "words"), [
    (Named, "loss term: two of this run have one name"),
    (NamedEncoder, "encoder: two of this run have one name"),
    (Unchecked, r"regularizer fine: check must return a list of TunerError \(got 'str'\)"),
    (Raises, "regularizer fine: check failed: AttributeError: .*nothing"),
])  # fmt: skip
def test_mistakes_that_are_found_while_planning(tmp_path: Path, kind: type, words: str) -> None:
    with pytest.raises(TunerError, match=words) as error:
        TinyProject.make(tmp_path, Plugin(kind)).plan(**ON)
    assert error.value.exit_code == 10


@pytest.mark.parametrize(("given", "words"), [
    (lambda value: None, r"must give a LossValue \(got 'NoneType'\)"),
    (lambda value: value.values, r"must give a LossValue \(got 'Tensor'\)"),
    (lambda value: replace(value, values=value.values.mean()), r"must give a number for each sample, \(2,\) float32"),
    (lambda value: replace(value, values=value.values[:, None]), r"float32 \(got '\(2, 1\) float32'\)"),
    (lambda value: replace(value, values=value.values.double()), r"float32 \(got '\(2,\) float64'\)"),
    (lambda value: replace(value, counted=torch.ones(2)), r"`counted` must be \(2,\) bool"),
])  # fmt: skip
def test_what_a_loss_term_may_not_give(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, given: Any, words: str) -> None:
    monkeypatch.setattr(Gives, "given", staticmethod(given))
    with pytest.raises(PluginError, match=f"loss term fine: .*{words}"):
        TinyProject.make(tmp_path, Plugin(Gives)).train(**ON)


@pytest.mark.parametrize(("kind", "words"), [
    (Elsewhere, r"regularizer fine: there are the streams video, audio \(got 'tap of vidoe'\)"),
    (Sometime, r"regularizer fine: a transform is called before or after a block \(got 'during'\)"),
])  # fmt: skip
def test_mistakes_that_are_found_when_it_trains(tmp_path: Path, kind: type, words: str) -> None:
    with pytest.raises(PluginError, match=words):
        TinyProject.make(tmp_path, Plugin(kind)).train(**ON)


def test_a_quantizer_that_takes_layers_away_from_the_adapters(tmp_path: Path) -> None:
    with pytest.raises(PluginError, match=r"quantizer swaps: 1 linear layers of block 0 are no nn\.Linear any more"):
        TinyProject.make(tmp_path, Quantizers()).train(base_model_precision="swaps", max_train_steps=2)


def test_the_term_that_is_no_number_is_named(tmp_path: Path) -> None:
    project = TinyProject.make(tmp_path, Plugin(BrokenValues))
    with pytest.raises(NumericError, match="loss is not finite at step 1, because of the term fine"):
        project.train(**ON)
    assert project.metrics()[0]["loss/fine"] is None and project.metrics()[0]["loss/video"] > 0


@pytest.mark.parametrize(("kind", "words"), [(BrokenFormat, "write failed: KeyError: 'planned'"), (NoFormat, "write has made no file")])
def test_a_format_that_fails_takes_no_other_file_along(tmp_path: Path, kind: type, words: str) -> None:
    project = TinyProject.make(tmp_path, Plugin(kind))
    with pytest.raises(PluginError, match=f"checkpoint format fine: {words}"):
        project.train(max_train_steps=2)
    assert {path.name for path in (tmp_path / "out").glob("*.safetensors")} == {"pytorch_lora_weights.safetensors"}


def test_a_plugin_that_takes_no_part_forbids_no_resume(tmp_path: Path) -> None:
    alone, beside = TinyProject.make(tmp_path), TinyProject.make(tmp_path, Plugin(Fine))
    facts = [exact_facts(project.plan(max_train_steps=2), 1) for project in (alone, beside)]
    assert json.dumps(facts[0]) == json.dumps(facts[1])
    taking = exact_facts(beside.plan(**ON), 1)
    assert "fault_weight" in taking["settings"] and "fault_weight" not in facts[1]["settings"]  # type: ignore[operator]
    assert len(taking["versions"]) == len(facts[1]["versions"]) + 1  # type: ignore[arg-type]
    alone.train(max_train_steps=2, lr_scheduler="constant")
    assert beside.train(max_train_steps=3, lr_scheduler="constant", resume_from_checkpoint="latest").step == 3


def test_samples_that_are_not_counted_may_be_no_number() -> None:
    values = torch.tensor([1.0, float("nan")], requires_grad=True)
    for counted, wanted in (([True, False], 1.0), ([False, False], 0.0)):
        assert LossValue("x", values, torch.tensor(counted)).reduced().item() == wanted

