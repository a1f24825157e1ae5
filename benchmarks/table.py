"""The step under every setting that has a figure to keep: LTX-2 2.0 at real size with random weights, rank 32, replayed as a CUDA graph.

    python benchmarks/table.py                        # one process for all rows; those of 121 frames without recomputation want 100 GB
    python benchmarks/table.py --only fp8             # rows whose name contains one of these words
    python benchmarks/table.py --size tiny --steps 1  # the same program on a CPU, to see that it runs; its times mean nothing

head: 832x480x17, batch 2; 121f: 768x512x121, batch 1. A model is built once for all rows that share it. The last column is what a step
would take if all its products and attention ran as fast as one large bf16 product, measured in the same process, in parts of what it takes.
`step.py` measures one row beside diffusers + peft, and tells its kernels apart.
"""

from __future__ import annotations

import gc
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from figures import Figure, write_json
from plain import WORK
from product import ProductStep, Setup
from profiling import matrix_rate, operations
from program import GIB, begin, parser_of
from step import Row, measure
from tuner.model.compiled import CompiledBlocks
from tuner.model.runner import Checkpointing
from tuner.train.execute import GraphExecution, PlainExecution

FP8 = {"base_model_compute": "fp8"}


@dataclass(frozen=True)
class Case:
    """One row, and the most that it may take."""

    work: str
    recomputed: bool
    seconds: float | None
    gib: float | None
    video_only: bool = False
    fp8: bool = False

    @property
    def name(self) -> str:
        """In words."""
        words = [self.work, *["video alone"] * self.video_only, "fp8 products" if self.fp8 else "bf16"]
        return ", ".join([*words, "recomputed" if self.recomputed else "kept"])


CASES = (
    Case("head", False, 0.36, 68), Case("head", True, 0.50, 42), Case("121f", False, 0.98, 100), Case("121f", True, 1.35, 45),
    Case("head", False, 0.28, 68, fp8=True), Case("head", True, 0.40, 42, fp8=True), Case("121f", True, None, None, fp8=True),
    Case("head", False, 0.29, 47, video_only=True), Case("head", True, 0.41, 30, video_only=True),
    Case("head", False, 0.20, 47, video_only=True, fp8=True), Case("head", True, 0.29, 30, video_only=True, fp8=True),
)  # fmt: skip


def show(case: Case, row: Row, rate: float) -> None:
    """One line of the table. `rate`: operations a second of a large product; 0: not known."""

    def beside(limit: float | None) -> str:
        return f" (at most {limit:g})" if limit is not None else ""

    reached = f"{row.operations / rate / row.seconds:.0%}" if rate else "-"
    peak = "-" if row.peak_gib is None else f"{row.peak_gib:.1f}{beside(case.gib)}"
    cells = [row.name, f"{row.seconds:.3f}{beside(case.seconds)}", f"{row.fastest:.3f} - {row.slowest:.3f}", peak, outside(), reached]
    print(f"| {' | '.join(cells)} |", flush=True)


def outside() -> str:
    """GiB of the device's memory that torch does not count: the driver, the libraries' kernels, what graphs consist of."""
    if not torch.cuda.is_available():
        return "-"
    free, total = torch.cuda.mem_get_info()
    return f"{(total - free - torch.cuda.memory_reserved()) / GIB:.2f}"


def figures(done: Sequence[tuple[Case, Row]], *, limits: bool) -> list[Figure]:
    """Seconds and peak of each."""
    times = [Figure(f"{row.name}, step", row.seconds, most=case.seconds if limits else None) for case, row in done]
    peaks = [
        Figure(f"{row.name}, peak", row.peak_gib, "GiB", case.gib if limits else None) for case, row in done if row.peak_gib is not None
    ]
    return times + peaks


def main(argv: list[str]) -> int:
    """Measures, prints, and writes the JSON file."""
    parser = parser_of(__doc__)
    parser.add_argument("--only", default="", help="only rows whose name contains one of these words, separated by commas")
    parser.add_argument("--skip", default="", help="not those whose name contains one of these words")
    parser.add_argument("--dynamo_mode", default="", help="compile the blocks in this mode of torch.compile")
    parser.add_argument("--lanes", default="2", metavar="1|2|1,2", help="cuda_graph_lanes: 2 puts small work beside large; or each in turn")
    parser.add_argument("--steps", type=int, default=10, help="timed steps")
    arguments = parser.parse_args(argv)
    device, machine = begin(arguments.size)
    rate = matrix_rate(device) if device.type == "cuda" else 0.0
    if rate:
        eight_bits = matrix_rate(device, eight_bits=True)
        print(f"a large bf16 product: {rate / 1e12:.0f}e12 operations a second; in 8 bits {eight_bits / 1e12:.0f}e12")
    columns = ("Step", "s (median)", "fastest - slowest", "peak GiB", "GiB outside torch", "of a large product's rate")
    print(f"\n| {' | '.join(columns)} |\n|{'---|' * len(columns)}", flush=True)
    lanes = [int(count) for count in arguments.lanes.split(",")]
    done: list[tuple[Case, Row]] = []
    wanted, unwanted = arguments.only.split(","), [word for word in arguments.skip.split(",") if word]
    chosen = [c for c in CASES if any(word in c.name for word in wanted) and not any(word in c.name for word in unwanted)]
    for video_only, fp8 in dict.fromkeys((case.video_only, case.fp8) for case in chosen):
        setup = Setup(video_only=video_only, keys=FP8 if fp8 else {})
        step = ProductStep(WORK[arguments.size]["head"], setup, device, arguments.size)
        if arguments.dynamo_mode:
            step.runner.train_block = CompiledBlocks(step.family.call_block, arguments.dynamo_mode)
        for case in chosen:
            if (case.video_only, case.fp8) != (video_only, fp8):
                continue
            step.take(WORK[arguments.size][case.work])  # type: ignore[index]
            count = len(step.runner.blocks)
            step.runner.checkpointing = Checkpointing.every(count) if case.recomputed else Checkpointing()
            counted = operations(step)
            for count in lanes if not video_only else lanes[-1:]:  # one stream has one lane
                step.runner.lanes = count > 1
                step.execution = (GraphExecution if device.type == "cuda" else PlainExecution)(step.run, step.masters)
                gc.collect()
                if device.type == "cuda":
                    torch.cuda.empty_cache()
                more = ", compiled" * bool(arguments.dynamo_mode) + ", one lane" * (count == 1)
                row = measure(case.name + more, step, device, arguments.steps)
                done.append((case, replace(row, operations=counted)))
                show(*done[-1], rate)
                found = figures(done, limits=arguments.size == "real")
                write_json(arguments.json, machine, [row for _, row in done], found, steps=arguments.steps)
        step.close()
        del step
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
