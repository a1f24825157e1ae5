"""The kernels of `tuner.model.fused`: a program takes one token, reads it once, and writes once. Imported for CUDA devices only.

Triton comes with torch there. Its interpreter runs the same programs on a CPU, which is how the tests check them.

Dimensions: as in `tuner.model.fused`; M = B·S rows.
"""

from __future__ import annotations

from typing import Final

import torch
import triton
import triton.language as tl
from torch import Tensor

from tuner.model import fused

LIMIT: Final = 1e-2
"""Rounding to bfloat16 makes 0.2 %."""


# --- norm · factor + shift ---------------------------------------------------------------------------------------
@triton.jit  # type: ignore[untyped-decorator]
def _norm_row(  # type: ignore[no-untyped-def]  # Triton reads the annotations
    x, factor, shift, clean, gradient, out, eps, tokens, columns, factor_sample, factor_vector, shift_sample, shift_vector,
    BACK: tl.constexpr, HAS_FACTOR: tl.constexpr, HAS_SHIFT: tl.constexpr, HAS_CLEAN: tl.constexpr, PLUS_ONE: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    sample = row // tokens
    place = tl.arange(0, BLOCK)
    inside = place < columns
    value = tl.load(x + row * columns + place, mask=inside, other=0.0).to(tl.float32)
    inverse = 1.0 / tl.sqrt(tl.sum(value * value, 0) / columns + eps)
    normed = value * inverse
    vector = row * 0
    if HAS_CLEAN:
        vector = tl.load(clean + row).to(tl.int64)
    scale = normed * 0.0 + 1.0
    if HAS_FACTOR:
        scale = tl.load(factor + sample * factor_sample + vector * factor_vector + place, mask=inside, other=0.0).to(tl.float32)
        if PLUS_ONE:
            scale += 1.0
    if BACK:
        arriving = tl.load(gradient + row * columns + place, mask=inside, other=0.0).to(tl.float32) * scale
        result = inverse * (arriving - normed * (tl.sum(arriving * normed, 0) / columns))
    else:
        result = normed * scale
        if HAS_SHIFT:
            result += tl.load(shift + sample * shift_sample + vector * shift_vector + place, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + row * columns + place, result, mask=inside)


def norm(x: Tensor, eps: float, factor: Tensor | None, shift: Tensor | None, clean: Tensor | None, plus_one: bool) -> Tensor:
    """`fused.norm_formula`."""
    return _norm(x, None, eps, factor, shift, clean, plus_one)


def norm_gradient(x: Tensor, gradient: Tensor, eps: float, factor: Tensor | None, clean: Tensor | None, plus_one: bool) -> Tensor:
    """Of x, from that of the result."""
    return _norm(x, gradient, eps, factor, None, clean, plus_one)


def _norm(
    x: Tensor, gradient: Tensor | None, eps: float, factor: Tensor | None, shift: Tensor | None, clean: Tensor | None, plus_one: bool
) -> Tensor:
    x = x.contiguous()
    out = torch.empty_like(x)
    tokens, columns = x.shape[-2:]
    block = triton.next_power_of_2(columns)
    _norm_row[(x.numel() // columns,)](
        x, _last(factor, x), _last(shift, x), x if clean is None else clean.contiguous(), x if gradient is None else gradient.contiguous(),
        out, eps, tokens, columns, *_strides(factor), *_strides(shift),
        BACK=gradient is not None, HAS_FACTOR=factor is not None, HAS_SHIFT=shift is not None, HAS_CLEAN=clean is not None,
        PLUS_ONE=plus_one, BLOCK=block, num_warps=_warps(block),
    )  # fmt: skip
    return out


def _last(vectors: Tensor | None, stand_in: Tensor) -> Tensor:
    """(B or 1, t, D) with channels beside each other; `stand_in` is never read."""
    if vectors is None:
        return stand_in
    return vectors if vectors.stride(-1) == 1 else vectors.contiguous()


def _strides(vectors: Tensor | None) -> tuple[int, int]:
    """Elements from sample to sample and from vector to vector; 0 where one is for all."""
    if vectors is None:
        return 0, 0
    vectors = _last(vectors, vectors)
    return (vectors.stride(0) if vectors.shape[0] > 1 else 0), (vectors.stride(1) if vectors.shape[1] > 1 else 0)


def _warps(block: int) -> int:
    """So that a thread holds 8 to 16 values."""
    return max(1, min(16, block // 512))


# --- norm · weight, turned ---------------------------------------------------------------------------------------
@triton.jit  # type: ignore[untyped-decorator]
def _rotated_row(  # type: ignore[no-untyped-def]
    x, weight, cos, sin, gradient, out, eps, tokens, pairs, cos_sample, cos_head, cos_token, sin_sample, sin_head, sin_token,
    HALF: tl.constexpr, BACK: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    sample = row // tokens
    token = row % tokens
    pair = tl.arange(0, BLOCK)
    inside = pair < pairs
    # Known to the compiler, so that it sees which addresses lie side by side.
    head = pair // HALF
    within = pair % HALF
    first = head * 2 * HALF + within
    start = row * 2 * pairs
    a = tl.load(x + start + first, mask=inside, other=0.0).to(tl.float32)
    b = tl.load(x + start + first + HALF, mask=inside, other=0.0).to(tl.float32)
    columns = 2 * pairs
    inverse = 1.0 / tl.sqrt((tl.sum(a * a, 0) + tl.sum(b * b, 0)) / columns + eps)
    a *= inverse
    b *= inverse
    weight_a = tl.load(weight + first, mask=inside, other=0.0).to(tl.float32)
    weight_b = tl.load(weight + first + HALF, mask=inside, other=0.0).to(tl.float32)
    c = tl.load(cos + sample * cos_sample + head * cos_head + token * cos_token + within, mask=inside, other=0.0).to(tl.float32)
    s = tl.load(sin + sample * sin_sample + head * sin_head + token * sin_token + within, mask=inside, other=0.0).to(tl.float32)
    if BACK:
        to_a = tl.load(gradient + start + first, mask=inside, other=0.0).to(tl.float32)
        to_b = tl.load(gradient + start + first + HALF, mask=inside, other=0.0).to(tl.float32)
        back_a = (to_a * c + to_b * s) * weight_a
        back_b = (to_b * c - to_a * s) * weight_b
        mean = (tl.sum(back_a * a, 0) + tl.sum(back_b * b, 0)) / columns
        result_a = inverse * (back_a - a * mean)
        result_b = inverse * (back_b - b * mean)
    else:
        a *= weight_a
        b *= weight_b
        result_a = a * c - b * s
        result_b = b * c + a * s
    tl.store(out + start + first, result_a, mask=inside)
    tl.store(out + start + first + HALF, result_b, mask=inside)


def rotated(x: Tensor, eps: float, weight: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """`fused.rotated_formula`."""
    return _rotated(x, None, eps, weight, cos, sin)


def rotated_gradient(x: Tensor, gradient: Tensor, eps: float, weight: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Of x, from that of the result."""
    return _rotated(x, gradient, eps, weight, cos, sin)


def _rotated(x: Tensor, gradient: Tensor | None, eps: float, weight: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    x, cos, sin = x.contiguous(), _last(cos, cos), _last(sin, sin)
    out = torch.empty_like(x)
    tokens, columns = x.shape[-2:]
    block = triton.next_power_of_2(columns // 2)
    _rotated_row[(x.numel() // columns,)](
        x, weight.contiguous(), cos, sin, x if gradient is None else gradient.contiguous(), out, eps, tokens, columns // 2,
        *_places(cos), *_places(sin), HALF=cos.shape[3], BACK=gradient is not None, BLOCK=block, num_warps=_warps(2 * block),
    )  # fmt: skip
    return out


def _places(table: Tensor) -> tuple[int, int, int]:
    """Elements from sample to sample, head to head and token to token of (B, H, S, r)."""
    return (table.stride(0) if table.shape[0] > 1 else 0), table.stride(1), table.stride(2)


# --- base + values · gate ----------------------------------------------------------------------------------------
@triton.jit  # type: ignore[untyped-decorator]
def _gate_row(  # type: ignore[no-untyped-def]
    base, values, gate, out, tokens, columns, gate_sample, gate_token, HAS_BASE: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    place = tl.arange(0, BLOCK)
    inside = place < columns
    chosen = gate + row // tokens * gate_sample + row % tokens * gate_token
    result = tl.load(values + row * columns + place, mask=inside, other=0.0).to(tl.float32)
    result *= tl.load(chosen + place, mask=inside, other=0.0).to(tl.float32)
    if HAS_BASE:
        result += tl.load(base + row * columns + place, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + row * columns + place, result, mask=inside)


def gated(hidden: Tensor | None, change: Tensor, gate: Tensor) -> Tensor:
    """hidden + change · gate, or change · gate: (B, S, D), the gate (B or 1, S or 1, D)."""
    change = change.contiguous()
    out = torch.empty_like(change)
    tokens, columns = change.shape[-2:]
    block = triton.next_power_of_2(columns)
    _gate_row[(change.numel() // columns,)](
        change if hidden is None else hidden.contiguous(), change, _last(gate, gate), out, tokens, columns, *_strides(gate),
        HAS_BASE=hidden is not None, BLOCK=block, num_warps=_warps(block),
    )  # fmt: skip
    return out


# --- proof -------------------------------------------------------------------------------------------------------
def differences(device: torch.device) -> dict[str, float]:
    """Relative distance of each kernel's result to that of the formula in float32, for bfloat16 tokens of odd numbers."""
    draws = torch.Generator().manual_seed(0)

    def draw(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        return torch.randn(shape, generator=draws).to(device, dtype)

    samples, tokens, heads, half = 2, 7, 3, 24
    width = heads * 2 * half
    x, up, weight = draw(samples, tokens, width), draw(samples, tokens, width), draw(width)
    vectors = draw(samples, 2, 3, width)  # as a model makes them: beside each other
    scale, shift = vectors[:, :, 0], vectors[:, :, 2]
    clean = (torch.randn((samples, tokens, 1), generator=draws) > 0).to(device)
    angles = draw(1, heads, tokens, half, dtype=torch.float32).expand(samples, -1, -1, -1)
    cos, sin = angles.cos(), angles.sin()
    found: dict[str, float] = {}

    def compare(name: str, ours: Tensor, wanted: Tensor) -> None:
        found[name] = float((ours.float() - wanted).norm() / wanted.norm())

    wide = x.float().requires_grad_()
    cases: dict[str, tuple[Tensor | None, Tensor | None, Tensor | None, bool]] = {
        "norm": (None, None, None, False), "weighted norm": (weight[None, None], None, None, False),
        "modulated norm": (scale[:, :1], shift[:, :1], None, True), "modulated norm with given tokens": (scale, shift, clean, True),
    }  # fmt: skip
    for name, (factor, added, given, plus_one) in cases.items():
        wanted = fused.norm_formula(wide, 1e-6, _float(factor), _float(added), given, plus_one=plus_one)
        compare(name, norm(x, 1e-6, factor, added, given, plus_one), wanted.detach())
        (gradient,) = torch.autograd.grad(wanted, wide, up.float())
        compare(f"gradient of the {name}", norm_gradient(x, up, 1e-6, factor, given, plus_one), gradient)
    for name, gate in (("gate of a sample", scale[:, :1]), ("gate of a token", draw(samples, tokens, width)), ("one gate", scale[:1, :1])):
        compare(name, gated(up, x, gate), up.float() + x.float() * gate.float())
        compare(f"gradient behind the {name}", gated(None, x, gate), x.float() * gate.float())
    wanted = fused.rotated_formula(wide, 1e-6, weight.float(), cos, sin)
    compare("turned norm", rotated(x, 1e-6, weight, cos, sin), wanted.detach())
    (gradient,) = torch.autograd.grad(wanted, wide, up.float())
    compare("gradient of the turned norm", rotated_gradient(x, up, 1e-6, weight, cos, sin), gradient)
    return found


def _float(given: Tensor | None) -> Tensor | None:
    return None if given is None else given.float()
