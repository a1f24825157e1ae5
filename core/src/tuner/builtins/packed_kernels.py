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
_PAIRS: Final = 1024
"""Bytes of codes of a row that one program unpacks, 16 for each of its threads. On an H200 that moves 3.7 of the 4.1 TB/s of a copy."""
_WARPS: Final = 2
_PLACES: Final = 16
"""Of a row's part of the list that are read at a time; most rows have one or two."""


@triton.jit  # type: ignore[untyped-decorator]
def _unpack_row(low, high, base, places, others, starts, out, half, PAIRS: tl.constexpr, PLACES: tl.constexpr):  # type: ignore[no-untyped-def]  # Triton reads the annotations
    row = tl.program_id(0)
    first = tl.program_id(1) * PAIRS
    column = first + tl.arange(0, PAIRS)
    inside = column < half
    begin = row.to(tl.int64) * 2 * half
    pair = tl.load(high + row.to(tl.int64) * half + column, mask=inside, other=0).to(tl.int32)
    lowest = tl.load(base + row).to(tl.int32)
    for side in tl.static_range(2):
        below = tl.load(low + begin + side * half + column, mask=inside, other=0).to(tl.int32)
        code = (pair >> (4 * side)) & 15
        exponent = tl.where(code > 0, code + lowest, 0)
        bits = ((below & 0x80) << 8) | (exponent << 7) | (below & 0x7F)
        tl.store(out + begin + side * half + column, bits.to(tl.int16), mask=inside)
    # What is listed is written over what another thread of this program has written.
    number, end = tl.load(starts + row), tl.load(starts + row + 1)
    tl.debug_barrier()
    while number < end:
        listed = number + tl.arange(0, PLACES)
        place = tl.load(places + listed, mask=listed < end, other=0)
        column_of = (place - begin) % half
        mine = (listed < end) & (column_of >= first) & (column_of < first + PAIRS)
        tl.store(out + place, tl.load(others + listed, mask=mine, other=0), mask=mine)
        number += PLACES


def unpacked(low: Tensor, high: Tensor, base: Tensor, places: Tensor, others: Tensor, starts: Tensor) -> Tensor:
    """`packed.unpacked`."""
    rows, columns = low.shape
    out = torch.empty((rows, columns), dtype=torch.int16, device=low.device)
    grid = (rows, triton.cdiv(columns // 2, _PAIRS))
    _unpack_row[grid](low, high, base, places, others, starts, out, columns // 2, PAIRS=_PAIRS, PLACES=_PLACES, num_warps=_WARPS)
    return out.view(torch.bfloat16)


def differences(device: torch.device) -> dict[str, float]:
    """How many weights are others than those of the formula."""
    draws = torch.Generator().manual_seed(0)
    weight = torch.randn((70, 4500), generator=draws).to(device, torch.bfloat16)
    weight[3], weight[5, 7], weight[6, :4] = 0, 1e30, torch.tensor([-0.0, 1e-39, -1e-30, float("inf")])
    weight[7, ::100], weight[69, 2249:] = 1e30, weight[69, 2249:] * (torch.arange(2251, device=device) % 60 > 0)
    made = packed.pack(weight)
    assert made is not None
    found = unpacked(*(getattr(made, name) for name in packed.PIECES))
    return {"unpacked weights": float((found.view(torch.int16) != weight.view(torch.int16)).sum())}
