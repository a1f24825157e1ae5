"""The kernels of `tuner.model.fp8`: rows are rounded in one pass, and weights turned tile by tile. Imported for CUDA devices only.

Dimensions: as in `tuner.model.fp8`.
"""

from __future__ import annotations

from typing import Final

import torch
import triton
import triton.language as tl
from torch import Tensor

from tuner.model import fp8

LIMIT: Final = 0.02
"""Few values may fall on the other side of a tie between two numbers, which lie up to 1/8 apart."""
_TILE: Final = 64


@triton.jit  # type: ignore[untyped-decorator]
def _round_row(  # type: ignore[no-untyped-def]  # Triton reads the annotations
    x, factor, values, scales, columns, smallest, HAS_FACTOR: tl.constexpr, LARGEST: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    place = tl.arange(0, BLOCK)
    inside = place < columns
    value = tl.load(x + row * columns + place, mask=inside, other=0.0).to(tl.float32)
    if HAS_FACTOR:
        value *= tl.load(factor + place, mask=inside, other=0.0).to(tl.float32)
    scale = tl.maximum(tl.max(tl.abs(value), 0) / LARGEST, smallest)
    rounded = tl.minimum(tl.maximum(value / scale, -LARGEST), LARGEST)
    tl.store(values + row * columns + place, rounded.to(tl.float8e4nv), mask=inside)
    tl.store(scales + row, scale)


def rounded_rows(x: Tensor, factor: Tensor | None = None) -> fp8.Rounded:
    """`fp8.rounded_rows`."""
    x = x.contiguous()
    rows, columns = x.shape
    values = torch.empty(x.shape, dtype=fp8.E4M3, device=x.device)
    scales = torch.empty((rows, 1), dtype=torch.float32, device=x.device)
    block = triton.next_power_of_2(columns)
    _round_row[(rows,)](
        x, x if factor is None else factor.contiguous(), values, scales, columns, fp8.TINY, HAS_FACTOR=factor is not None,
        LARGEST=fp8.LARGEST, BLOCK=block, num_warps=max(1, min(16, block // 512)),
    )  # fmt: skip
    return values, scales


@triton.jit  # type: ignore[untyped-decorator]
def _turn_tile(values, out, rows, columns, TILE: tl.constexpr):  # type: ignore[no-untyped-def]
    row = tl.program_id(0).to(tl.int64) * TILE + tl.arange(0, TILE)
    column = tl.program_id(1).to(tl.int64) * TILE + tl.arange(0, TILE)
    inside = (row < rows)[:, None] & (column < columns)[None, :]
    tile = tl.load(values + row[:, None] * columns + column[None, :], mask=inside, other=0)
    turned = (column < columns)[:, None] & (row < rows)[None, :]
    tl.store(out + column[:, None] * rows + row[None, :], tl.trans(tile), mask=turned)


def transposed(values: Tensor) -> Tensor:
    """`fp8.transposed`."""
    values = values.contiguous()
    rows, columns = values.shape
    out = torch.empty((columns, rows), dtype=values.dtype, device=values.device)
    # As whole numbers: nothing is computed.
    _turn_tile[(triton.cdiv(rows, _TILE), triton.cdiv(columns, _TILE))](
        values.view(torch.int8), out.view(torch.int8), rows, columns, TILE=_TILE, num_warps=4
    )
    return out


def differences(device: torch.device) -> dict[str, float]:
    """Relative distance of each kernel's result to that of the formula."""
    draws = torch.Generator().manual_seed(0)
    x, factor = (torch.randn(shape, generator=draws).to(device, torch.bfloat16) for shape in ((70, 200), (1, 200)))
    found: dict[str, float] = {}
    for name, given in (("rounded rows", None), ("rounded rows times a factor", factor.float().abs())):
        values, scale = rounded_rows(x, given)
        wide = x.float() if given is None else x.float() * given
        wanted = (wide.abs().amax(dim=1, keepdim=True) / fp8.LARGEST).clamp(min=fp8.TINY)
        rounded = (wide / wanted).to(fp8.E4M3).float() * wanted
        found[name] = float((values.float() * scale - rounded).norm() / rounded.norm())
    values = rounded_rows(x)[0]
    found["turned weights"] = float((transposed(values).float() != values.float().t()).sum())
    return found
