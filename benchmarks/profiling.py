"""Where the GPU time of a step goes: its kernels by class, and its products beside what the card's matrix units can do.

Used by `step.py --profile`. A kernel's class is told by its name, the first pattern that fits deciding. Shares are of the time in which
any kernel runs; while several run at once each counts in full, so classes may add up to more than that.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile
from torch.utils.benchmark import Timer

from product import ProductStep
from tuner.train.execute import PlainExecution
from tuner.train.forecast.footprint import LiveBytes

CLASSES = (
    ("attention", r"flash|fmha|sdpa|attention"),
    ("8-bit matrix products", r"e4m3|nvjet_q|_scaled_mm"),
    ("matrix products", r"nvjet|gemm|cutlass|splitk"),
    ("tuner's kernels", r"_norm_row|_rotated_row|_gate_row|_round_row|_turn_tile"),
    ("compiled passes", r"triton_"),
    ("copies to and from the host", r"memcpy (htod|dtoh)|memcpy.*(pinned|pageable)"),
    ("optimizer and masters", r"multi_tensor|adam"),
    ("joining, copying, filling", r"memcpy|memset|catarray|copy_kernel|fillfunctor"),
    ("reductions", r"reduce|norm"),
    ("element by element", r"elementwise|vectorized|unrolled"),
)
"""Name and pattern, in the order in which they are tried."""
OTHERS = "others"
SIDE = 8192
"""Of the square matrices that the card's rate is measured with."""


@dataclass(frozen=True)
class Interval:
    """A kernel as the profiler saw it, in microseconds."""

    name: str
    start: float
    end: float


@dataclass(frozen=True)
class Share:
    """What one class of kernels takes in a step."""

    name: str
    launches: int
    seconds: float
    examples: tuple[tuple[str, int, float], ...]
    """The longest ones: name, launches, seconds."""


@dataclass(frozen=True)
class Profile:
    """Of one step."""

    seconds: float
    """From the first kernel's start to the last one's end."""
    busy: float
    """Of these in which any kernel ran."""
    shares: tuple[Share, ...]


def class_of(kernel: str) -> str:
    """By its name."""
    lower = kernel.lower()
    return next((name for name, pattern in CLASSES if re.search(pattern, lower)), OTHERS)


def summarize(intervals: Sequence[Interval]) -> Profile:
    """The longest classes first. Raises `ValueError` without kernels."""
    if not intervals:
        raise ValueError("the profiler saw no kernel")
    ordered = sorted(intervals, key=lambda one: one.start)
    busy, until = 0.0, ordered[0].start
    for one in ordered:
        busy += max(0.0, one.end - max(one.start, until))
        until = max(until, one.end)
    classes: dict[str, dict[str, list[float]]] = {}
    for one in ordered:
        classes.setdefault(class_of(one.name), {}).setdefault(one.name, []).append((one.end - one.start) / 1e6)
    shares = []
    for name, kernels in classes.items():
        longest = sorted(((kernel, len(times), sum(times)) for kernel, times in kernels.items()), key=lambda row: -row[2])
        shares.append(Share(name, sum(row[1] for row in longest), sum(row[2] for row in longest), tuple(longest[:4])))
    shares.sort(key=lambda share: -share.seconds)
    return Profile((until - ordered[0].start) / 1e6, busy / 1e6, tuple(shares))


def observe(step: Callable[[], object]) -> Profile:
    """One call of `step` on a CUDA device, which must be warm."""
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        step()
        torch.cuda.synchronize()
    events: Any = profiler.events()
    kernels = [event for event in events if "CUDA" in str(event.device_type)]
    return summarize([Interval(event.name, event.time_range.start, event.time_range.end) for event in kernels])


def operations(step: ProductStep) -> int:
    """Of the products and attentions of one step, forward and backward; recomputed ones are counted as often as they are made.

    Leaves the step executing plainly.
    """
    step.execution = PlainExecution(step.run, step.masters)
    runner: Any = step.runner
    compiled, runner.train_block = runner.train_block, None
    try:
        with LiveBytes() as counter:
            step()
    finally:
        runner.train_block = compiled
    counted: int = counter.flops
    return counted


def matrix_rate(device: torch.device, *, eight_bits: bool = False) -> float:
    """Operations a second of a product of random square matrices, in bfloat16 or in 8-bit floats with a scale per row and column."""
    x, y = (torch.randn(SIDE, SIDE, device=device, dtype=torch.bfloat16) for _ in range(2))
    if eight_bits:
        scale = torch.ones(SIDE, 1, device=device)
        x8, y8 = x.to(torch.float8_e4m3fn), y.to(torch.float8_e4m3fn).t()

        def product() -> object:
            return torch._scaled_mm(x8, y8, scale, scale.t(), out_dtype=torch.bfloat16, use_fast_accum=True)
    else:

        def product() -> object:
            return x @ y

    measured = Timer("product()", globals={"product": product}).blocked_autorange(min_run_time=0.2)
    return float(2 * SIDE**3 / measured.median)


def render(found: Profile) -> str:
    """The table as Markdown, with the longest kernels of each class under it."""
    lines = [f"kernels run for {found.busy:.3f} s of {found.seconds:.3f} s", "", "| Kernels | launches | s | share |", "|---|---|---|---|"]
    lines += [f"| {one.name} | {one.launches} | {one.seconds:.4f} | {one.seconds / found.busy:.1%} |" for one in found.shares]
    lines.append("")
    for share in found.shares:
        lines += [f"  {share.name}: {launches:5d} x {1e6 * s / launches:8.1f} us  {name[:110]}" for name, launches, s in share.examples]
    return "\n".join(lines)
