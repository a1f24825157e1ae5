"""Loads plugins one by one: whatever is wrong with one becomes a line about it and leaves the others untouched.

`TUNER_PLUGINS=a,b` loads only these, `TUNER_DISABLE_PLUGINS=a,b` none of these; the built-ins are always there. The tiny family for
tests of plugins is loaded only where `TUNER_PLUGINS` names it (`testing`).
Nothing here imports torch; a plugin that does so at registration gets a note.
"""

from __future__ import annotations

import inspect
import logging
import os
import sys
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass, replace
from importlib.metadata import EntryPoint, entry_points, version
from typing import Literal

import pluggy

import tuner
from tuner import hookspecs
from tuner.component import Component
from tuner.config.options import Options
from tuner.errors import PluginError
from tuner.plugins.claims import Claims
from tuner.plugins.record import BUILTINS, KINDS, Kind, LoadedPlugin, PluginRecord, reason_of, registration_hook
from tuner.plugins.registry import Registry

log = logging.getLogger(__name__)

GROUP = "tuner"
ONLY, DISABLED = "TUNER_PLUGINS", "TUNER_DISABLE_PLUGINS"
ON_REQUEST: Mapping[str, str] = {"testing": "tuner.testing.plugin"}
"""Plugins of the core that are loaded only where `TUNER_PLUGINS` names them: name -> module."""


@dataclass(frozen=True, slots=True)
class Candidate:
    """A plugin before it is loaded."""

    name: str
    distribution: str
    version: str
    load: Callable[[], object]

    @property
    def origin(self) -> str:
        """`tuner-moon 3.1`."""
        return f"{self.distribution} {self.version}" if self.distribution else "a module given directly"


def load_plugins(environ: Mapping[str, str] = os.environ, extra: Sequence[tuple[str, object]] = ()) -> Registry:
    """Loads the built-ins, then every installed plugin and `extra` (name, module or object) in the order of their names."""
    only, disabled = _names(environ, ONLY), _names(environ, DISABLED)
    candidates = _candidates(extra, only or set())
    claims = Claims()
    builtins = _builtins()
    plugins = [_load(builtins, claims)]
    named = {BUILTINS: builtins}
    for candidate in candidates:
        reason = _why_disabled(candidate.name, only, disabled)
        if reason:
            plugins.append(_absent(candidate, "disabled", reason))
        elif (first := named.setdefault(candidate.name, candidate)) is not candidate:
            words = f"{first.origin} and {candidate.origin} both offer a plugin named {candidate.name!r}; the first is taken"
            plugins.append(_absent(candidate, "failed", reason_of(PluginError(words, remedy="remove one of them"))))
        else:
            plugins.append(_load(candidate, claims))
    installed = {candidate.name for candidate in candidates} | {BUILTINS}
    missing = sorted((only or set()) - installed)
    plugins.extend(_absent(_unknown(name), "failed", f"{ONLY} names it, but it is not installed") for name in missing)
    for name in sorted((disabled or set()) - installed):
        log.warning("%s names %r, which is not installed", DISABLED, name)
    for record in (plugin.record for plugin in plugins if plugin.record.status == "failed"):
        log.warning("plugin %s is not loaded: %s", record.name, record.reason)
    return Registry(plugins)


def _names(environ: Mapping[str, str], variable: str) -> set[str] | None:
    """The names in a variable; None where it is not set or empty."""
    return {name.strip() for name in environ.get(variable, "").split(",") if name.strip()} or None


def _candidates(extra: Sequence[tuple[str, object]], only: Collection[str]) -> list[Candidate]:
    installed = [_from_entry_point(entry_point) for entry_point in entry_points(group=GROUP)]
    installed += [_of_core(name, module) for name, module in ON_REQUEST.items() if name in only]
    given = [Candidate(name, "", "", lambda plugin=plugin: plugin) for name, plugin in extra]  # type: ignore[misc]
    return sorted([*installed, *given], key=lambda candidate: (candidate.name, candidate.distribution))


def _from_entry_point(entry_point: EntryPoint) -> Candidate:
    distribution = entry_point.dist
    if distribution is None:
        return Candidate(entry_point.name, "", "", entry_point.load)
    return Candidate(entry_point.name, distribution.name, distribution.version, entry_point.load)


def _builtins() -> Candidate:
    """Registered like any other plugin, from a module path that is known."""
    return _of_core(BUILTINS, "tuner.builtins.plugin")


def _of_core(name: str, module: str) -> Candidate:
    return Candidate(name, "tuner-framework", version("tuner-framework"), EntryPoint(name, module, GROUP).load)


def _unknown(name: str) -> Candidate:
    return Candidate(name, "", "", lambda: None)


def _why_disabled(name: str, only: set[str] | None, disabled: set[str] | None) -> str:
    if disabled and name in disabled:
        return f"switched off by {DISABLED}"
    return f"not among {ONLY}" if only is not None and name not in only else ""


def _absent(candidate: Candidate, status: Literal["failed", "disabled"], reason: str, claimed: tuple[str, ...] = ()) -> LoadedPlugin:
    return LoadedPlugin(PluginRecord(candidate.name, candidate.distribution, candidate.version, status, reason, claimed=claimed))


def _load(candidate: Candidate, claims: Claims) -> LoadedPlugin:
    """Loads one plugin. Nothing of one that fails stays: its manager and its claims are dropped with it."""
    torch_before = "torch" in sys.modules
    components: dict[Kind, tuple[Component, ...]] = {}
    try:
        with redirect_stdout(sys.stderr):  # stdout belongs to the command: with --json it is one object
            plugin = candidate.load()
        manager = _manager(candidate, plugin)
        loaded = LoadedPlugin(PluginRecord(candidate.name, candidate.distribution, candidate.version, "loaded"), manager)
        components.update(_components(loaded))
        option_types = _option_types(loaded, components)
        claims.add(candidate.name, components, option_types)
    except (Exception, SystemExit) as error:
        names = tuple(component.name for group in components.values() for component in group)
        return _absent(candidate, "failed", reason_of(error), names)
    notes = ["it implements no hook"] if not manager.get_hookcallers(plugin) else []
    if not torch_before and "torch" in sys.modules:
        notes.append("it imports torch at registration, which slows every command down")
    record = PluginRecord(
        candidate.name, candidate.distribution, candidate.version, "loaded",
        components=components, option_types=option_types, notes=tuple(notes),
    )
    return LoadedPlugin(record, manager)


def _manager(candidate: Candidate, plugin: object) -> pluggy.PluginManager:
    """A manager with this plugin alone. Raises `PluginError` or pluggy's validation error for hooks that do not fit."""
    _check_version(candidate, getattr(plugin, "TUNER_HOOKSPEC_VERSION", tuner.HOOKSPEC_VERSION))
    manager = pluggy.PluginManager(GROUP)
    manager.add_hookspecs(hookspecs)
    manager.register(plugin, candidate.name)
    manager.check_pending()
    bare = [n for n in dir(plugin) if n.startswith("tuner_") and inspect.isroutine(getattr(plugin, n)) and not _is_hook(manager, plugin, n)]
    if bare:
        raise PluginError(f"{', '.join(bare)} lacks the decorator tuner.hookspecs.hookimpl")
    return manager


def _check_version(candidate: Candidate, built_for: object) -> None:
    here = tuner.HOOKSPEC_VERSION
    if type(built_for) is not int:
        kind = "text" if isinstance(built_for, str) else type(built_for).__name__
        raise PluginError(f"its TUNER_HOOKSPEC_VERSION must be the number {here}, not {kind}", value=built_for)
    if built_for != here:
        remedy = (
            f"install a version of {candidate.distribution or 'the plugin'} made for hook version {here}, "
            f"or a tuner-framework with hook version {built_for}"
        )
        raise PluginError(f"it was built for hook version {built_for}; this is version {here}", remedy=remedy)


def _is_hook(manager: pluggy.PluginManager, plugin: object, name: str) -> bool:
    return manager.parse_hookimpl_opts(plugin, name) is not None


def _components(plugin: LoadedPlugin) -> dict[Kind, tuple[Component, ...]]:
    found = {kind: _listed(plugin, registration_hook(kind)) for kind in KINDS}
    for kind, items in found.items():
        for item in items:
            if not isinstance(item, Component):
                raise PluginError(f"{registration_hook(kind)} must return Components, not {type(item).__name__}")
    name, distribution = plugin.record.name, plugin.record.distribution
    return {
        kind: tuple(replace(item, plugin=name, distribution=distribution) for item in items if isinstance(item, Component))
        for kind, items in found.items()
        if items
    }


def _option_types(plugin: LoadedPlugin, components: Mapping[Kind, tuple[Component, ...]]) -> tuple[type[Options], ...]:
    own = _listed(plugin, "tuner_register_options")
    offered = dict.fromkeys([*own, *(component.options for group in components.values() for component in group)])
    for item in offered:
        if not (isinstance(item, type) and issubclass(item, Options)):
            raise PluginError(f"{item!r} is no subclass of tuner.config.options.Options")
    return tuple(item for item in offered if isinstance(item, type) and issubclass(item, Options))


def _listed(plugin: LoadedPlugin, hook: str) -> list[object]:
    """What a registration hook returns, flat. Raises `PluginError` when that is no list."""
    items: list[object] = []
    for answer in plugin.call(hook):
        if not isinstance(answer, (list, tuple)):
            raise PluginError(f"{hook} must return a list, not {type(answer).__name__}")
        items.extend(answer)
    return items
