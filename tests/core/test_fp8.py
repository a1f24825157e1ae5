"""Products in 8-bit floats against their arithmetic written out, how far they are off, and the kernels on an interpreter."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode

from core.interpreted import proof_of
from tuner.builtins.plugin import tuner_register_quantizers
from tuner.builtins.quantizers import LinearQuantizer
from tuner.config.options import Options
from tuner.config.settings import AdapterSettings, ModelSettings
from tuner.model import fp8
from tuner.model.adapters import adapted_layers, add_adapters
from tuner.model.low_rank import project
from tuner.model.quantized import QuantizedLinear

IN, OUT = 96, 64


def quantizer(name: str, compute: str = "fp8") -> LinearQuantizer:
    (component,) = (c for c in tuner_register_quantizers() if c.name == name)
    made: LinearQuantizer = component.load()(Options(), None)  # type: ignore[operator]
    made.compute = compute
    return made


def draw(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def layer(name: str = "fp8-torchao", dtype: torch.dtype = torch.float32) -> fp8.Fp8Linear:
    linear = nn.Linear(IN, OUT).to(dtype)
    with torch.no_grad():
        linear.weight.copy_(draw(OUT, IN, seed=1))
        linear.bias.copy_(draw(OUT, seed=2))
    linear.requires_grad_(False)
    holder = nn.ModuleDict({"linear": linear})
    quantizer(name).quantize(holder)
    assert type(linear) is fp8.Fp8Linear
    return linear


def nearest(value: float) -> float:
    """Of the numbers of e4m3: three bits behind the leading one, exponents from -6 on, below that steps of 2^-9; ties to even."""
    sign, size = (-1.0 if value < 0 else 1.0), min(abs(value), 448.0)
    step = 2.0**-9
    while step * 16 <= size:
        step *= 2
    return sign * round(size / step) * step  # Python rounds ties to even


def test_rows_are_rounded_to_the_nearest_numbers() -> None:
    x = torch.cat([draw(6, IN) * 10.0 ** torch.arange(-3, 3)[:, None], torch.zeros(1, IN)])
    values, scale = fp8.rounded_rows(x)
    assert values.dtype == torch.float8_e4m3fn and scale.shape == (7, 1)
    for row, found, one in zip(x.tolist(), values.float().tolist(), scale.flatten().tolist(), strict=True):
        assert one == pytest.approx(max(max(map(abs, row)) / 448, 1e-12), rel=1e-6)
        wanted = [nearest(float(torch.tensor(value) / torch.tensor(one))) for value in row]
        assert found == wanted
    factor = draw(1, IN, seed=3).abs()
    assert torch.equal(fp8.rounded_rows(x, factor)[0].float(), fp8.rounded_rows(x * factor)[0].float())


@pytest.mark.parametrize("name", ["fp8-torchao", "fp8-quanto"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_result_and_gradient_are_those_of_the_rounded_sides(name: str, dtype: torch.dtype) -> None:
    linear, x = layer(name, dtype), draw(2, 5, IN, dtype=dtype).requires_grad_()
    weight = linear.dense(torch.float32).double()
    values, scale = fp8.rounded_rows(x.detach().reshape(-1, IN))
    wanted = (values.double() * scale) @ weight.t() + linear.bias.double()
    y = linear(x)
    assert y.dtype == dtype
    close = {"rtol": 1e-5, "atol": 1e-4} if dtype == torch.float32 else {"rtol": 0.02, "atol": 0.1}
    torch.testing.assert_close(y.double().reshape(-1, OUT), wanted, **close)

    up = draw(2, 5, OUT, seed=4, dtype=dtype)
    (found,) = torch.autograd.grad(y, x, up)
    stored, row_scale = linear.parts(linear.weight)
    values, scale = fp8.rounded_rows(up.reshape(-1, OUT), row_scale.view(1, -1))
    torch.testing.assert_close(found.double().reshape(-1, IN), (values.double() * scale) @ stored.double(), **close)
    assert found.dtype == dtype


def test_both_sides_are_off_by_their_rounding_alone() -> None:
    """Each side is off by 2.6 % (2^-4 / sqrt(6) of a value, evenly spread), so is a product of random numbers by sqrt(2) times that."""
    linear, x = layer(), draw(200, IN).requires_grad_()
    plain = draw(OUT, IN, seed=1)
    y, wanted = linear(x), nn.functional.linear(x, plain, linear.bias)
    assert float(((y - wanted).norm() / wanted.norm()).detach()) < 0.045
    up = draw(200, OUT, seed=5)
    (found,) = torch.autograd.grad(y, x, up)
    assert float((found - up @ plain).norm() / (up @ plain).norm()) < 0.045


def test_nothing_is_kept_for_backward() -> None:
    kept: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    with saved_tensors_hooks(keep, lambda tensor: tensor):
        layer()(draw(3, IN).requires_grad_())
    assert kept == []


def refuse(*given: object) -> Tensor:
    raise RuntimeError("CUDA error: CUBLAS_STATUS_NOT_SUPPORTED when calling something")


def test_a_card_that_lacks_a_way_takes_the_next_one(monkeypatch: pytest.MonkeyPatch) -> None:
    (a, a_scale), (b, b_scale) = fp8.rounded_rows(draw(5, IN)), fp8.rounded_rows(draw(OUT, IN, seed=1))
    bias, tried = draw(OUT, seed=2), []

    def counted(*given: Tensor) -> Tensor:
        tried.append(1)
        return refuse(*given)

    monkeypatch.setattr(fp8, "_WAYS", (counted, refuse, fp8._in_16_bits))
    monkeypatch.setattr(fp8, "_taken", {})
    wanted = fp8.scaled_product(a, a_scale, b, b_scale, torch.float32, bias)
    for _ in range(2):
        torch.testing.assert_close(fp8._on_card(a, a_scale, b, b_scale, torch.float32, bias), wanted)
    assert tried == [1]
    monkeypatch.setattr(fp8, "_WAYS", (refuse,))
    monkeypatch.setattr(fp8, "_taken", {})
    with pytest.raises(RuntimeError, match="NOT_SUPPORTED"):
        fp8._on_card(a, a_scale, b, b_scale, torch.float32, bias)


def test_other_faults_of_a_product_are_raised(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*given: object) -> Tensor:
        raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    monkeypatch.setattr(fp8, "_WAYS", (full, fp8._in_16_bits))
    (a, a_scale), (b, b_scale) = fp8.rounded_rows(draw(5, IN)), fp8.rounded_rows(draw(OUT, IN, seed=1))
    with pytest.raises(torch.cuda.OutOfMemoryError):
        fp8._on_card(a, a_scale, b, b_scale, torch.float32, None)


class Roundings(TorchDispatchMode):
    """How often something becomes e4m3."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        result = func(*args, **(kwargs or {}))
        self.count += func.name().startswith("aten::_to_copy") and result.dtype == torch.float8_e4m3fn
        return result


def test_layers_of_one_input_round_it_once() -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.ModuleDict({name: nn.Linear(IN, OUT) for name in "qkv"})
    quantizer("fp8-torchao").quantize(model)
    add_adapters(model, list("qkv"), AdapterSettings(lora_rank=4), 0)
    layers, x = list(adapted_layers(model).values()), draw(5, IN).requires_grad_()
    with Roundings() as forward:
        found = project(layers, x)  # type: ignore[arg-type]
    assert forward.count == 1
    with Roundings() as backward:
        torch.autograd.grad([y.sum() for y in found], x)
    assert backward.count == 3
    for y, adapted in zip(found, layers, strict=True):
        torch.testing.assert_close(y, adapted(x), rtol=1e-6, atol=1e-6)


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
def test_a_compiler_sees_the_same() -> None:
    linear, x = layer(), draw(5, IN).requires_grad_()
    torch._dynamo.reset()
    compiled = torch.compile(lambda x: linear(x), backend="aot_eager", fullgraph=True)
    y, wanted = compiled(x), linear(x)
    torch.testing.assert_close(y, wanted)
    torch.testing.assert_close(torch.autograd.grad(y.sum(), x)[0], torch.autograd.grad(wanted.sum(), x)[0])
    torch._dynamo.reset()


def test_which_layers_multiply_so() -> None:
    model = nn.ModuleDict({"small": nn.Linear(32, 64), "odd": nn.Linear(72, 64), "fits": nn.Linear(96, 64)})
    quantizer("fp8-torchao").quantize(model)
    assert [type(one) for one in model.values()] == [nn.Linear, QuantizedLinear, fp8.Fp8Linear]
    plain = nn.ModuleDict({"fits": nn.Linear(96, 64)})
    quantizer("fp8-torchao", "").quantize(plain)
    assert type(plain["fits"]) is QuantizedLinear
    assert {c.name for c in tuner_register_quantizers() if "fp8" in quantizer(c.name).computes} == {"fp8-torchao", "fp8-quanto"}


def test_one_key_implies_the_other() -> None:
    assert ModelSettings(base_model_compute="fp8").base_model_precision == "fp8-torchao"
    assert ModelSettings(base_model_compute="fp8", base_model_precision="no_change").base_model_precision == "fp8-torchao"
    assert ModelSettings(base_model_compute="fp8", base_model_precision="fp8-quanto").base_model_precision == "fp8-quanto"
    assert ModelSettings(base_model_compute="fp8", base_model_precision="int8-torchao").base_model_precision == "int8-torchao"
    assert ModelSettings().base_model_precision == "no_change"


def test_kernels_compute_the_formulas() -> None:
    found, problem = proof_of("tuner.model.fp8_kernels")
    if torch.cuda.is_available():
        assert problem == ""
    # The interpreter of Triton 3.7 makes 384 of the largest number, 448, of which every row has one.
    assert found.pop("turned weights") == 0 and len(found) == 2 and max(found.values()) < 0.07
