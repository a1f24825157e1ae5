"""Who owns which component name and which key: two claims on one are the later plugin's failure."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from tuner.component import Component
from tuner.config.options import Options, field_facts
from tuner.config.settings import CORE_OPTIONS
from tuner.config.vocabulary import RESERVED, Key, canonical, keys_of
from tuner.errors import PluginError
from tuner.plugins.record import CORE, Kind


class Claims:
    """Component names by kind, and keys; the core's keys are claimed from the start."""

    def __init__(self) -> None:
        self._names: dict[tuple[Kind, str], str] = {}
        self._keys: dict[str, tuple[type[Options], str]] = {}
        for options in CORE_OPTIONS:
            self._keys.update(self._checked(CORE, options))

    def add(self, plugin: str, components: Mapping[Kind, Iterable[Component]], option_types: Iterable[type[Options]]) -> None:
        """Claims everything, or raises `PluginError` and claims nothing."""
        names, keys = dict(self._names), dict(self._keys)
        for kind, component in ((kind, component) for kind, group in components.items() for component in group):
            if (kind, component.name) in names:
                raise PluginError(f"{kind} {component.name!r} is offered by {names[kind, component.name]} already")
            names[kind, component.name] = plugin
        for options in option_types:
            for spelling, claim in self._checked(plugin, options).items():
                owner, by = keys.setdefault(spelling, claim)
                if owner is not options:
                    raise PluginError(f"key {spelling} belongs to {by} ({owner.__module__}.{owner.__name__}) already")
        self._names, self._keys = names, keys

    def _checked(self, plugin: str, options: type[Options]) -> dict[str, tuple[type[Options], str]]:
        """Every spelling that `options` claims. Raises for declarations that could not work."""
        options()  # a default outside its own limits is the plugin's mistake, not the user's
        spellings: dict[str, tuple[type[Options], str]] = {}
        for key in keys_of(options):
            _check_declaration(options, key)
            for spelling in (key.name, *key.aliases):
                if spelling in spellings:
                    raise PluginError(f"key {spelling} is declared twice in {options.__name__}")
                spellings[spelling] = (options, plugin)
        return spellings


def _check_declaration(options: type[Options], key: Key) -> None:
    if "unit" not in field_facts(options, key.name) or not key.help:
        raise PluginError(f"key {key.name} in {options.__name__} is not declared with tuner.config.options.option")
    for spelling in (key.name, *key.aliases):
        if spelling != canonical(spelling) or spelling != spelling.lower():
            raise PluginError(f"key {spelling!r} must be written in lower case with underscores")
        if spelling in RESERVED:
            raise PluginError(f"key {spelling} is reserved for the command line")
