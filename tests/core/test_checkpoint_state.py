"""Optimizer states through files and back: an optimizer that goes on from one makes the very same steps."""

from __future__ import annotations

import json
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from tuner.errors import CheckpointError
from tuner.train.saving.checkpoint import flatten_state, load_checkpoint, restore_state, save_checkpoint


def adamw_8bit(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    """An optimizer whose states are wrapper tensors."""
    optimizer: torch.optim.Optimizer = pytest.importorskip("torchao.optim").AdamW8bit(parameters, lr=1e-2)
    return optimizer


def through_file(state: dict[str, Any], folder: Path) -> Any:
    """What comes back from a checkpoint on disk."""
    tensors, description = flatten_state(state)
    loaded = load_checkpoint(save_checkpoint(folder, 1, {"optimizer": tensors}, {"optimizer": description}, keep=1))
    return restore_state(loaded.parts["optimizer"], loaded.facts["optimizer"])


def run(optimizer: torch.optim.Optimizer, parameters: list[nn.Parameter], first: int, last: int) -> None:
    """Steps whose gradients depend on nothing but the step's number."""
    for step in range(first, last):
        generator = torch.Generator().manual_seed(step)
        for parameter in parameters:
            parameter.grad = torch.randn(parameter.shape, generator=generator)
        torch.manual_seed(step)  # stochastic rounding draws from the global generator
        optimizer.step()


def new_parameters() -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    # 4096 elements: from there on torchao keeps 8-bit states
    return [nn.Parameter(torch.randn(64, 64, generator=generator)), nn.Parameter(torch.randn(5, generator=generator))]


OPTIMIZERS: dict[str, Callable[[list[nn.Parameter]], torch.optim.Optimizer]] = {
    "AdamW": lambda parameters: torch.optim.AdamW(parameters, lr=1e-2, betas=(0.8, 0.99)),
    "AdamW, two groups, tensor rate": lambda parameters: torch.optim.AdamW(
        [{"params": parameters[:1], "lr": torch.tensor(1e-2)}, {"params": parameters[1:], "weight_decay": 0.0}], amsgrad=True, foreach=False
    ),
    "SGD": lambda parameters: torch.optim.SGD(parameters, lr=1e-2, momentum=0.9),
    "Adafactor": lambda parameters: torch.optim.Adafactor(parameters, lr=1e-2),
    "AdamW8bit": adamw_8bit,
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_restored_optimizer_makes_the_same_steps(tmp_path: Path, name: str) -> None:
    make = OPTIMIZERS[name]
    with torch.compiler.set_stance("force_eager"):
        whole = new_parameters()
        optimizer = make(whole)
        run(optimizer, whole, 0, 3)
        resumed = [nn.Parameter(parameter.detach().clone()) for parameter in whole]
        restored = make(resumed)
        restored.load_state_dict(through_file(optimizer.state_dict(), tmp_path))
        cold = [nn.Parameter(parameter.detach().clone()) for parameter in whole]
        run(optimizer, whole, 3, 6)
        run(restored, resumed, 3, 6)
        run(make(cold), cold, 3, 6)
    assert all(torch.equal(a, b) for a, b in zip(whole, resumed, strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(whole, cold, strict=True))


def test_wrapper_tensor_keeps_class_and_parts(tmp_path: Path) -> None:
    parameters = new_parameters()
    with torch.compiler.set_stance("force_eager"):
        optimizer = adamw_8bit(parameters)
        run(optimizer, parameters, 0, 2)
    saved = optimizer.state_dict()["state"][0]["exp_avg_sq"]
    back = through_file(optimizer.state_dict(), tmp_path)["state"][0]["exp_avg_sq"]
    assert type(back) is type(saved)
    assert type(back).__name__ == "OptimState8bit"
    assert (back.shape, back.dtype, back.signed, back.block_size) == (saved.shape, saved.dtype, saved.signed, saved.block_size)
    for attribute in ("codes", "scale", "qmap"):
        assert torch.equal(getattr(back, attribute), getattr(saved, attribute))
    assert not back.signed
    assert back.codes.count_nonzero() > 0


def test_schedule_state(tmp_path: Path) -> None:
    parameters = new_parameters()
    optimizer = torch.optim.SGD(parameters, lr=1.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (step + 1))
    for _ in range(3):
        optimizer.step()
        schedule.step()
    assert through_file(schedule.state_dict(), tmp_path) == schedule.state_dict()


scalars = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text()
trees = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=3)
    | st.lists(inner, max_size=3).map(tuple)
    | st.dictionaries(st.integers() | st.text() | st.booleans() | st.none(), inner, max_size=3),
    max_leaves=10,
)


def same(a: object, b: object) -> bool:
    """Equal in value and in type, all the way down; the order of dicts too."""
    if type(a) is not type(b):
        return False
    if isinstance(a, dict) and isinstance(b, dict):
        return len(a) == len(b) and all(same(x, y) for x, y in zip(a.items(), b.items(), strict=True))
    if isinstance(a, list | tuple) and isinstance(b, list | tuple):
        return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))
    return a == b


@settings(max_examples=40, deadline=None)
@given(st.dictionaries(st.integers() | st.text(), trees, max_size=4))
def test_every_nesting_comes_back_through_json(state: dict[Any, Any]) -> None:
    tensors, description = flatten_state(state)
    assert tensors == {}
    assert same(restore_state({}, json.loads(json.dumps(description))), state)


def test_names_that_would_meet_stay_apart() -> None:
    inner = {"b": torch.ones(1), 0: torch.full((1,), 2.0), "0": torch.full((1,), 3.0)}
    state = {"a.b": torch.zeros(1), "a": inner, "": OrderedDict(x=nn.Parameter(torch.ones(2)))}
    tensors, description = flatten_state(state)
    assert len(tensors) == 5
    back = restore_state(tensors, json.loads(json.dumps(description)))
    assert [back["a.b"], back["a"]["b"], back["a"][0], back["a"]["0"]] == [torch.tensor([float(n)]) for n in range(4)]
    assert torch.equal(back[""]["x"], torch.ones(2))


class Foreign(torch.Tensor):
    """A tensor class that no file may ask for."""


@pytest.mark.parametrize("value", [print, {1, 2}, {"x": {(1, 2): 3}}, torch.zeros(2).as_subclass(Foreign), torch.device("cpu")])
def test_what_needs_pickle_is_refused(value: object) -> None:
    with pytest.raises(TypeError, match="without pickle"):
        flatten_state({"inner": value})


@pytest.mark.parametrize(
    "description",
    [
        {"dict": [["a", {"tensor": "absent"}]]},
        {"unknown": 1},
        {"dtype": "zeros"},
        {"dtype": "no_such"},
        {"subclass": "os:system", "inner": {}, "context": None, "size": [], "stride": []},
        {"subclass": "torch:Tensor", "inner": {}, "context": None, "size": [], "stride": []},
        {"subclass": "torch.hub:load", "inner": {}, "context": None, "size": [], "stride": []},
        {"subclass": "torch.absent:X", "inner": {}, "context": None, "size": [], "stride": []},
    ],
)
def test_damaged_or_hostile_description_is_a_checkpoint_error(description: Any) -> None:
    with pytest.raises(CheckpointError, match="cannot be put together"):
        restore_state({}, description)
