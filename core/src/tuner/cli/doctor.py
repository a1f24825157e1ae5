"""`tuner doctor`: what is there, what is missing or too old, and the line that mends it."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import click

from tuner.cli.table import columns, folded
from tuner.config.resolve import find_config, resolve
from tuner.errors import ConfigError
from tuner.plugins.loader import load_plugins

if TYPE_CHECKING:
    from tuner.doctor.findings import Row

COLOURS = {"ok": "green", "note": "yellow", "problem": "red"}


@click.command("doctor")
@click.option("--config", metavar="FILE", type=click.Path(path_type=Path), help="Also what this configuration needs; config/config.json is "
              "found by itself.")  # fmt: skip
@click.option("--online", is_flag=True, help="Also ask the model hub whether it answers.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object on stdout.")
def command(config: Path | None, online: bool, as_json: bool) -> int:
    """Look at Python, libraries, plugins, GPUs, memory, disk, codecs and the model hub, and say what is missing.

    Exit code 0 when training would work here, 3 when something required is missing or too old, 2 when only the configuration is wrong.
    """
    from tuner.doctor.findings import examine, exit_code  # with packaging

    rows = examine(checks(config, online))
    if as_json:
        counted = {verdict: sum(row.verdict == verdict for row in rows) for verdict in COLOURS}
        click.echo(json.dumps({"ok": not exit_code(rows), "counts": counted, "rows": [row.as_json() for row in rows]}, indent=2))
    else:
        click.echo(_text(rows))
    return exit_code(rows)


def checks(config: Path | None, online: bool) -> list:  # type: ignore[type-arg]
    """All of them, in the order in which one thing needs the other."""
    from tuner.doctor import machine, software
    from tuner.doctor.findings import Check, problem_of

    registry = load_plugins()
    file, settings, broken = find_config(config, Path.cwd()), None, None
    if file is not None:
        try:
            settings = resolve(registry.option_types, config_file=file, environ=os.environ, hint=registry.hint())
        except ConfigError as error:
            broken = problem_of("configuration", str(file), error)

    def configuration() -> Sequence[Row]:
        if broken is not None:
            return [broken]
        return list(software.configuration_rows(registry, settings, str(file))) if settings is not None else []

    return [
        Check("python", "python", software.python_rows),
        *(Check("libraries", name, partial(software.library_rows, name)) for name in software.distributions(registry)),
        *(Check("libraries", name, partial(software.extra_rows, registry, name)) for name in software.distributions(registry)),
        Check("plugins", "plugins", lambda: software.plugin_rows(registry)),
        Check("torch", "torch", machine.torch_rows),
        Check("host", "cores", machine.core_rows),
        Check("host", "memory", machine.memory_rows),
        Check("host", "locked memory", machine.locked_rows),
        Check("host", "shared memory", machine.shared_rows),
        Check("disk", "disk", lambda: machine.disk_rows(software.folders_of(settings))),
        Check("media", "codecs", machine.media_rows),
        Check("hub", "hub", lambda: machine.hub_rows(online)),
        Check("configuration", "configuration", configuration),
    ]


def _text(rows: Sequence[Row]) -> str:
    """The table for people, remedies below their rows, the sum at the end."""
    cells = [(row.verdict, row.name, row.found + (f" -> {row.remedy}" if row.remedy else "")) for row in rows]
    table = columns(("", "WHAT", "FOUND"), cells)
    lines = []
    for line in table.splitlines():
        verdict = line.partition(" ")[0]
        lines.append(click.style(verdict, fg=COLOURS[verdict]) + line[len(verdict) :] if verdict in COLOURS else line)
    problems, notes = (sum(row.verdict == verdict for row in rows) for verdict in ("problem", "note"))
    said = "training would work here" if not problems else "training would not work here"
    return "\n".join([*lines, "", folded(f"{said}: {_count(problems, 'problem')}, {_count(notes, 'note')}")])


def _count(number: int, word: str) -> str:
    return f"{number} {word}{'' if number == 1 else 's'}"
