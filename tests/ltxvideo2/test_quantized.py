"""Checkpoints in 8 and 4 bits: the weights are stored numbers times their scales, and no scale is left over."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from tuner.errors import CheckpointError
from tuner.interfaces.services import WeightSource
from tuner_ltxvideo2.loading import CombinedFile, build_part
from tuner_ltxvideo2.quantized import unpack_nvfp4
from tuner_ltxvideo2.tiny import TinyPaths
from tuner_ltxvideo2.variants import variant_of

CPU = torch.device("cpu")
LEAD = "model.diffusion_model."
NAMES = tuple(f"transformer_blocks.{block}.{layer}.to_q" for block in (0, 1) for layer in ("attn1", "audio_attn1"))
E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
"""Codes 0 to 7; 8 to 15 are the same, negative."""
Edit = Callable[[dict[str, Tensor]], None]


@pytest.fixture(scope="module")
def plain(tiny20: TinyPaths) -> dict[str, Tensor]:
    """The tensors of some parts: a file need not hold all."""
    tensors = load_file(tiny20.checkpoint)
    return {key: tensor for key, tensor in tensors.items() if key.startswith((LEAD, "text_embedding_projection.", "vocoder."))}


def written(tiny: TinyPaths, path: Path, tensors: dict[str, Tensor], **metadata: object) -> Path:
    with safe_open(tiny.checkpoint, framework="pt") as opened:
        told = dict(opened.metadata())
    save_file(tensors, path, metadata=told | {key: json.dumps(value) for key, value in metadata.items()})
    return path


def opened(path: Path) -> WeightSource:
    return CombinedFile().open(path, path.name)


def weights(source: WeightSource, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    return dict(build_part(source, "transformer", variant_of(source), dtype=dtype, device=CPU).state_dict())


# --- 8 bits ------------------------------------------------------------------------------------------------------
def in_eight_bits(tensors: dict[str, Tensor], scale_name: str, per_row: bool) -> dict[str, Tensor]:
    """Replaces NAMES' weights in place; returns what they should be read as."""
    expected: dict[str, Tensor] = {}
    for name in NAMES:
        weight = tensors[f"{LEAD}{name}.weight"].float()
        largest = weight.abs().amax(dim=1, keepdim=True) if per_row else weight.abs().amax()
        scale = largest / 448
        stored = (weight / scale).to(torch.float8_e4m3fn)
        tensors[f"{LEAD}{name}.weight"] = stored
        tensors[f"{LEAD}{name}.{scale_name}"] = scale
        expected[f"{name}.weight"] = stored.float() * scale
    return expected


@pytest.mark.parametrize(("scale_name", "per_row"), [("weight_scale", False), ("weight_scale", True), ("scale_weight", False)])
def test_eight_bit_weights_are_scaled(
    scale_name: str, per_row: bool, tiny20: TinyPaths, plain: dict[str, Tensor], tmp_path: Path
) -> None:
    tensors = dict(plain)
    expected = in_eight_bits(tensors, scale_name, per_row)
    for name in NAMES:
        tensors[f"{LEAD}{name}.{'input_scale' if scale_name == 'weight_scale' else 'scale_input'}"] = torch.tensor(0.5)
    tensors[f"{LEAD}scaled_fp8"] = torch.empty(2, dtype=torch.float8_e4m3fn)
    source = opened(written(tiny20, tmp_path / "a.safetensors", tensors))
    found = weights(source)
    for name, weight in expected.items():
        assert torch.equal(found[name], weight)
    assert torch.equal(weights(source, torch.bfloat16)[f"{NAMES[0]}.weight"], expected[f"{NAMES[0]}.weight"].to(torch.bfloat16))
    assert torch.equal(found["proj_in.weight"], plain[f"{LEAD}patchify_proj.weight"].float())
    # the error of rounding to 3 bits of mantissa, at most half of the last one
    torch.testing.assert_close(found[f"{NAMES[0]}.weight"], plain[f"{LEAD}{NAMES[0]}.weight"].float(), rtol=1 / 16, atol=1e-3)


def test_eight_bits_without_any_scale_are_a_plain_cast(tiny20: TinyPaths, plain: dict[str, Tensor], tmp_path: Path) -> None:
    tensors = dict(plain)
    for name in NAMES:
        tensors[f"{LEAD}{name}.weight"] = tensors[f"{LEAD}{name}.weight"].to(torch.float8_e5m2)
    found = weights(opened(written(tiny20, tmp_path / "a.safetensors", tensors)))
    assert torch.equal(found[f"{NAMES[0]}.weight"], tensors[f"{LEAD}{NAMES[0]}.weight"].float())


def test_a_changed_scale_is_another_model(tiny20: TinyPaths, plain: dict[str, Tensor], tmp_path: Path) -> None:
    tensors = dict(plain)
    in_eight_bits(tensors, "weight_scale", per_row=False)
    first = opened(written(tiny20, tmp_path / "a.safetensors", tensors)).fingerprint("transformer")
    tensors[f"{LEAD}{NAMES[0]}.weight_scale"] *= 2
    assert opened(written(tiny20, tmp_path / "b.safetensors", tensors)).fingerprint("transformer") != first


def lacking(tensors: dict[str, Tensor]) -> None:
    in_eight_bits(tensors, "weight_scale", per_row=False)
    del tensors[f"{LEAD}{NAMES[0]}.weight_scale"]


def doubled(tensors: dict[str, Tensor]) -> None:
    in_eight_bits(tensors, "weight_scale", per_row=False)
    tensors[f"{LEAD}{NAMES[0]}.scale_weight"] = torch.tensor(1.0)


def alone(tensors: dict[str, Tensor]) -> None:
    tensors[f"{LEAD}nobody.weight_scale"] = torch.tensor(1.0)


def misshapen(tensors: dict[str, Tensor]) -> None:
    in_eight_bits(tensors, "weight_scale", per_row=False)
    tensors[f"{LEAD}{NAMES[0]}.weight_scale"] = torch.ones(3, 4)


def undeclared(tensors: dict[str, Tensor]) -> None:
    tensors[f"{LEAD}{NAMES[0]}.weight"] = torch.zeros(192, 96, dtype=torch.uint8)


@pytest.mark.parametrize(
    ("edit", "said"),
    [
        (lacking, "1 weights in 8 bits lack their scale"), (doubled, "belong to no weight, or to one that has"),
        (alone, r"nobody\.weight_scale"), (misshapen, "scales do not fit"), (undeclared, "does not declare them as nvfp4"),
    ],
)  # fmt: skip
def test_what_cannot_be_read_is_refused(edit: Edit, said: str, tiny20: TinyPaths, plain: dict[str, Tensor], tmp_path: Path) -> None:
    tensors = dict(plain)
    edit(tensors)
    with pytest.raises(CheckpointError, match=said) as caught:
        opened(written(tiny20, tmp_path / "a.safetensors", tensors))
    assert "bf16" in str(caught.value)


def test_formats_of_one_program_are_named(tiny20: TinyPaths, plain: dict[str, Tensor], tmp_path: Path) -> None:
    tensors = dict(plain)
    tensors[f"{LEAD}{NAMES[0]}.weight"] = torch.zeros(192, 192, dtype=torch.int8)
    said = json.dumps({"format": "int8_rotated"}).encode()
    tensors[f"{LEAD}{NAMES[0]}.comfy_quant"] = torch.frombuffer(bytearray(said), dtype=torch.uint8)
    with pytest.raises(CheckpointError, match="int8_rotated"):
        opened(written(tiny20, tmp_path / "a.safetensors", tensors))


# --- 4 bits ------------------------------------------------------------------------------------------------------
def pack(weight: Tensor, scale: float) -> tuple[Tensor, Tensor, Tensor]:
    """Packed numbers, tiled block scales, and the weight that they stand for; element by element, as the layout is documented."""
    rows, columns = weight.shape
    blocks = columns // 16
    across = -(-blocks // 4)
    tiles = torch.zeros(-(-rows // 128) * across * 512)
    packed = torch.zeros(rows, columns // 2, dtype=torch.uint8)
    meant = torch.zeros(rows, columns)
    levels = torch.tensor(E2M1)
    for row in range(rows):
        for block in range(blocks):
            values = weight[row, 16 * block : 16 * block + 16]
            block_scale = (values.abs().max() / 6 / scale).to(torch.float8_e4m3fn).float()
            place = (row // 128 * across + block // 4) * 512 + row % 32 * 16 + row % 128 // 32 * 4 + block % 4
            tiles[place] = block_scale
            total = block_scale * scale
            nearest = (values.abs()[:, None] / total - levels).abs().argmin(dim=1)
            codes = nearest + 8 * (values < 0)
            packed[row, 8 * block : 8 * block + 8] = (codes[::2] * 16 + codes[1::2]).to(torch.uint8)
            meant[row, 16 * block : 16 * block + 16] = levels[nearest] * torch.where(values < 0, -1, 1) * total
    padded = tiles.to(torch.float8_e4m3fn).reshape(-(-rows // 128) * 128, across * 4)
    return packed, padded, meant


def test_four_bit_weights_are_unpacked() -> None:
    weight = torch.randn(130, 96, generator=torch.Generator().manual_seed(3))  # neither side fills its tiles
    packed, tiles, meant = pack(weight, 0.01)
    assert tiles.shape == (256, 8)
    found = unpack_nvfp4(packed, tiles, torch.tensor(0.01))
    torch.testing.assert_close(found, meant, rtol=1e-6, atol=0)
    assert float((found - weight).norm() / weight.norm()) < 0.15


def test_a_four_bit_file_gives_the_weights_that_it_stands_for(tiny20: TinyPaths, plain: dict[str, Tensor], tmp_path: Path) -> None:
    name = NAMES[0]
    packed, tiles, meant = pack(plain[f"{LEAD}{name}.weight"].float(), 0.002)
    tensors = dict(plain)
    tensors[f"{LEAD}{name}.weight"], tensors[f"{LEAD}{name}.weight_scale"] = packed, tiles
    tensors[f"{LEAD}{name}.weight_scale_2"], tensors[f"{LEAD}{name}.input_scale"] = torch.tensor(0.002), torch.tensor(1.0)
    told = {"_quantization_metadata": {"format_version": "1.0", "layers": {name: {"format": "nvfp4"}}}}
    source = opened(written(tiny20, tmp_path / "a.safetensors", tensors, **told))
    assert source.headers("transformer")[f"{name}.weight"].shape == meant.shape
    torch.testing.assert_close(weights(source)[f"{name}.weight"], meant, rtol=1e-6, atol=0)

    # the same said by a tensor beside the weight
    tensors[f"{LEAD}{name}.comfy_quant"] = torch.frombuffer(bytearray(b'{"format": "nvfp4"}'), dtype=torch.uint8)
    beside = opened(written(tiny20, tmp_path / "b.safetensors", tensors))
    assert torch.equal(dict(beside.tensors("transformer", [f"{name}.weight"]))[f"{name}.weight"], weights(source)[f"{name}.weight"])
