"""How the quantized tensors of each library are expanded to plain ones (N, K), with as few kernels as torch has for it.

Special here: every product is written straight into a tensor of the wanted dtype. On a GPU that is one kernel which reads 8 bits, writes
16 and rounds once. Values are those of the library's own `dequantize` bit by bit, in the dtype that the weight had. All are an `Expand`
of `tuner.model.quantized`: given the weight and a dtype they return its values row by row.

Dimensions: N out, K in, G groups of a row.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from tuner.model.kernels import proven


def expand_int8(weight: Any, dtype: torch.dtype) -> Tensor:
    """torchao's Int8Tensor: `qdata` (N, K) int8, `scale` (N, 1) float32. W = q · s."""
    return _scaled(weight.qdata, weight.scale, dtype)


def expand_float8(weight: Any, dtype: torch.dtype) -> Tensor:
    """torchao's Float8Tensor: `qdata` (N, K) e4m3, `scale` (N, 1) float32. W = q · s, copied first: torch multiplies no 8-bit floats."""
    return _scale(weight.qdata.to(dtype), weight.scale)


def float8_parts(weight: Any) -> tuple[Tensor, Tensor]:
    """torchao's Float8Tensor as values (N, K) e4m3 and scale (N, 1) float32."""
    return weight.qdata, weight.scale


def expand_int4(weight: Any, dtype: torch.dtype) -> Tensor:
    """torchao's Int4Tensor: `qdata` (N, K/2) int8 with the even column in the lower half of a byte, `scale` and `zero_point` (G, N).

    W = q · s + z, q in -8..7. torchao itself cannot expand it: the tests write the formula out.
    """
    qdata, scale, zero = weight.qdata, weight.scale, weight.zero_point
    groups, rows = scale.shape
    # Shifting left drops the upper half; shifting right again keeps the sign.
    values = torch.stack(((qdata << 4) >> 4, qdata >> 4), dim=-1).view(rows, groups, -1)
    out = torch.empty(values.shape, dtype=dtype, device=qdata.device)
    return torch.addcmul(zero.t().unsqueeze(-1), values, scale.t().unsqueeze(-1), out=out)


def expand_bytes(weight: Any, dtype: torch.dtype) -> Tensor:
    """quanto's WeightQBytesTensor of int8: `_data` (N, K), `_scale` (N, 1) in the weight's dtype."""
    return _scaled(weight._data, weight._scale, dtype)


def expand_float_bytes(weight: Any, dtype: torch.dtype) -> Tensor:
    """quanto's WeightQBytesTensor of e4m3: `_data` (N, K), `_scale` (N, 1) in the weight's dtype."""
    return _scale(weight._data.to(dtype), weight._scale)


def float_bytes_parts(weight: Any) -> tuple[Tensor, Tensor]:
    """quanto's WeightQBytesTensor of e4m3 as values (N, K) and scale (N, 1) float32."""
    return weight._data, weight._scale.float()


def expand_nibbles(weight: Any, dtype: torch.dtype) -> Tensor:
    """quanto's WeightQBitsTensor: `_data` packs (N·G, K/G) values 0..15, the upper half of the rows in the upper halves of the bytes.

    W = q · s - shift, with `_scale` and `_shift` (N·G, 1) in the weight's dtype. Unpacked here: quanto would compile a kernel first.
    """
    packed, scale, shift = weight._data._data, weight._scale, weight._shift
    half, width = packed.shape
    out = torch.empty((2 * half, width), dtype=dtype, device=packed.device)
    torch.mul(packed & 15, scale[:half], out=out[:half])
    torch.mul(packed >> 4, scale[half:], out=out[half:])
    out -= shift
    return out


def _row_kernel(values: Tensor) -> Callable[[Tensor, Tensor, torch.dtype], Tensor] | None:
    """The kernel for values on a CUDA device; None: torch's own product, which a compiler fuses with what follows."""
    if not values.is_cuda or torch.compiler.is_compiling() or not values.is_contiguous():
        return None
    kernels = proven("tuner.builtins.row_scale", values.device.index)
    return None if kernels is None else kernels.scale_rows  # type: ignore[no-any-return]


def _scaled(values: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    if (fast := _row_kernel(values)) is not None:
        return fast(values, scale, dtype)
    out = torch.empty(values.shape, dtype=dtype, device=values.device)
    return torch.mul(values, scale, out=out)


def _scale(values: Tensor, scale: Tensor) -> Tensor:
    return torch.mul(values, scale, out=values)
