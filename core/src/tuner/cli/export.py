"""`tuner export`: a trained adapter as a file that other programs load."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click

from tuner.cli.common import ConfiguredCommand
from tuner.config.resolve import Settings
from tuner.plugins.registry import Registry


def run(registry: Registry, settings: Settings, arguments: Mapping[str, Any]) -> int:
    """Reads the adapter, checks it against the model where one is named, writes the file."""
    from tuner.train.saving.export import export  # torch

    target = Path(arguments["output"]) if arguments["output"] else None
    written = export(registry, settings, Path(arguments["source"]), target, arguments["layout"])
    click.echo(str(written))
    return 0


command = ConfiguredCommand(
    "export",
    "Convert the adapter of a run, a checkpoint or a file into a layout that other programs read. The file is checked against the "
    "model's own list of weights before it is written.",
    run,
    [
        click.Argument(["source"], metavar="RUN|CHECKPOINT|FILE"),
        click.Option(["--output", "-o"], metavar="FILE|DIR", help="Where to write; beside the source when empty."),
        click.Option(["--layout"], default="", help="Which layout, by the name that `tuner plugins` lists; the family's own when empty."),
    ],
)
