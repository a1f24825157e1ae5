"""Activations kept by budget on cards of several sizes: `gradient_checkpointing: auto` in the product's own loop over cached data.

    python benchmarks/budget.py                   # LTX-2 2.0 at real size, in the folder of start.py; needs a GPU
    python benchmarks/budget.py --cards 48,64     # sizes in GiB
    python benchmarks/budget.py --size tiny --folder /tmp/start     # the same program on a CPU, where nothing is kept by budget

A smaller card is this one while another process holds the rest of its memory. Printed are the blocks whose activations are kept as it was
forecast and after the correction of the first steps, what torch allocated at most beside what tensors may take there, and the time of a
step after its capture. The step with every block recomputed stands first, on the whole card.
"""

from __future__ import annotations

import gc
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from data import WARM_UP, make_loop, round_of
from figures import Figure, write_json
from program import GIB, begin, parser_of
from start import prepared
from tuner.data.prefetch import Prefetcher
from tuner.train.activations import ActivationBudget
from tuner.train.placement import to_device

OUTSIDE = 2.0
"""GiB that the process that holds memory takes beside it, and the driver for this one."""


@dataclass(frozen=True)
class Row:
    """One line of the table."""

    name: str
    forecast: int
    kept: int
    room_gib: float
    peak_gib: float
    seconds: float


@contextmanager
def card_of(size: float, device: torch.device) -> Iterator[None]:
    """Inside, another process holds all but `size` GiB of the device's memory."""
    if device.type != "cuda":
        yield
        return
    count = int(torch.cuda.get_device_properties(device).total_memory - (size + OUTSIDE) * GIB)
    held = f"held = torch.empty({count}, dtype=torch.uint8, device='cuda')"
    program = f"import sys, torch; {held}; print('held', flush=True); sys.stdin.read()"
    with subprocess.Popen([sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        if not process.stdout.readline():
            raise RuntimeError(f"{count / GIB:.0f} GiB could not be taken")
        yield
        process.communicate()


def measure(name: str, keys: Mapping[str, object], device: torch.device, steps: int) -> Row:
    """Loads the model, trains until graphs are captured, and times `steps` more. The peak is of all after the budget's correction."""
    gc.collect()  # of the row before
    if device.type == "cuda":
        torch.cuda.empty_cache()  # which a smaller card would not have
        torch.cuda.reset_peak_memory_stats(device)
    loop = make_loop(keys, device)
    there = [to_device(loop.prepare(index), device) for index in range(loop.dataset.steps_per_epoch)]
    feed = Prefetcher(lambda index: there[index % len(there)], depth=0)
    budget = loop.assembly.execution
    forecast = budget.kept if isinstance(budget, ActivationBudget) else 0
    round_of(loop, feed, 0, 2 * WARM_UP)
    seconds = round_of(loop, feed, 2 * WARM_UP, steps)
    peak = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else 0
    kept, room = (budget.kept, budget.budget) if isinstance(budget, ActivationBudget) else (0, 0)
    loop.assembly.detach()
    return Row(name, forecast, kept, room / GIB, peak / GIB, seconds)


def main(argv: list[str]) -> int:
    """Measures and prints."""
    parser = parser_of(__doc__)
    parser.add_argument("--folder", type=Path, default=Path("/dev/shm/tuner-start"), help="where the weights are written, and left")
    parser.add_argument("--cards", default="48,56,64,80", help="GiB, separated by commas")
    parser.add_argument("--steps", type=int, default=6)
    arguments = parser.parse_args(argv)
    device, machine = begin(arguments.size)
    _, keys = prepared(arguments.folder, arguments.size, 4)
    columns = ("Card", "kept: forecast", "kept: corrected", "GiB that tensors may take", "peak GiB", "s/step")
    print(f"\n| {' | '.join(columns)} |\n|{'---|' * len(columns)}", flush=True)
    rows: list[Row] = []
    figures: list[Figure] = []
    cases: list[tuple[str, float, Mapping[str, object]]] = [("all of it, every block recomputed", 0.0, {})]
    cases += [(f"{size:g} GiB", size, {"gradient_checkpointing": "auto"}) for size in map(float, arguments.cards.split(","))]
    for name, size, more in cases:
        if size:
            with card_of(size, device):
                row = measure(name, {**keys, **more}, device, arguments.steps)
        else:
            row = measure(name, keys, device, arguments.steps)
        rows.append(row)
        figures += [
            Figure(f"{name}, step", row.seconds), Figure(f"{name}, kept", row.kept, ""),
            Figure(f"{name}, peak", row.peak_gib, "GiB", row.room_gib or None),
        ]  # fmt: skip
        print(f"| {name} | {row.forecast} | {row.kept} | {row.room_gib:.1f} | {row.peak_gib:.1f} | {row.seconds:.3f} |", flush=True)
        write_json(arguments.json, machine, rows, figures)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
