"""pydantic's findings in the words of a user: `train_batch_size: must be at least 1 (got 0)`."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from pydantic import ValidationError

from tuner.config.masking import shown
from tuner.config.options import Options
from tuner.errors import ConfigError, TunerError

Facts = Mapping[str, Any]

TEXTS: dict[str, Callable[[Facts], str]] = {
    "greater_than_equal": lambda facts: f"must be at least {_number(facts['ge'])}",
    "greater_than": lambda facts: f"must be more than {_number(facts['gt'])}",
    "less_than_equal": lambda facts: f"must be at most {_number(facts['le'])}",
    "less_than": lambda facts: f"must be less than {_number(facts['lt'])}",
    "literal_error": lambda facts: f"must be {facts['expected']}",
    "extra_forbidden": lambda facts: "is not a known key",
    "missing": lambda facts: "is missing",
    "finite_number": lambda facts: "must be a finite number",
    "value_error": lambda facts: str(facts["error"]),
}
KINDS = {"bool": "must be true or false", "int": "must be a whole number", "float": "must be a number", "string": "must be text",
         "list": "must be a list", "dict": "must be an object", "model": "must be an object"}
ELEMENT = re.compile(r"[a-z_][a-z0-9_]*")
BRANCHES = frozenset({"bool", "int", "float", "str", "list", "dict"})


def problems_of(error: ValidationError, options: type[Options], given: Mapping[str, tuple[object, str]]) -> list[ConfigError]:
    """One problem per key of `options`. `given`: key -> the value as its source gave it, and the place where it stands."""
    found: dict[str, list[Any]] = {}
    for item in error.errors(include_url=False):
        found.setdefault(_where(item["loc"]) or options.title or options.__name__, []).append(item)
    return [_problem(where, items, given) for where, items in found.items()]


def combined(problems: Sequence[ConfigError]) -> ConfigError:
    """The only problem itself, or one error that lists all."""
    if len(problems) == 1:
        return problems[0]
    return ConfigError(f"{len(problems)} problems in the configuration:\n{listed(problems)}")


def listed(problems: Sequence[TunerError]) -> str:
    """A dash before each, its further lines below it."""
    return "\n".join("- " + str(problem).replace("\n", "\n  ") for problem in problems)


def _problem(where: str, items: Sequence[Any], given: Mapping[str, tuple[object, str]]) -> ConfigError:
    texts = list(dict.fromkeys(_text(item) for item in items))
    message = " or ".join([texts[0], *(text.removeprefix("must be ") for text in texts[1:])])
    key, _, inside = where.partition(".")
    value, place = given.get(key, (None, ""))
    if inside:
        value = items[0]["input"]
    return ConfigError(message, where=where, value=shown(where, value), remedy=f"change it ({place})" if place else "")


def _text(item: Any) -> str:
    kind: str = item["type"]
    if kind in TEXTS:
        return TEXTS[kind](item.get("ctx", {}))
    return KINDS.get(kind.partition("_")[0]) or str(item["msg"])


def _where(location: Sequence[int | str]) -> str:
    """`routes[0].ratio`, without pydantic's names for the branches of a union."""
    words = ""
    for part in location:
        if isinstance(part, int):
            words += f"[{part}]"
        elif ELEMENT.fullmatch(part) and part not in BRANCHES:
            words += f".{part}" if words else part
    return words


def _number(value: float) -> str:
    return f"{value:g}" if abs(value) < 1e6 else str(value)
