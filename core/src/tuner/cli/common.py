"""What commands that read the configuration share. Importing this costs no torch."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import click

from tuner.config.flags import collect, flags_for
from tuner.config.resolve import Settings, find_config, resolve
from tuner.plugins.loader import load_plugins
from tuner.plugins.registry import Registry

Run = Callable[[Registry, Settings, Mapping[str, Any]], int]


def configured_command(name: str, summary: str, run: Run, extra: Sequence[click.Parameter] = ()) -> click.Command:
    """A command that takes every key as a flag, and `--config`; `run` returns the exit code.

    `extra` parameters are handed to `run` by name and are no keys.
    """
    registry = load_plugins()
    own = {parameter.name for parameter in extra} | {"config"}

    def callback(**given: Any) -> int:
        arguments = {key: value for key, value in given.items() if key in own}
        flags = collect({key: value for key, value in given.items() if key not in own})
        explicit = Path(arguments["config"]) if arguments["config"] else None
        settings = resolve(
            registry.option_types, config_file=find_config(explicit, Path.cwd()), flags=flags, environ=os.environ,
            hint=registry.hint(),
        )  # fmt: skip
        return run(registry, settings, arguments)

    config = click.Option(["--config"], metavar="FILE", help="Configuration file; config/config.json is found by itself.")
    return click.Command(name, params=[*extra, config, *flags_for(registry.option_types)], callback=callback, help=summary)
