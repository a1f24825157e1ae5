"""Streamed and quantized weights at real size: peak memory and time of tuner's own training step, beside the resident step and the bound.

    python benchmarks/memory.py --rows head              # 832x480x17, batch 2; wants a GPU of 80 GB for the resident step
    python benchmarks/memory.py --size tiny --steps 2    # the same program on a CPU, to see that it runs; its times mean nothing

The bound of a streamed step is max(forward, load) + max(backward, load): forward and backward are those of the resident step of the
same precision, measured here, `load` is what has to cross the link in one walk over the blocks, at the bandwidth of a large
pinned copy, measured here too. Nothing that streams can be faster. Peak memory counts what torch has allocated, weights included.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from plain import WORK, Shape
from product import ProductStep, Setup
from step import GIB, WARM_UP, describe_machine, synchronize
from tuner.train.execute import GraphExecution

GROUPS = {"enable_group_offload": "true", "group_offload_use_stream": "true"}
INT8 = {"base_model_precision": "int8-torchao"}
WALKS = 2
"""Over the blocks in a step: forward, and backward with the recomputation inside."""


@dataclass(frozen=True)
class Case:
    """One way to hold the weights, stepped plainly and as a CUDA graph. Limits: what it is meant to stay below."""

    name: str
    keys: Mapping[str, str] = field(default_factory=dict)
    limit_gib: float | None = None
    limit_ratio: float | None = None
    graph_ratio: float | None = None
    fetches: int = WALKS
    """How often a step brings each streamed weight; 0: it is resident."""

    @property
    def quantized(self) -> bool:
        """Whether its base is in 8 bits."""
        return "base_model_precision" in self.keys


@dataclass(frozen=True)
class Timed:
    """One measured row. Seconds are medians."""

    name: str
    seconds: float
    peak_gib: float
    bound: float
    ratio: float
    weights_gib: float
    """Block weights that are on the device after a step."""
    limits: tuple[float | None, float | None]


def cases(video_only: bool, long: bool, blocks: int) -> list[Case]:
    """The rows of one kind of work; resident ones first, because the others are measured against them."""
    swap = {"musubi_blocks_to_swap": str(blocks - 1)}
    peak = 7.0 if video_only else 12.0 if long else 9.0
    ratio = 1.2 if long else 1.1
    rows = [Case("resident, bf16", fetches=0), Case("group offload with a stream, bf16", GROUPS, peak, ratio, ratio)]
    if video_only:
        return rows
    rows.insert(1, Case("resident, int8", INT8, None if long else 26.0, None if long else 1.15, None if long else 1.15, fetches=0))
    int8 = (1.1, 1.1) if long else (1.4, 1.15)
    rows.append(Case("group offload with a stream, int8", GROUPS | INT8, peak, *int8))
    if not long:
        rows.append(Case(f"Musubi block swap of {blocks - 1}, bf16", swap, peak, ratio, ratio))
        rows.append(Case("RamTorch, bf16", {"ramtorch": "true"}, 8.0, 1.25, 1.25, fetches=3))
    return rows


def block_bytes(step: ProductStep) -> int:
    """Of all frozen block weights, as they are held."""
    return sum(
        inner.numel() * inner.element_size()
        for block in step.runner.blocks.blocks
        for parameter in block.parameters()
        if not parameter.requires_grad
        for inner in flat(parameter)
    )


def flat(tensor: torch.Tensor) -> list[torch.Tensor]:
    """A tensor, or the plain tensors inside a quantized one."""
    if not hasattr(tensor, "__tensor_flatten__"):
        return [tensor]
    names, _ = tensor.__tensor_flatten__()
    return [inner for name in names for inner in flat(getattr(tensor, name))]


def link_speed(device: torch.device) -> float:
    """Bytes a second of pinned copies to the device; on the CPU of plain ones."""
    count = 512 << 20 if device.type == "cuda" else 16 << 20
    host = torch.empty(count, dtype=torch.uint8, pin_memory=device.type == "cuda")
    there = torch.empty(count, dtype=torch.uint8, device=device)
    times = []
    for _ in range(8):
        synchronize(device)
        started = time.perf_counter()
        there.copy_(host, non_blocking=True)
        synchronize(device)
        times.append(time.perf_counter() - started)
    return count / min(times)


def run(step: ProductStep, device: torch.device, steps: int) -> tuple[float, float]:
    """Median seconds, and peak GiB; warm-up included, because what a graph holds is allocated when it is captured."""
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
    if not bool(torch.isfinite(loss)):
        raise FloatingPointError(f"the loss is {float(loss)}")
    peak = torch.cuda.max_memory_allocated(device) / GIB if device.type == "cuda" else 0.0
    return statistics.median(times), peak


def split(step: ProductStep, device: torch.device, total: float, plain: tuple[float, float] | None) -> tuple[float, float]:
    """Seconds of the walk forward and of everything else of a resident step that takes `total`.

    The walks of a replayed graph cannot be told apart: they are given the shares of the `plain` step.
    """
    if plain is not None:
        return total * plain[0] / sum(plain), total * plain[1] / sum(plain)
    times = []
    for _ in range(3):
        synchronize(device)
        started = time.perf_counter()
        with torch.no_grad():
            state = step.family.enter(step.run.model, step.batch, step.draw())
            step.runner.run(state)
        synchronize(device)
        times.append(time.perf_counter() - started)
    forward = min(statistics.median(times), total)
    return forward, total - forward


def measure(shape: Shape, arguments: argparse.Namespace, device: torch.device, speed: float) -> list[Timed]:
    """Every case, plainly and as a graph."""
    blocks = 48 if arguments.size == "real" else 2
    video_only = arguments.rows == "video"
    rows: list[Timed] = []
    walks: dict[tuple[bool, bool], tuple[float, float]] = {}
    sizes: dict[bool, int] = {}
    every = cases(video_only, arguments.rows == "121f", blocks)
    chosen = [case for case in every if arguments.only in case.name]
    # What a chosen row is measured against is measured too.
    wanted = [c for c in every if c in chosen or c.name == "resident, bf16" or (not c.fetches and any(o.quantized for o in chosen))]
    for case in wanted:
        step = ProductStep(shape, Setup(video_only=video_only, keys=case.keys), device, arguments.size)
        for graphs in (False, True):
            if graphs and (device.type != "cuda" or not step.session.capturable):
                continue
            if graphs:
                step.execution = GraphExecution(step.run, step.masters)
            seconds, peak = run(step, device, arguments.steps)
            if not case.fetches:
                sizes[case.quantized] = block_bytes(step)
                walks[case.quantized, graphs] = split(step, device, seconds, walks.get((case.quantized, False)) if graphs else None)
            bound = bound_of(case, walks[case.quantized and bool(case.fetches), graphs], sizes[case.quantized] / speed)
            held = sizes[case.quantized] if not case.fetches else ring_bytes(step)
            limits = (case.limit_gib, case.graph_ratio if graphs else case.limit_ratio)
            name = case.name + ", CUDA graph" * graphs
            rows.append(Timed(name, seconds, peak, bound, seconds / bound, held / GIB, limits))
            show(rows[-1])
        free(step, device)
        del step
    return rows


def bound_of(case: Case, walks: tuple[float, float], load: float) -> float:
    """Seconds that a step cannot beat, or for a resident one those of bf16; `load`: of all block weights over the link once."""
    forward, backward = walks
    if not case.fetches:
        return forward + backward
    # One fetch in the walk forward, the others in the walk back.
    return max(forward, load) + max(backward, (case.fetches - 1) * load)


def ring_bytes(step: ProductStep) -> int:
    """What the slots of a streamed part take on the device."""
    link: Any = getattr(step.session, "link", None)
    return sum(slot.memory.numel() for slot in link.slots) if link is not None else 0


def free(step: ProductStep, device: torch.device) -> None:
    """Everything that the step held."""
    step.close()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def show(row: Timed) -> None:
    """One line of the table, as soon as it is known."""
    gib, ratio = row.limits
    peak = f"{row.peak_gib:.2f}" + (f" (at most {gib:g})" if gib else "")
    times = f"{row.ratio:.2f}" + (f" (at most {ratio:g})" if ratio else "")
    print(f"| {row.name} | {peak} | {row.weights_gib:.2f} | {row.seconds:.3f} | {row.bound:.3f} | {times} |", flush=True)


def main(argv: list[str]) -> int:
    """Measures, prints, and writes the JSON file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=("real", "tiny"), default="real")
    parser.add_argument("--rows", choices=("head", "121f", "video"), default="head")
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--only", default="", help="only rows whose name contains this")
    parser.add_argument("--json", type=Path, metavar="FILE")
    arguments = parser.parse_args(argv)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if arguments.size == "real" and device.type == "cpu":
        print("--size real needs a GPU; --size tiny runs here", file=sys.stderr)
        return 3
    shape = WORK[arguments.size]["121f" if arguments.rows == "121f" else "head"]
    machine, speed = describe_machine(device), link_speed(device)
    print("\n".join(f"{name}: {value}" for name, value in machine.items()))
    print(f"link: {speed / 1e9:.1f} GB/s pinned, measured here")
    print(f"work: {shape.width}x{shape.height}x{shape.frames}, batch {shape.batch}, every block recomputed, LoRA rank 32\n")
    print("| Weights | peak GiB | block weights on the device, GiB | s/step | bound, s | ratio |\n|---|---|---|---|---|---|", flush=True)
    rows = measure(shape, arguments, device, speed)
    if arguments.json:
        result = {"machine": machine, "link": speed, "work": asdict(shape), "rows": [asdict(row) for row in rows]}
        arguments.json.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
