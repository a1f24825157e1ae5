"""`tuner plugins new`: writes a plugin that installs, is listed and passes its own tests, as a place to start from.

The files come from `tuner/templates`: those of `common`, then those of the kind; `NAME` in a path and `{{...}}` in a text are replaced.
"""

from __future__ import annotations

import ast
import importlib.util
import keyword
import re
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, distribution
from importlib.resources import files
from importlib.resources.abc import Traversable
from pathlib import Path

import click

import tuner
from tuner.config.vocabulary import keys_of
from tuner.errors import ConfigError, DiskError
from tuner.plugins.claims import unusable
from tuner.plugins.loader import ON_REQUEST, load_plugins
from tuner.plugins.record import CORE, Kind
from tuner.plugins.registry import Registry

NAME = re.compile(r"[a-z][a-z0-9]*(?:[-_][a-z0-9]+)*")
LONGEST = 40
"""Letters of a NAME."""
SUFFIX = ".txt"
"""Of every template: none is a program before it is filled in."""


@dataclass(frozen=True, slots=True)
class Starter:
    """A kind of plugin that can be written."""

    kind: Kind
    module: str
    """The file with the arithmetic."""
    summary: str
    what: str
    """What the example does, for its README and `tuner plugins`."""
    keys: tuple[tuple[str, str, str], ...]
    """What stands behind the name in each key, the default, and what it is for."""
    flags: str
    """What to add to `tuner train` to see it work."""


STARTERS: Mapping[str, Starter] = {
    "regularizer": Starter(
        "regularizer", "regularizer", "A regularizer", "keeps what neighbouring frames look like inside the model alike",
        (("_weight", "0", "weight of the loss; 0 switches it off"), ("_block", "1", "after which block the tokens are looked at")),
        "--{{name}}_weight 0.1",
    ),
    "loss": Starter(
        "loss_term", "loss", "A loss term", "the pseudo-Huber distance of the predicted velocity",
        (("_weight", "0", "weight of the loss; 0 switches it off"), ("_scale", "0.1", "errors above it count by their size")),
        "--{{name}}_weight 0.5",
    ),
    "encoder": Starter(
        "latent_encoder", "encoder", "A latent encoder", "caches how much each frame of a clip moves",
        (("", "false", "caches the record"), ("_cell", "8", "side of the squares that are compared, in pixels")),
        "--{{name}} true",
    ),
    "memory": Starter(
        "memory_strategy", "memory", "A memory strategy", "blocks wait in host memory and come when they run",
        (("", "false", "switches it on"),), "--{{name}} true",
    ),
    "family": Starter(
        "family", "family", "A model family", "a small diffusion transformer for video",
        (("_blocks", "4", "blocks of the model that is made where no checkpoint is named"),),
        "--family {{name}} --resolution 64 --max_train_steps 20",
    ),
}  # fmt: skip
"""KIND on the command line -> what is written."""


@click.command("new")
@click.argument("kind", type=click.Choice(list(STARTERS)))
@click.argument("name")
@click.option("--into", metavar="DIR", default=".", show_default=True, type=click.Path(path_type=Path), help="Where the folder is made.")
def command(kind: str, name: str, into: Path) -> None:
    """Write a plugin of KIND called NAME, to start from."""
    target = write_plugin(kind, name, into, load_plugins())
    count = sum(path.is_file() for path in target.rglob("*"))
    click.echo(f"wrote {count} files into {target}\n")
    click.echo(f"  pip install -e {target}\n  tuner plugins show {identifier(name)}\n  python -m pytest {target}")


def write_plugin(kind: str, name: str, into: Path, registry: Registry) -> Path:
    """Writes `into`/tuner-NAME and returns it. Raises `ConfigError` for a name that is no name or is taken, and where the folder exists."""
    check_name(kind, name, registry)
    target = into / f"tuner-{name.replace('_', '-')}"
    if target.exists():
        problem = "exists already, and nothing is overwritten"
        raise ConfigError(problem, where="--into", value=str(target), remedy="choose another NAME or DIR")
    blocked = next((path for path in (into, *into.parents) if path.exists() and not path.is_dir()), None)
    if blocked is not None:
        raise ConfigError("is a file, no folder", where="--into", value=str(blocked), remedy="name a folder")
    words = replacements(STARTERS[kind], name)
    try:
        for path, text in filled(kind, words):
            place = target / path
            place.parent.mkdir(parents=True, exist_ok=True)
            place.write_text(text, encoding="utf-8")
    except OSError as error:
        shutil.rmtree(target, ignore_errors=True)
        raise DiskError(f"cannot be written: {error.strerror}", where=str(target), remedy="choose another DIR") from error
    return target


def identifier(name: str) -> str:
    """NAME as components, keys and modules spell it."""
    return name.replace("-", "_")


def check_name(kind: str, name: str, registry: Registry) -> None:
    """Raises `ConfigError` for what cannot be the name of a package or of keys, and for what something installed is called already."""
    if not NAME.fullmatch(name):
        near = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-0123456789")
        remedy = f"such as {near}" if NAME.fullmatch(near) else "such as warm-tones"
        raise ConfigError("must be words of small letters and digits, joined by dashes", where="NAME", value=name, remedy=remedy)
    if len(name) > LONGEST:
        raise ConfigError(f"is longer than {LONGEST} letters", where="NAME", value=name, remedy="users type it in keys: choose a short one")
    if name.startswith(("tuner-", "tuner_")):
        raise ConfigError("is called tuner-... in any case", where="NAME", value=name, remedy=f"use {name[6:]}")
    if keyword.iskeyword(name):
        raise ConfigError("is a word of Python itself", where="NAME", value=name, remedy="choose another")
    for key in keys_named(STARTERS[kind], identifier(name)):
        if reason := unusable(key):
            raise ConfigError(f"cannot be: its key {key} {reason}", where="NAME", value=name, remedy="choose another")
    if taken := taken_by(STARTERS[kind], identifier(name), registry):
        raise ConfigError(f"is taken: {taken}", where="NAME", value=name, remedy="choose another")
    if hidden := hidden_by(kind, identifier(name)):
        raise ConfigError(f"would hide {hidden}, which the files of the plugin use", where="NAME", value=name, remedy="choose another")


def keys_named(starter: Starter, name: str) -> set[str]:
    """The keys that the plugin declares."""
    return {f"{name}{ending}" for ending, _, _ in starter.keys}


def taken_by(starter: Starter, name: str, registry: Registry) -> str:
    """What is called so already; empty: nothing."""
    if name in (CORE, *ON_REQUEST):
        return f"a part of tuner itself is called {name}"
    for record in registry.plugins:
        if record.name == name:
            return f"a plugin is called {name}"
        if name in [component.name for component in record.components.get(starter.kind, ())]:
            return f"{record.name} offers a {starter.kind.replace('_', ' ')} {name}"
    wanted = keys_named(starter, name)
    for options in registry.option_types:
        for key in keys_of(options):
            if clash := wanted & {key.name, *key.aliases}:
                return f"{clash.pop()} is a key of {registry.owner_of(options)}"
    if importlib.util.find_spec(f"tuner_{name}"):
        return f"a module tuner_{name} is installed"
    project = f"tuner-{name.replace('_', '-')}"
    try:
        return f"a distribution {distribution(project).name} is installed"
    except PackageNotFoundError:
        return ""


def hidden_by(kind: str, name: str) -> str:
    """What a file of the plugin uses and would define anew, as a class or key of this name; empty: nothing."""
    keys = keys_named(STARTERS[kind], name)
    for path, text in filled(kind, replacements(STARTERS[kind], name)):
        nodes = list(ast.walk(ast.parse(text))) if path.suffix == ".py" else []
        imported = {alias.name for node in nodes if isinstance(node, ast.ImportFrom) for alias in node.names}
        classes = {node.name for node in nodes if isinstance(node, ast.ClassDef)}
        fields = {node.target.id for node in nodes if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name)}
        used = {node.id for node in nodes if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load)}
        if hidden := (imported & classes) | (used & fields & keys):
            return min(hidden)
    return ""


def replacements(starter: Starter, name: str) -> Mapping[str, str]:
    """What stands in the place of each `{{word}}`."""
    own = identifier(name)
    rows = [f"| `{own}{ending}` | {default} | {text} |" for ending, default, text in starter.keys]
    return {
        "name": own, "dashed": name.replace("_", "-"), "Class": "".join(word.title() for word in own.split("_")),
        "summary": starter.summary, "what": starter.what, "module": starter.module, "keys": "\n".join(rows),
        "flags": starter.flags.replace("{{name}}", own), "hooks": str(tuner.HOOKSPEC_VERSION),
    }  # fmt: skip


def filled(kind: str, words: Mapping[str, str]) -> Iterator[tuple[Path, str]]:
    """Path inside the plugin's folder, and content, of every file."""
    package = Path("src") / f"tuner_{words['name']}"
    templates = files("tuner") / "templates"
    for folder in ("common", kind):
        for path, source in _below(templates / folder, Path()):
            place = Path(str(path.with_suffix("")).replace("NAME", words["name"]))
            yield package / "__init__.py" if place.name == "init.py" else place, fill(source.read_text(encoding="utf-8"), words)
    yield package / "py.typed", ""


def _below(folder: Traversable, place: Path) -> Iterator[tuple[Path, Traversable]]:
    for child in sorted(folder.iterdir(), key=lambda child: child.name):
        if child.is_dir():
            yield from _below(child, place / child.name)
        elif child.name.endswith(SUFFIX):
            yield place / child.name, child


def fill(text: str, words: Mapping[str, str]) -> str:
    """Plain replacement. Raises KeyError for a word that nobody fills in."""
    return re.sub(r"\{\{(\w+)\}\}", lambda match: words[match[1]], text)
