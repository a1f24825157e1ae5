"""What stands between the products of a transformer block, in one pass over its tokens each: root mean square norms with what follows them.

Special here: of a norm autograd keeps its input alone, and backward works out the rest again, where torch keeps float32 copies of every
step. Everything is computed in float32 and rounded once. On a CUDA device both directions are kernels (`tuner.model.fused_kernels`), which
first have to show there that they compute the formula; elsewhere, and where they cannot be had, the formula is called as it stands.
A compiler gets the formula, to fuse it as it likes; so do inputs beside the tokens that are trained, whose gradients autograd finds.

Dimensions: B samples, S tokens, D channels, t modulation vectors a sample (2: the second is for tokens that are given clean), H heads,
r half the channels of a head.
"""

from __future__ import annotations

from typing import Any, Protocol, cast

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from tuner.model.kernels import proven


def rms_norm(x: Tensor, eps: float, weight: Tensor | None = None) -> Tensor:
    """x (B, S, D) -> x / sqrt(mean(x²) + eps) · weight (D,), in x's dtype."""
    if _by_formula(weight):
        return norm_formula(x, eps, weight)
    return _norm(x, eps, None if weight is None else weight[None, None], None, None, False)


def rms_modulated(x: Tensor, eps: float, scale: Tensor, shift: Tensor, clean: Tensor | None = None) -> Tensor:
    """x (B, S, D) -> norm(x) · (1 + scale) + shift, both (B, t, D). `clean`: (B, S, 1) bool, tokens that take the second of two vectors."""
    if _by_formula(scale, shift):
        return norm_formula(x, eps, scale, shift, clean, plus_one=True)
    return _norm(x, eps, scale, shift, clean, True)


def rms_rotated(x: Tensor, eps: float, weight: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x (B, S, H·2r) -> norm(x) · weight, whose heads turn: (first, second) half -> (first·cos - second·sin, second·cos + first·sin).

    cos and sin: (B, H, S, r), any strides before the last dimension.
    """
    if _by_formula(weight):
        return rotated_formula(x, eps, weight, cos, sin)
    return _Rotated.apply(x, eps, weight, cos, sin)  # type: ignore[no-any-return, no-untyped-call]


def gated(hidden: Tensor, change: Tensor, gate: Tensor) -> Tensor:
    """hidden + change · gate in one pass: (B, S, D), the gate of a shape that broadcasts to it."""
    if _by_formula(gate):
        return torch.addcmul(hidden, change, gate)
    return _Gated.apply(hidden, change, gate)  # type: ignore[no-any-return, no-untyped-call]


def _by_formula(*others: Tensor | None) -> bool:
    return torch.compiler.is_compiling() or any(other is not None and other.requires_grad for other in others)


# --- the formulas ------------------------------------------------------------------------------------------------
def norm_formula(
    x: Tensor, eps: float, factor: Tensor | None = None, shift: Tensor | None = None, clean: Tensor | None = None, *, plus_one: bool = False
) -> Tensor:
    """norm(x) · factor + shift; factor and shift (B or 1, t, D) or (D,). `plus_one`: 1 + factor."""
    result, _ = _normed(x, eps)
    if factor is not None:
        result = result * _spread(factor, clean, result.dtype, plus_one=plus_one)
    if shift is not None:
        result = result + _spread(shift, clean, result.dtype)
    return result.to(x.dtype)


def rotated_formula(x: Tensor, eps: float, weight: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """As `rms_rotated`."""
    normed, _ = _normed(x, eps)
    return turned(normed * weight.to(normed.dtype), cos, sin).to(x.dtype)


def turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x (B, S, H·2r), its heads turned by the angles of cos and sin (B, H, S, r), in x's dtype."""
    first, second = x.reshape(*x.shape[:2], cos.shape[1], 2, cos.shape[3]).unbind(3)
    cos, sin = cos.to(x.dtype).transpose(1, 2), sin.to(x.dtype).transpose(1, 2)
    return torch.stack((first * cos - second * sin, second * cos + first * sin), dim=3).flatten(2)


def _normed(x: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """norm(x), and 1 / root mean square (B, S, 1); float32, or float64 where x is."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    inverse = torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return wide * inverse, inverse


def _spread(vector: Tensor, clean: Tensor | None, dtype: torch.dtype, *, plus_one: bool = False) -> Tensor:
    vector = vector.to(dtype) + 1 if plus_one else vector.to(dtype)
    return vector if clean is None else torch.where(clean, vector[:, 1:], vector[:, :1])


def _norm_gradient(x: Tensor, eps: float, to_normed: Tensor) -> Tensor:
    """Gradient of norm(x) -> gradient of x."""
    normed, inverse = _normed(x, eps)
    return (inverse * (to_normed - normed * (to_normed * normed).mean(-1, keepdim=True))).to(x.dtype)


# --- the functions -----------------------------------------------------------------------------------------------
def _norm(x: Tensor, eps: float, factor: Tensor | None, shift: Tensor | None, clean: Tensor | None, plus_one: bool) -> Tensor:
    return _Norm.apply(x, eps, factor, shift, clean, plus_one)  # type: ignore[no-any-return, no-untyped-call]


class _Norm(torch.autograd.Function):
    """`norm_formula`; the gradient is that of x."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, eps: float, factor: Tensor | None, shift: Tensor | None, clean: Tensor | None, plus_one: bool
    ) -> Tensor:
        ctx.eps, ctx.plus_one = eps, plus_one
        ctx.save_for_backward(x, factor, clean)
        if x.is_meta:
            return torch.empty_like(x)
        if (kernels := kernels_for(x)) is not None:
            return kernels.norm(x, eps, factor, shift, clean, plus_one)
        return norm_formula(x, eps, factor, shift, clean, plus_one=plus_one)

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, gradient: Tensor) -> Any:
        x, factor, clean = ctx.saved_tensors
        if x.is_meta:
            found = torch.empty_like(x)
        elif (kernels := kernels_for(x)) is not None:
            found = kernels.norm_gradient(x, gradient, ctx.eps, factor, clean, ctx.plus_one)
        else:
            wide = gradient.to(torch.promote_types(x.dtype, torch.float32))
            wide = wide if factor is None else wide * _spread(factor, clean, wide.dtype, plus_one=ctx.plus_one)
            found = _norm_gradient(x, ctx.eps, wide)
        return found, None, None, None, None, None


class _Rotated(torch.autograd.Function):
    """`rotated_formula`; the gradient is that of x."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, eps: float, weight: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.eps = eps
        ctx.save_for_backward(x, weight, cos, sin)
        if x.is_meta:
            return torch.empty_like(x)
        if (kernels := kernels_for(x)) is not None:
            return kernels.rotated(x, eps, weight, cos, sin)
        return rotated_formula(x, eps, weight, cos, sin)

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, gradient: Tensor) -> Any:
        x, weight, cos, sin = ctx.saved_tensors
        if x.is_meta:
            found = torch.empty_like(x)
        elif (kernels := kernels_for(x)) is not None:
            found = kernels.rotated_gradient(x, gradient, ctx.eps, weight, cos, sin)
        else:
            wide = gradient.to(torch.promote_types(x.dtype, torch.float32))
            found = _norm_gradient(x, ctx.eps, turned(wide, cos, -sin) * weight.to(wide.dtype))
        return found, None, None, None, None


class _Gated(torch.autograd.Function):
    """hidden + change · gate, of which only the gate is kept."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, change: Tensor, gate: Tensor) -> Tensor:
        ctx.save_for_backward(gate)
        alike = hidden.shape == change.shape and hidden.dtype == change.dtype
        if alike and (kernels := _gate_kernels_for(change, gate)) is not None:
            return kernels.gated(hidden, change, gate)
        return torch.addcmul(hidden, change, gate)

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, gradient: Tensor) -> Any:
        (gate,) = ctx.saved_tensors
        if not ctx.needs_input_grad[1]:
            return gradient, None, None
        kernels = _gate_kernels_for(gradient, gate)
        return gradient, gradient * gate if kernels is None else kernels.gated(None, gradient, gate), None


# --- kernels -----------------------------------------------------------------------------------------------------
class Kernels(Protocol):
    """`tuner.model.fused_kernels`: the same over CUDA tensors."""

    def norm(
        self, x: Tensor, eps: float, factor: Tensor | None, shift: Tensor | None, clean: Tensor | None, plus_one: bool
    ) -> Tensor: ...

    def norm_gradient(
        self, x: Tensor, gradient: Tensor, eps: float, factor: Tensor | None, clean: Tensor | None, plus_one: bool
    ) -> Tensor: ...

    def rotated(self, x: Tensor, eps: float, weight: Tensor, cos: Tensor, sin: Tensor) -> Tensor: ...

    def rotated_gradient(self, x: Tensor, gradient: Tensor, eps: float, weight: Tensor, cos: Tensor, sin: Tensor) -> Tensor: ...


    def gated(self, hidden: Tensor | None, change: Tensor, gate: Tensor) -> Tensor: ...


def _gate_kernels_for(change: Tensor, gate: Tensor) -> Kernels | None:
    """Those take a gate for all tokens of a sample, or one for each."""
    alike = gate.dim() == change.dim() == 3 and gate.shape[2] == change.shape[2] and gate.dtype == change.dtype
    return kernels_for(change) if alike else None


def kernels_for(x: Tensor) -> Kernels | None:
    """The kernels for `x`; None: the formulas."""
    if not x.is_cuda or x.dtype == torch.float64:
        return None
    return cast("Kernels | None", proven("tuner.model.fused_kernels", x.device.index))
