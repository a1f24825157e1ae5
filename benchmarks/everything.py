"""All programs of this folder one after the other, within a time: what one machine with a GPU can tell in one visit.

    python benchmarks/everything.py --budget 1500 --out figures     # seconds; wants a GPU of 80 GB
    python benchmarks/everything.py --size tiny --out figures       # the same on a CPU, to see that all of it runs

First the tests that need a GPU, then the programs, those first whose figures matter most. Each is a process of its own with a time of its
own; those of this folder are forked from one that has imported what they need, where the device allows that. What no longer fits into the
budget is skipped, which is said. `--out` gets each one's text and JSON as it comes, and summary.md
with every figure beside its limit, written anew after each program. The exit code is 1 where a program failed or, at real size, a
limit was missed.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

from figures import Figure, read_figures

HERE = Path(__file__).resolve().parent
LEAST = 0.5
"""A program is begun where this share of the time that it is expected to take is left: it leaves the figures that it gets to."""
ROOM = 48 * 2**30
"""Bytes that a checkpoint of random weights takes, with some to spare; there is one at a time."""


@dataclass(frozen=True)
class Task:
    """One program."""

    name: str
    command: Sequence[str]
    """Behind the interpreter; a name of this folder, or -m and a module."""
    expected: int
    """Seconds that it takes on a GPU, as far as that is known."""
    needs: Sequence[str] = ()
    """Modules without which it cannot run."""
    own: bool = True
    """Whether it is a program of this folder, which takes --json."""
    sized: bool = True
    """Whether that takes --size."""


@dataclass
class Done:
    """What became of it."""

    name: str
    outcome: str
    seconds: float = 0.0
    figures: list[Figure] = field(default_factory=list)
    failed: bool = False


def tasks(size: str, scratch: Path) -> list[Task]:
    """All, in the order of their importance."""
    quick = size == "tiny"
    steps = ["--steps", "1"] if quick else []
    step = ["step.py", *steps]
    memory = ["memory.py", *steps, *([] if quick else ["--no-plain"])]
    clips = ["--clips", "1"] if quick else []
    modules = ("core/test_fused", "core/test_fp8", "core/test_packed", "offload/test_cuda_link", "offload/test_leaf_gpu")
    tests = ["tests/cuda", *(f"tests/{name}.py" for name in modules)]
    # On a GPU the tests are small: several processes share it.
    together = ["-n", "8"] if not quick and importlib.util.find_spec("xdist") else []
    shallow = ["--blocks", "1", "--small"] if quick else []
    every = [
        Task("tests", ["-m", "pytest", *tests, *together, "-v", "--tb=short", "-p", "no:cacheprovider"], 200, ("pytest", "av"), own=False),
        Task("table", ["table.py", *steps, "--lanes", "1,2", "--only", "bf16"], 160),
        Task("table-fp8", ["table.py", *steps, "--lanes", "1,2", "--only", "fp8"], 130),
        Task("gradients", ["gradients.py", "--compiled", "no", *shallow], 220, sized=False),
        Task("memory", [*memory, "--rows", "head,121f"], 350),
        Task("memory-video", [*memory, "--rows", "video"], 60),
        Task("regularizers", ["regularizers.py", *steps, "--cuda_graphs", "on"], 110),
        Task("start", ["start.py", "--folder", str(scratch / "start")], 200, ("av",)),
        Task("data", ["data.py", "--folder", str(scratch / "start"), *(["--rounds", "1", *steps] if quick else [])], 120, ("av",)),
        Task("budget", ["budget.py", "--folder", str(scratch / "start")], 140, ("av",)),
        Task("accumulation", ["accumulation.py", *steps], 320),
        Task("sample", ["sample.py", *(["--steps", "1"] if quick else []), *clips], 120),
        Task("caching", ["caching.py", *(["--clips", "2"] if quick else [])], 70, ("av",)),
        Task("profile", [*step, "--no-peer", "--cuda_graphs", "--profile"], 55),
        Task("profile-kept", [*step, "--no-peer", "--cuda_graphs", "--profile", "--no-checkpointing"], 60),
        Task("profile-fp8", [*step, "--no-peer", "--cuda_graphs", "--profile", "--no-checkpointing", "--fp8"], 60),
        Task("compiled", [*step, "--no-peer", "--cuda_graphs", "--profile", "--no-checkpointing", "--dynamo_mode", "default"], 180),
        Task("gradients-compiled", ["gradients.py", "--compiled", "only", *shallow], 300, sized=False),
        Task("text_encoder", ["text_encoder.py", "--folder", str(scratch / "text"), "--only", "group"], 120),
        Task("deviation", ["benchmarks/deviation.py", "--blocks", "2,6,24,48"], 100, own=False),
        Task("peers-head", [*step, "--work", "head"], 100),
        Task("peers-kept", [*step, "--work", "head", "--no-checkpointing"], 80),
        Task("peers-121f", [*step, "--work", "121f"], 100),
        Task("memory-plain", ["memory.py", *steps, "--rows", "head"], 240),
    ]
    slow = ("memory-plain", "peers-121f", "deviation", "gradients-compiled", "compiled")
    return [task for task in every if not (quick and task.name in slow)]


def missing(task: Task) -> list[str]:
    """Modules that are not installed."""
    return [name for name in task.needs if importlib.util.find_spec(name) is None]


FORKING = multiprocessing.get_context("fork")


def forked(command: Sequence[str], text: IO[bytes], environment: Mapping[str, str]) -> None:
    """A program of this folder in a copy of this process, which has imported everything already; ends with its exit code."""
    os.setsid()
    for number in (1, 2):
        os.dup2(text.fileno(), number)
    os.chdir(HERE.parent)
    os.environ.update(environment)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    sys.argv = list(command)
    sys.exit(importlib.import_module(Path(command[0]).stem).main(list(command[1:])))


def touch_device() -> None:
    """Fails where a copy of this process cannot use the device."""
    import torch

    torch.zeros(1, device="cuda" if torch.cuda.is_available() else "cpu")


def imported() -> bool:
    """Imports what the programs need; whether they can be forked then: not where an import has touched the device."""
    os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"] = "1"  # torch then tells without touching it whether there is one
    for name in ("memory", "regularizers", "sample", "start", "data", "gradients", "table"):
        with suppress(ImportError):  # av may be missing
            importlib.import_module(name)
    import torch

    if torch.cuda.is_initialized():
        return False
    trial = FORKING.Process(target=touch_device)
    trial.start()
    trial.join()
    return trial.exitcode == 0


def carry_out(task: Task, size: str, out: Path, left: float, environment: Mapping[str, str], *, fork: bool) -> Done:
    """Runs it for at most `left` seconds, its text on the screen and in a file; ends what it started with it."""
    json_file = out / f"{task.name}.json"
    json_file.unlink(missing_ok=True)
    given = ["--size", size] if task.sized else []
    own = [str(HERE / task.command[0]), *task.command[1:], *given, "--json", str(json_file)] if task.own else list(task.command)
    limit = min(left, 2.0 * task.expected + 60)
    began = time.monotonic()
    outcome = ""
    with (out / f"{task.name}.txt").open("wb") as text:
        if fork and task.own:
            copy = FORKING.Process(target=forked, args=(own, text, environment))
            copy.start()
            pid, wait, code_of = copy.pid, copy.join, lambda: copy.exitcode
        else:
            process = subprocess.Popen(
                [sys.executable, *own], stdout=text, stderr=subprocess.STDOUT, cwd=HERE.parent, env=dict(environment),
                start_new_session=True,
            )  # fmt: skip
            pid, wait, code_of = process.pid, process.wait, process.poll
        try:
            with suppress(subprocess.TimeoutExpired):
                wait(limit)
        finally:  # also where this program is told to end
            code = code_of()
            if code is None:
                outcome = f"stopped after {limit:.0f} s"
                os.killpg(pid, signal.SIGKILL)
                wait()
    found = read_figures(json_file)
    # A program may also say by its exit code that a limit was missed.
    broke = bool(code) and (all(figure.kept for figure in found) or "Traceback" in last_lines(out / f"{task.name}.txt", 200))
    outcome = outcome or (f"failed with {code}" if broke else "done")
    return Done(task.name, outcome, time.monotonic() - began, found, failed=broke)


def last_lines(path: Path, count: int) -> str:
    """Of a program's text."""
    return "\n".join(path.read_text(encoding="utf-8", errors="replace").splitlines()[-count:])


def render(done: Sequence[Done]) -> str:
    """The summary as Markdown."""
    lines = ["| Program | Outcome | s |", "|---|---|---|"]
    lines += [f"| {one.name} | {one.outcome} | {one.seconds:.0f} |" for one in done]
    lines += ["", "| Program | Figure | |", "|---|---|---|"]
    lines += [f"| {one.name} | {figure.name} | {figure.describe()} |" for one in done for figure in one.figures]
    return "\n".join(lines) + "\n"


def parse(argv: list[str]) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=("real", "tiny"), default="real")
    parser.add_argument("--budget", type=float, default=1500, help="seconds for all of it")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="takes all texts and figures")
    parser.add_argument("--only", default="", help="only programs whose name contains one of these words, separated by commas")
    parser.add_argument("--skip", default="", help="not those whose name contains one of these words")
    return parser.parse_args(argv)


def wanted(name: str, only: str, skip: str) -> bool:
    """By the words of the command line."""
    return any(word in name for word in only.split(",")) and not any(word and word in name for word in skip.split(","))


def main(argv: list[str]) -> int:
    """Runs them all."""
    arguments = parse(argv)
    ends = time.monotonic() + arguments.budget
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that a program under way is ended, too
    arguments.out.mkdir(parents=True, exist_ok=True)
    out = arguments.out.resolve()
    done: list[Done] = []
    shared_memory = Path("/dev/shm")
    roomy = shared_memory.is_dir() and shutil.disk_usage(shared_memory).free > ROOM
    with tempfile.TemporaryDirectory() as compiled, tempfile.TemporaryDirectory(dir=shared_memory if roomy else None) as scratch:
        # What one program compiles the next one finds.
        environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": compiled, "PYTHONUNBUFFERED": "1"}
        os.environ.update(environment)
        fork = imported()
        for task in tasks(arguments.size, Path(scratch)):
            if not wanted(task.name, arguments.only, arguments.skip):
                continue
            left = ends - time.monotonic()
            if lacking := missing(task):
                done.append(Done(task.name, f"skipped: {', '.join(lacking)} is not installed"))
            elif left < LEAST * task.expected * (0.05 if arguments.size == "tiny" else 1):
                done.append(Done(task.name, f"skipped: {left:.0f} s are left, it takes about {task.expected}"))
            else:
                print(f"== {task.name}: {left:.0f} s left", flush=True)
                done.append(carry_out(task, arguments.size, out, left, environment, fork=fork))
                print(last_lines(out / f"{task.name}.txt", 30), flush=True)
            if task.name not in ("start", "data"):  # whose weights the next one takes
                for left_over in Path(scratch).iterdir():
                    shutil.rmtree(left_over, ignore_errors=True)
            (out / "summary.md").write_text(render(done), encoding="utf-8")
            print(f"-- {done[-1].name}: {done[-1].outcome}, {done[-1].seconds:.0f} s", flush=True)
    print("\n" + render(done))
    missed = arguments.size == "real" and not all(figure.kept for one in done for figure in one.figures)
    return int(missed or any(one.failed for one in done))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
