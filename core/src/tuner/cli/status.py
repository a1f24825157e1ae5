"""`tuner status`: how runs are doing, from their folders."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from pathlib import Path

import click

from tuner.cli.table import columns, folded
from tuner.watch.folder import find_runs
from tuner.watch.status import RunStatus, read_status
from tuner.watch.words import checkpoints, duration, losses, memory, pace, progress, remark, row

HEADERS = ("RUN", "STATE", "STEP", "S/STEP", "LEFT", "LOSS", "CHECKPOINT", "REMARK")


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
