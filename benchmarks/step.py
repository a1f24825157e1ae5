"""One LoRA training step of LTX-2: plain diffusers + peft against tuner, in one process on one device.

    python benchmarks/step.py --work head                  # the comparison at real size, random weights; wants a GPU of 80 GB
    python benchmarks/step.py --size tiny --steps 3        # the same program on a CPU, to see that it runs; its times mean nothing

Peak memory counts what torch has allocated, weights and warm-up included: what a graph holds is allocated when it is captured. The
peer is freed before tuner's side is built. The ratio is against the faster of the two peers; video-only has no peer that leaves the
audio branch out.
"""

from __future__ import annotations

import argparse
import math
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING

import torch

from figures import Figure, write_json
from plain import WORK, LoraDtype, Shape, StepFunction, plain_step_factory
from program import GIB, begin, parser_of, synchronize

if TYPE_CHECKING:
    from product import ProductStep

WARM_UP = 5
"""Enough for a graph to be captured."""
PEERS: dict[LoraDtype, str] = {"bf16": "diffusers + peft, LoRA in bf16", "fp32": "diffusers + peft, LoRA in fp32, autocast"}


@dataclass(frozen=True)
class Row:
    """One line of the table."""

    name: str
    seconds: float
    """Median of the timed steps."""
    fastest: float
    slowest: float
    peak_gib: float | None
    """None on the CPU, where it is not measured."""
    loss: float
    """Of the last step: shows that the numbers stayed finite."""
    operations: int = 0
    """Of its products and attentions; 0: not counted."""


def measure(name: str, step: StepFunction, device: torch.device, steps: int) -> Row:
    """Times `steps` steps one by one after a warm-up. Raises `FloatingPointError` when the loss is not finite."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    for _ in range(WARM_UP):
        step()
    synchronize(device)
    times = []
    for _ in range(steps):
        started = time.perf_counter()
        loss = step()
        synchronize(device)
        times.append(time.perf_counter() - started)
    peak = torch.cuda.max_memory_allocated(device) / GIB if device.type == "cuda" else None
    if not math.isfinite(float(loss)):
        raise FloatingPointError(f"{name}: the loss is {float(loss)}")
    return Row(name, statistics.median(times), min(times), max(times), peak, float(loss))


def measure_and_free(name: str, made: tuple[StepFunction, Callable[[], None]], device: torch.device, steps: int) -> Row:
    """`measure`, after which the memory is free again in every case."""
    step, cleanup = made
    try:
        return measure(name, step, device, steps)
    finally:
        cleanup()


def peer_rows(shape: Shape, arguments: argparse.Namespace, device: torch.device) -> list[Row]:
    """Both ways to hold the adapter."""
    rows = []
    for lora, name in PEERS.items():
        made = plain_step_factory(shape, arguments.checkpointing, device, size=arguments.size, lora=lora)
        rows.append(measure_and_free(name, made, device, arguments.steps))
    return rows


def product_row(shape: Shape, arguments: argparse.Namespace, device: torch.device) -> Row:
    """tuner's own step."""
    from product import ProductStep, Setup, product_step_factory  # tuner is not needed to time the peer alone

    keys = {"base_model_compute": "fp8"} if arguments.fp8 else {}
    graphs = arguments.cuda_graphs and device.type == "cuda"
    mode, lanes = arguments.dynamo_mode, arguments.lanes
    setup = Setup(arguments.checkpointing, arguments.video_only, graphs, dynamo_mode=mode, lanes=lanes, keys=keys)
    name = "tuner" + ", video only" * arguments.video_only + ", CUDA graph" * arguments.cuda_graphs
    name += ", fp8 products" * arguments.fp8
    name += ", one lane" * (arguments.cuda_graphs and arguments.lanes == 1)
    name += f", compiled ({arguments.dynamo_mode})" if arguments.dynamo_mode else ""
    if arguments.profile:
        return profiled(name, ProductStep(shape, setup, device, arguments.size), device, arguments.steps)
    return measure_and_free(name, product_step_factory(shape, setup, device, arguments.size), device, arguments.steps)


def profiled(name: str, step: ProductStep, device: torch.device, steps: int) -> Row:
    """`measure`, then one more step under the profiler; its kernels and its part of the card's matrix rate are printed."""
    from profiling import matrix_rate, observe, operations, render

    way = step.execution
    counted = operations(step)
    step.execution = way
    row = replace(measure(name, step, device, steps), operations=counted)
    print(f"{name}: {counted / 1e12:.1f}e12 operations in products and attentions", flush=True)
    if device.type == "cuda":
        print(render(observe(step)))
        rate, eight_bits = matrix_rate(device), matrix_rate(device, eight_bits=True)
        share = counted / row.seconds / rate
        print(f"\n{counted / row.seconds / 1e12:.0f}e12 operations a second, {share:.1%} of the {rate / 1e12:.0f}e12 that "
              f"a large bf16 product has here (in 8 bits: {eight_bits / 1e12:.0f}e12)\n", flush=True)
    step.close()
    return row


def render(rows: list[Row]) -> str:
    """The table as Markdown; ratios are peer / row, so 2.0 means twice as fast as the faster peer."""
    peers = [row.seconds for row in rows if not row.name.startswith("tuner")]
    lines = ["| Step | s/step (median) | fastest - slowest | peak GiB | speed against the peer |", "|---|---|---|---|---|"]
    for row in rows:
        peak = "-" if row.peak_gib is None else f"{row.peak_gib:.1f}"
        ratio = f"{min(peers) / row.seconds:.2f}" if peers else "-"
        lines.append(f"| {row.name} | {row.seconds:.3f} | {row.fastest:.3f} - {row.slowest:.3f} | {peak} | {ratio} |")
    return "\n".join(lines)


def figures(rows: list[Row]) -> list[Figure]:
    """Seconds and peak of each."""
    peaks = [Figure(f"{row.name}, peak", row.peak_gib, "GiB") for row in rows if row.peak_gib is not None]
    return [*(Figure(f"{row.name}, step", row.seconds) for row in rows), *peaks]


def parse(argv: list[str]) -> argparse.Namespace:
    """The command line."""
    parser = parser_of(__doc__)
    yes_or_no = argparse.BooleanOptionalAction
    parser.add_argument("--work", choices=("head", "121f"), default="head", help="head: 832x480x17, batch 2; 121f: 768x512x121, batch 1")
    parser.add_argument("--checkpointing", action=yes_or_no, default=True, help="recompute blocks in backward")
    parser.add_argument("--steps", type=int, default=10, help="timed steps")
    parser.add_argument("--peer", action=yes_or_no, default=True, help="measure diffusers + peft")
    parser.add_argument("--product", action=yes_or_no, default=True, help="measure tuner")
    parser.add_argument("--video_only", action="store_true", help="tuner trains the video stream alone")
    parser.add_argument("--fp8", action="store_true", help="tuner's frozen layers multiply 8-bit floats")
    parser.add_argument("--dynamo_mode", default="", help="tuner compiles the blocks in this mode of torch.compile")
    parser.add_argument("--cuda_graphs", action="store_true", help="tuner replays the step as a CUDA graph")
    parser.add_argument("--lanes", type=int, choices=(1, 2), default=2, help="cuda_graph_lanes: 2 puts small work beside large")
    parser.add_argument("--profile", action="store_true", help="tuner's kernels by class, and its part of the card's matrix rate")
    arguments = parser.parse_args(argv)
    if arguments.steps < 1:
        parser.error("--steps must be at least 1")
    if not (arguments.peer or arguments.product):
        parser.error("--no-peer and --no-product together leave nothing to measure")
    return arguments


def main(argv: list[str]) -> int:
    """Measures, prints, and writes the JSON file."""
    arguments = parse(argv)
    device, machine = begin(arguments.size)
    shape = WORK[arguments.size][arguments.work]
    print(f"work: {arguments.size} {shape.name}, {shape.width}x{shape.height}x{shape.frames}, batch {shape.batch}, "
          f"{shape.video_tokens} + {shape.audio_tokens} tokens, text {shape.text_tokens}, "
          f"checkpointing {'on' if arguments.checkpointing else 'off'}, {arguments.steps} steps\n", flush=True)
    rows = peer_rows(shape, arguments, device) if arguments.peer else []
    if arguments.product:
        rows.append(product_row(shape, arguments, device))
    print(render(rows))
    write_json(
        arguments.json, machine, rows, figures(rows), work=asdict(shape), size=arguments.size, checkpointing=arguments.checkpointing,
        steps=arguments.steps,
    )  # fmt: skip
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
