"""`tuner report`: the page about a run, made anew or to be passed on."""

from __future__ import annotations

from pathlib import Path

import click

from tuner.text_files import replace_text
from tuner.watch.folder import REPORT, one_run
from tuner.watch.history import read_history
from tuner.watch.report import render


@click.command("report")
@click.argument("run", default=".", metavar="[RUN]", type=click.Path(path_type=Path))
@click.option("--output", metavar="FILE", type=click.Path(path_type=Path), help="Write a page that stands alone, samples inside (30 MB).")
def command(run: Path, output: Path | None) -> None:
    """Write report.html of a run anew, from its files: RUN is its output_dir, the current folder by default.

    A run writes it itself, after samples and checkpoints and at its end, with links to the samples beside it. Opening it needs a browser
    and no network.
    """
    files = one_run(run)
    target = output or files.path / REPORT
    replace_text(target, render(read_history(files.path), single_file=output is not None), remedy="name another file with --output")
    click.echo(target)
