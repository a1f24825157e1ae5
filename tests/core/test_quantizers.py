"""Quantized linear layers: error bounds by formula, the libraries' own values bit by bit, gradients of the dequantized weight, memory."""

from __future__ import annotations

import math
import sys
import weakref
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode

from tuner.builtins.plugin import tuner_register_quantizers
from tuner.builtins.quantizers import LinearQuantizer
from tuner.component import Component
from tuner.config.options import Options
from tuner.config.settings import AdapterSettings
from tuner.errors import ConfigError, EnvironmentProblem
from tuner.interfaces.blocks import BlockState
from tuner.model import fp8
from tuner.model.adapters import add_adapters, resolve_targets
from tuner.model.placing import RunMemory
from tuner.model.quantized import QuantizedLinear, map_pieces, pieces
from tuner.model.runner import BlockRunner, Checkpointing
from tuner.plugins.loader import load_plugins
from tuner.testing.blocks import MixingModel, call_mixing_block

COMPONENTS = {component.name: component for component in tuner_register_quantizers() if component.extra}
"""Those that round, each held by a library; tests/core/test_packed.py has the one that does not."""
OUT, IN = 96, 160
"""In groups of 32; a row of zeros and an outlier among them."""
DTYPES = (torch.bfloat16, torch.float32)


@pytest.fixture(scope="module", params=COMPONENTS)
def quantizer(request: pytest.FixtureRequest) -> LinearQuantizer:
    """Each in turn, with its real library."""
    return built(COMPONENTS[request.param])


def built(component: Component) -> LinearQuantizer:
    found = component.load()(Options(), None)  # type: ignore[operator]
    assert isinstance(found, LinearQuantizer) and found.name == component.name
    return found


def plain_layer(dtype: torch.dtype, *, bias: bool = True) -> nn.Linear:
    draws = torch.Generator().manual_seed(0)
    layer = nn.Linear(IN, OUT, bias=bias, dtype=dtype).requires_grad_(False)
    with torch.no_grad():
        layer.weight.copy_(torch.randn(OUT, IN, generator=draws) / 12)
        layer.weight[3] = 0
        layer.weight[5, 7] = 4
    return layer


def quantized_layer(quantizer: LinearQuantizer, dtype: torch.dtype, *, bias: bool = True) -> QuantizedLinear:
    layer = plain_layer(dtype, bias=bias)
    quantizer.quantize(layer)
    assert isinstance(layer, QuantizedLinear)
    return layer


def expected(layer: QuantizedLinear, name: str) -> tuple[Tensor, Tensor]:
    """Values and error bounds (OUT, IN), both float32, by the formulas of each precision from the stored pieces."""
    weight, rounding = plain_layer(layer.weight.dtype).weight.float(), torch.finfo(layer.weight.dtype).eps
    stored = pieces(layer.weight)
    scale = stored[1].float()
    if name.startswith("int4"):
        third = stored[2].float()
        if name == "int4-torchao":
            packed = stored[0].int()
            low, high = (packed & 15), (packed >> 4) & 15
            values = torch.stack([low - 16 * (low > 7), high - 16 * (high > 7)], -1).view(OUT, IN)
            scale, zero = scale.t().repeat_interleave(32, 1), third.t().repeat_interleave(32, 1)
        else:
            values = torch.cat([stored[0] & 15, stored[0] >> 4]).view(OUT, IN)
            scale, zero = scale.view(OUT, -1).repeat_interleave(32, 1), -third.view(OUT, -1).repeat_interleave(32, 1)
        # Half a step, and what rounding 15 steps and the zero to the weight's dtype cuts off at the ends.
        return values * scale + zero, scale / 2 + (15 * scale + zero.abs()) * rounding
    if name.startswith("fp8"):
        return stored[0].float() * scale, torch.maximum(weight.abs() / 16, scale / 1024)
    return stored[0].float() * scale, (scale / 2).expand_as(weight) * (1 + 1e-4)  # float32's own rounding


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_weight_comes_back_within_the_bound_and_as_the_library_computes_it(quantizer: LinearQuantizer, dtype: torch.dtype) -> None:
    layer = quantized_layer(quantizer, dtype)
    values, bound = expected(layer, quantizer.name)
    error = (values - plain_layer(dtype).weight.float()).abs()
    assert bool((error <= bound).all()), float((error / bound).max())
    assert float(values[3].abs().max()) <= 1e-9  # zeros stay zeros
    found = layer.dense(dtype)
    assert found.dtype == dtype and found.shape == (OUT, IN) and type(found) is Tensor
    torch.testing.assert_close(found.float(), values, rtol=2 * torch.finfo(dtype).eps, atol=float(bound.max()) * 0.04)
    if quantizer.name != "int4-torchao":  # which torchao cannot expand
        assert torch.equal(found, layer.weight.dequantize())
    else:
        assert torch.equal(found, values.to(dtype)) or dtype is torch.float32  # fused: rounded once


@pytest.mark.parametrize("dtype", DTYPES)
def test_bytes_are_known_from_the_shape(quantizer: LinearQuantizer, dtype: torch.dtype) -> None:
    block = nn.ModuleDict({"big": plain_layer(dtype), "gate": nn.Linear(IN, 32, dtype=dtype), "norm": nn.LayerNorm(IN, dtype=dtype)})
    done = quantizer.quantize(block)
    assert done.modules == ("big",) and type(block["gate"]) is nn.Linear
    stored = pieces(block["big"].weight)  # type: ignore[arg-type]
    assert sum(piece.nbytes for piece in stored) == done.bytes_after == quantizer.bytes_of(torch.Size((OUT, IN)), dtype)
    assert done.bytes_before == OUT * IN * dtype.itemsize
    assert quantizer.bytes_of(torch.Size((32, IN)), dtype) == 32 * IN * dtype.itemsize
    bits = 8 * quantizer.bytes_of(torch.Size((4096, 4096)), torch.bfloat16) / 4096**2
    assert 8 <= bits < 8.02 if "4-" not in quantizer.name else bits == 4.5
    assert quantizer.quantize(block).modules == ()  # nothing is quantized twice


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(2, 5, IN), (7, IN)])
@pytest.mark.parametrize("bias", [True, False])
def test_product_and_gradients_are_those_of_the_dequantized_weight(
    quantizer: LinearQuantizer, dtype: torch.dtype, shape: tuple[int, ...], bias: bool
) -> None:
    layer = quantized_layer(quantizer, dtype, bias=bias)
    x = torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(dtype).requires_grad_()
    dense = layer.dense(dtype)
    if bias:
        layer.bias.requires_grad_()
    wanted_from = [x, layer.bias] if bias else [x]
    ours, theirs = layer(x), functional.linear(x, dense, layer.bias)
    assert torch.equal(ours, theirs)
    up = torch.randn(ours.shape, generator=torch.Generator().manual_seed(2)).to(dtype)
    for found, wanted in zip(torch.autograd.grad(ours, wanted_from, up), torch.autograd.grad(theirs, wanted_from, up), strict=True):
        assert torch.equal(found, wanted)
    with torch.no_grad():
        assert torch.equal(layer(x), theirs)
    layer.requires_grad_(False)
    assert not layer(x.detach()).requires_grad


def test_nothing_is_kept_for_backward(quantizer: LinearQuantizer) -> None:
    layer, kept = quantized_layer(quantizer, torch.bfloat16), []

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    with saved_tensors_hooks(keep, lambda tensor: tensor):
        layer(torch.randn(3, IN).bfloat16().requires_grad_())
    assert kept == []


class Operations(TorchDispatchMode):
    """The kernels that run inside: views and allocations left out."""

    FREE = ("aten::empty", "aten::view", "aten::t", "aten::unsqueeze", "aten::slice", "aten::_unsafe_view", "aten::detach")

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        name = func.name().split(".")[0]
        self.names += [] if name in self.FREE else [name]
        return func(*args, **(kwargs or {}))


KERNELS = {
    "int8-torchao": ["mul"], "int8-quanto": ["mul"], "fp8-torchao": ["_to_copy", "mul"], "fp8-quanto": ["_to_copy", "mul"],
    "int4-torchao": ["__lshift__", "__rshift__", "__rshift__", "stack", "addcmul"],
    "int4-quanto": ["bitwise_and", "mul", "__rshift__", "mul", "sub_"],
}  # fmt: skip
"""To dequantize; one product follows."""


def test_a_product_takes_few_kernels(quantizer: LinearQuantizer) -> None:
    layer, x = quantized_layer(quantizer, torch.bfloat16), torch.randn(3, IN).bfloat16().requires_grad_()
    dequantize = [f"aten::{name}" for name in KERNELS[quantizer.name]]
    with Operations() as forward:
        y = layer(x)
    assert forward.names == [*dequantize, "aten::addmm"]
    up = torch.ones_like(y)
    with Operations() as backward:
        y.backward(up)
    assert backward.names == [*dequantize, "aten::mm"]


def test_weights_may_be_rebuilt_elsewhere_between_forward_and_backward(quantizer: LinearQuantizer) -> None:
    layer, x = quantized_layer(quantizer, torch.float32), torch.randn(3, IN).requires_grad_()
    (wanted,) = torch.autograd.grad(layer(x).sum(), x)
    y = layer(x)
    first, elsewhere = layer.weight, map_pieces(layer.weight, torch.clone)
    layer.weight = nn.Parameter(elsewhere, requires_grad=False)
    for piece in pieces(first):  # as a ring of buffers does
        piece.zero_()
    (found,) = torch.autograd.grad(y.sum(), x)
    assert torch.equal(found, wanted)


def test_moving_or_converting_a_model_leaves_its_quantized_weights_as_they_are(quantizer: LinearQuantizer) -> None:
    model = nn.Sequential(quantized_layer(quantizer, torch.bfloat16))
    before, kinds = model[0].dense(torch.float32), [piece.dtype for piece in pieces(model[0].weight)]
    parameters = list(dict(model.named_parameters()))
    model.to("cpu", torch.float16)
    assert torch.equal(model[0].dense(torch.float32), before) and model[0].bias.dtype == torch.float16
    assert [piece.dtype for piece in pieces(model[0].weight)] == kinds and parameters == list(dict(model.named_parameters()))
    assert model.to("meta")[0].weight.device.type == "meta"


# --- in a model --------------------------------------------------------------------------------------------------
def mixing(quantizer: LinearQuantizer | None) -> MixingModel:
    """Blocks of 64 x 64, adapted, with adapters that do something."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = MixingModel(depth=3, width=64)
        for block in model.blocks if quantizer else ():
            quantizer.quantize(block)
        add_adapters(model, resolve_targets(model, "to_q,to_v", []), AdapterSettings(lora_rank=4), seed=1)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_B" in name:
                    parameter.copy_(torch.randn(parameter.shape) / 8)
    return model


def state_of(model: MixingModel) -> BlockState:
    draws = torch.Generator().manual_seed(3)
    shapes = ((2, 6, 6), (2, 3, 6), (2, 4, 6), (2, 6))
    video, audio, text, sigma = (torch.randn(shape, generator=draws) for shape in shapes)
    return model.enter(video, audio, text, sigma)


def gradients(model: MixingModel, checkpointing: Checkpointing) -> dict[str, Tensor]:
    runner = BlockRunner(model.block_set(), call_mixing_block, checkpointing=checkpointing)
    sum(out.square().mean() for out in model.exit(runner.run(state_of(model))).values()).backward()  # type: ignore[union-attr]
    return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}


def test_gradients_of_adapters_are_the_same_with_checkpointing_and_close_to_those_of_the_plain_model(quantizer: LinearQuantizer) -> None:
    kept, recomputed = (gradients(mixing(quantizer), policy) for policy in (Checkpointing(), Checkpointing.every(3)))
    plain = gradients(mixing(None), Checkpointing())
    assert kept.keys() == recomputed.keys() == plain.keys() and len(kept) == 3 * 2 * 2
    for name, gradient in kept.items():
        assert torch.equal(gradient, recomputed[name])
    off = math.sqrt(sum(float((kept[n] - plain[n]).square().sum()) for n in plain) / sum(float(g.square().sum()) for g in plain.values()))
    assert off < {"int8": 0.01, "fp8-": 0.04, "int4": 0.15}[quantizer.name[:4]], off


def taken_together(model: MixingModel, batches: int, counted: list[int]) -> list[Tensor]:
    """Gradients of several batches that each block takes together; `counted` gets the layers quantized in all and left with something."""
    runner = BlockRunner(model.block_set(), call_mixing_block, checkpointing=Checkpointing.every(3))
    passed = runner.run_all([state_of(model) for _ in range(batches)])
    torch.stack([out.square().mean() for after, _ in passed for out in model.exit(after).values()]).sum().backward()
    layers = [layer for layer in model.modules() if isinstance(layer, QuantizedLinear)]
    counted += [len(layers), sum(layer.kept is not None for layer in layers)]
    return [parameter.grad for parameter in model.parameters() if parameter.grad is not None]


def test_batches_that_a_block_takes_together_dequantize_it_once_on_each_way(quantizer: LinearQuantizer) -> None:
    plain, model, calls = mixing(quantizer), mixing(quantizer), []
    for _ in range(3):
        gradients(plain, Checkpointing.every(3))
    for layer in model.modules():
        if isinstance(layer, QuantizedLinear):
            layer.expand = lambda weight, dtype, expand=layer.expand: calls.append(weight) or expand(weight, dtype)
    found = taken_together(model, 3, counted := [])
    assert all(torch.equal(a, b.grad) for a, b in zip(found, (p for p in plain.parameters() if p.grad is not None), strict=True))
    layers, left = counted
    assert len(calls) == 2 * layers > 0 and left == 0


def test_an_eight_bit_weight_is_turned_once_for_batches_taken_together(monkeypatch: pytest.MonkeyPatch) -> None:
    rounder = built(COMPONENTS["fp8-torchao"])
    rounder.compute = "fp8"
    plain, model, calls = mixing(rounder), mixing(rounder), []
    for _ in range(3):
        gradients(plain, Checkpointing.every(3))
    turn = fp8.transposed
    monkeypatch.setattr(fp8, "transposed", lambda values: calls.append(values) or turn(values))
    found = taken_together(model, 3, counted := [])
    assert all(torch.equal(a, b.grad) for a, b in zip(found, (p for p in plain.parameters() if p.grad is not None), strict=True))
    assert 0 < len(calls) <= counted[0]


def test_while_a_part_is_read_one_block_at_most_is_held_unquantized() -> None:
    placement = RunMemory((), {"transformer": built(COMPONENTS["int8-torchao"])}).open("transformer", 4, torch.device("cpu"))
    model = MixingModel(depth=4, width=64).requires_grad_(False).to("meta")
    plain: list[weakref.ref[Tensor]] = []
    held: list[int] = []
    for index, block in enumerate(model.blocks):
        block.to_empty(device=placement.reading)
        plain += [weakref.ref(layer.weight) for layer in block.modules() if isinstance(layer, nn.Linear)]
        held.append(sum(reference() is not None for reference in plain))
        placement.received(index, block)
        held.append(sum(reference() is not None for reference in plain))
    assert held == [4, 0] * 4
    placement.attach(model.block_set())
    placement.close()


def test_a_precision_that_finds_nothing_to_round_says_so(caplog: pytest.LogCaptureFixture) -> None:
    model = MixingModel(depth=1, width=8)
    placement = RunMemory((), {"transformer": built(COMPONENTS["fp8-torchao"])}).open("transformer", 1, torch.device("cpu"))
    placement.received(0, model.blocks[0])
    placement.attach(model.block_set())
    assert "fp8-torchao: no linear layer of blocks.0" in caplog.text


# --- what users see ----------------------------------------------------------------------------------------------
@pytest.fixture
def without_libraries(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for name in ("torchao.quantization", "optimum.quanto"):
        monkeypatch.setitem(sys.modules, name, None)
    yield


def test_a_missing_library_is_named_with_the_command_that_installs_it(without_libraries: None) -> None:
    for name, extra in (("int8-torchao", "torchao"), ("int4-quanto", "quanto")):
        with pytest.raises(EnvironmentProblem, match=rf"{name} needs {extra}(.|\n)*pip install 'tuner-framework\[{extra}\]'"):
            COMPONENTS[name].load()(Options(), None)  # type: ignore[operator]


def test_an_unknown_precision_is_answered_with_the_nearest_names() -> None:
    with pytest.raises(ConfigError, match=r"base_model_precision(.|\n)*int8-(torchao|quanto)"):
        load_plugins().component("quantizer", "int8wo-torchao")
