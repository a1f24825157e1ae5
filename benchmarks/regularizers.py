"""What regularizers cost or save: tuner's own step of LTX-2 2.0 with and without them, at real size with random weights.

    python benchmarks/regularizers.py                   # 768x512x121 (6,144 video tokens); wants a GPU of 80 GB
    python benchmarks/regularizers.py --size tiny       # the same program on a CPU, to see that it runs; its times mean nothing

TREAD leaves half of the video tokens out of blocks 2 to -2. Its bound is the ratio of the work of both steps, in operations of the
products and attentions, counted in this process. CREPA takes synthetic features of the width of DINOv2 ViT-g/14; what encoding
them costs is paid before training and not part of it. Ratios are against the plain step of the same setting. The exit code is 1 where
a limit is missed, which counts at real size alone.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from figures import Figure, write_json
from memory import free, run
from plain import WORK, Shape, Size
from product import ProductStep, Setup
from profiling import operations
from program import begin, parser_of
from tuner.train.execute import GraphExecution, PlainExecution

LEAST_SPEED = 1.6
"""How many times as fast a step with TREAD must be."""
MOST_ADDED = 1.03
"""How many times as long a step with CREPA may take."""
PLAIN, TREAD, CREPA = "plain", "TREAD", "CREPA"
WIDTH, PATCH = 1536, 14
TEACHER = {"model_type": "dinov2", "hidden_size": WIDTH, "patch_size": PATCH}
"""The part of ViT-g/14's configuration that the regularizer reads."""


@dataclass(frozen=True)
class Timed:
    """One measured row."""

    name: str
    checkpointing: bool
    graph: bool
    seconds: float
    peak_gib: float
    work: float
    """Operations of the plain step / of this one: how many times as fast it can be at most, as far as products decide."""
    speed: float
    """Seconds of the plain step / of this one."""
    limit: str
    kept: bool


def tread_keys(blocks: int) -> dict[str, str]:
    """Half of the tokens, over 2 to -2; a model of few blocks routes all of them."""
    first, last = (2, -2) if blocks > 4 else (0, -1)
    return {"tread_config": json.dumps({"routes": [{"selection_ratio": 0.5, "start_layer_idx": first, "end_layer_idx": last}]})}


def crepa_keys(folder: Path, blocks: int) -> dict[str, str]:
    """A teacher that is only a configuration: its features come from `features`."""
    (folder / "config.json").write_text(json.dumps(TEACHER), encoding="utf-8")
    (folder / "model.safetensors").write_bytes(b"")
    return {"crepa_enabled": "true", "crepa_encoder": str(folder), "crepa_block_index": str(min(8, blocks - 1))}


def features(shape: Shape, device: torch.device) -> dict[str, Tensor]:
    """(B, F, h, w, E) float16, on the grid of the tokens, as they are cached."""
    return {"crepa.features": torch.randn(shape.batch, *shape.grid, WIDTH, dtype=torch.float16, device=device)}


def measure(arguments: argparse.Namespace, device: torch.device, folder: Path, seen: Callable[[list[Timed]], None]) -> list[Timed]:
    """Every row, for each setting; a model is built once for each technique and checkpointing. `seen`: is shown all after each new one."""
    size: Size = arguments.size
    shape = WORK[size][arguments.work]  # type: ignore[index]
    blocks = 48 if size == "real" else 2
    asked: dict[str, tuple[Mapping[str, str], Mapping[str, Tensor]]] = {
        PLAIN: ({}, {}), TREAD: (tread_keys(blocks), {}), CREPA: (crepa_keys(folder, blocks), features(shape, device)),
    }  # fmt: skip
    rows: list[Timed] = []
    for checkpointing in arguments.checkpointing:
        plain: dict[bool, float] = {}
        work = 0
        for name, (keys, extras) in asked.items():
            setup = Setup(checkpointing, arguments.video_only, keys=keys, extras=extras)
            step = ProductStep(shape, setup, device, size)
            counted = operations(step)
            work = work or counted
            for graph in arguments.graphs if device.type == "cuda" else [False]:
                step.execution = (GraphExecution if graph else PlainExecution)(step.run, step.masters)
                seconds, peak = run(step, device, arguments.steps)
                speed = plain.setdefault(graph, seconds) / seconds
                row = Timed(name, checkpointing, graph, seconds, peak, work / counted, speed, "", True)
                rows.append(judged(row) if size == "real" else row)
                show(rows[-1])
                seen(rows)
            free(step, device)
            del step
    return rows


def judged(row: Timed) -> Timed:
    """With the limit that it is meant to keep."""
    if row.name == TREAD:
        return replace(row, limit=f"at least {LEAST_SPEED:g}", kept=row.speed >= LEAST_SPEED)
    if row.name == CREPA:
        return replace(row, limit=f"at least {1 / MOST_ADDED:.3f}", kept=row.speed >= 1 / MOST_ADDED)
    return row


def figures(rows: list[Timed]) -> list[Figure]:
    """Seconds of each, and how many times as fast as plain it is."""
    least = {TREAD: LEAST_SPEED, CREPA: 1 / MOST_ADDED}
    found = []
    for row in rows:
        name = f"{row.name}, {'recomputed' if row.checkpointing else 'kept'}, {'CUDA graph' if row.graph else 'plain'}"
        found.append(Figure(f"{name}, step", row.seconds))
        if row.name != PLAIN:
            found.append(Figure(f"{name}, speed against plain", row.speed, "", least=least[row.name] if row.limit else None))
    return found


def show(row: Timed) -> None:
    """One line of the table, as soon as it is known."""
    held = "recomputed" if row.checkpointing else "kept"
    verdict = row.limit and f" ({row.limit}{'' if row.kept else ': missed'})"
    way = "CUDA graph" if row.graph else "plain"
    cells = [row.name, held, way, f"{row.peak_gib:.1f}", f"{row.seconds:.3f}", f"{row.work:.2f}", f"{row.speed:.3f}{verdict}"]
    print(f"| {' | '.join(cells)} |", flush=True)


def parse(argv: list[str]) -> argparse.Namespace:
    """The command line; `checkpointing` and `graphs` become lists of what is measured."""
    parser = parser_of(__doc__)
    switch = {"both": [True, False], "on": [True], "off": [False]}
    parser.add_argument("--work", choices=("head", "121f"), default="121f", help="121f: 768x512x121, batch 1; head: 832x480x17, batch 2")
    parser.add_argument("--checkpointing", choices=switch, default="on", help="recompute blocks in backward; off needs 140 GB at 121f")
    parser.add_argument("--cuda_graphs", dest="graphs", choices=switch, default="both", help="replay the step as a CUDA graph")
    parser.add_argument("--video_only", action="store_true", help="train the video stream alone")
    parser.add_argument("--steps", type=int, default=6, help="timed steps")
    arguments = parser.parse_args(argv)
    arguments.checkpointing, arguments.graphs = switch[arguments.checkpointing], switch[arguments.graphs]
    return arguments


def main(argv: list[str]) -> int:
    """Measures, prints, and writes the JSON file."""
    arguments = parse(argv)
    device, machine = begin(arguments.size)
    shape = WORK[arguments.size][arguments.work]
    print(f"work: {arguments.size} {shape.width}x{shape.height}x{shape.frames}, batch {shape.batch}, {shape.video_tokens} video tokens\n")
    print("| Step | Blocks' activations | Carried out | peak GiB | s/step | less work, times | faster, times |")
    print("|---|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        rows = measure(arguments, device, Path(folder), lambda rows: write_json(arguments.json, machine, rows, figures(rows)))
    return int(not all(row.kept for row in rows))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
