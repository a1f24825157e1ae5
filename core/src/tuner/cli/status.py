"""`tuner status`: how runs are doing, from their folders."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path

import click

from tuner.cli.table import columns, folded
from tuner.watch.folder import find_runs
from tuner.watch.pace import GIB
from tuner.watch.status import RunStatus, read_status

HEADERS = ("RUN", "STATE", "STEP", "S/STEP", "LEFT", "LOSS", "CHECKPOINT", "REMARK")
LONG_AGO = 60.0
"""Seconds after which it is said that a run has not been heard of, or has not ended a step."""


@click.command("status")
@click.argument("run", default=".", metavar="[RUN]", type=click.Path(path_type=Path))
@click.option("--json", "as_json", is_flag=True, help='One object on stdout: {"runs": [...]}.')
@click.option("--watch", type=click.FloatRange(min=0.2), metavar="SECONDS", help="Show it again every so often, until no run is going on.")
def command(run: Path, as_json: bool, watch: float | None) -> None:
    """Show how runs are doing: RUN is the output_dir of one, or a folder with several below; the current folder by default.

    Runs may be going on, on this machine or another one that shares the disk, or may have ended long ago. Nothing is written.
    """
    while True:
        found = [read_status(folder) for folder in find_runs(run)]
        click.echo(json.dumps({"runs": [status.as_json() for status in found]}, indent=None if watch else 2) if as_json else shown(found))
        if watch is None or all(status.state != "running" for status in found):
            return
        time.sleep(watch)
        if not as_json:
            click.echo()


def shown(runs: Sequence[RunStatus]) -> str:
    """All about one run, or a row for each of several."""
    if len(runs) == 1:
        return "\n".join(folded(f"{label:<12}{words}") for label, words in details(runs[0]) if words)
    return columns(HEADERS, [row(run) for run in runs])


def details(run: RunStatus) -> list[tuple[str, str]]:
    """Label and text; empty where nothing is known."""
    doing = {"running": f" ({run.doing})", "died": f" while {run.doing}"}.get(run.state, "")
    return [
        ("run", str(run.path)), ("model", run.model), ("state", run.state + doing), ("remark", remark(run)), ("step", progress(run)),
        ("pace", pace(run)), ("left", duration(run.eta)), ("loss", losses(run.metrics)), ("held out", losses(run.heldout)),
        ("gradient", f"{run.metrics['grad_norm']:.3g}" if "grad_norm" in run.metrics else ""),
        ("rate", f"{run.metrics['lr']:.2e}" if "lr" in run.metrics else ""), ("memory", memory(run)),
        ("checkpoint", checkpoints(run)),
        ("sample", run.sample), ("process", f"{run.pid} on {run.host}" if run.pid and run.state == "running" else ""),
        ("report", str(run.path / "report.html") if (run.path / "report.html").is_file() else ""),
    ]  # fmt: skip


def row(run: RunStatus) -> tuple[str, ...]:
    """One line of the table."""
    step = f"{run.step}/{run.total}" if run.total else ""
    seconds = f"{run.seconds_per_step:.3g}" if run.seconds_per_step else ""
    return str(run.path), run.state, step, seconds, duration(run.eta), losses(run.metrics), run.checkpoint, remark(run)


def checkpoints(run: RunStatus) -> str:
    """The last one, and when the next comes."""
    following = f"at step {run.next_checkpoint}" if run.next_checkpoint else ""
    if not run.checkpoint:
        return f"the first one {following}" if following else ""
    return run.checkpoint + (f", next {following}" if following else "")


def progress(run: RunStatus) -> str:
    """`step/total (share)`."""
    return f"{run.step}/{run.total} ({run.step / run.total:.0%})" if run.total else ""


def pace(run: RunStatus) -> str:
    """Seconds a step, and samples a second."""
    if not run.seconds_per_step:
        return ""
    samples = run.metrics.get("samples")
    return f"{run.seconds_per_step:.3g} s/step" + (f", {samples / run.seconds_per_step:.3g} samples/s" if samples else "")


def losses(metrics: object) -> str:
    """`video 0.123 | audio 0.045`, or the total where there are no parts."""
    if not isinstance(metrics, dict):
        return ""
    parts = {name.removeprefix("loss/"): value for name, value in metrics.items() if name.startswith("loss/")}
    parts = parts or {name: value for name, value in metrics.items() if name not in ("grad_norm", "lr", "seconds", "samples")}
    return " | ".join(f"{name} {value:.4f}" for name, value in parts.items())


def memory(run: RunStatus) -> str:
    """Now, peak and limit."""
    numbers = [run.memory.get(name) for name in ("now", "peak", "limit")]
    if not all(isinstance(value, int) for value in numbers):
        return ""
    now, peak, limit = (value / GIB for value in numbers if isinstance(value, int))
    return f"{run.memory.get('place')} {now:.1f} GiB, at most {peak:.1f} of {limit:.1f}"


def duration(seconds: float | None) -> str:
    """`1:02:03`; empty where it is not known."""
    return "" if seconds is None else str(timedelta(seconds=round(seconds)))


def remark(run: RunStatus) -> str:
    """What is odd about it."""
    if run.state == "failed":
        return run.reason.strip().splitlines()[0] if run.reason.strip() else ""
    if run.state == "died":
        since = f"nothing heard of it for {duration(run.silent)}; " if run.silent is not None else ""
        return since + ("go on with --resume_from_checkpoint latest" if run.checkpoint else "no checkpoint was saved")
    if run.state == "running" and run.silent is not None and run.silent > LONG_AGO:
        return f"no heartbeat for {duration(run.silent)}"
    if run.state == "running" and run.waiting is not None and run.waiting > max(LONG_AGO, 20 * (run.seconds_per_step or 0)):
        return f"no step for {duration(run.waiting)}"
    return ""
