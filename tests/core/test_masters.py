"""Master weights: exact float32 accumulation, rounding into the model, norms."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from tuner.builtins.optimizers import AdamW
from tuner.builtins.options import AdamOptions
from tuner.errors import CheckpointError
from tuner.train.masters import MasterWeights


def two_parameters() -> dict[str, nn.Parameter]:
    draws = torch.Generator().manual_seed(0)
    return {
        "a.low": nn.Parameter(torch.randn(4, 3, generator=draws).bfloat16()),
        "b.full": nn.Parameter(torch.randn(5, generator=draws)),
    }


def test_only_bfloat16_parameters_get_a_copy() -> None:
    params = two_parameters()
    low, full = MasterWeights(params, low_precision=False).optimized()
    assert low is not params["a.low"] and low.dtype == torch.float32
    assert torch.equal(low, params["a.low"].float().flatten())
    assert full is params["b.full"]
    assert MasterWeights(params, low_precision=True).optimized() == list(params.values())


def test_gradients_of_batches_add_up_in_float32() -> None:
    params = two_parameters()
    masters = MasterWeights(params, low_precision=False)
    small = torch.full((4, 3), 2.0**-10, dtype=torch.bfloat16)
    for gradient in (torch.ones(4, 3, dtype=torch.bfloat16), small, small):
        params["a.low"].grad = gradient
        masters.collect()
        assert params["a.low"].grad is None
    # In bfloat16, 1 + 2**-10 is 1.
    low, full = masters.optimized()
    assert low.grad is not None and torch.equal(low.grad, torch.full((12,), 1 + 2.0**-9))
    assert full.grad is None


def test_gradients_are_found_by_name() -> None:
    params = two_parameters()
    masters = MasterWeights(params, low_precision=False)
    assert masters.gradients() == {}
    for parameter in params.values():
        parameter.grad = torch.arange(parameter.numel(), dtype=parameter.dtype).view(parameter.shape)
    masters.collect()
    found = masters.gradients()
    assert list(found) == ["a.low", "b.full"]
    for name, parameter in params.items():
        assert torch.equal(found[name], torch.arange(parameter.numel()).view(parameter.shape).float())


def test_publish_rounds_small_updates_into_the_model_once_they_add_up() -> None:
    weight = nn.Parameter(torch.ones(3, dtype=torch.bfloat16))
    storage = weight.data_ptr()
    masters = MasterWeights({"w": weight}, low_precision=False)
    optimizer = AdamW(masters.optimized(), 1e-3, AdamOptions(adam_weight_decay=0.0))
    seen = []
    for _ in range(8):
        weight.grad = torch.ones_like(weight)
        masters.collect()
        optimizer.step()
        optimizer.zero_grad()
        masters.publish()
        seen.append(weight.detach()[0].item())
    assert seen[0] == 1.0  # 0.999 is nearer to 1 than to 1 - 1/256
    assert masters.state()["w"][0].item() == pytest.approx(1 - 8e-3, abs=1e-6)
    assert seen[-1] == torch.tensor(1 - 8e-3).bfloat16().item()
    assert weight.data_ptr() == storage and masters.optimized()[0].grad is None


@pytest.mark.parametrize("low_precision", [True, False])
def test_clip_measures_and_scales(low_precision: bool) -> None:
    params = two_parameters()
    masters = MasterWeights(params, low_precision)
    for parameter in params.values():
        parameter.grad = torch.ones_like(parameter)
    masters.collect()
    total = masters.clip_(0)
    assert total.dtype == torch.float32 and total.item() == pytest.approx(17**0.5, rel=1e-6)
    assert masters.clip_(0).item() == total.item()
    masters.clip_(2.0)
    assert masters.clip_(0).item() == pytest.approx(2.0, rel=4e-3 if low_precision else 1e-5)
    masters.clip_(100.0)
    assert masters.clip_(0).item() == pytest.approx(2.0, rel=4e-3 if low_precision else 1e-5)


def test_buckets_hold_many_parameters_and_split_by_size(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tuner.train.masters.BUCKET_ELEMENTS", 10)
    draws = torch.Generator().manual_seed(1)
    params = {f"p{i}": nn.Parameter(torch.randn(shape, generator=draws).bfloat16()) for i, shape in enumerate([(2, 3), (4,), (5, 5), (1,)])}
    masters = MasterWeights(params, low_precision=False)
    assert [master.numel() for master in masters.optimized()] == [10, 25, 1]
    assert {name: tuple(value.shape) for name, value in masters.state().items()} == {name: tuple(p.shape) for name, p in params.items()}
    for index, parameter in enumerate(params.values()):
        if index != 1:
            parameter.grad = torch.full_like(parameter, float(index + 1))
    masters.collect()
    first = masters.optimized()[0].grad
    assert first is not None and first.tolist() == [1.0] * 6 + [0.0] * 4
    with torch.no_grad():
        for master in masters.optimized():
            master.fill_(7.0)
    masters.publish()
    assert all((parameter == 7).all() for parameter in params.values())


def test_clip_without_gradients_is_zero() -> None:
    assert MasterWeights(two_parameters(), low_precision=False).clip_(1.0).item() == 0.0


def test_state_round_trip_restores_masters_and_model() -> None:
    source = MasterWeights(two_parameters(), low_precision=False)
    with torch.no_grad():
        for master in source.optimized():
            master.add_(1e-4)
    params = two_parameters()
    target = MasterWeights(params, low_precision=False)
    state = source.state()
    assert list(state) == ["a.low", "b.full"] and state["a.low"].dtype == torch.float32
    target.load_state(state)
    for one, other in zip(source.optimized(), target.optimized(), strict=True):
        assert torch.equal(one, other)
    assert torch.equal(params["a.low"], state["a.low"].bfloat16())
    assert torch.equal(params["b.full"], state["b.full"])


def test_a_state_that_does_not_fit_is_refused() -> None:
    masters = MasterWeights(two_parameters(), low_precision=False)
    state = masters.state()
    with pytest.raises(CheckpointError, match=r"a\.low: 1 trained tensors differ; the first is missing"):
        masters.load_state({"b.full": state["b.full"]})
    with pytest.raises(CheckpointError, match=r"c\.new: .*trained only in"):
        masters.load_state({**state, "c.new": state["b.full"]})
    with pytest.raises(CheckpointError, match=r"b\.full: stored as torch\.float32 \(6,\)"):
        masters.load_state({**state, "b.full": torch.zeros(6)})
    with pytest.raises(CheckpointError, match=r"a\.low: stored as torch\.bfloat16"):
        masters.load_state({**state, "a.low": state["a.low"].bfloat16()})
