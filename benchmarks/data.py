"""A training step over cached data beside the same step over data that lie on the device already.

    python benchmarks/data.py                     # LTX-2 2.0 at real size, in the folder of start.py; needs a GPU
    python benchmarks/data.py --size tiny --folder /tmp/start     # the same program on a CPU; its times mean nothing

Both are the product's own loop: batches come from its prefetch thread, which reads records, puts them together and page-locks them, or from
a list of the same batches on the device. Rounds of both alternate. A round is timed as a whole, because waiting for the device after each
step would hide a thread that is too slow. Data should make a step at most 2 % longer.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Mapping
from pathlib import Path

import torch

from figures import Figure, write_json
from program import begin, parser_of, synchronize
from start import WORK, prepared
from tuner.config.resolve import resolve
from tuner.config.settings import DataSettings, TrainSettings
from tuner.data.dataset import TrainingSet
from tuner.data.prefetch import Prefetcher
from tuner.plugins.loader import load_plugins
from tuner.train.assemble import assemble
from tuner.train.execute import GraphExecution
from tuner.train.loop import Loop
from tuner.train.placement import to_device
from tuner.train.planning import make_plan
from tuner.train.signals import StopRequests
from tuner.train.step import Item

LIMIT = 1.02
"""Time over cached data / time over data on the device, at most."""
WARM_UP = 6
"""Enough for a graph to be captured."""


class Waiting(Prefetcher[Item]):
    """Knows how long the step has waited for it."""

    waited = 0.0

    def __next__(self) -> Item:
        started = time.perf_counter()
        found = super().__next__()
        self.waited += time.perf_counter() - started
        return found


def make_loop(keys: Mapping[str, object], device: torch.device) -> Loop:
    """The loop of a run with these keys, of as many steps as are asked of it."""
    registry = load_plugins()
    settings = resolve(registry.option_types, flags={key: str(value) for key, value in keys.items()} | {"max_train_steps": "1000000"})
    plan = make_plan(registry, settings, device)
    train = settings.get(TrainSettings)
    dataset = TrainingSet(plan.manifest, plan.encoders, train.train_batch_size, train.seed, train.caption_dropout_probability)
    return Loop(plan, assemble(plan, device), dataset, lambda step, row: None, lambda step: None, StopRequests(lambda text: None))


def round_of(loop: Loop, feed: Prefetcher[Item], first: int, steps: int) -> float:
    """Seconds a step."""
    synchronize(loop.device)
    started = time.perf_counter()
    for step in range(first, first + steps):
        loop.step(step, feed)
    synchronize(loop.device)
    return (time.perf_counter() - started) / steps


def measure(loop: Loop, rounds: int, steps: int) -> tuple[float, float, float]:
    """Median seconds a step over data on the device and over cached data, and seconds that a step waited for the latter."""
    there = [to_device(loop.prepare(index), loop.device) for index in range(loop.dataset.steps_per_epoch)]
    synthetic = Prefetcher(lambda index: there[index % len(there)], depth=0)
    cached = Waiting(loop.prepare, 0, loop.plan.settings.get(DataSettings).dataloader_prefetch)
    try:
        step = 0
        for feed in (synthetic, cached):
            print(f"to warm up: {round_of(loop, feed, step, WARM_UP):.2f} s/step", flush=True)
            step += WARM_UP
        if isinstance(loop.assembly.execution, GraphExecution):
            print(f"shapes replayed as CUDA graphs: {loop.assembly.execution.captured}", flush=True)
        cached.waited = 0.0
        times: tuple[list[float], list[float]] = ([], [])
        for _ in range(rounds):
            for found, feed in zip(times, (synthetic, cached), strict=True):
                found.append(round_of(loop, feed, step, steps))
                step += steps
            print(f"a round: {times[0][-1]:.4f} and {times[1][-1]:.4f} s/step", flush=True)
    finally:
        cached.close()
    return statistics.median(times[0]), statistics.median(times[1]), cached.waited / (rounds * steps)


def main(argv: list[str]) -> int:
    """Measures and prints."""
    parser = parser_of(__doc__)
    parser.add_argument("--folder", type=Path, default=Path("/dev/shm/tuner-start"), help="where the weights are written, and left")
    parser.add_argument("--clips", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=5, help="of both kinds")
    parser.add_argument("--steps", type=int, default=10, help="in a round")
    arguments = parser.parse_args(argv)
    device, machine = begin(arguments.size)
    _, keys = prepared(arguments.folder, arguments.size, arguments.clips)
    width, height, frames = WORK[arguments.size]
    began = time.perf_counter()
    loop = make_loop(keys, device)
    print(f"made ready in {time.perf_counter() - began:.1f} s")
    work = f"{arguments.clips} clips of {width}x{height}x{frames}, batch 2"
    print(f"{work}, {arguments.rounds} rounds of {arguments.steps} steps\n", flush=True)
    synthetic, cached, waited = measure(loop, arguments.rounds, arguments.steps)
    print("| Data | s/step | s waited for a batch | ratio |\n|---|---|---|---|")
    print(f"| on the device | {synthetic:.4f} | - | 1 |")
    print(f"| cached | {cached:.4f} | {waited:.5f} | {cached / synthetic:.3f} (at most {LIMIT:g}) |")
    limit = LIMIT if arguments.size == "real" else None
    write_json(arguments.json, machine, [], [Figure("cached data / data on the device", cached / synthetic, "", most=limit)])
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
