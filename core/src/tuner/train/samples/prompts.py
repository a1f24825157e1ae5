"""Prompts that samples are made from: the one of the configuration, those of a library file, the empty one. Imports no torch."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path

from tuner.config.json_text import parse, plain
from tuner.config.validation_settings import USER_LIBRARY, ValidationSettings
from tuner.errors import ConfigError

LIBRARY_KEY = "validation_prompt_library"
OWN = "sample"
"""The label of `validation_prompt`."""
EMPTY = "unconditional"
"""The label of the empty prompt."""
LONGEST = 80
"""Characters of a label, which is the name of a file."""


def prompts(settings: ValidationSettings) -> dict[str, str]:
    """Label -> prompt, in the order in which samples are made. Raises `ConfigError` for a library that cannot be used."""
    found = {OWN: settings.validation_prompt} if settings.validation_prompt else {}
    library = library_path(settings)
    if library is not None:
        for name, prompt in read_library(library).items():
            found[unused(label(name), found)] = prompt
    if not settings.validation_disable_unconditional:
        found[unused(EMPTY, found)] = ""
    return found


def library_path(settings: ValidationSettings) -> Path | None:
    """The file of further prompts; None: there is to be none."""
    wanted = settings.validation_prompt_library
    if isinstance(wanted, str) and wanted.strip().lower() in ("true", "false", "1", "0", "yes", "no"):
        wanted = wanted.strip().lower() in ("true", "1", "yes")
    if isinstance(wanted, str) and wanted:
        return Path(wanted).expanduser()
    if wanted or settings.user_prompt_library:
        return Path(settings.user_prompt_library or USER_LIBRARY).expanduser()
    return None


def read_library(path: Path) -> dict[str, str]:
    """Name -> prompt, from an object of that form or a list of prompts, which are numbered. Raises `ConfigError`."""
    content = read_json(path, LIBRARY_KEY, "write {name: prompt, ...} into it, or name another file")
    if isinstance(content, list):
        content = {f"prompt-{number}": prompt for number, prompt in enumerate(content, 1)}
    if not isinstance(content, Mapping):
        raise ConfigError(f"{path} must hold an object or a list", where=LIBRARY_KEY, value=type(content).__name__)
    wrong = [name for name, prompt in content.items() if not isinstance(prompt, str) or not prompt.strip()]
    if wrong:
        raise ConfigError(f"{path}: a prompt must be text that is not empty", where=f"{LIBRARY_KEY}.{wrong[0]}", value=content[wrong[0]])
    if not content:
        raise ConfigError(f"{path} holds no prompt", where=LIBRARY_KEY, remedy="write {name: prompt, ...} into it")
    return {str(name): str(prompt) for name, prompt in content.items()}


def read_json(path: Path, key: str, remedy: str) -> object:
    """What the file that `key` names holds. Raises `ConfigError`, for an object with a name twice too."""
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        raise ConfigError("there is no such file", where=key, value=str(path), remedy=remedy) from None
    except OSError as error:
        raise ConfigError(f"cannot be read: {error}", where=key, value=str(path)) from error
    place = f"{key}, {path}"
    return plain(parse(content, place), place)


def label(name: str) -> str:
    """A name that every file system takes: letters, digits, dots, dashes and underscores; at most `LONGEST` of them."""
    return re.sub(r"[^\w.-]+", "-", name.strip()).strip("-.")[:LONGEST] or "prompt"


def unused(wanted: str, taken: Iterable[str]) -> str:
    """`wanted`, or with a number behind it where that is taken; file systems may not tell upper from lower case."""
    known = {each.lower() for each in taken}
    numbered = (f"{wanted}-{number}" for number in range(2, len(known) + 2))
    return wanted if wanted.lower() not in known else next(each for each in numbered if each.lower() not in known)
