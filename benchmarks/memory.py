"""Streamed and quantized weights at real size: peak memory and time of tuner's own training step, beside the resident step and the bound.

    python benchmarks/memory.py --rows head,121f         # wants a GPU of 80 GB for the resident step
    python benchmarks/memory.py --size tiny --steps 2    # the same program on a CPU, to see that it runs; its times mean nothing

The bound of a streamed step is max(forward, load) + max(backward, load): forward and backward are those of the resident step of the
same precision, measured here, `load` is what has to cross the link in one walk over the blocks, at the bandwidth of a large
pinned copy, measured here too. Nothing that streams can be faster. Peak memory counts what torch has allocated, weights included.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from figures import Figure, write_json
from plain import WORK, Shape
from product import ProductStep, Setup
from program import GIB, begin, parser_of, synchronize
from step import measure as measure_step
from tuner.train.execute import GraphExecution, PlainExecution

GROUPS = {"enable_group_offload": "true", "group_offload_use_stream": "true"}
INT8 = {"base_model_precision": "int8-torchao"}
PACKED = {"base_model_precision": "bf16-packed"}


@dataclass(frozen=True)
class Limits:
    """What a row is meant to stay below: GiB at the peak; ratio to the bound, carried out plainly and as a CUDA graph."""

    gib: float | None = None
    plain: float | None = None
    graph: float | None = None


NONE = Limits()


@dataclass(frozen=True)
class Case:
    """One way to hold the weights."""

    name: str
    keys: Mapping[str, str] = field(default_factory=dict)
    fetches: int = 2
    """How often a step brings each streamed weight: once on each walk over the blocks; 0: it is resident."""
    limits: Mapping[str, Limits] = field(default_factory=dict)
    """By work; it is measured on these."""

    @property
    def precision(self) -> str:
        """Of its base; empty: as it is."""
        return self.keys.get("base_model_precision", "")


@dataclass(frozen=True)
class Timed:
    """One measured row. Seconds are medians."""

    work: str
    name: str
    seconds: float
    peak_gib: float
    bound: float
    ratio: float
    weights_gib: float
    """Block weights that are on the device after a step."""
    limits: tuple[float | None, float | None]


def cases(blocks: int) -> list[Case]:
    """Resident ones first, because the others are measured against them."""
    swap = {"musubi_blocks_to_swap": str(blocks - 1)}
    bf16, int8 = Limits(9, 1.1, 1.1), Limits(9, 1.4, 1.15)
    return [
        Case("resident, bf16", fetches=0, limits={"head": NONE, "121f": NONE, "video": NONE}),
        Case("resident, int8", INT8, 0, {"head": Limits(26, 1.15, 1.15), "121f": NONE}),
        Case("group offload with a stream, int8", GROUPS | INT8, limits={"head": int8, "121f": Limits(12, 1.1, 1.1)}),
        Case(
            "group offload with a stream, bf16", GROUPS,
            limits={"head": bf16, "121f": Limits(12, 1.2, 1.2), "video": Limits(7, 1.1, 1.1)},
        ),
        Case("resident, bf16 in 12 bits", PACKED, 0, {"head": NONE, "121f": NONE}),
        Case("group offload with a stream, bf16 in 12 bits", GROUPS | PACKED, limits={"head": bf16, "121f": Limits(12, 1.2, 1.2)}),
        Case("RamTorch, bf16", {"ramtorch": "true"}, 3, {"head": Limits(8, 1.25, 1.25)}),
        Case(f"Musubi block swap of {blocks - 1}, bf16", swap, limits={"head": bf16}),
    ]


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
    row = measure_step("the step", step, device, steps)
    return row.seconds, row.peak_gib or 0.0


def walks_of(step: ProductStep, device: torch.device, total: float, graphs: bool) -> tuple[float, float]:
    """Seconds of the walk forward and of everything else of a resident step that takes `total`."""
    if graphs:  # not to be told apart in a replay; products of frozen weights are those of a forward, a recomputation and a backward
        return total / 3, total * 2 / 3
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


def measure(arguments: argparse.Namespace, device: torch.device, speed: float, seen: Callable[[list[Timed]], None]) -> None:
    """Every case that is asked for, on every work that is; a model is built once a case. `seen`: is shown the rows after each new one."""
    works = arguments.rows.split(",")
    every = cases(48 if arguments.size == "real" else 2)
    chosen = [case for case in every if any(word in case.name for word in arguments.only.split(","))]
    rows: list[Timed] = []
    resident: dict[tuple[str, bool, str], tuple[float, float]] = {}
    sizes: dict[str, int] = {}
    for case in every:
        # What a chosen row is measured against is measured too.
        needed = not case.fetches and (not case.precision or any(other.precision == case.precision for other in chosen))
        mine = [work for work in works if work in case.limits]
        if (case not in chosen and not needed) or not mine:
            continue
        video_only = mine == ["video"]
        step = ProductStep(shape_of(arguments.size, mine[0]), Setup(video_only=video_only, keys=case.keys), device, arguments.size)
        if not case.fetches:
            sizes[case.precision] = block_bytes(step)
        for work in mine:
            step.take(shape_of(arguments.size, work))
            for graphs in [False] * arguments.plain + [True] * (device.type == "cuda" and step.session.capturable):
                step.execution = (GraphExecution if graphs else PlainExecution)(step.run, step.masters)
                seconds, peak = run(step, device, arguments.steps)
                if not case.fetches:
                    resident[case.precision, graphs, work] = walks_of(step, device, seconds, graphs)
                walks = resident[case.precision if case.fetches else "", graphs, work]
                bound = bound_of(case, walks, sizes[case.precision] / speed)
                held = sizes[case.precision] if not case.fetches else ring_bytes(step)
                limits = case.limits[work]
                asked = (limits.gib, limits.graph if graphs else limits.plain)
                name = case.name + ", CUDA graph" * graphs
                rows.append(Timed(work, name, seconds, peak, bound, seconds / bound, held / GIB, asked))
                show(rows[-1])
                seen(rows)
        free(step, device)
        del step


def shape_of(size: str, work: str) -> Shape:
    """The work of that name; the video stream alone is trained on "head"."""
    return WORK[size]["121f" if work == "121f" else "head"]  # type: ignore[index]


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
    print(f"| {row.work} | {row.name} | {peak} | {row.weights_gib:.2f} | {row.seconds:.3f} | {row.bound:.3f} | {times} |", flush=True)


def figures(rows: list[Timed]) -> list[Figure]:
    """Peak and ratio to the bound of each."""
    found = []
    for row in rows:
        name = f"{row.work}: {row.name}"
        found += [
            Figure(f"{name}, step", row.seconds), Figure(f"{name}, peak", row.peak_gib, "GiB", row.limits[0]),
            Figure(f"{name}, against the bound", row.ratio, "", row.limits[1]),
        ]  # fmt: skip
    return found


def main(argv: list[str]) -> int:
    """Measures, prints, and writes the JSON file."""
    parser = parser_of(__doc__)
    parser.add_argument("--rows", default="head,121f", help="works, separated by commas: head, 121f; or video alone: head without sound")
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--only", default="", help="only rows whose name contains one of these words, separated by commas")
    parser.add_argument("--plain", action=argparse.BooleanOptionalAction, default=True, help="also without a CUDA graph")
    arguments = parser.parse_args(argv)
    device, machine = begin(arguments.size)
    speed = link_speed(device)
    print(f"link: {speed / 1e9:.1f} GB/s pinned, measured here")
    print("every block recomputed, LoRA rank 32; head: 832x480x17, batch 2; 121f: 768x512x121, batch 1; video: head, video stream alone\n")
    print("| Work | Weights | peak GiB | block weights on the device, GiB | s/step | bound, s | ratio |\n|---|---|---|---|---|---|---|")
    measure(arguments, device, speed, lambda rows: write_json(arguments.json, machine, rows, figures(rows), link=speed))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
