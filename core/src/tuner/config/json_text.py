"""JSON that people write by hand: keys given twice are kept, and where it breaks off, what usually breaks it there is said."""

from __future__ import annotations

import json

from tuner.errors import ConfigError

LITERALS = {"True": "true", "False": "false", "None": "null"}
"""Python's words, and JSON's."""


class Pairs(list[tuple[str, object]]):
    """A JSON object before repeated keys are lost."""


def parse(content: bytes, where: str) -> object:
    """The value, with objects as `Pairs`. `where` names the file. Raises `ConfigError`."""
    try:
        return json.loads(content.decode("utf-8-sig"), object_pairs_hook=Pairs, parse_constant=refuse_constant)
    except UnicodeDecodeError as error:
        raise ConfigError("is not written in UTF-8", where=where, remedy="save it as UTF-8") from error
    except json.JSONDecodeError as error:
        raise ConfigError(
            f"line {error.lineno}, column {error.colno}: is not valid JSON: {error.msg}", where=where, remedy=_remedy(error)
        ) from error
    except RecursionError as error:
        raise ConfigError("is nested too deeply", where=where, remedy="mend the JSON") from error
    except ValueError as error:
        raise ConfigError(f"is not valid JSON: {error}", where=where) from error


def plain(value: object, where: str) -> object:
    """With objects as dicts. Raises `ConfigError` for a key given twice; `where` leads to the value."""
    if isinstance(value, Pairs):
        names = [name for name, _ in value]
        repeated = sorted({name for name in names if names.count(name) > 1})
        if repeated:
            raise ConfigError(f"holds {', '.join(repeated)} twice", where=where, remedy="keep one of them")
        return {name: plain(inner, f"{where}.{name}") for name, inner in value}
    if isinstance(value, list):
        return [plain(inner, where) for inner in value]
    return value


def refuse_constant(name: str) -> object:
    """For `json.loads`: NaN and Infinity are no JSON."""
    raise ValueError(f"{name} is not a number that a setting can have")


def _remedy(error: json.JSONDecodeError) -> str:
    before, rest = error.doc[: error.pos].rstrip(), error.doc[error.pos :].lstrip()
    if not error.doc.strip():
        return "the file is empty: write the settings into it"
    if rest.startswith(("//", "/*", "#")):
        return "take out the comment: JSON has none"
    # Python 3.13 points at the comma, older ones at what follows it
    closes = rest.removeprefix(",").lstrip()[:1] in ("}", "]")
    if closes and (before.endswith(",") or rest.startswith(",")):
        return "take out the comma before it"
    if rest.startswith("'"):
        return "write \" for '"
    if rest[:1] == '"' and "',' delimiter" in error.msg:
        return "write a comma before it"
    if "escape" in error.msg:
        return "write / or \\\\ for each \\ of a path"
    return next((f"write {ours}" for theirs, ours in LITERALS.items() if rest.startswith(theirs)), "mend the JSON")
