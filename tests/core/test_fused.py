"""Norms with what follows them: values and gradients against formulas written out here, what is kept, and the kernels on an interpreter."""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import ModuleType

import pytest
import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode

from core.interpreted import proof_of
from tuner.model import fused, kernels

B, S, H, HALF = 2, 5, 3, 4
D = H * 2 * HALF
EPS = 1e-3


def draw(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def vectors(seed: int) -> Tensor:
    """(B, 2, D), with gaps between them, as a model makes them."""
    return draw(B, 2, 3, D, seed=seed)[:, :, 1]


CLEAN = draw(B, S, 1, seed=9) > 0
COS, SIN = draw(1, H, S, HALF, seed=3).cos().expand(B, -1, -1, -1), draw(1, H, S, HALF, seed=3).sin().expand(B, -1, -1, -1)


def plain_norm(x: Tensor) -> Tensor:
    return x / torch.sqrt((x * x).mean(-1, keepdim=True) + EPS)


def picked(pair: Tensor) -> Tensor:
    """Sample by sample and token by token."""
    return torch.stack([torch.stack([pair[b, int(CLEAN[b, s])] for s in range(S)]) for b in range(B)])


def plain_turn(x: Tensor) -> Tensor:
    found = torch.empty_like(x)
    for head in range(H):
        for i in range(HALF):
            one, other = head * 2 * HALF + i, head * 2 * HALF + HALF + i
            c, s = COS[:, head, :, i].to(x.dtype), SIN[:, head, :, i].to(x.dtype)
            found[..., one] = x[..., one] * c - x[..., other] * s
            found[..., other] = x[..., other] * c + x[..., one] * s
    return found


WEIGHT, SCALE, SHIFT = draw(D, seed=4), vectors(5), vectors(6)
Call = Callable[[Tensor], Tensor]


def cast(tensor: Tensor, x: Tensor) -> Tensor:
    return tensor.to(x.dtype)


CASES: dict[str, tuple[Call, Call]] = {
    "norm": (lambda x: fused.rms_norm(x, EPS), plain_norm),
    "weighted norm": (lambda x: fused.rms_norm(x, EPS, cast(WEIGHT, x)), lambda x: plain_norm(x) * cast(WEIGHT, x)),
    "modulated": (
        lambda x: fused.rms_modulated(x, EPS, cast(SCALE[:, :1], x), cast(SHIFT[:, :1], x)),
        lambda x: plain_norm(x) * (1 + cast(SCALE[:, :1], x)) + cast(SHIFT[:, :1], x),
    ),
    "modulated, some tokens given": (
        lambda x: fused.rms_modulated(x, EPS, cast(SCALE, x), cast(SHIFT, x), CLEAN),
        lambda x: plain_norm(x) * (1 + picked(cast(SCALE, x))) + picked(cast(SHIFT, x)),
    ),
    "turned": (
        lambda x: fused.rms_rotated(x, EPS, cast(WEIGHT, x), COS, SIN),
        lambda x: plain_turn(plain_norm(x) * cast(WEIGHT, x)),
    ),
}


@pytest.fixture(params=CASES)
def case(request: pytest.FixtureRequest) -> tuple[Call, Call]:
    return CASES[request.param]


def test_values_and_gradients_are_those_of_the_formula(case: tuple[Call, Call]) -> None:
    x, up = draw(B, S, D, seed=1).requires_grad_(), draw(B, S, D, seed=2)
    found, wanted = (call(x) for call in case)
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)
    ours, theirs = (torch.autograd.grad(result, x, up)[0] for result in (found, wanted))
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


def test_gradients_equal_finite_differences(case: tuple[Call, Call]) -> None:
    assert torch.autograd.gradcheck(case[0], (draw(B, S, D, seed=1).requires_grad_(),))


def test_half_precision_is_rounded_once(case: tuple[Call, Call]) -> None:
    x, up = draw(B, S, D, seed=1, dtype=torch.bfloat16).requires_grad_(), draw(B, S, D, seed=2, dtype=torch.bfloat16)
    exact = x.detach().double().requires_grad_()

    def errors(call: Call) -> tuple[float, float]:
        result = call(x)
        wanted = case[1](exact)
        gradients = torch.autograd.grad(result, x, up)[0], torch.autograd.grad(wanted, exact, up.double())[0]
        one, other = (float(((a.double() - b).norm() / b.norm()).detach()) for a, b in ((result, wanted), gradients))
        return one, other

    # Parameters are rounded on either side; half a unit in the last place is 2^-9 = 0.2 % at most.
    ours, stepwise = errors(case[0]), errors(case[1])
    assert max(ours) < 0.004 and ours[0] <= stepwise[0] and ours[1] <= stepwise[1]


def test_only_the_input_is_kept_of_the_tokens(case: tuple[Call, Call]) -> None:
    x, kept = draw(B, S, D, seed=1).requires_grad_(), []

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    with saved_tensors_hooks(keep, lambda tensor: tensor):
        case[0](x)
    assert [tensor.data_ptr() for tensor in kept if tensor.shape == x.shape] == [x.data_ptr()]


def test_a_gate_is_the_one_thing_kept() -> None:
    hidden, change = draw(B, S, D, seed=1).requires_grad_(), draw(B, S, D, seed=2).requires_grad_()
    gate, kept = draw(B, 1, D, seed=3), []

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    with saved_tensors_hooks(keep, lambda tensor: tensor):
        result = fused.gated(hidden, change, gate)
    assert [tensor.shape for tensor in kept] == [gate.shape]
    torch.testing.assert_close(result, hidden + change * gate)
    up = draw(B, S, D, seed=4)
    to_hidden, to_change = torch.autograd.grad(result, [hidden, change], up)
    assert torch.equal(to_hidden, up) and torch.equal(to_change, up * gate)


def test_trained_parameters_get_their_gradients() -> None:
    """In full fine-tuning, or where an adapter sits on what makes the modulation."""
    x = draw(B, S, D, seed=1).requires_grad_()
    weight, scale, shift = (tensor.detach().clone().requires_grad_() for tensor in (WEIGHT, SCALE, SHIFT))
    gate = draw(B, 1, D, seed=7).requires_grad_()

    def ours() -> Tensor:
        result = fused.rms_modulated(fused.rms_norm(x, EPS, weight), EPS, scale, shift, CLEAN)
        return fused.gated(x, fused.rms_rotated(result, EPS, weight, COS, SIN), gate)

    def written_out() -> Tensor:
        result = plain_norm(plain_norm(x) * weight) * (1 + picked(scale)) + picked(shift)
        return x + plain_turn(plain_norm(result) * weight) * gate

    wanted = [x, weight, scale, shift, gate]
    for found, expected in zip(torch.autograd.grad(ours().sum(), wanted), torch.autograd.grad(written_out().sum(), wanted), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)


def test_on_the_meta_device_there_is_nothing_but_the_result() -> None:
    """What a step takes is observed there, and a kernel makes nothing else either."""
    x, weight = (torch.empty(shape, device="meta") for shape in ((B, S, D), (D,)))
    table = torch.empty(B, H, S, HALF, device="meta")
    for call in (lambda: fused.rms_norm(x, EPS, weight), lambda: fused.rms_rotated(x, EPS, weight, table, table)):
        x.requires_grad_(False)
        with Made() as made:
            call()
        assert made.shapes == [x.shape]
        x.requires_grad_()
        result = call()
        with Made() as made:
            torch.autograd.grad(result, x, torch.empty_like(result))
        assert made.shapes.count(x.shape) == 2  # the gradient that arrives, made here, and the one that leaves


class Made(TorchDispatchMode):
    """Shapes of the tensors that operations inside make."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.shapes: list[torch.Size] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        result = func(*args, **(kwargs or {}))
        self.shapes += [] if func.is_view else [result.shape]
        return result


def test_kernels_compute_the_formulas() -> None:
    found, problem = proof_of("tuner.model.fused_kernels")
    # The interpreter cuts bfloat16 off where a card rounds: up to 2^-8.
    assert problem == "" and len(found) == 16 and max(found.values()) < 2**-8


class Wrong(ModuleType):
    """Kernels, one of which computes something else; or which cannot be built."""

    LIMIT = 0.01

    def __init__(self, error: float | Exception) -> None:
        super().__init__("wrong_kernels")
        self.error = error

    def differences(self, device: torch.device) -> dict[str, float]:
        if isinstance(self.error, Exception):
            raise self.error
        return {"norm": 0.001, "turned norm": self.error}


def test_kernels_that_are_wrong_or_cannot_be_built_are_not_used(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    expected = {
        "the kernels compute something else here: turned norm": (0.02, float("nan")),
        "the kernels cannot be built here: OSError: no compiler": (OSError("no compiler\nfurther lines"),),
    }
    for problem, errors in expected.items():
        for error in errors:
            kernels.proven.cache_clear()
            monkeypatch.setitem(sys.modules, "wrong_kernels", Wrong(error))
            caplog.clear()
            assert kernels.proven("wrong_kernels", 0) is None and kernels.proven("wrong_kernels", 0) is None
            assert [record.getMessage() for record in caplog.records] == [f"wrong_kernels is not used, so steps take longer: {problem}"]
    kernels.proven.cache_clear()
    right = Wrong(0.001)
    monkeypatch.setitem(sys.modules, "wrong_kernels", right)
    assert kernels.proven("wrong_kernels", 0) is right and kernels.proven("there_is_no_such_module", 0) is None
    kernels.proven.cache_clear()
