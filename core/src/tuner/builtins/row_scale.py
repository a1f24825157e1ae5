"""Whole numbers of 8 bits times one scale a row, in one pass over memory, on a CUDA device.

torch's product of an int8 and a float tensor converts element by element: on an H200 it moves 0.8 TB/s of the 4.8 there are. Imported
where a quantized weight is first found on such a device; Triton comes with torch there.

Dimensions: N rows, K columns.
"""

from __future__ import annotations

from typing import Final

import torch
import triton
import triton.language as tl
from torch import Tensor

LIMIT: Final = 0.0
"""Not a bit."""
_COLUMNS = 4096
"""Of a row that one program converts: 16 bytes at a time for each of its threads."""


@triton.jit  # type: ignore[untyped-decorator]
def _scale_rows(values, scales, out, columns, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]  # Triton reads the annotations
    row = tl.program_id(0).to(tl.int64)
    place = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = place < columns
    loaded = tl.load(values + row * columns + place, mask=inside)
    scaled = loaded.to(tl.float32) * tl.load(scales + row).to(tl.float32)
    tl.store(out + row * columns + place, scaled, mask=inside)


def scale_rows(values: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """values (N, K) int8 times scale (N, 1), multiplied in float32 and rounded once to `dtype`; bitwise `torch.mul` into that dtype."""
    rows, columns = values.shape
    out = torch.empty((rows, columns), dtype=dtype, device=values.device)
    _scale_rows[(rows, triton.cdiv(columns, _COLUMNS))](values, scale, out, columns, BLOCK=_COLUMNS)
    return out


def differences(device: torch.device) -> dict[str, float]:
    """How many values are others than torch's own."""
    draws = torch.Generator().manual_seed(0)
    values = torch.randint(-128, 128, (5, 4500), generator=draws, dtype=torch.int8).to(device)
    scale = torch.rand((5, 1), generator=draws).to(device)
    found = {}
    for dtype in (torch.bfloat16, torch.float32):
        wanted = torch.mul(values, scale, out=torch.empty(values.shape, dtype=dtype, device=device))
        found[f"rows to {dtype}"] = float((scale_rows(values, scale, dtype) != wanted).sum())
    return found
