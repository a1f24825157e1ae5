"""Products of adapted layers against their formula: alone and together, over plain and quantized weights, and what they cost."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import cast

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode

from tuner.builtins.plugin import tuner_register_quantizers
from tuner.config.options import Options
from tuner.config.settings import AdapterSettings
from tuner.model.adapters import adapted_layers, add_adapters, without_adapters
from tuner.model.low_rank import LoraLinear, project

WIDTHS = {"q": 64, "k": 96, "v": 80}
IN, SCALE = 64, 0.5


def layers(dtype: torch.dtype = torch.float64, precision: str = "", dropout: float = 0.0, bias: bool = True) -> list[LoraLinear]:
    """Three adapted layers of different widths over one input; B is not zero."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.ModuleDict({name: nn.Linear(IN, width, bias=bias) for name, width in WIDTHS.items()}).to(dtype)
        if precision:
            (component,) = (c for c in tuner_register_quantizers() if c.name == precision)
            component.load()(Options(), None).quantize(model)  # type: ignore[operator]
        add_adapters(model, list(WIDTHS), AdapterSettings(lora_rank=4, lora_alpha=4 * SCALE, lora_dropout=dropout), 0)
        for layer in adapted_layers(model).values():
            nn.init.normal_(layer.lora_B["default"].weight)
    return cast(list[LoraLinear], list(adapted_layers(model).values()))


def matrices(given: Sequence[LoraLinear]) -> list[Tensor]:
    return [m.weight for layer in given for m in (layer.lora_A["default"], layer.lora_B["default"])]


def formula(given: Sequence[LoraLinear], x: Tensor) -> tuple[Tensor, ...]:
    """W·x + b + s·B·A·x, written out."""
    found = []
    for layer in given:
        base = layer.get_base_layer()
        weight = base.dense(x.dtype) if hasattr(base, "dense") else base.weight
        low = x @ layer.lora_A["default"].weight.t()
        found.append(functional.linear(x, weight, base.bias) + SCALE * (low @ layer.lora_B["default"].weight.t()))
    return tuple(found)


def one_by_one(given: Sequence[LoraLinear], x: Tensor) -> tuple[Tensor, ...]:
    return tuple(layer(x) for layer in given)


def tokens(dtype: torch.dtype = torch.float64, *, wanted: bool = True) -> Tensor:
    drawn = torch.randn(2, 5, IN, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(dtype)
    return drawn.requires_grad_(wanted)


def results(call: Callable[[Sequence[LoraLinear], Tensor], tuple[Tensor, ...]], given: Sequence[LoraLinear], x: Tensor) -> list[Tensor]:
    """Outputs, then gradients of the input (where wanted) and of every A and B."""
    outputs = call(given, x)
    draws = torch.Generator().manual_seed(2)
    up = [torch.randn(output.shape, generator=draws, dtype=torch.float64).to(output.dtype) for output in outputs]
    wanted = [*([x] if x.requires_grad else []), *matrices(given)]
    return [*outputs, *torch.autograd.grad(outputs, wanted, up)]


@pytest.mark.parametrize("call", [project, one_by_one], ids=["together", "one by one"])
@pytest.mark.parametrize("wanted", [True, False], ids=["input wants a gradient", "frozen input"])
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
def test_results_and_gradients_are_those_of_the_formula(call: Callable, wanted: bool, bias: bool) -> None:  # type: ignore[type-arg]
    given, x = layers(bias=bias), tokens(wanted=wanted)
    for found, expected in zip(results(call, given, x), results(formula, given, x), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


def test_gradients_equal_finite_differences() -> None:
    given = layers()
    x = tokens()[:, :2].detach().requires_grad_()
    trained = matrices(given)

    def function(x: Tensor, *_: Tensor) -> tuple[Tensor, ...]:
        return project(given, x)

    assert torch.autograd.gradcheck(function, (x, *trained), fast_mode=True)  # the matrices are moved where they lie


@pytest.mark.parametrize("precision", ["int8-torchao", "fp8-quanto", "int4-torchao"])
def test_over_quantized_weights_they_are_those_of_what_the_layer_computes_with(precision: str) -> None:
    given, x = layers(torch.float32, precision), tokens(torch.float32)
    for found, expected in zip(results(project, given, x), results(formula, given, x), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-4)


def test_bfloat16_is_closer_to_the_truth_than_separate_products_are() -> None:
    """B·A·x is not rounded before it is added."""
    given, exact = layers(torch.bfloat16), layers()
    for layer, twin in zip(given, exact, strict=True):
        twin.load_state_dict({name: tensor.double() for name, tensor in layer.state_dict().items()})
    x = tokens(torch.bfloat16)
    truth = results(formula, exact, x.detach().double().requires_grad_())

    def error(found: list[Tensor]) -> float:
        pairs = zip(found, truth, strict=True)
        return float(torch.stack([(a.detach().double() - b.detach()).norm() / b.detach().norm() for a, b in pairs]).mean())

    assert error(results(project, given, x)) < error(results(formula, given, x)) < 0.01


def test_a_result_that_is_not_used_gets_no_gradient() -> None:
    given, x = layers(), tokens()
    q, _, v = project(given, x)
    found = torch.autograd.grad(q.sum() + v.sum(), [x, *matrices(given)], allow_unused=True)
    expected = torch.autograd.grad(formula([given[0], given[2]], x)[0].sum() + formula([given[2]], x)[0].sum(), [x, *matrices(given)],
                                   allow_unused=True)  # fmt: skip
    assert found[3] is None and found[4] is None and expected[3] is None
    for one, other in zip(found, expected, strict=True):
        assert (one is None) == (other is None)
        if one is not None:
            torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


def test_what_is_not_plain_goes_layer_by_layer() -> None:
    x = tokens()
    dropping = layers(dropout=0.5)
    with torch.random.fork_rng():
        torch.manual_seed(3)
        a, b = project(dropping, x)[0], project(dropping, x)[0]
    assert not torch.equal(a, b)
    seen: list[str] = []
    watched = layers()
    handle = watched[1].register_forward_hook(lambda *_: seen.append("k"))
    project(watched, x)
    assert seen == ["k"]
    handle.remove()
    model = nn.ModuleList(watched)
    with without_adapters(model):
        assert torch.equal(project(watched, x)[0], watched[0].get_base_layer()(x))
    plain = [nn.Linear(IN, 8).double(), nn.Linear(IN, 9).double()]
    assert all(torch.equal(one, layer(x)) for one, layer in zip(project(plain, x), plain, strict=True))


class Counting(TorchDispatchMode):
    """Operations that are no views."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        result = func(*args, **(kwargs or {}))
        if not func.is_view and "empty" not in func.name():
            self.names.append(func.name().split("::")[1].split(".")[0])
        return result


def test_kernels_of_queries_keys_and_values() -> None:
    given, x = layers(torch.float32), tokens(torch.float32)
    with Counting() as forward:
        outputs = project(given, x)
    # Each layer's product, one with every A, and B·A·x added where the result lies.
    assert sorted(forward.names) == ["addmm"] * 3 + ["addmm_"] * 3 + ["cat", "mm"]
    ups = [torch.ones_like(output) for output in outputs]
    with Counting() as backward:
        torch.autograd.grad(outputs, [x, *matrices(given)], ups)
    # Of each layer: to A·x and to B, each scaled; to A together; to the input one product, to which the others are added.
    assert sorted(backward.names) == ["addmm_"] * 3 + ["cat"] * 2 + ["mm"] * 8 + ["mul_"] * 6


def test_nothing_of_the_tokens_size_is_kept_but_the_input() -> None:
    given, x, kept = layers(torch.float32), tokens(torch.float32), []

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    with saved_tensors_hooks(keep, lambda tensor: tensor):
        project(given, x)
    large = [tensor for tensor in kept if tensor.shape[:-1].numel() == 10 and tensor.shape[-1] > 12]
    assert [tensor.data_ptr() for tensor in large] == [x.data_ptr()]


def test_a_compiler_sees_the_same() -> None:
    given, x = layers(torch.float32), tokens(torch.float32)
    torch._dynamo.reset()
    compiled = torch.compile(lambda x: project(given, x), backend="aot_eager", fullgraph=True)
    for found, expected in zip(results(lambda _, x: compiled(x), given, x), results(formula, given, x), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-4)
    torch._dynamo.reset()
