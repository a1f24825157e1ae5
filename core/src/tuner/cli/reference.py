"""`python -m tuner.cli.reference [--check]` writes docs/reference from the declarations themselves, or says what is stale.

The pages describe the distributions of the repository they stand in, whatever else is installed.
"""

from __future__ import annotations

import ast
import copy
import difflib
import inspect
import os
import re
import sys
import tomllib
from collections.abc import Iterable, Sequence
from pathlib import Path

import click

from tuner import hookspecs
from tuner.cli.main import COMMANDS, build
from tuner.config.flags import KeyFlag, default_text
from tuner.config.vocabulary import Key, keys_of
from tuner.errors import EnvironmentProblem
from tuner.plugins.loader import ONLY, load_plugins
from tuner.plugins.record import BUILTINS
from tuner.plugins.registry import Registry

WIDTH = 100
STALE = 1
GENERATED = "<!-- Written by `python -m tuner.cli.reference`; change the declarations instead. -->"


def find_root(start: Path) -> Path:
    """The nearest folder at or above `start` that holds docs/reference. Raises `EnvironmentProblem` when there is none."""
    for folder in (start, *start.parents):
        if (folder / "docs" / "reference").is_dir():
            return folder
    raise EnvironmentProblem("no folder above holds docs/reference", where=str(start), remedy="run it inside the repository")


def repository_plugins(root: Path) -> list[str]:
    """The names under which the distributions of the repository declare their plugins."""
    projects = [tomllib.loads(path.read_text(encoding="utf-8")) for path in sorted(root.glob("plugins/*/pyproject.toml"))]
    return sorted(name for project in projects for name in project["project"].get("entry-points", {}).get("tuner", {}))


def pages(root: Path) -> dict[str, str]:
    """File name -> text of every generated page. Raises `EnvironmentProblem` when a plugin of the repository does not load."""
    registry = load_plugins({ONLY: ",".join([BUILTINS, *repository_plugins(root)])})
    if broken := [record for record in registry.plugins if record.status == "failed"]:
        raise EnvironmentProblem("; ".join(f"plugin {r.name} is not loaded: {r.reason}" for r in broken), remedy="install the workspace")
    return {
        "options.md": options_page(registry),
        "commands.md": commands_page(),
        "hookspecs.md": hookspecs_page(),
        "components.md": components_page(registry),
    }


def options_page(registry: Registry) -> str:
    """All keys by group, then those that are recognised without effect."""
    parts = [
        "# Options", GENERATED,
        "Every key is a key of `config.json`, a flag (`--key VALUE`) and an environment variable (`TUNER_KEY`). "
        "Flags win over the environment, the environment over the file, the file over defaults.",
    ]
    groups = [(options, keys_of(options), registry.owner_of(options)) for options in registry.option_types]
    for options, keys, owner in groups:
        working = [key for key in keys if not key.unsupported]
        if working:
            parts.append(f"## {options.title or options.__name__}\n\n{inspect.getdoc(options)} Declared by `{owner}`.")
            parts.append(_markdown(("Key", "Type", "Default", "Unit", "Meaning"), [_row(key) for key in working]))
    idle = [(key, owner) for _, keys, owner in groups for key in keys if key.unsupported]
    if idle:
        parts.append(
            "## Recognised, without effect\n\nConfigurations may contain these keys. A value that asks for something is an error "
            "where it would change the result, otherwise a notice."
        )
        rows = [(f"`{key.name}`", owner, "error" if key.changes_results else "notice", key.help, key.unsupported) for key, owner in idle]
        parts.append(_markdown(("Key", "Declared by", "When set", "Meaning", "Reason"), rows))
    return _joined(parts)


def _row(key: Key) -> tuple[str, ...]:
    default = default_text(key)
    also = f" Also: {', '.join(f'`{alias}`' for alias in key.aliases)}." if key.aliases else ""
    return f"`{key.name}`", key.type_name, f"`{default}`" if default else "", key.unit, key.help + also


def components_page(registry: Registry) -> str:
    """What users can name, by kind."""
    parts = ["# Components", GENERATED, "What plugins offer, by kind. `tuner plugins` shows the same for what is installed on a machine."]
    offered: dict[str, list[tuple[str, ...]]] = {}
    for record in registry.plugins:
        for kind, group in record.components.items():
            offered.setdefault(kind, []).extend(
                (f"`{c.name}`", c.summary, f"`{record.name}`", c.options.title, c.source) for c in group
            )
    for heading, rows in offered.items():
        parts.append(f"## {heading.replace('_', ' ').capitalize()}")
        parts.append(_markdown(("Name", "Summary", "Plugin", "Options", "Source"), rows))
    return _joined(parts)


def hookspecs_page() -> str:
    """Every hook with its exact signature, in the order of a run."""
    parts = ["# Hooks", GENERATED, inspect.getdoc(hookspecs) or ""]
    for function in hook_functions():
        parts.append(f"## {function.name}\n\n```python\n{signature(function)}\n```\n\n{ast.get_docstring(function)}")
    return _joined(parts)


def hook_functions() -> list[ast.FunctionDef]:
    """The specifications as they are written in `tuner.hookspecs`."""
    tree = ast.parse(inspect.getsource(hookspecs))
    return [node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name.startswith("tuner_")]


def signature(function: ast.FunctionDef) -> str:
    """`def name(argument: Type) -> Result`."""
    result = f" -> {ast.unparse(function.returns)}" if function.returns else ""
    return f"def {function.name}({ast.unparse(function.args)}){result}"


def commands_page() -> str:
    """The help of every command of the core."""
    group = build()
    parts = ["# Commands", GENERATED, "Exit codes: 0 done, 1 a bug, 2 usage or configuration, 3 environment, 4 data, 5 out of memory, "
             "6 checkpoint, 7 numeric, 8 network or hub, 9 disk, 10 plugin, 129, 130 and 143 stopped by a signal."]
    with click.Context(group, info_name="tuner", terminal_width=WIDTH, **group.context_settings) as context:
        parts.append(_help("tuner", group, context))
        for name in COMMANDS:
            command = group.get_command(context, name)
            assert command is not None
            parts.extend(_command_parts(name, command, context))
    return _joined(parts)


def _command_parts(name: str, command: click.Command, parent: click.Context) -> Iterable[str]:
    keys = [parameter for parameter in command.params if isinstance(parameter, KeyFlag)]
    short = copy.copy(command)
    short.params = [parameter for parameter in command.params if not isinstance(parameter, KeyFlag)]
    with click.Context(short, info_name=name, parent=parent, terminal_width=WIDTH) as context:
        yield _help(context.command_path, short, context)
        if keys:
            yield "Besides, every key of [options.md](options.md) is a flag."
        if isinstance(command, click.Group):
            for inner in command.list_commands(context):
                found = command.get_command(context, inner)
                if found is not None:
                    yield from _command_parts(inner, found, context)


def _help(path: str, command: click.Command, context: click.Context) -> str:
    text = "\n".join(line.rstrip() for line in command.get_help(context).splitlines())
    return f"## {path}\n\n```text\n{text}\n```"


def _markdown(headers: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [headers, ["---"] * len(headers), *rows]
    return "\n".join("| " + " | ".join(re.sub(r"\s+", " ", cell.replace("|", r"\|")) for cell in line) + " |" for line in lines)


def _joined(parts: Iterable[str]) -> str:
    return "\n\n".join(parts) + "\n"


def differences(folder: Path, wanted: dict[str, str]) -> list[str]:
    """Lines that say how the pages on disk differ from what they should be; empty when all are current."""
    lines: list[str] = []
    for name, text in wanted.items():
        path = folder / name
        found = path.read_text(encoding="utf-8") if path.is_file() else ""
        titles = f"{name} (on disk)", f"{name} (declared)"
        lines.extend(difflib.unified_diff(found.splitlines(), text.splitlines(), *titles, lineterm="", n=0))
    return lines


@click.command()
@click.option("--check", is_flag=True, help="Write nothing; exit 1 with the differences when a page is stale.")
def command(check: bool) -> None:
    """Write docs/reference."""
    root = find_root(Path.cwd())
    folder = root / "docs" / "reference"
    wanted = pages(root)
    if not check:
        for name, text in wanted.items():
            (folder / name).write_text(text, encoding="utf-8")
        click.echo(f"wrote {', '.join(wanted)} in {os.path.relpath(folder)}")
        return
    lines = differences(folder, wanted)
    for line in lines[:60]:
        click.echo(line, err=True)
    if lines:
        click.echo(f"docs/reference is stale: {len(lines)} lines of differences; run `python -m tuner.cli.reference`", err=True)
        sys.exit(STALE)


if __name__ == "__main__":
    command()
