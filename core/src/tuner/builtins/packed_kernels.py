"""The kernel of `tuner.builtins.packed`: weights are unpacked in one pass, reading 12 bits and writing 16. For CUDA devices only.

Dimensions: as in `tuner.builtins.packed`.
"""

from __future__ import annotations

from typing import Final

import torch
import triton
import triton.language as tl
from torch import Tensor

from tuner.builtins import packed

LIMIT: Final = 0.0
"""Not a bit."""
_COLUMNS: Final = 4096
"""Of a row that one program unpacks."""
_PLACES: Final = 1024


@triton.jit  # type: ignore[untyped-decorator]
def _unpack_row(low, high, base, out, columns, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]  # Triton reads the annotations
    row = tl.program_id(0).to(tl.int64)
    place = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = place < columns
    below = tl.load(low + row * columns + place, mask=inside, other=0).to(tl.int32)
    pair = tl.load(high + row * (columns // 2) + place // 2, mask=inside, other=0).to(tl.int32)
    code = (pair >> (4 * (place % 2))) & 15
    exponent = tl.where(code > 0, code + tl.load(base + row).to(tl.int32), 0)
    bits = ((below & 0x80) << 8) | (exponent << 7) | (below & 0x7F)
    tl.store(out + row * columns + place, bits.to(tl.int16), mask=inside)


@triton.jit  # type: ignore[untyped-decorator]
def _put(places, others, out, count, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    number = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = number < count
    # Several may say the same of one place.
    tl.store(out + tl.load(places + number, mask=inside, other=0), tl.load(others + number, mask=inside, other=0), mask=inside)


def unpacked(low: Tensor, high: Tensor, base: Tensor, places: Tensor, others: Tensor) -> Tensor:
    """`packed.unpacked`."""
    rows, columns = low.shape
    out = torch.empty((rows, columns), dtype=torch.int16, device=low.device)
    _unpack_row[(rows, triton.cdiv(columns, _COLUMNS))](low, high, base, out, columns, BLOCK=_COLUMNS)
    _put[(triton.cdiv(len(places), _PLACES),)](places, others, out, len(places), BLOCK=_PLACES)
    return out.view(torch.bfloat16)


def differences(device: torch.device) -> dict[str, float]:
    """How many weights are others than those of the formula."""
    draws = torch.Generator().manual_seed(0)
    weight = torch.randn((70, 4500), generator=draws).to(device, torch.bfloat16)
    weight[3], weight[5, 7], weight[6, :4] = 0, 1e30, torch.tensor([-0.0, 1e-39, -1e-30, float("inf")])
    made = packed.pack(weight)
    assert made is not None
    found = unpacked(*(getattr(made, name) for name in packed.PIECES))
    return {"unpacked weights": float((found.view(torch.int16) != weight.view(torch.int16)).sum())}
