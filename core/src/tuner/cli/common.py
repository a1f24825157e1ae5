"""What commands that read the configuration share. Importing this costs no torch."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click

from tuner.config.flags import collect, flags_for
from tuner.config.resolve import Settings, find_config, resolve
from tuner.plugins.loader import load_plugins
from tuner.plugins.registry import Registry

Run = Callable[[Registry, Settings, Mapping[str, Any]], int]


@dataclass(frozen=True)
class LaterCommand:
    """A command that is made when it is used, because plugins have a part in it."""

    made: Callable[[], click.Command]


@dataclass(frozen=True)
class ConfiguredCommand:
    """A command that takes every key as a flag, and `--config`."""

    name: str
    summary: str
    run: Run
    """Returns the exit code."""
    extra: Sequence[click.Parameter] = ()
    """Handed to `run` by name; these are no keys."""
    earlier: Callable[[Mapping[str, Any]], Mapping[str, object]] = lambda arguments: {}
    """From the arguments of `extra`: keys of a run that the command is about, which file, environment and flags override."""

    def made(self) -> click.Command:
        """With the flags of the plugins of this moment."""
        registry = load_plugins()
        own = {parameter.name for parameter in self.extra} | {"config"}

        def callback(**given: Any) -> int:
            arguments = {key: value for key, value in given.items() if key in own}
            flags = collect({key: value for key, value in given.items() if key not in own})
            explicit = Path(arguments["config"]) if arguments["config"] else None
            settings = resolve(
                registry.option_types, config_file=find_config(explicit, Path.cwd()), flags=flags, environ=os.environ,
                hint=registry.hint(), earlier=self.earlier(arguments),
            )  # fmt: skip
            return self.run(registry, settings, arguments)

        config = click.Option(["--config"], metavar="FILE", help="Configuration file; config/config.json is found by itself.")
        params = [*self.extra, config, *flags_for(registry.option_types)]
        return click.Command(self.name, params=params, callback=callback, help=self.summary)
