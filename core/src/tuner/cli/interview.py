"""Asks the questions that keys declare, on a terminal or, without one, by taking flags and defaults."""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Mapping, Sequence

import click

from tuner.cli.table import folded, terminal_width
from tuner.config.options import Options
from tuner.config.questions import Choices, Question, questions_of, shown
from tuner.config.resolve import Settings
from tuner.errors import ConfigError, TunerError

REQUIRED = ("model_family", "data")
"""Keys without a default."""
WIDTH = 100
ROOM = 8
"""Characters for the answer, behind a question."""
HELP = "?"


class Interview:
    """The answers so far. `check(name, value)` raises `TunerError` for what a key's declaration cannot know, and may say more."""

    def __init__(
        self, settings: Settings, own: Settings, check: Callable[[str, object], str], choices: Callable[[str], Choices], terminal: bool
    ) -> None:
        self._sources = (settings, own)
        self._check = check
        self._choices = choices
        self.terminal = terminal
        self.answers: dict[str, object] = {}
        self.suggestions: dict[str, object] = {}
        """What is offered where neither a file nor a variable says anything."""
        self.missing: list[str] = []

    def value(self, name: str) -> object:
        """What was answered, else what was given or is the default. Raises KeyError for an unknown key."""
        return self.answers[name] if name in self.answers else self._source(name).value(name)

    def enabled(self, options: type[Options]) -> bool:
        """Whether the group is switched on by the answers so far."""
        source = self._source(next(iter(options.model_fields)))
        mine = {name: value for name, value in self.answers.items() if name in options.model_fields}
        return source.get(options).model_copy(update=mine).enabled()

    def group(self, options: type[Options], leave_out: Sequence[str] = ()) -> None:
        """The questions of an option model: the first always, the others while the group is enabled."""
        for number, question in enumerate(questions_of(options)):
            if number and not self.enabled(options):
                return
            if question.name not in leave_out:
                self.ask(question)

    def one(self, options: type[Options], name: str) -> None:
        """One question of an option model."""
        self.ask(next(question for question in questions_of(options) if question.name == name))

    def ask(self, question: Question) -> None:
        """Puts the answer among `answers`. Raises `TunerError` where there is nobody to ask again."""
        name = question.name
        if self._source(name).origin(name) == "flag":
            self._accept(name, self._source(name).value(name))
            return
        if not question.applies(self.value):
            return
        offered = self._offered(question)
        if self.terminal:
            self._converse(question, offered)
        elif name in REQUIRED and not offered:
            self.missing.append(name)
        else:
            self._accept(name, offered)

    def note(self, text: str) -> None:
        """Lines for people."""
        click.echo(folded(text))

    def _accept(self, name: str, value: object) -> None:
        remark = self._check(name, value)
        self.answers[name] = value
        if remark:
            self.note(f"  {remark}")

    def _offered(self, question: Question) -> object:
        source, name = self._source(question.name), question.name
        if source.origin(name) != "default":
            return source.value(name)
        if name in self.suggestions:
            return self.suggestions[name]
        return source.value(name) if question.suggest is None else question.suggest

    def _converse(self, question: Question, offered: object) -> None:
        choices = self._choices(question.name)
        if choices:
            self.note("\n".join(_numbered(choices)))
        default, values = shown(offered), ", ".join(question.key.choices())
        prompt = " ".join(filter(None, [question.text, values and f"({values})", default and f"[{default}]"])) + " "
        while True:
            text = input(folded(prompt.rstrip(), max(0, terminal_width() - ROOM)) + " ").strip()
            if text == HELP:
                self.note("\n".join(_indented(line) for line in question.explain(choices).splitlines()))
                continue
            if not text and question.name in REQUIRED and not offered:
                self.note("    an answer is needed; ? explains")
                continue
            try:
                self._accept(question.name, self._meant(question, text, choices) if text else offered)
                return
            except TunerError as error:
                self.note(f"    {error.message}" + ("" if error.value is None else f" (got {error.value!r})"))
                if error.remedy and not error.remedy.startswith("change it"):
                    self.note(f"    -> {error.remedy}")

    def _meant(self, question: Question, text: str, choices: Choices) -> object:
        """An answer as a value: numbers stand for the choices shown."""
        names = [name for name, _ in choices]
        if text.isdigit() and text not in names and 1 <= int(text) <= len(names):
            text = names[int(text) - 1]
        beside = {key: value for key, value in self.answers.items() if key in question.key.owner.model_fields and key != question.name}
        return question.parse(text, beside)

    def _source(self, name: str) -> Settings:
        for source in self._sources:
            try:
                source.value(name)
            except KeyError:
                continue
            return source
        raise KeyError(name)

    def choose(self, text: str, lines: Sequence[str]) -> int:
        """The index of one of `lines`; the first where there is nobody to ask."""
        if not self.terminal:
            return 0
        self.note("\n".join(f"  {number:>2}  {line}" for number, line in enumerate(lines, 1)))
        while True:
            answer = input(f"{text} [1] ").strip() or "1"
            if answer.isdigit() and 1 <= int(answer) <= len(lines):
                return int(answer) - 1
            self.note(f"    a number from 1 to {len(lines)}")

    def require(self) -> None:
        """Raises `ConfigError` that names what is missing, each with its flag."""
        if self.missing:
            names, flags = ", ".join(self.missing), ", ".join(f"--{name}" for name in self.missing)
            raise ConfigError(f"nobody is asked, and these have no default: {names}", remedy=f"give {flags}")


def _numbered(choices: Choices) -> list[str]:
    width = max(len(name) for name, _ in choices)
    return [f"  {number:>2}  {name:<{width}}  {line}".rstrip() for number, (name, line) in enumerate(choices, 1)]


def _indented(line: str) -> str:
    return textwrap.fill(line, min(WIDTH, terminal_width() or WIDTH), initial_indent="    ", subsequent_indent="    ")


def as_json(options: type[Options], name: str, value: object) -> object:
    """A value as it stands in a configuration: whole floats without a point."""
    dumped: Mapping[str, object] = options.model_validate({name: value}).model_dump(mode="json")
    found = dumped[name]
    return int(found) if isinstance(found, float) and found.is_integer() else found
