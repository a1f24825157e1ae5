"""On a GPU: kernels of our own at the sizes of a released model, against their formulas in float32, called and replayed."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from integration.gpu_runs import needs_gpu
from tuner.builtins.plugin import tuner_register_quantizers
from tuner.config.options import Options
from tuner.model import fp8, fused, kernels

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
B, S, HEADS = 2, 1170, 32
CLOSE = 0.005
"""Relative: rounding to bfloat16 makes 0.2 %."""
Call = Callable[[Tensor], Tensor]


def draw(*shape: int, seed: int = 0, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)


def calls(width: int) -> dict[str, Call]:
    """Over tokens of that width."""
    weight, vectors, angles = draw(width, seed=1), draw(B, 2, 6, width, seed=2), draw(1, HEADS, S, width // HEADS // 2, seed=3).float()
    scale, shift, clean = vectors[:, :, 1], vectors[:, :, 0], draw(B, S, 1, seed=4) > 0
    cos, sin = (table.expand(B, -1, -1, -1) for table in (angles.cos(), angles.sin()))

    def like(tensor: Tensor, x: Tensor) -> Tensor:
        return tensor.to(x.dtype)

    around = draw(B, S, width, seed=8)
    return {
        "gated": lambda x: fused.gated(like(around, x), x, like(scale[:, :1], x)),
        "gated by token": lambda x: fused.gated(x, like(around, x), like(around, x)) + fused.gated(like(around, x), x, like(around, x)),
        "norm": lambda x: fused.rms_norm(x, 1e-6),
        "weighted": lambda x: fused.rms_norm(x, 1e-6, like(weight, x)),
        "modulated": lambda x: fused.rms_modulated(x, 1e-6, like(scale[:, :1], x), like(shift[:, :1], x)),
        "some tokens given": lambda x: fused.rms_modulated(x, 1e-6, like(scale, x), like(shift, x), clean),
        "turned": lambda x: fused.rms_rotated(x, 1e-6, like(weight, x), cos, sin),
    }


@torch.no_grad()
def off(found: Tensor, wanted: Tensor) -> float:
    return float((found.double() - wanted.double()).norm() / wanted.double().norm())


@needs_gpu
@pytest.mark.parametrize(
    "module", ["tuner.model.fused_kernels", "tuner.model.fp8_kernels", "tuner.builtins.row_scale", "tuner.builtins.packed_kernels"]
)
def test_kernels_prove_themselves_here(module: str) -> None:
    if DEVICE.type == "cuda":
        assert kernels.proven(module, 0) is not None


@needs_gpu
@pytest.mark.parametrize("width", [4096, 2048])
@pytest.mark.parametrize("name", calls(64))
def test_norms_are_their_formulas(name: str, width: int) -> None:
    call = calls(width)[name]
    x, up = draw(B, S, width, seed=5).requires_grad_(), draw(B, S, width, seed=6)
    exact = x.detach().double().requires_grad_()
    found, wanted = call(x), call(exact)
    assert off(found, wanted) < CLOSE
    assert off(torch.autograd.grad(found, x, up)[0], torch.autograd.grad(wanted, exact, up.double())[0]) < CLOSE


@needs_gpu
@pytest.mark.skipif(DEVICE.type != "cuda", reason="a graph is the device's")
def test_a_replayed_norm_is_the_called_one() -> None:
    call, x = calls(4096)["turned"], draw(B, S, 4096, seed=7)
    wanted = call(x)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = call(x)
    graph.replay()
    assert torch.equal(found, wanted)


@needs_gpu
@pytest.mark.parametrize("tokens", [17, 150])
@pytest.mark.parametrize(("rows", "columns"), [(4096, 4096), (16384, 4096), (4096, 16384), (2048, 4096), (2048, 8192), (8192, 2048)])
def test_products_in_8_bits_are_those_of_the_rounded_sides(rows: int, columns: int, tokens: int) -> None:
    holder = nn.ModuleDict({"linear": nn.Linear(columns, rows, device=DEVICE, dtype=torch.bfloat16)}).requires_grad_(False)
    (component,) = (c for c in tuner_register_quantizers() if c.name == "fp8-torchao")
    quantizer = component.load()(Options(), None)  # type: ignore[operator]
    quantizer.compute = "fp8"
    quantizer.quantize(holder)
    layer = holder["linear"]
    assert isinstance(layer, fp8.Fp8Linear)
    x, up = draw(2, tokens, columns, seed=8).requires_grad_(), draw(2, tokens, rows, seed=9)
    found = layer(x)
    (gradient,) = torch.autograd.grad(found, x, up)
    stored, scale = layer.parts(layer.weight)
    values, row_scale = fp8.rounded_rows(x.detach().float().reshape(-1, columns))
    wanted = (values.float() * row_scale) @ (stored.float() * scale).t() + layer.bias.float()
    assert off(found.reshape(-1, rows), wanted) < 0.01
    values, row_scale = fp8.rounded_rows(up.float().reshape(-1, rows), scale.view(1, -1))
    assert off(gradient.reshape(-1, columns), (values.float() * row_scale) @ stored.float()) < 0.01
