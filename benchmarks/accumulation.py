"""Gradient accumulation over streamed weights: blocks take all batches of a step while their weights are there, or one at a time.

    python benchmarks/accumulation.py                  # LTX-2 2.0 at real size, random weights; needs a GPU
    python benchmarks/accumulation.py --only layer     # rows whose name contains one of these words
    python benchmarks/accumulation.py --size tiny      # the same program on a CPU

Computing is what the batches cost with resident bf16 weights, measured in the same process; four batches of one clip of 832x480 and 17
frames should take at most 1.2 times that. Loading is what the streamed weights take to cross the link as often as the order asks for it, at
the bandwidth of a large pinned copy, measured here too: where it is longer than computing, nothing that streams all weights can be faster.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from figures import Figure, write_json
from memory import GROUPS, INT8, PACKED, block_bytes, free, link_speed, run
from plain import WORK, Size
from product import ProductStep, Setup
from program import begin, parser_of

LIMIT = 1.2


@dataclass(frozen=True)
class Case:
    """One line of the table."""

    name: str
    order: str
    keys: Mapping[str, str]
    streamed: float = 0.0
    """Share of the blocks that is."""


@dataclass(frozen=True)
class Row:
    """What one took. Seconds a step."""

    name: str
    seconds: float
    peak_gib: float
    loading: float
    ratio: float
    """To computing."""
    limit: float | None


def cases(blocks: int) -> list[Case]:
    """The resident one first, because the others are measured against it."""
    plain, packed = blocks * 2 // 3, blocks * 3 // 4  # so many that an H200's link keeps up with four batches

    def some(count: int) -> dict[str, str]:
        return {"musubi_blocks_to_swap": str(count)}

    return [
        Case("resident", "batch", {}),
        Case("streamed", "layer", GROUPS, 1),
        Case("streamed, int8", "layer", GROUPS | INT8, 1),
        Case("streamed, bf16 in 12 bits", "layer", GROUPS | PACKED, 1),
        Case(f"{plain} of {blocks} blocks streamed", "layer", some(plain), plain / blocks),
        Case(f"{packed} of {blocks} blocks streamed, bf16 in 12 bits", "layer", some(packed) | PACKED, packed / blocks),
        Case("streamed", "batch", GROUPS, 1),
    ]


def show(row: Row, computing: float) -> None:
    """One line of the table."""
    asked = f" (at most {row.limit:g})" if row.limit else ""
    times = f"{row.seconds:.3f} | {computing:.3f} | {row.loading:.3f} | {row.ratio:.2f}{asked}"
    print(f"| {row.name} | {row.peak_gib:.2f} | {times} |", flush=True)


def figures(rows: Sequence[Row]) -> list[Figure]:
    """Seconds, peak and ratio of each."""
    found = []
    for row in rows:
        found += [
            Figure(f"{row.name}, step", row.seconds), Figure(f"{row.name}, peak", row.peak_gib, "GiB"),
            Figure(f"{row.name}, against resident", row.ratio, "", row.limit),
        ]  # fmt: skip
    return found


def measure(case: Case, batches: int, steps: int, graphs: bool, size: Size, device: torch.device, speed: float) -> Row:
    """Builds the model, times steps, and frees it; the ratio is left at 1."""
    setup = Setup(batches=batches, graphs=graphs, together=case.order == "layer", keys=case.keys)
    step = ProductStep(replace(WORK[size]["head"], batch=1), setup, device, size)
    walks = 2 if case.order == "layer" else 2 * batches
    loading = walks * case.streamed * block_bytes(step) / speed
    seconds, peak = run(step, device, steps)
    free(step, device)
    return Row(f"{case.name}, {case.order} order", seconds, peak, loading, 1, LIMIT if case.order == "layer" else None)


def main(argv: list[str]) -> int:
    """Measures and prints."""
    parser = parser_of(__doc__)
    parser.add_argument("--batches", type=int, default=4)
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--graphs", action=argparse.BooleanOptionalAction, default=True, help="replay the step as a CUDA graph")
    parser.add_argument("--only", default="", help="the resident row, and those whose name has one of these words, separated by commas")
    arguments = parser.parse_args(argv)
    device, machine = begin(arguments.size)
    speed = link_speed(device)
    print(f"link: {speed / 1e9:.1f} GB/s pinned, measured here")
    print(f"every block recomputed, LoRA rank 32, {arguments.batches} batches of one clip\n")
    print("| Weights, order | peak GiB | s/step | computing, s | loading, s | ratio to computing |\n|---|---|---|---|---|---|", flush=True)
    graphs = arguments.graphs and device.type == "cuda"
    words = arguments.only.split(",")
    rows: list[Row] = []
    for case in cases(48 if arguments.size == "real" else 2):
        if case.streamed and not any(word in f"{case.name}, {case.order} order" for word in words):
            continue
        row = measure(case, arguments.batches, arguments.steps, graphs, arguments.size, device, speed)
        computing = rows[0].seconds if rows else row.seconds
        rows.append(replace(row, ratio=row.seconds / computing))
        show(rows[-1], computing)
        write_json(arguments.json, machine, rows, figures(rows), link=speed)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
