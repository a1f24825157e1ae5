"""bfloat16 weights in 12 bits: every bit comes back, whatever the weight; how large they are; and the kernel on an interpreter."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from torch import Tensor, nn

from core.interpreted import proof_of
from tuner.builtins import packed
from tuner.builtins.quantizers import Packed
from tuner.config.options import Options
from tuner.config.settings import AdapterSettings
from tuner.model.adapters import add_adapters, resolve_targets
from tuner.model.quantized import QuantizedLinear, map_pieces, pieces
from tuner.model.runner import BlockRunner, Checkpointing
from tuner.testing.blocks import MixingModel, call_mixing_block

SPECIAL = [0.0, -0.0, 1e-39, -1e-39, 1e-30, -1e30, float("inf"), -float("inf"), float("nan")]


def normal(rows: int, columns: int, seed: int = 0) -> Tensor:
    return (torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)) / 50).bfloat16()


def quantizer() -> Packed:
    return Packed(Options(), None)  # type: ignore[arg-type]


def same_bits(one: Tensor, other: Tensor) -> bool:
    return torch.equal(one.view(torch.int16), other.view(torch.int16))


def expanded(weight: Tensor) -> Tensor:
    made = packed.pack(weight)
    assert made is not None and made.shape == weight.shape and made.dtype == torch.bfloat16
    return packed.expand_packed(made, torch.bfloat16)


@pytest.mark.parametrize(("rows", "columns"), [(64, 64), (65, 130), (1500, 4096)])  # the last in two goes
def test_normal_weights_come_back_bit_for_bit(rows: int, columns: int) -> None:
    weight = normal(rows, columns)
    assert same_bits(expanded(weight), weight)
    assert same_bits(expanded(weight.t().contiguous().t()), weight)


def test_special_numbers_zeros_and_rows_of_other_sizes_come_back() -> None:
    weight = normal(96, 256)
    weight[0, : len(SPECIAL)] = torch.tensor(SPECIAL)
    weight[1], weight[2], weight[3] = 0, weight[2] * 1e20, weight[3] * 1e-36  # subnormal numbers among the last
    weight[4, ::2] = 0
    assert same_bits(expanded(weight), weight)


@settings(max_examples=60, deadline=None)
@given(arrays(np.int16, (2, 64)), st.integers(0, 61))
def test_any_bits_come_back_or_the_weight_stays_as_it_is(bits: np.ndarray, place: int) -> None:
    weight = normal(64, 64)
    weight[place : place + 2] = torch.from_numpy(bits).view(torch.bfloat16)
    made = packed.pack(weight)
    if made is not None:
        assert same_bits(packed.expand_packed(made, torch.bfloat16), weight)
    few = normal(64, 64)
    few[place, :8] = torch.from_numpy(bits[0, :8]).view(torch.bfloat16)  # as many as the list of 64 x 64 has places
    assert same_bits(expanded(few), few)


def test_weights_whose_exponents_are_spread_too_far_stay_as_they_are() -> None:
    block = nn.ModuleDict({"even": nn.Linear(128, 64), "spread": nn.Linear(128, 64), "odd": nn.Linear(127, 64)}).bfloat16()
    with torch.no_grad():
        block["spread"].weight.copy_(torch.exp(20 * torch.randn(64, 128)))  # type: ignore[union-attr, operator]
    done = quantizer().quantize(block)
    assert done.modules == ("even",) and type(block["spread"]) is nn.Linear and done.bytes_before == 2 * 64 * 128
    assert quantizer().quantize(nn.Sequential(nn.Linear(64, 64))).modules == ()  # float32


def test_bytes_are_known_from_the_shape() -> None:
    layer = nn.Linear(4096, 1024, bias=False).bfloat16()
    done = quantizer().quantize(nn.Sequential(layer))
    assert sum(piece.nbytes for piece in pieces(layer.weight)) == done.bytes_after
    assert done.bytes_after == quantizer().bytes_of(torch.Size((1024, 4096)), torch.bfloat16)
    assert 12 < 8 * done.bytes_after / layer.weight.numel() < 12.05
    assert quantizer().bytes_of(torch.Size((1024, 4096)), torch.float32) == 4 * 1024 * 4096


def test_it_is_held_moved_and_copied_like_a_tensor_and_computes_nothing() -> None:
    weight = normal(64, 128)
    layer = nn.Linear(128, 64, bias=False).bfloat16()
    with torch.no_grad():
        layer.weight.copy_(weight)
    quantizer().quantize(nn.Sequential(layer))
    assert isinstance(layer, QuantizedLinear) and "PackedTensor" in repr(layer.weight)
    assert same_bits(layer.dense(torch.bfloat16), weight) and torch.equal(layer.dense(torch.float32), weight.float())
    moved = map_pieces(layer.weight, torch.clone)
    assert same_bits(packed.expand_packed(moved, torch.bfloat16), weight)
    assert same_bits(packed.expand_packed(layer.weight.detach().clone(), torch.bfloat16), weight)
    assert copy.deepcopy(layer).to("meta").weight.device.type == "meta" and layer.weight.device.type == "cpu"
    with pytest.raises(TypeError, match="are expanded for it"):
        layer.weight.float()


def test_a_model_trains_to_the_bit_as_with_plain_weights() -> None:
    found = []
    for quantized in (False, True):
        torch.manual_seed(0)
        model = MixingModel(depth=3, width=64).bfloat16()
        if quantized:
            assert all(quantizer().quantize(block).modules for block in model.blocks)
        add_adapters(model, resolve_targets(model, "to_q,to_v", []), AdapterSettings(lora_rank=4), seed=1)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_B" in name:
                    parameter.copy_(normal(*parameter.shape, seed=2) * 8)
        draws = torch.Generator().manual_seed(3)
        video, audio, text, sigma = (torch.randn(s, generator=draws).bfloat16() for s in ((2, 6, 6), (2, 3, 6), (2, 4, 6), (2, 6)))
        runner = BlockRunner(model.block_set(), call_mixing_block, checkpointing=Checkpointing.every(3))
        out = model.exit(runner.run(model.enter(video, audio, text, sigma)))
        torch.stack([prediction.float().square().mean() for prediction in out.values()]).sum().backward()
        found.append([*(p.detach() for p in out.values()), *(p.grad for p in model.parameters() if p.grad is not None)])
    assert len(found[0]) == len(found[1]) > 10 and all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_the_kernel_computes_the_formula() -> None:
    assert proof_of("tuner.builtins.packed_kernels") == ({"unpacked weights": 0.0}, "")
