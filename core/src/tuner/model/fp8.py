"""Frozen linear layers that multiply in 8-bit floats: weights are stored in e4m3, tokens and gradients are rounded to it as they come.

Special here: each row (a token, or an output channel) has a scale of its own, so a product is exact but for the rounding of its two
sides, and the scales are multiplied in where it is written. For the gradient of the input the weight's scales lie along the sum; they are
multiplied into the arriving gradient before that is rounded. Nothing is kept for backward. (Micikevicius et al. 2022, arXiv:2209.05433,
for the formats.) On a CUDA device the products are the card's own; elsewhere the same roundings are followed by a product in float32.

Dimensions: M tokens of all samples, N out, K in.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any, Final, Protocol, cast

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from tuner.model.kernels import proven
from tuner.model.quantized import QuantizedLinear

log = logging.getLogger(__name__)

E4M3: Final = torch.float8_e4m3fn
LARGEST: Final = 448.0
"""Of the numbers of e4m3."""
TINY: Final = 1e-12
"""Least scale, so that a row of zeros stays one."""
MULTIPLE: Final = 16
"""The cards' products want N and K to be multiples of it."""
CAPABILITY: Final = (8, 9)
"""Compute capability of a card from which on it multiplies 8-bit floats."""

Rounded = tuple[Tensor, Tensor]
"""(values (M, K) e4m3, scale (M, 1) float32)."""


class Fp8Linear(QuantizedLinear):
    """A `QuantizedLinear` over e4m3 weights with a scale for each row."""

    parts: Callable[[Any], Rounded]
    """The weight -> its values (N, K) and scale (N, 1)."""

    def prepare(self, input: Tensor) -> tuple[Rounded]:
        """What `forward` takes beside `input`, for all such layers that read it."""
        return (rounded_rows(input.reshape(-1, self.in_features)),)

    def product(self, input: Tensor, *prepared: Any) -> Tensor:
        ((rows, row_scale),) = prepared or self.prepare(input)
        values, scale = self.parts(self.weight)
        return scaled_product(rows, row_scale, values, scale, input.dtype, self.bias).view(*input.shape[:-1], self.out_features)

    def input_gradient(self, gradient: Tensor, into: Tensor | None = None) -> Tensor:
        values, scale = self.parts(self.weight)
        rows, row_scale = rounded_rows(gradient, scale.view(1, -1))
        turned = self.once("transposed", lambda: transposed(values))
        found = scaled_product(rows, row_scale, turned, _ones(self.in_features, gradient.device), gradient.dtype)
        return found if into is None else into.add_(found)


def _ones(rows: int, device: torch.device) -> Tensor:
    """(K, 1): made once, because a step makes nothing anew that it can keep."""
    if torch.compiler.is_compiling():
        return torch.ones(rows, 1, device=device)
    if (rows, device) not in _KEPT:
        _KEPT[rows, device] = torch.ones(rows, 1, device=device)
    return _KEPT[rows, device]


_KEPT: dict[tuple[int, torch.device], Tensor] = {}


def rounded_rows(x: Tensor, factor: Tensor | None = None) -> Rounded:
    """x (M, K), times factor (1, K), in e4m3 with the scale max|row| / 448 for each row."""
    if not torch.compiler.is_compiling() and (kernels := _kernels_for(x)) is not None:
        return kernels.rounded_rows(x, factor)
    if x.is_meta:  # what a kernel makes
        return x.new_empty(x.shape, dtype=E4M3), x.new_empty((len(x), 1), dtype=torch.float32)
    wide = x.float() if factor is None else x.float() * factor
    scale = (wide.abs().amax(dim=1, keepdim=True) / LARGEST).clamp(min=TINY)
    return (wide / scale).clamp(-LARGEST, LARGEST).to(E4M3), scale


def transposed(values: Tensor) -> Tensor:
    """(N, K) -> (K, N), row by row: cards multiply 8-bit floats only where the sum runs along both rows."""
    if not torch.compiler.is_compiling() and (kernels := _kernels_for(values)) is not None:
        return kernels.transposed(values)
    return values.t().contiguous()


@torch.library.custom_op("tuner::scaled_product", mutates_args=())
def _scaled_product(a: Tensor, a_scale: Tensor, b: Tensor, b_scale: Tensor, dtype: torch.dtype, bias: Tensor | None) -> Tensor:
    if not a.is_cuda:
        found = a.float().mm(b.float().t()) * a_scale * b_scale.t()
        return (found if bias is None else found + bias).to(dtype)
    return _on_card(a, a_scale, b, b_scale, dtype, None if bias is None else bias.to(dtype))


@_scaled_product.register_fake
def _(a: Tensor, a_scale: Tensor, b: Tensor, b_scale: Tensor, dtype: torch.dtype, bias: Tensor | None) -> Tensor:
    return a.new_empty((len(a), len(b)), dtype=dtype)


@register_flop_formula(torch.ops.tuner.scaled_product)  # type: ignore[untyped-decorator]
def _flops(a: torch.Size, a_scale: torch.Size, b: torch.Size, *others: object, **named: object) -> int:
    return 2 * a[0] * a[1] * b[0]


def scaled_product(
    a: Tensor, a_scale: Tensor, b: Tensor, b_scale: Tensor, dtype: torch.dtype, bias: Tensor | None = None
) -> Tensor:
    """(a · a_scale) (M, K) times (b · b_scale) (N, K) transposed, plus bias (N,): (M, N) in `dtype`; bfloat16 on a CUDA device."""
    found: Tensor = torch.ops.tuner.scaled_product(a, a_scale, b, b_scale, dtype, bias)
    return found


# --- the ways of a CUDA device -----------------------------------------------------------------------------------
# Fast accumulation: partial sums are kept to about 14 bits, far below what the rounding of either side leaves.
def _by_row(a: Tensor, a_scale: Tensor, b: Tensor, b_scale: Tensor, dtype: torch.dtype, bias: Tensor | None) -> Tensor:
    return torch._scaled_mm(a, b.t(), scale_a=a_scale, scale_b=b_scale.t(), bias=bias, out_dtype=dtype, use_fast_accum=True)


def _scaled_after(a: Tensor, a_scale: Tensor, b: Tensor, b_scale: Tensor, dtype: torch.dtype, bias: Tensor | None) -> Tensor:
    one = _ones(1, a.device)
    found = torch._scaled_mm(a, b.t(), scale_a=one, scale_b=one, out_dtype=dtype, use_fast_accum=True)
    return _finish(found, a_scale, b_scale, bias)


def _in_16_bits(a: Tensor, a_scale: Tensor, b: Tensor, b_scale: Tensor, dtype: torch.dtype, bias: Tensor | None) -> Tensor:
    return _finish(a.to(dtype).mm(b.to(dtype).t()), a_scale, b_scale, bias)


def _finish(found: Tensor, a_scale: Tensor, b_scale: Tensor, bias: Tensor | None) -> Tensor:
    found.mul_(a_scale).mul_(b_scale.t())
    return found if bias is None else found.add_(bias)


_WAYS = (_by_row, _scaled_after, _in_16_bits)
"""The first one that the card's library has for the shapes is taken: a scale for each row is refused for some of them even on an H200, and
for all on some cards."""
_taken: dict[object, int] = {}


def _on_card(a: Tensor, a_scale: Tensor, b: Tensor, b_scale: Tensor, dtype: torch.dtype, bias: Tensor | None) -> Tensor:
    key = a.device, a.shape, b.shape, dtype, bias is not None
    for number in range(_taken.get(key, 0), len(_WAYS)):
        try:
            found = _WAYS[number](a, a_scale, b, b_scale, dtype, bias)
        except RuntimeError as error:
            if number + 1 == len(_WAYS) or not any(word in str(error).lower() for word in _LACKING):
                raise
            log.info("8-bit product of %s and %s, way %d: %s", tuple(a.shape), tuple(b.shape), number + 1, str(error).splitlines()[0])
        else:
            _taken[key] = number
            return found
    raise AssertionError("the last way returns or raises")


_LACKING = ("not_supported", "not supported", "only supported", "not implemented")


def fits(rows: int, columns: int) -> bool:
    """Whether cards multiply with a weight (N, K) of this shape."""
    return rows % MULTIPLE == 0 and columns % MULTIPLE == 0


class Kernels(Protocol):
    """`tuner.model.fp8_kernels`: the same over CUDA tensors, in one pass each."""

    def rounded_rows(self, x: Tensor, factor: Tensor | None = None) -> Rounded: ...

    def transposed(self, values: Tensor) -> Tensor: ...


def _kernels_for(x: Tensor) -> Kernels | None:
    return cast("Kernels | None", proven("tuner.model.fp8_kernels", x.device.index)) if x.is_cuda else None
