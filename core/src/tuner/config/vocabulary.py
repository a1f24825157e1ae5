"""All keys that a set of option models declares, and how users may spell them.

`--lora-rank`, `lora-rank` and `lora_rank` are one key; an alias stands for the key that declares it.
"""

from __future__ import annotations

import difflib
import types
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Union, get_args, get_origin

from tuner.config.options import Options, field_facts

RESERVED = frozenset({"config", "debug", "disable_plugins", "dry_run", "help", "json", "plugins", "version"})
"""Names that the command line or the environment uses itself; no plugin may declare them as keys."""

TYPE_NAMES: dict[Any, str] = {bool: "true/false", int: "integer", float: "number", str: "text", list: "list", dict: "object"}


@dataclass(frozen=True, slots=True)
class Key:
    """One key with everything its declaration says."""

    name: str
    owner: type[Options]
    annotation: Any
    default: Any
    help: str
    unit: str
    aliases: tuple[str, ...]
    metavar: str
    unsupported: str
    """Why the key has no effect; empty for keys that work."""
    changes_results: bool

    @property
    def type_name(self) -> str:
        """The type in words: `integer`, `text or list of text`, `"no" or "bf16"`."""
        return type_name(self.annotation)

    def admits(self, kind: type) -> bool:
        """Whether values of `kind` (list, dict, str, ...) are among those the annotation allows."""
        return any((get_origin(part) or part) is kind for part in union_parts(self.annotation))

    def choices(self) -> tuple[str, ...]:
        """The values of a Literal annotation; empty for any other."""
        return tuple(str(value) for value in get_args(self.annotation)) if get_origin(self.annotation) is Literal else ()


def union_parts(annotation: Any) -> tuple[Any, ...]:
    """The members of a union without None; a plain annotation alone."""
    if get_origin(annotation) in (Union, types.UnionType):
        return tuple(part for part in get_args(annotation) if part is not type(None))
    return (annotation,)


def type_name(annotation: Any) -> str:
    """An annotation in the words of the reference page."""
    parts = union_parts(annotation)
    if len(parts) > 1:
        return " or ".join(type_name(part) for part in parts)
    part = parts[0]
    if get_origin(part) is Literal:
        return " or ".join(f'"{value}"' for value in get_args(part))
    if get_origin(part) is list:
        return f"list of {type_name(get_args(part)[0])}"
    return TYPE_NAMES.get(get_origin(part) or part, "object")


def canonical(spelled: str) -> str:
    """A key as users spell it -> as it is declared: no leading dashes, underscores inside."""
    return spelled.strip().lstrip("-").replace("-", "_")


def keys_of(options: type[Options]) -> tuple[Key, ...]:
    """The keys that one option model declares, in order."""
    return tuple(_key(options, name) for name in options.model_fields)


def _key(options: type[Options], name: str) -> Key:
    field, facts = options.model_fields[name], field_facts(options, name)
    return Key(
        name=name,
        owner=options,
        annotation=field.annotation,
        default=field.get_default(call_default_factory=True),
        help=field.description or "",
        unit=facts.get("unit", ""),
        aliases=tuple(facts.get("aliases", ())),
        metavar=facts.get("metavar", ""),
        unsupported=facts.get("unsupported", ""),
        changes_results=bool(facts.get("changes_results", False)),
    )


class Vocabulary:
    """Every key of `option_types`, found by name or alias. Raises ValueError when two models claim one."""

    def __init__(self, option_types: Iterable[type[Options]]) -> None:
        self.option_types: tuple[type[Options], ...] = tuple(dict.fromkeys(option_types))
        self.keys: dict[str, Key] = {}
        self._spellings: dict[str, Key] = {}
        for key in (key for options in self.option_types for key in keys_of(options)):
            self.keys[key.name] = key
            for spelling in (key.name, *key.aliases):
                if spelling in self._spellings:
                    raise ValueError(f"{spelling} is declared by {self._spellings[spelling].owner.__name__} and {key.owner.__name__}")
                self._spellings[spelling] = key

    def find(self, spelled: str) -> Key | None:
        """The key that `spelled` stands for; None when there is none."""
        return self._spellings.get(canonical(spelled))

    def nearest(self, spelled: str) -> list[str]:
        """Up to three names that look like `spelled`, best first."""
        return nearest(canonical(spelled), list(self._spellings))


def nearest(wanted: str, known: Sequence[str]) -> list[str]:
    """Up to three of `known` that look like `wanted`, best first."""
    return difflib.get_close_matches(wanted, known, n=3, cutoff=0.6)


def did_you_mean(names: Sequence[str]) -> str:
    """`did you mean a, b or c?`; empty when there is nothing to offer."""
    if not names:
        return ""
    return f"did you mean {' or '.join(filter(None, [', '.join(names[:-1]), names[-1]]))}?"
