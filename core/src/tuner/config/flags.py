"""Every key as a command line flag, made from its declaration.

Values stay strings here: they take the same way as values from the file, so that both mean the same.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import click
from click.shell_completion import CompletionItem

from tuner.config.options import Options
from tuner.config.vocabulary import Key, Vocabulary


class KeyFlag(click.Option):
    """A flag that takes a value; one for true/false may stand alone and then means true. Completes the choices of its key."""

    def __init__(self, key: Key) -> None:
        spellings = dict.fromkeys(s for name in (key.name, *key.aliases) for s in (f"--{name}", "--" + name.replace("_", "-")))
        alone = {"is_flag": False, "flag_value": "true"} if key.admits(bool) else {}
        super().__init__(
            [*spellings, key.name], type=click.STRING, default=None, help=help_text(key), metavar=metavar(key),
            hidden=bool(key.unsupported), **alone,  # type: ignore[arg-type]
        )
        self.key = key

    def get_help_record(self, ctx: click.Context) -> tuple[str, str] | None:
        """One spelling for help; the others are accepted as well."""
        return None if self.hidden else (f"--{self.key.name} {self.metavar}", self.help or "")

    def shell_complete(self, ctx: click.Context, incomplete: str) -> list[CompletionItem]:
        """The key's choices that begin with what is typed."""
        choices = ("true", "false") if self.key.annotation is bool else self.key.choices()
        return [CompletionItem(choice) for choice in choices if choice.startswith(incomplete)]


def flags_for(option_types: Iterable[type[Options]]) -> list[click.Option]:
    """One flag per key, in order of declaration; those of unsupported keys are accepted but hidden from help."""
    return [KeyFlag(key) for key in Vocabulary(option_types).keys.values()]


def collect(kwargs: Mapping[str, object]) -> dict[str, object]:
    """Of a command's arguments those that were given on the command line."""
    return {name: value for name, value in kwargs.items() if value is not None}


def help_text(key: Key) -> str:
    """The help sentence with unit and default: `Steps of the sample. [steps; default: 40]`."""
    facts = [key.unit, f"default: {default_text(key)}" if key.default not in (None, "") else ""]
    inside = "; ".join(filter(None, facts))
    return f"{key.help}  [{inside}]" if inside else key.help


def default_text(key: Key) -> str:
    """The default as it would be typed."""
    if isinstance(key.default, bool):
        return str(key.default).lower()
    return "" if key.default is None else str(key.default)


def metavar(key: Key) -> str:
    """What help shows in place of the value."""
    if key.metavar:
        return key.metavar
    if key.choices():
        return f"[{'|'.join(key.choices())}]"
    if key.annotation is bool:
        return "[true|false]"
    return "NUMBER" if key.admits(int) or key.admits(float) else "JSON" if key.admits(dict) else "TEXT"
