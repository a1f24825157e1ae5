"""What the loaded plugins offer, by kind and name, and the hooks of a run.

Every plugin has a pluggy manager of its own. So a plugin that fails takes nothing along, hooks are called plugin by plugin in
the order of names, and an error is known to be that plugin's.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from tuner.component import Component
from tuner.config.options import Options
from tuner.config.settings import CORE_OPTIONS
from tuner.config.vocabulary import did_you_mean, nearest
from tuner.errors import ConfigError, PluginError, TunerError
from tuner.plugins.record import CORE, Kind, LoadedPlugin, PluginRecord, reason_of

if TYPE_CHECKING:
    from tuner.train.run import RunInfo

log = logging.getLogger(__name__)

CHOSEN_BY: Mapping[Kind, str] = {
    "family": "model_family", "optimizer": "optimizer", "quantizer": "base_model_precision", "tracker": "report_to",
}
"""The key by which users name a component of a kind."""


class Registry:
    """The plugins of this process: built by `load_plugins`, read by everyone else."""

    def __init__(self, plugins: Sequence[LoadedPlugin]) -> None:
        self._loaded = tuple(plugins)

    @property
    def plugins(self) -> tuple[PluginRecord, ...]:
        """One record per plugin, the built-ins first, then by name; failed and disabled ones included."""
        return tuple(plugin.record for plugin in self._loaded)

    @property
    def option_types(self) -> tuple[type[Options], ...]:
        """Every option model: the core's, then each plugin's own and its components', without repeats."""
        return tuple(self._owners())

    def owner_of(self, options_type: type[Options]) -> str:
        """`core`, or the plugin that brought the model. Raises KeyError for a model that nobody registered."""
        return self._owners()[options_type]

    def components(self, kind: Kind) -> tuple[Component, ...]:
        """All components of a kind, in the order of `plugins`."""
        return tuple(component for record in self.plugins for component in record.components.get(kind, ()))

    def component(self, kind: Kind, name: str) -> Component:
        """The component that a user named.

        Raises `ConfigError` with the nearest names, or `PluginError` where a plugin that did not load is the likelier reason.
        """
        known = {component.name: component for component in self.components(kind)}
        if name in known:
            return known[name]
        similar = nearest(name, list(known))
        missing = [record for record in self.plugins if record.status != "loaded"]
        culprits = [record for record in missing if record.name == name or name in record.claimed]
        advice = did_you_mean(similar) or (f"there is {', '.join(known)}" if known else "no plugin offers any")
        words, where = f"no {kind.replace('_', ' ')} has this name", CHOSEN_BY.get(kind, "")
        if culprits or (missing and not similar):
            raise PluginError(words, where=where, value=name, remedy=f"{absences(culprits or missing)}; {advice}")
        raise ConfigError(words, where=where, value=name, remedy="; ".join(filter(None, [advice, absences(missing)])))

    def hint(self) -> str:
        """Which plugins did not load and why, for errors about unknown keys; empty when all did."""
        return absences([record for record in self.plugins if record.status != "loaded"])

    # --- hooks of a run --------------------------------------------------------------------------------------------
    def check_plan(self, plan: Any) -> list[TunerError]:
        """All problems of all plugins with `plan`, a `tuner.train.plan.Plan`. A check that raises is a problem itself."""
        problems: list[TunerError] = []
        for plugin in self._active():
            try:
                answers = plugin.call("tuner_check_plan", plan=plan)
            except TunerError as error:
                problems.append(error)
                continue
            except Exception as error:
                problems.append(PluginError(f"its check of the plan failed: {reason_of(error)}", where=f"plugin {plugin.record.name}"))
                continue
            for answer in answers:
                problems.extend(_problems(plugin.record.name, answer))
        return problems

    def checkpoint_saved(self, run: RunInfo, path: Path, step: int) -> tuple[str, ...]:
        """Tells every plugin; returns one warning per plugin that failed, which are logged as well."""
        return self._notify("tuner_checkpoint_saved", run=run, path=path, step=step)

    def run_finished(self, run: RunInfo, outcome: str) -> tuple[str, ...]:
        """Tells every plugin; returns one warning per plugin that failed, which are logged as well."""
        return self._notify("tuner_run_finished", run=run, outcome=outcome)

    def add_commands(self, cli: click.Group) -> tuple[str, ...]:
        """Adds the plugins' commands to `cli`. Names that exist stay; returns one warning per plugin that failed or clashed."""
        warnings: list[str] = []
        for plugin in self._active():
            offered = click.Group()
            existing = cli.list_commands(click.Context(cli))
            failures = self._attempt(plugin, "tuner_register_commands", cli=offered)
            taken = [name for name in offered.commands if name in existing]
            warnings += [*failures, *(_warn(plugin, f"its command {name!r} exists already and is left out") for name in taken)]
            for name, command in offered.commands.items():
                if name not in taken and not failures:
                    cli.add_command(command, name)
        return tuple(warnings)

    def _notify(self, hook: str, **arguments: object) -> tuple[str, ...]:
        return tuple(warning for plugin in self._active() for warning in self._attempt(plugin, hook, **arguments))

    def _attempt(self, plugin: LoadedPlugin, hook: str, **arguments: object) -> list[str]:
        try:
            plugin.call(hook, **arguments)
        except Exception as error:
            return [_warn(plugin, f"{hook} failed: {reason_of(error)}")]
        return []

    def _active(self) -> Iterator[LoadedPlugin]:
        return (plugin for plugin in self._loaded if plugin.record.status == "loaded")

    def _owners(self) -> dict[type[Options], str]:
        owners: dict[type[Options], str] = dict.fromkeys(CORE_OPTIONS, CORE)
        for record in self.plugins:
            for options in record.option_types:
                owners.setdefault(options, record.name)
        return owners


def absences(records: Sequence[PluginRecord]) -> str:
    """`plugin x is not loaded (reason)`, for every record."""
    return "; ".join(f"plugin {record.name} is not loaded ({record.reason})" for record in records)


def _problems(name: str, answer: object) -> list[TunerError]:
    if isinstance(answer, (list, tuple)) and all(isinstance(item, TunerError) for item in answer):
        return list(answer)
    return [PluginError("its check of the plan must return a list of TunerError", where=f"plugin {name}", value=type(answer).__name__)]


def _warn(plugin: LoadedPlugin, reason: str) -> str:
    warning = f"plugin {plugin.record.name}: {reason}"
    log.warning(warning)
    return warning
