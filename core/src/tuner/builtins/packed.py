"""bfloat16 weights in 12 bits each, bit for bit: a sign, 7 bits of mantissa and a 4-bit code for the exponent.

The exponents of a trained weight carry under 3 bits (Zhang et al. 2025, arXiv:2504.11651, who give them codes of varying length). Special
here: codes of one length, so a device unpacks each weight by itself, and a layer's size follows from its shape, so it can be streamed
through fixed slots. A row has a window of 15 exponents that lie beside each other, placed where most of its weights are; code 0 is for
zeros and subnormal numbers. What lies outside, in a normal row two weights of ten thousand, is listed with its place.

Dimensions: N out, K in, P places in the list.
"""

from __future__ import annotations

from typing import Any, Final

import torch
from torch import Tensor

from tuner.model.kernels import proven

WINDOW: Final = 15
"""Exponents of a row that have a code."""
LISTED: Final = 2048
"""Weights of which one may lie outside of its row's window."""
_ROWS: Final = 1 << 22
"""Weights that are packed at a time: counting exponents takes 8 bytes for each."""

PIECES: Final = ("low", "high", "base", "places", "others", "starts")


class PackedTensor(Tensor):
    """Looks like the bfloat16 tensor (N, K) that it holds; nothing is computed with it but through `expand_packed`.

    `low` (N, K) uint8: sign and mantissa; `high` (N, K/2) uint8: two codes, that of column k in the lower half and that of k + K/2 in the
    upper one; `base` (N, 1) uint8: a code c > 0 means the exponent base + c; `places` (P,) int32 and `others` (P,) int16: where in N·K the
    16 bits are those instead; `starts` (N + 1,) int32: where in that list a row's part begins. Behind the last row's it says once more
    what the first weight is.
    """

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    low: Tensor
    high: Tensor
    base: Tensor
    places: Tensor
    others: Tensor
    starts: Tensor

    @staticmethod
    def __new__(cls, low: Tensor, high: Tensor, base: Tensor, places: Tensor, others: Tensor, starts: Tensor) -> PackedTensor:
        made: PackedTensor = torch.Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls, low.shape, dtype=torch.bfloat16, device=low.device, requires_grad=False
        )
        return made

    def __init__(self, low: Tensor, high: Tensor, base: Tensor, places: Tensor, others: Tensor, starts: Tensor) -> None:
        self.low, self.high, self.base, self.places, self.others, self.starts = low, high, base, places, others, starts

    def __tensor_flatten__(self) -> tuple[list[str], None]:
        return list(PIECES), None

    @staticmethod
    def __tensor_unflatten__(inner: dict[str, Tensor], facts: None, size: object, stride: object) -> PackedTensor:
        return PackedTensor(**inner)

    def __repr__(self) -> str:  # type: ignore[override]
        return f"PackedTensor({tuple(self.shape)}, device={self.device})"

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        name, (first, *_) = func.overloadpacket._qualified_op_name, args
        if name in ("aten::detach", "aten::alias", "aten::clone"):
            return cls(*(func(getattr(first, piece), **(kwargs or {})) for piece in PIECES))
        raise TypeError(f"{name} of packed weights: they are expanded for it")


def places_of(rows: int, columns: int) -> int:
    """P, a multiple of 8."""
    return 8 * -(-rows * columns // (8 * LISTED))


def packed_bytes(rows: int, columns: int) -> int:
    """Of a packed (N, K)."""
    return rows * columns + rows * (columns // 2) + rows + 6 * places_of(rows, columns) + 4 * (rows + 1)


def pack(weight: Tensor) -> PackedTensor | None:
    """(N, K) bfloat16, K even; None where more weights lie outside of their row's window than the list has places."""
    rows, columns = weight.shape
    low = torch.empty((rows, columns), dtype=torch.uint8, device=weight.device)
    high = torch.empty((rows, columns // 2), dtype=torch.uint8, device=weight.device)
    base = torch.empty((rows, 1), dtype=torch.uint8, device=weight.device)
    bits = weight.contiguous().view(torch.int16)
    outside: list[Tensor] = []
    step = max(1, _ROWS // columns)
    for first in range(0, rows, step):
        here = slice(first, first + step)
        given = bits[here].to(torch.int32) & 0xFFFF
        exponent = (given >> 7) & 0xFF
        start = _windows(exponent)
        code = exponent - start + 1
        fitting = (exponent == 0) | ((code >= 1) & (code <= WINDOW))
        code = torch.where(fitting & (exponent > 0), code, 0).to(torch.uint8)
        low[here] = (((given >> 8) & 0x80) | (given & 0x7F)).to(torch.uint8)
        high[here] = code[:, : columns // 2] | (code[:, columns // 2 :] << 4)
        base[here] = (start - 1).to(torch.uint8)
        outside.append((~fitting).flatten().nonzero().flatten() + first * columns)
    found = torch.cat(outside)
    count = places_of(rows, columns)
    if len(found) > count:
        return None
    places = torch.zeros(count, dtype=torch.int32, device=weight.device)
    places[: len(found)] = found.to(torch.int32)
    starts = torch.searchsorted(found, torch.arange(rows + 1, device=weight.device) * columns).to(torch.int32)
    return PackedTensor(low, high, base, places, bits.view(-1)[places.long()], starts)


def _windows(exponent: Tensor) -> Tensor:
    """(R, K) exponents -> (R, 1) the lowest of the 15 that most of a row's are among, those above 0; of equal windows the uppermost."""
    rows = len(exponent)
    counts = torch.zeros((rows, 256), dtype=torch.int32, device=exponent.device)
    counts.scatter_add_(1, exponent.long(), torch.ones_like(exponent))
    counts[:, 0] = 0
    summed = counts.cumsum(1)
    starts = torch.arange(1, 257 - WINDOW, device=exponent.device)
    inside = summed[:, starts + WINDOW - 1] - summed[:, starts - 1]
    return starts[(inside * 256 + starts).argmax(dim=1)].unsqueeze(1).to(torch.int32)


def expand_packed(weight: Any, dtype: torch.dtype) -> Tensor:
    """An `Expand` of `tuner.model.quantized`: the bfloat16 numbers that were packed, in `dtype`."""
    if weight.low.is_meta:  # what a kernel makes
        return torch.empty(weight.low.shape, dtype=dtype, device="meta")
    kernels = None
    if weight.low.is_cuda and not torch.compiler.is_compiling():
        kernels = proven("tuner.builtins.packed_kernels", weight.low.device.index)
    pieces = [getattr(weight, name) for name in PIECES]
    found: Tensor = unpacked(*pieces) if kernels is None else kernels.unpacked(*pieces)
    return found if dtype == torch.bfloat16 else found.to(dtype)


def unpacked(low: Tensor, high: Tensor, base: Tensor, places: Tensor, others: Tensor, starts: Tensor) -> Tensor:
    """The pieces of a `PackedTensor` -> (N, K) bfloat16."""
    code = torch.cat((high & 15, high >> 4), dim=1)
    exponent = torch.where(code > 0, code + base, 0).to(torch.int16)
    # The sign bit goes to the upper end of the 16 bits, where it makes the whole number negative.
    bits = (exponent << 7) | (low & 0x7F) | ((low & 0x80).to(torch.int16) << 8)
    return bits.view(-1).scatter_(0, places.long(), others).view(torch.bfloat16).view(low.shape)
