"""`tuner options`: every key with type, default and owner, or all about one."""

from __future__ import annotations

import json

import click

from tuner.cli.table import columns
from tuner.config.flags import default_text
from tuner.config.schema import json_schema
from tuner.config.vocabulary import Key, Vocabulary, did_you_mean
from tuner.errors import ConfigError
from tuner.plugins.loader import load_plugins
from tuner.plugins.registry import Registry


@click.command("options")
@click.argument("name", required=False)
@click.option("--json", "as_json", is_flag=True, help="The JSON Schema of config.json, or of the key NAME, on stdout.")
def command(name: str | None, as_json: bool) -> None:
    """List the keys of config.json, which are also flags; NAME: all about one key, or all keys of a plugin or group."""
    registry = load_plugins()
    vocabulary = Vocabulary(registry.option_types)
    key = vocabulary.find(name) if name else None
    if as_json:
        click.echo(json.dumps(_schema(registry, vocabulary, name, key), indent=2))
    elif key is not None:
        click.echo(_details(registry, key))
    else:
        click.echo(_table(registry, _selected(registry, vocabulary, name)))


def _schema(registry: Registry, vocabulary: Vocabulary, name: str | None, key: Key | None) -> object:
    schema = json_schema(registry.option_types)
    if key is not None:
        return schema["properties"][key.name]
    if not name:
        return schema
    owners = dict.fromkeys(found.owner for found in _selected(registry, vocabulary, name))
    return json_schema(owners)


def _selected(registry: Registry, vocabulary: Vocabulary, name: str | None) -> list[Key]:
    """All keys, or those of a plugin or group. Raises `ConfigError` with near names."""
    keys = list(vocabulary.keys.values())
    if not name:
        return keys
    found = [key for key in keys if name.lower() in (registry.owner_of(key.owner).lower(), key.owner.title.lower())]
    if not found:
        advice = " ".join(filter(None, [did_you_mean(vocabulary.nearest(name)), registry.hint()]))
        raise ConfigError("no key, plugin or group has this name", value=name, remedy=advice or "`tuner options` lists all keys")
    return found


def _table(registry: Registry, keys: list[Key]) -> str:
    rows = [
        (key.name, key.type_name, default_text(key), registry.owner_of(key.owner), _sentence(key)) for key in keys
    ]
    return columns(("KEY", "TYPE", "DEFAULT", "FROM", "HELP"), rows)


def _sentence(key: Key) -> str:
    return f"(no effect: {key.unsupported}) {key.help}" if key.unsupported else key.help + (f" [{key.unit}]" if key.unit else "")


def _details(registry: Registry, key: Key) -> str:
    facts = {
        "type": key.type_name,
        "default": default_text(key) or "(empty)",
        "unit": key.unit,
        "aliases": ", ".join(key.aliases),
        "flag": f"--{key.name}",
        "environment": f"TUNER_{key.name.upper()}",
        "group": key.owner.title,
        "from": registry.owner_of(key.owner),
        "no effect": key.unsupported,
    }
    return "\n".join([f"{key.name}: {key.help}", *(f"  {name:<12} {value}" for name, value in facts.items() if value)])
