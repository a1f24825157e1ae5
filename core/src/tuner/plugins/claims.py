"""Who owns which component name and which key: two claims on one are the later plugin's failure."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from pydantic import ValidationError

from tuner.component import Component
from tuner.config.options import Options, field_facts
from tuner.config.problems import problems_of
from tuner.config.settings import CORE_OPTIONS
from tuner.config.vocabulary import RESERVED, Key, canonical, keys_of
from tuner.errors import ConfigError, PluginError
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
        spellings: dict[str, tuple[type[Options], str]] = {}
        for key in keys_of(options):
            _check_declaration(options, key)
            for spelling in (key.name, *key.aliases):
                if spelling in spellings:
                    raise PluginError(f"key {spelling} is declared twice in {options.__name__}")
                spellings[spelling] = (options, plugin)
        _check_defaults(options)
        return spellings


def unusable(spelling: str, alias: bool = False) -> str:
    """Why no option model can declare a key, or an alias of one, that is called so; empty: it can."""
    if spelling in RESERVED:
        return "is reserved for the command line"
    return f"would hide Options.{spelling}, which every option model has" if hasattr(Options, spelling) and not alias else ""


def _check_declaration(options: type[Options], key: Key) -> None:
    if "unit" not in field_facts(options, key.name) or not key.help:
        raise PluginError(f"key {key.name} in {options.__name__} is not declared with tuner.config.options.option")
    if options.model_fields[key.name].is_required():
        raise PluginError(f"key {key.name} in {options.__name__} has no default")
    for spelling in (key.name, *key.aliases):
        if spelling != canonical(spelling) or spelling != spelling.lower():
            raise PluginError(f"key {spelling!r} must be written in lower case with underscores")
        if reason := unusable(spelling, alias=spelling != key.name):
            raise PluginError(f"key {spelling} {reason}")


def _check_defaults(options: type[Options]) -> None:
    """A default outside its own limits is the plugin's mistake, not the user's."""
    try:
        options()
    except ValidationError as error:
        defaults = {key.name: (repr(key.default), "") for key in keys_of(options)}
        reasons = [_of_default(options, problem) for problem in problems_of(error, options, defaults)]
        raise PluginError("; ".join(reasons), remedy="mend the default or its limits in the plugin") from error


def _of_default(options: type[Options], problem: ConfigError) -> str:
    value = "" if problem.value is None else f" {problem.value}"
    return f"the default{value} of {problem.where} in {options.__name__} is refused: {problem.message}"
