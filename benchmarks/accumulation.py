"""Gradient accumulation over streamed weights: blocks take all batches of a step while their weights are there, or one at a time.

    python benchmarks/accumulation.py                  # LTX-2 2.0 at real size, random weights; needs a GPU
    python benchmarks/accumulation.py --size tiny      # the same program on a CPU

The bound is what the batches cost with resident weights, measured in the same process. Four batches of one clip of 832x480 and 17 frames
should take at most 1.2 times that.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch

from figures import Figure, write_json
from memory import GROUPS, free, link_speed, run
from plain import WORK
from product import ProductStep, Setup
from step import describe_machine, lacks_gpu

LIMIT = 1.2


@dataclass(frozen=True)
class Row:
    """One line of the table."""

    weights: str
    order: str
    peak_gib: float
    seconds: float
    ratio: float
    """To the same batches with resident weights."""


def figures(rows: list[Row]) -> list[Figure]:
    """Of those with streamed weights."""
    found = []
    for row in rows:
        name = f"{row.weights}, {row.order} order"
        limit = LIMIT if row.order == "layer" else None
        found += [Figure(f"{name}, step", row.seconds), Figure(f"{name}, against resident", row.ratio, "", limit)]
    return found


def main(argv: list[str]) -> int:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=("real", "tiny"), default="real")
    parser.add_argument("--batches", type=int, default=4)
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--graphs", action=argparse.BooleanOptionalAction, default=True, help="replay the step as a CUDA graph")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there too")
    arguments = parser.parse_args(argv)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if lacks_gpu(arguments.size, device):
        return 3
    machine = describe_machine(device)
    print("\n".join(f"{name}: {value}" for name, value in machine.items()))
    print(f"link: {link_speed(device) / 1e9:.1f} GB/s pinned, measured here")
    print(f"every block recomputed, LoRA rank 32, {arguments.batches} batches of one clip\n")
    print("| Weights | Order | peak GiB | s/step | bound, s | ratio |\n|---|---|---|---|---|---|")
    shape = replace(WORK[arguments.size]["head"], batch=1)
    setup = partial(Setup, batches=arguments.batches, graphs=arguments.graphs and device.type == "cuda")
    bound = None
    rows: list[Row] = []
    for weights, order, keys in (("resident", "batch", {}), ("streamed", "batch", GROUPS), ("streamed", "layer", GROUPS)):
        step = ProductStep(shape, setup(together=order == "layer", keys=keys), device, arguments.size)
        seconds, peak = run(step, device, arguments.steps)
        bound = bound or seconds
        asked = f" (at most {LIMIT:g})" if order == "layer" else ""
        print(f"| {weights} | {order} | {peak:.2f} | {seconds:.3f} | {bound:.3f} | {seconds / bound:.2f}{asked} |", flush=True)
        rows.append(Row(weights, order, peak, seconds, seconds / bound))
        write_json(arguments.json, machine, rows, figures(rows))
        free(step, device)
        del step
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
