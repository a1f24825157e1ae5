"""Optimizers against torch's AdamW; stochastic rounding against the value it rounds."""

from __future__ import annotations

import io
import sys
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from tuner.builtins import optimizers
from tuner.builtins.optimizers import AdamW, AdamW8bit, AdamWBF16, round_stochastically, split_by_size
from tuner.builtins.options import AdamOptions
from tuner.errors import EnvironmentProblem

OPTIONS = AdamOptions(adam_beta1=0.8, adam_beta2=0.95, adam_epsilon=1e-6, adam_weight_decay=0.1)
SHAPES = ((3, 4), (5,), (2, 2, 2))


def parameters(dtype: torch.dtype = torch.float32) -> list[nn.Parameter]:
    draws = torch.Generator().manual_seed(0)
    return [nn.Parameter(torch.randn(shape, generator=draws).to(dtype)) for shape in SHAPES]


def give_gradients(params: list[nn.Parameter], step: int) -> None:
    draws = torch.Generator().manual_seed(100 + step)
    for parameter in params:
        parameter.grad = torch.randn(parameter.shape, generator=draws).to(parameter.dtype)


def reference(params: list[nn.Parameter]) -> torch.optim.AdamW:
    return torch.optim.AdamW(params, lr=0.03, betas=(0.8, 0.95), eps=1e-6, weight_decay=0.1, foreach=False)


@pytest.mark.parametrize("make", [AdamW, AdamWBF16])
def test_float32_weights_follow_adamw(make: Callable[..., torch.optim.Optimizer]) -> None:
    ours, theirs = parameters(), parameters()
    optimizer, oracle = make(ours, 0.03, OPTIONS), reference(theirs)
    for step in range(20):
        give_gradients(ours, step)
        give_gradients(theirs, step)
        if step == 5:  # a parameter without a gradient is left alone and counts its own steps
            ours[1].grad = theirs[1].grad = None
        optimizer.step()
        oracle.step()
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, other, rtol=0, atol=1e-6)


def test_chunks_do_not_change_the_update(monkeypatch: pytest.MonkeyPatch) -> None:
    whole, pieces = parameters(), parameters()
    for params, limit in ((whole, 1 << 24), (pieces, 6)):
        monkeypatch.setattr(optimizers, "CHUNK_ELEMENTS", limit)
        optimizer = AdamWBF16(params, 0.03, OPTIONS)
        give_gradients(params, 0)
        optimizer.step()
    for one, other in zip(whole, pieces, strict=True):
        assert torch.equal(one, other)


def test_split_by_size() -> None:
    sizes = [[p.numel() for p in run] for run in split_by_size(parameters(), 13)]
    assert sizes == [[12], [5, 8]]
    assert [[p.numel() for p in run] for run in split_by_size(parameters(), 1)] == [[12], [5], [8]]


def test_rounding_gives_one_of_the_two_neighbours_and_the_value_on_average() -> None:
    values = torch.tensor([1.0 + 0.3 / 128, -1.0 - 0.9 / 128, 3.14159, -2e-5, 1.9999, 0.0, 1.5])
    draws = torch.Generator().manual_seed(0)
    repeats = 20_000
    rounded = round_stochastically(values.repeat(repeats), draws).view(repeats, -1).double()
    truncated = (values.view(torch.int32) & -65536).view(torch.float32)
    away = ((values.view(torch.int32) & -65536) + 65536).view(torch.float32)
    for column, value in enumerate(values.tolist()):
        found = set(rounded[:, column].tolist())
        assert found <= {float(truncated[column]), float(away[column])}
        spacing = abs(float(away[column] - truncated[column]))
        # The mean of a two-point variable of this spacing has a standard deviation of at most spacing / 2 / sqrt(repeats).
        assert abs(float(rounded[:, column].mean()) - value) <= 5 * spacing / 2 / repeats**0.5
    assert set(rounded[:, -1].tolist()) == {1.5}


def test_rounding_keeps_what_is_not_finite() -> None:
    all_bits = torch.tensor([0x7FFFFFFF], dtype=torch.int32).view(torch.float32)
    values = torch.cat([all_bits, torch.tensor([float("inf"), float("-inf")])]).repeat(100)
    rounded = round_stochastically(values, torch.Generator().manual_seed(0)).view(100, 3)
    assert bool(rounded[:, 0].isnan().all())
    assert rounded[:, 1:].unique(dim=0).tolist() == [[float("inf"), float("-inf")]]


def test_updates_below_bfloat16_resolution_arrive_on_average() -> None:
    weight = nn.Parameter(torch.ones(4096, dtype=torch.bfloat16))
    optimizer = AdamWBF16([weight], 1e-4, AdamOptions(adam_weight_decay=0.0))
    for _ in range(50):
        weight.grad = torch.ones_like(weight)
        optimizer.step()
    # A constant gradient makes every update lr; 1e-4 is 1/39 of the spacing below 1, so rounding to nearest would stay at 1. The
    # running means are rounded too, which blurs the size of each update by less than 1 %.
    assert float(weight.detach().double().mean()) == pytest.approx(1 - 50 * 1e-4, abs=5e-4)
    assert float(weight.detach().min()) < 1.0


def test_bfloat16_training_keeps_to_float32_training() -> None:
    low, high = parameters(torch.bfloat16), [nn.Parameter(p.detach().float()) for p in parameters(torch.bfloat16)]
    optimizer, oracle = AdamWBF16(low, 0.01, AdamOptions()), torch.optim.AdamW(high, lr=0.01)
    for step in range(30):
        give_gradients(low, step)
        for mine, other in zip(low, high, strict=True):
            assert mine.grad is not None
            other.grad = mine.grad.float()
        optimizer.step()
        oracle.step()
    for mine, other in zip(low, high, strict=True):
        assert {state["exp_avg"].dtype for state in optimizer.state.values()} == {torch.bfloat16}
        # 30 updates of at most 0.01, rounded: a random walk of sqrt(30) half spacings (1/256 of a weight of size 1).
        torch.testing.assert_close(mine.detach().float(), other.detach(), rtol=0.03, atol=0.03)


def train(optimizer: torch.optim.Optimizer, params: list[nn.Parameter], steps: range) -> None:
    for step in steps:
        give_gradients(params, step)
        optimizer.step()


def reloaded(state: dict[str, object]) -> dict[str, object]:
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    loaded: dict[str, object] = torch.load(file, weights_only=True)
    return loaded


@pytest.mark.parametrize(("make", "dtype"), [(AdamW, torch.float32), (AdamWBF16, torch.float32), (AdamWBF16, torch.bfloat16)])
def test_resumed_is_uninterrupted(make: Callable[..., torch.optim.Optimizer], dtype: torch.dtype) -> None:
    through, stopped = parameters(dtype), parameters(dtype)
    train(make(through, 0.03, OPTIONS), through, range(6))
    first = make(stopped, 0.03, OPTIONS)
    train(first, stopped, range(3))
    torch.manual_seed(99)  # the global generator has no part in it
    resumed = make(stopped, 0.03, OPTIONS)
    resumed.load_state_dict(reloaded(first.state_dict()))
    train(resumed, stopped, range(3, 6))
    for one, other in zip(through, stopped, strict=True):
        assert torch.equal(one, other)


def test_rounding_depends_on_the_seed() -> None:
    results: list[Tensor] = []
    for seed in (0, 0, 1):
        weight = nn.Parameter(torch.ones(256, dtype=torch.bfloat16))
        optimizer = AdamWBF16([weight], 1e-3, OPTIONS, seed=seed)
        weight.grad = torch.ones_like(weight)
        optimizer.step()
        results.append(weight.detach())
    assert torch.equal(results[0], results[1]) and not torch.equal(results[0], results[2])


def test_which_optimizers_step_the_models_own_weights() -> None:
    assert (AdamW.wants_low_precision, AdamWBF16.wants_low_precision, AdamW8bit.wants_low_precision) == (False, True, True)


# torchao warns at import about its own compiled extras, which are not used here.
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_eight_bit_states_minimise_a_quadratic_and_resume_exactly(dtype: torch.dtype) -> None:
    pytest.importorskip("torchao")

    def run(weight: nn.Parameter, optimizer: torch.optim.Optimizer, steps: int) -> None:
        for _ in range(steps):
            weight.grad = 2 * weight.detach()
            optimizer.step()

    start = torch.randn(64, 128, generator=torch.Generator().manual_seed(0)).to(dtype)
    through, stopped = nn.Parameter(start.clone()), nn.Parameter(start.clone())
    run(through, AdamW8bit([through], 0.05, AdamOptions()), 12)
    first = AdamW8bit([stopped], 0.05, AdamOptions())
    run(stopped, first, 6)
    states = [state["exp_avg"] for state in first.state.values()]
    assert [tuple(state.codes.shape) for state in states] == [(64, 128)] and states[0].codes.dtype == torch.uint8
    torch.manual_seed(99)
    resumed = AdamW8bit([stopped], 0.05, AdamOptions())
    resumed.load_state_dict(reloaded(first.state_dict()))
    run(stopped, resumed, 6)
    assert torch.equal(through, stopped)
    assert float(through.detach().float().square().sum()) < 0.5 * float(start.float().square().sum())


def test_eight_bit_without_torchao_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "tuner.builtins.eight_bit", raising=False)
    monkeypatch.setitem(sys.modules, "torchao", None)
    monkeypatch.setitem(sys.modules, "torchao.optim", None)
    with pytest.raises(EnvironmentProblem, match=r"pip install 'tuner-framework\[torchao\]'"):
        AdamW8bit(parameters(), 0.1, OPTIONS)
