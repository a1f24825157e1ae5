"""From defaults, file, environment and flags to one validated instance of every option model, each value with its origin.

A later source wins over an earlier one: defaults < file < environment < flags. Everything wrong in all sources is reported at once.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, TypeVar, cast, get_args, get_origin

from pydantic import ValidationError

from tuner.config.json_text import Pairs, parse, plain, refuse_constant
from tuner.config.masking import masked, shown
from tuner.config.options import Options
from tuner.config.problems import combined, problems_of
from tuner.config.vocabulary import RESERVED, Key, Vocabulary, did_you_mean, union_parts
from tuner.errors import ConfigError

EXPONENT = re.compile(r"[+-]?\d+(\.\d*)?[eE]\+?\d{1,3}")
ENVIRONMENT_PREFIX = "TUNER_"
DEFAULT_CONFIG = Path("config") / "config.json"
NEUTRAL = frozenset({"", "none", "null", "false"})

O = TypeVar("O", bound=Options)  # noqa: E741


@dataclass(frozen=True, slots=True)
class Given:
    """One value as a source gave it."""

    key: Key
    value: object
    origin: str
    """run, file, environment or flag."""
    place: str
    """For people: the file, the variable or the flag."""


class Settings:
    """The resolved values of all option models."""

    def __init__(
        self, vocabulary: Vocabulary, models: Mapping[type[Options], Options], origins: Mapping[str, str], notices: Iterable[str]
    ) -> None:
        self._vocabulary = vocabulary
        self._models = models
        self._origins = origins
        self.notices: tuple[str, ...] = tuple(notices)
        """Given keys that have no effect, each with its reason."""

    def get(self, cls: type[O]) -> O:
        """The instance of an option model. Raises KeyError for a model that was not resolved."""
        return cast(O, self._models[cls])

    def value(self, key: str) -> object:
        """The value of a key, by name or alias. Raises KeyError for an unknown one."""
        found = self._key(key)
        return getattr(self._models[found.owner], found.name)

    def origin(self, key: str) -> str:
        """`default`, `run`, `file`, `environment` or `flag`."""
        return self._origins.get(self._key(key).name, "default")

    def explicit(self) -> set[str]:
        """The keys that a source other than the defaults decided."""
        return set(self._origins)

    def resolved(self) -> dict[str, dict[str, object]]:
        """Key -> value and origin, as JSON can hold them; values of secret keys are masked."""
        dumped = {name: value for model in self._models.values() for name, value in model.model_dump(mode="json").items()}
        return {name: {"value": masked(dumped[name], name), "origin": self.origin(name)} for name in self._vocabulary.keys}

    def _key(self, name: str) -> Key:
        found = self._vocabulary.find(name)
        if found is None:
            raise KeyError(name)
        return found


def find_config(explicit: Path | None, cwd: Path) -> Path | None:
    """The file that was named, else `config/config.json` below `cwd` where there is one."""
    if explicit is not None:
        return explicit
    found = cwd / DEFAULT_CONFIG
    return found if found.is_file() else None


def resolve(
    option_types: Iterable[type[Options]],
    *,
    config_file: Path | None = None,
    flags: Mapping[str, object] = {},
    environ: Mapping[str, str] = {},
    hint: str = "",
    earlier: Mapping[str, object] = {},
) -> Settings:
    """Resolves every model in `option_types`. `earlier`: what a run was made with, which everything else overrides.

    `hint` is added to errors about unknown keys: which plugins did not load. Raises one `ConfigError` with every problem found.
    """
    vocabulary = Vocabulary(option_types)
    problems: list[ConfigError] = []
    notices: list[str] = []
    given: dict[str, Given] = {}
    typed: list[Pair] = [("flag", f"--{name}", name, value) for name, value in flags.items()]
    before: list[Pair] = [("run", "as the run had it", name, value) for name, value in earlier.items()]
    pairs = [*before, *_file_pairs(config_file), *_environment_pairs(vocabulary, environ, notices), *typed]
    for item in _recognised(vocabulary, pairs, hint, problems):
        given[item.key.name] = item
    decoded = [_decoded(item, problems) for item in given.values() if not _is_empty(item)]
    acting = {
        item.key.name: item
        for item in decoded
        if item is not None and (not item.key.unsupported or _accepts_unsupported(item, problems, notices))
    }
    for options in vocabulary.option_types:
        for pair in options.alternatives:
            _choose(pair, acting, notices)
    models = _build_models(vocabulary, acting, problems)
    if problems:
        raise combined(problems)
    notices += _idle(models, acting)
    return Settings(vocabulary, models, {name: item.origin for name, item in acting.items()}, notices)


ORIGINS = ("run", "file", "environment", "flag")
"""Where a value may come from, the nearest last."""
Pair = tuple[str, str, str, object]
"""Origin, place, key as spelled, value."""


def _file_pairs(path: Path | None) -> list[Pair]:
    if path is None:
        return []
    return [("file", str(path), key, value) for key, value in read_object(path) if key != "$schema"]


def read_object(path: Path) -> list[tuple[str, object]]:
    """The pairs of the JSON object in a file, in order, repeated keys included. Raises `ConfigError` for anything else."""
    try:
        content = parse(path.read_bytes(), str(path))
    except FileNotFoundError as error:
        raise ConfigError("there is no such file", where=str(path), remedy="name the configuration with --config FILE") from error
    except OSError as error:
        raise ConfigError(f"cannot be read: {error.strerror}", where=str(path), remedy="name a file that can be read") from error
    if not isinstance(content, Pairs):
        raise ConfigError("must hold a JSON object: { ... }", where=str(path), remedy='write {"key": value, ...}')
    return [(key, plain(value, f"{path}: {key}")) for key, value in content]


def _environment_pairs(vocabulary: Vocabulary, environ: Mapping[str, str], notices: list[str]) -> list[Pair]:
    pairs: list[Pair] = []
    for variable in sorted(name for name in environ if name.startswith(ENVIRONMENT_PREFIX)):
        key = variable.removeprefix(ENVIRONMENT_PREFIX).lower()
        if key in RESERVED or environ[variable] == "":
            continue
        if vocabulary.find(key):
            pairs.append(("environment", variable, key, environ[variable]))
        else:  # the variable may belong to another program, so it is no error
            advice = did_you_mean([f"{ENVIRONMENT_PREFIX}{name.upper()}" for name in vocabulary.nearest(key)])
            notices.append(f"{variable}: names no key and is ignored{'; ' + advice if advice else ''}")
    return pairs


def _recognised(vocabulary: Vocabulary, pairs: list[Pair], hint: str, problems: list[ConfigError]) -> list[Given]:
    """Names turned into keys. Unknown names, and keys that one source gives twice with different values, become problems."""
    found: dict[tuple[str, str], Given] = {}
    for origin, place, spelled, value in pairs:
        key = vocabulary.find(spelled)
        if key is None:
            advice = " ".join(filter(None, [did_you_mean(vocabulary.nearest(spelled)), hint, "`tuner options` lists all keys"]))
            problems.append(ConfigError(f"unknown key ({place})", where=spelled, remedy=advice))
            continue
        previous = found.get((origin, key.name))
        if previous is not None and previous.value != value:
            both = shown(key.name, [previous.value, value])
            problems.append(ConfigError(f"given twice with different values ({place})", where=key.name, value=both))
        found[origin, key.name] = Given(key, value, origin, place)
    return list(found.values())


def _is_empty(item: Given) -> bool:
    """Whether a value means the default: null and "", for unsupported keys also false and "none"."""
    if item.value is None or item.value == "":
        return True
    return bool(item.key.unsupported) and (item.value is False or (isinstance(item.value, str) and item.value.strip().lower() in NEUTRAL))


def _decoded(item: Given, problems: list[ConfigError]) -> Given | None:
    """Strings that stand for something else: JSON or words separated by commas for lists and objects, `1e4` for whole numbers, `2` for
    the number among the choices.

    None, and a problem, where that fails or where true/false is given for a number.
    """
    key, value = item.key, item.value
    if isinstance(value, bool) and not key.admits(bool) and (key.admits(int) or key.admits(float)):
        problems.append(ConfigError("must be a number", where=key.name, value=value, remedy=f"change it ({item.place})"))
        return None
    if not isinstance(value, str):
        return item
    text = value.strip()
    if (key.admits(list) or key.admits(dict)) and text.startswith(("{", "[")):
        try:
            return replace(item, value=json.loads(text, parse_constant=refuse_constant))
        except ValueError as error:
            problems.append(ConfigError(f"is not valid JSON: {error} ({item.place})", where=key.name, value=shown(key.name, value)))
            return None
    if key.admits(list) and (not key.admits(str) or "," in text):
        words = [word.strip() for word in text.split(",") if word.strip()]
        members = [member for part in union_parts(key.annotation) if get_origin(part) is list for member in get_args(part)]
        return replace(item, value=[_chosen(members, word) for word in words])
    if key.admits(int) and not key.admits(str) and EXPONENT.fullmatch(text):
        return replace(item, value=float(text))  # pydantic takes 10000.0 for 10000 and refuses 0.5
    return replace(item, value=_chosen([key.annotation], value))


def _chosen(annotations: Iterable[Any], text: str) -> object:
    """The choice of a Literal that is written so; `text` itself where none is, or where text is among what is allowed."""
    parts = [part for annotation in annotations for part in union_parts(annotation)]
    choices = [choice for part in parts if get_origin(part) is Literal for choice in get_args(part)]
    if str in parts or text in choices:
        return text
    return next((choice for choice in choices if isinstance(choice, int) and str(choice).lower() == text.strip().lower()), text)


def _accepts_unsupported(item: Given, problems: list[ConfigError], notices: list[str]) -> bool:
    """Whether a key that has no effect keeps the given value; says so where that value asks for something."""
    key = item.key
    try:
        value, valid = getattr(key.owner.model_validate({key.name: item.value}), key.name), True
    except ValidationError:
        value, valid = item.value, False
    if value == key.default:
        return True
    if key.changes_results:
        problems.append(
            ConfigError(
                f"is not supported: {key.unsupported}", where=key.name, value=shown(key.name, item.value),
                remedy=f"remove it ({item.place})",
            )
        )
    else:
        notices.append(f"{key.name}: {shown(key.name, item.value)!r} has no effect: {key.unsupported} ({item.place})")
    return valid


def _choose(pair: tuple[str, str], given: dict[str, Given], notices: list[str]) -> None:
    """Of two keys that take each other's place the one from the nearer source stays; two from one source are for whoever reads them."""
    if not all(name in given and str(given[name].value) != "0" for name in pair):
        return
    farther, nearer = sorted((given[name] for name in pair), key=lambda item: ORIGINS.index(item.origin))
    if farther.origin != nearer.origin:
        del given[farther.key.name]
        notices.append(f"{farther.key.name}: left aside ({farther.place}), because {nearer.key.name} is given ({nearer.place})")


def _build_models(vocabulary: Vocabulary, given: Mapping[str, Given], problems: list[ConfigError]) -> dict[type[Options], Options]:
    models: dict[type[Options], Options] = {}
    for options in vocabulary.option_types:
        mine = {name: item for name, item in given.items() if item.key.owner is options}
        try:
            models[options] = options.model_validate({name: item.value for name, item in mine.items()})
        except ValidationError as error:
            problems.extend(problems_of(error, options, {name: (item.value, item.place) for name, item in mine.items()}))
    return models


def _idle(models: Mapping[type[Options], Options], given: Mapping[str, Given]) -> list[str]:
    """A notice for each group that is off although keys of it ask for something; the first key of a group is its switch."""
    notices = []
    for options, model in models.items():
        switch = next(iter(options.model_fields), "")
        idle = [name for name, item in given.items() if item.key.owner is options and getattr(model, name) != item.key.default]
        if idle and not model.enabled():
            notices.append(f"{', '.join(idle)}: no effect, since {options.title or options.__name__} is off ({switch})")
    return notices
