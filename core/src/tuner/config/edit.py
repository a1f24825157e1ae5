"""Changes JSON files of a user in place: the named keys, everything else and the order stay, and a file is always whole."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from tuner.config.masking import masked
from tuner.config.resolve import Settings, read_object
from tuner.config.vocabulary import Vocabulary
from tuner.errors import ConfigError
from tuner.text_files import replace_text


def apply_keys(path: Path, keys: Mapping[str, object], vocabulary: Vocabulary, settings: Settings) -> str:
    """Puts `keys` into the configuration file at once. Returns what changed, in words.

    A key that the file lacks is written only where its value is not the default. Raises `ConfigError` where a flag or variable would
    overrule the file, where the file gives a key twice, or is no configuration; `DiskError`.
    """
    content, said = changed(path, keys, vocabulary, settings)
    if said:
        write(path, content)
    return f"{path}: " + ("; ".join(said) if said else "holds this already")


def changed(path: Path, keys: Mapping[str, object], vocabulary: Vocabulary, settings: Settings) -> tuple[dict[str, object], list[str]]:
    """The content that `apply_keys` writes, and its changes in words; from nothing where there is no such file."""
    pairs = read_object(path) if path.exists() else []
    spelled: dict[str, list[str]] = {}
    for name, _ in pairs:
        if (known := vocabulary.find(name)) is not None:
            spelled.setdefault(known.name, []).append(name)
    _check_conflicts(path, keys, spelled, settings)
    content, said = dict(pairs), []
    for key, value in keys.items():
        name = spelled.get(key, [key])[0]
        if name not in content and vocabulary.keys[key].default == value:
            continue
        if name not in content or content[name] != value:
            before = f"{_told(key, content[name])} -> " if name in content else ""
            said.append(f"{key}: {before}{_told(key, value)}")
        content[name] = value
    return content, said


def _told(key: str, value: object) -> str:
    return json.dumps(masked(value, key), ensure_ascii=False)


def _check_conflicts(path: Path, keys: Mapping[str, object], spelled: Mapping[str, Sequence[str]], settings: Settings) -> None:
    for key, value in keys.items():
        if len(spelled.get(key, ())) > 1:
            raise ConfigError(f"is given more than once in {path}", where=key, value=list(spelled[key]), remedy="leave one of them")
        if (origin := settings.origin(key)) in ("flag", "environment") and settings.value(key) != value:
            raise ConfigError(
                f"is to become {_told(key, value)}, but a {origin.replace('environment', 'variable')} sets it and wins over {path}",
                where=key, value=masked(settings.value(key), key), remedy="leave it out, and do this again",
            )  # fmt: skip


def write(path: Path, content: object) -> None:
    """Writes JSON, or leaves the file as it was. Raises `DiskError`."""
    replace_text(path, json.dumps(content, indent=2, ensure_ascii=False) + "\n")
