"""Secrets: which keys hold them, and how values are shown and stored without them."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from pathlib import Path

MASK = "***"
_SECRET_WORD = re.compile(r"(token|secret|password|passwd|passphrase|credentials?)$")
_SECRET_PHRASE = re.compile(r"(api|access|private)_?key")
_SECRET_TEXT = re.compile(r"(?<=://)[^/@\s]+:[^/@\s]+(?=@)|\bhf_[A-Za-z0-9]{20,}\b")
"""Credentials inside a URL, and hub tokens wherever they stand."""
LONGEST = 120
"""Characters of a value that a message repeats."""


def is_secret(key: str) -> bool:
    """Whether a key's name says that its value must not be shown: `hub_token`, `api_key`, `db.password`; not `tokenizer` or `tokens`."""
    words = re.split(r"[^a-z0-9]+", key.lower())
    return any(_SECRET_WORD.search(word) for word in words) or bool(_SECRET_PHRASE.search("_".join(words)))


def masked(value: object, key: str = "") -> object:
    """`value` ready for JSON: secrets as `***`, NaN and infinities as null, paths as text, tuples and sets as lists.

    A secret that is empty or a switch stays as it is. Raises TypeError for what JSON cannot hold.
    """
    if isinstance(value, Mapping):
        return {str(name): masked(inner, f"{key}.{name}") for name, inner in value.items()}
    if isinstance(value, set | frozenset):
        return [masked(inner, key) for inner in sorted(value)]
    if isinstance(value, list | tuple):
        return [masked(inner, key) for inner in value]
    if value is None or isinstance(value, bool) or value == "":
        return value
    if is_secret(key):
        return MASK
    return _plain(value)


def _plain(value: object) -> object:
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else None
    if isinstance(value, int):
        return int(value)
    if isinstance(value, str | Path):
        return _SECRET_TEXT.sub(MASK, str(value))
    raise TypeError(f"{type(value).__name__} cannot be written as JSON")


def shown(name: str, value: object) -> object:
    """`value` as a message may repeat it: masked, and cut where it is long."""
    safe = masked(value, name)
    text = safe if isinstance(safe, str) else repr(safe)
    return safe if len(text) <= LONGEST else text[:LONGEST] + "..."
