"""JSON Schema (draft 2020-12) of config.json, for editors and other programs.

It describes the plain spelling: declared names and aliases, numbers as numbers. The tool itself also takes dashes and strings.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from pydantic.json_schema import models_json_schema

from tuner.config.options import Options
from tuner.config.vocabulary import Key, Vocabulary

DRAFT = "https://json-schema.org/draft/2020-12/schema"


def json_schema(option_types: Iterable[type[Options]]) -> dict[str, Any]:
    """The schema of a whole configuration file. Every key may also be null, which means its default."""
    vocabulary = Vocabulary(option_types)
    references, definitions = models_json_schema([(options, "validation") for options in vocabulary.option_types])
    shared: dict[str, Any] = definitions.get("$defs", {})
    properties: dict[str, Any] = {"$schema": {"type": "string"}}
    for options in vocabulary.option_types:
        model = shared[references[options, "validation"]["$ref"].rpartition("/")[2]]
        for key in (key for key in vocabulary.keys.values() if key.owner is options):
            properties[key.name] = _property(key, model["properties"][key.name])
            for alias in key.aliases:
                properties[alias] = {**properties[key.name], "description": f"The same as {key.name}."}
    top_level = {references[options, "validation"]["$ref"].rpartition("/")[2] for options in vocabulary.option_types}
    schema: dict[str, Any] = {"$schema": DRAFT, "title": "tuner configuration", "type": "object", "properties": properties}
    nested = {name: definition for name, definition in shared.items() if name not in top_level}
    return {**schema, "additionalProperties": False, **({"$defs": nested} if nested else {})}


def _property(key: Key, declared: dict[str, Any]) -> dict[str, Any]:
    """pydantic's schema of a field with null allowed, and only the facts that a reader of the schema can use."""
    dropped = {
        "title", "description", "default", "unit", "aliases", "metavar", "unsupported", "changes_results", "examples", "ask", "effect",
        "ask_if", "suggest",
    }  # fmt: skip
    rule = {name: value for name, value in declared.items() if name not in dropped}
    facts: dict[str, Any] = {"description": key.help, "default": declared.get("default")}
    if key.unit:
        facts["unit"] = key.unit
    if key.unsupported:
        return {**facts, "description": f"{key.help} No effect: {key.unsupported}.", "deprecated": True}
    branches = rule["anyOf"] if set(rule) == {"anyOf"} else [rule]
    return {**facts, "anyOf": [*(b for b in branches if b != {"type": "null"}), {"type": "null"}]}
