"""Checkpoints in 8 and 4 bits: which scales belong to which weight, and the weight itself again.

Special here: nothing is guessed. Every scale in a file belongs to exactly one weight, or the file is refused; packed 4-bit weights
are unpacked only where the file declares its format, because another order of the two halves of a byte is in use and looks the same.

The layouts (ComfyUI's QUANTIZATION.md, which the published files follow; NVIDIA's cuBLAS manual for the tiling of block scales):

* 8 bits: `X.weight` as F8_E4M3 or F8_E5M2, `X.weight_scale` (older files: `X.scale_weight`) for the whole tensor or per row;
  weight = stored · scale. `X.input_scale` (`X.scale_input`) is for 8-bit activations, `scaled_fp8` marks such a file: both are
  dropped knowingly. A file without any scale holds plain rounded weights.
* 4 bits (NVFP4): `X.weight` as U8, two E2M1 numbers a byte, the first in the high half; `X.weight_scale` as F8_E4M3, one for
  16 numbers of a row, in cuBLAS's tiles of 128 x 4; `X.weight_scale_2` for the whole tensor. weight = number · block scale · scale.

Dimensions: N rows, K columns of the weight; B = K / 16 blocks a row.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Final

import torch
from torch import Tensor

from tuner.errors import CheckpointError
from tuner.interfaces.services import TensorHeader
from tuner.model.reading import dtype_of, read_into
from tuner.model.stored import StoredFile, StoredTensor, named, read_bytes

PLAIN: Final = frozenset({"BF16", "F16", "F32", "F64"})
EIGHT_BITS: Final = frozenset({"F8_E4M3", "F8_E5M2"})
_DECLARED: Final = frozenset({"float8_e4m3fn", "float8_e5m2", "nvfp4"})
_SCALES: Final[Mapping[str, str]] = {"weight_scale": "scale", "scale_weight": "scale", "weight_scale_2": "second"}
_DROPPED: Final = ("input_scale", "scale_input", "comfy_quant")
_MARKER: Final = "scaled_fp8"
_PACKED: Final = "F4"
"""What a header says of a weight in NVFP4."""
_AT_ONCE: Final = 256 << 20
"""Bytes of weights that are in memory as they are stored, to be converted, at a time."""
_BLOCK: Final = 16
_TILE: Final = (128, 4)
"""Rows and columns of block scales in a tile, in which row r, column c lies at 16 · (r mod 32) + 4 · (r div 32) + c."""
_E2M1: Final = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
_REMEDY: Final = "use the bf16 checkpoint of the same model"


def with_scales(stored: StoredFile) -> StoredFile:
    """The same file with each scale attached to its weight, and headers that tell the weights' own shapes.

    Raises `CheckpointError` for a scale without a weight, an 8-bit weight without a scale among others that have one, and formats
    that are not read.
    """
    marks = {key for key in stored.tensors if _leaf(key) in (*_SCALES, *_DROPPED, _MARKER)}
    packed = {key for key, t in stored.tensors.items() if key.endswith(".weight") and t.header.dtype not in PLAIN | EIGHT_BITS}
    if not marks and not packed:
        return stored
    declared = _declared_formats(stored)
    _check_formats(stored, declared, packed)
    kept = {key: tensor for key, tensor in stored.tensors.items() if key not in marks}
    scales = _scales_by_weight(stored, marks, kept)
    eight = [key for key, tensor in kept.items() if tensor.header.dtype in EIGHT_BITS]
    unscaled = [key for key in eight if "scale" not in scales.get(key, {})]
    if unscaled and any("scale" in found for found in scales.values()):
        raise CheckpointError(
            f"{len(unscaled)} weights in 8 bits lack their scale, though others have one",
            where=stored.path.name, value=named(unscaled), remedy="download it again, or " + _REMEDY,
        )  # fmt: skip
    return replace(stored, tensors={key: _scaled(tensor, scales.get(key, {})) for key, tensor in kept.items()})


@torch.no_grad()
def read_weights(wanted: Iterable[tuple[StoredTensor, Tensor]]) -> None:
    """Fills each tensor, on any device and of any dtype, with the weight that is stored; what is stored otherwise is converted there."""
    straight: list[tuple[StoredTensor, Tensor]] = []
    others: list[tuple[StoredTensor, Tensor]] = []
    for stored, target in wanted:
        as_it_is = not stored.scales and dtype_of(stored) == target.dtype
        (straight if as_it_is else others).append((stored, target))
    read_into(straight)
    while others:
        group = [others.pop()]
        while others and sum(stored.end - stored.start for stored, _ in group) < _AT_ONCE:
            group.append(others.pop())
        _read_converted(group)


def _read_converted(wanted: Sequence[tuple[StoredTensor, Tensor]]) -> None:
    """All of them, and their scales, are in memory beside the targets for a moment."""
    raw = [[(piece, _room(piece, target.device)) for piece in (stored, *stored.scales)] for stored, target in wanted]
    read_into(pair for pairs in raw for pair in pairs)
    for (stored, target), pairs in zip(wanted, raw, strict=True):
        weight, *scales = (room for _, room in pairs)
        target.detach().copy_(_unscaled(stored, weight, scales))


def weight_of(stored: StoredTensor) -> Tensor:
    """The weight itself, on the CPU: as it is stored, or float32 where it has scales."""
    room = torch.empty(stored.header.shape, dtype=torch.float32 if stored.scales else dtype_of(stored))
    read_weights([(stored, room)])
    return room


def _room(stored: StoredTensor, device: torch.device) -> Tensor:
    """Memory for a tensor as it is stored."""
    if stored.header.dtype == _PACKED:  # the header is the weight's own
        rows, columns = stored.header.shape
        return torch.empty(rows, columns // 2, dtype=torch.uint8, device=device)
    return torch.empty(stored.header.shape, dtype=dtype_of(stored), device=device)


def _unscaled(stored: StoredTensor, raw: Tensor, scales: Sequence[Tensor]) -> Tensor:
    """The weight itself: `raw` where it has no scales, else float32 (N, K)."""
    if not scales:
        return raw
    if stored.header.dtype == _PACKED:
        return unpack_nvfp4(raw, *scales)
    scale = scales[0].float()
    return raw.float() * (scale if scale.numel() == 1 else scale.reshape(-1, *(1,) * (raw.ndim - 1)))


def unpack_nvfp4(packed: Tensor, block_scales: Tensor, scale: Tensor) -> Tensor:
    """(N, K/2) uint8, block scales float8 in cuBLAS's tiles, one scale -> (N, K) float32, all on one device."""
    rows, columns = packed.shape[0], 2 * packed.shape[1]
    codes = torch.stack([packed >> 4, packed & 0xF], dim=-1).reshape(rows, columns).long()
    numbers = torch.tensor([*_E2M1, *(-value for value in _E2M1)], device=packed.device)[codes]
    blocks = untile(block_scales.float(), rows, columns // _BLOCK) * scale.float()
    return (numbers.reshape(rows, -1, _BLOCK) * blocks[..., None]).reshape(rows, columns)


def untile(scales: Tensor, rows: int, columns: int) -> Tensor:
    """Block scales in cuBLAS's tiles (any shape; padded to whole tiles) -> (N, B)."""
    down, across = _tiles(rows, columns)
    # A tile is stored as 32 x 4 x 4: place in a group of 32 rows, which group, column.
    tiles = scales.reshape(down, across, 32, 4, 4)
    whole = tiles.permute(0, 3, 2, 1, 4).reshape(down * _TILE[0], across * _TILE[1])
    return whole[:rows, :columns]


def _tiles(rows: int, columns: int) -> tuple[int, int]:
    return -(-rows // _TILE[0]), -(-columns // _TILE[1])


# --- what the file says ------------------------------------------------------------------------------------------
def _leaf(key: str) -> str:
    return key.rpartition(".")[2]


def _declared_formats(stored: StoredFile) -> dict[str, str]:
    """Weight's key -> format, from the metadata or from the small JSON tensors beside the weights."""
    formats: dict[str, str] = {}
    try:
        told = json.loads(stored.metadata.get("_quantization_metadata", "{}"))
        layers = told.get("layers", {}) if isinstance(told, dict) else {}
        found = {layer: table["format"] for layer, table in layers.items()}
        beside = {key.removesuffix(".comfy_quant"): tensor for key, tensor in stored.tensors.items() if key.endswith(".comfy_quant")}
        found |= {layer: json.loads(read_bytes(tensor))["format"] for layer, tensor in beside.items()}
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError("what the file says about its quantization is damaged", where=stored.path.name, remedy=_REMEDY) from error
    for key in stored.tensors:
        if key.endswith(".weight"):
            layer = key.removesuffix(".weight")  # layers may be named without the part's prefix
            names = (layer, *(layer.split(".", cut)[cut] for cut in range(1, layer.count(".") + 1)))
            named_so = next((name for name in names[:3] if name in found), None)
            if named_so is not None:
                formats[key] = str(found[named_so])
    return formats


def _check_formats(stored: StoredFile, declared: Mapping[str, str], packed: set[str]) -> None:
    foreign = sorted(set(declared.values()) - _DECLARED)
    if foreign:
        raise CheckpointError(
            "weights are in a format that only the program it was made for reads", where=stored.path.name, value=foreign,
            remedy=_REMEDY + ", or its fp8 or nvfp4 one",
        )  # fmt: skip
    strange = [key for key in packed if declared.get(key) != "nvfp4" or stored.tensors[key].header.dtype != "U8"]
    if strange:
        kinds = sorted({stored.tensors[key].header.dtype for key in strange})
        raise CheckpointError(
            f"{len(strange)} weights are packed as {', '.join(kinds)} and the file does not declare them as nvfp4, so what the bytes mean "
            "is not known", where=stored.path.name, value=named(strange), remedy=_REMEDY,
        )  # fmt: skip


def _scales_by_weight(stored: StoredFile, marks: set[str], kept: Mapping[str, StoredTensor]) -> dict[str, dict[str, StoredTensor]]:
    """Weight's key -> "scale" and "second" -> where it lies."""
    found: dict[str, dict[str, StoredTensor]] = {}
    alone: list[str] = []
    for key in sorted(marks):
        layer, _, leaf = key.rpartition(".")
        weight = f"{layer}.weight"
        if leaf == _MARKER:
            continue
        role = _SCALES.get(leaf)
        if weight not in kept or (role is not None and role in found.get(weight, {})):
            alone.append(key)
        elif role is not None:
            found.setdefault(weight, {})[role] = stored.tensors[key]
    if alone:
        raise CheckpointError(
            f"{len(alone)} scales belong to no weight, or to one that has a scale already",
            where=stored.path.name, value=named(alone), remedy="download it again, or " + _REMEDY,
        )  # fmt: skip
    return found


def _scaled(tensor: StoredTensor, scales: Mapping[str, StoredTensor]) -> StoredTensor:
    """`tensor` with its scales. Raises `CheckpointError` for scales of a shape that means nothing here."""
    header = tensor.header
    if header.dtype == "U8" and scales:
        rows, columns = header.shape[0], 2 * header.shape[1]
        tiles = _tiles(rows, columns // _BLOCK)
        fits = (
            {"scale", "second"} <= set(scales) and columns % _BLOCK == 0
            and scales["scale"].header.dtype == "F8_E4M3" and scales["second"].header.count == 1
            and scales["scale"].header.count == tiles[0] * _TILE[0] * tiles[1] * _TILE[1]
        )  # fmt: skip
        if not fits:
            raise _misfit(tensor, scales)
        return replace(tensor, header=TensorHeader((rows, columns), _PACKED), scales=(scales["scale"], scales["second"]))
    if not scales:
        return tensor
    scale = scales.get("scale")
    if scale is None or "second" in scales or not (scale.header.count == 1 or scale.header.shape in _per_row(header.shape)):
        raise _misfit(tensor, scales)
    return replace(tensor, scales=(scale,))


def _per_row(shape: tuple[int, ...]) -> tuple[tuple[int, ...], ...]:
    return shape[:1], (shape[0], *(1,) * (len(shape) - 1))


def _misfit(tensor: StoredTensor, scales: Mapping[str, StoredTensor]) -> CheckpointError:
    seen = {_leaf(scale.key): list(scale.header.shape) for scale in scales.values()}
    return CheckpointError(
        f"the scales do not fit a weight of {list(tensor.header.shape)} in {tensor.header.dtype}",
        where=tensor.key, value=seen, remedy=_REMEDY,
    )  # fmt: skip
