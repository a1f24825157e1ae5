"""Secrets: which keys hold them, and how values are shown without them."""

from __future__ import annotations

import re

SECRET = re.compile(r"token(?!s|iz)|secret|password|passwd|api_?key|credential", re.IGNORECASE)
MASK = "***"
LONGEST = 120
"""Characters of a value that a message repeats."""


def masked(name: str, value: object) -> object:
    """`value` without secrets: masked where `name`, or a key inside it, names one. Empty values stay."""
    if isinstance(value, dict):
        return {key: masked(str(key), inner) for key, inner in value.items()} if not SECRET.search(name) else MASK
    if isinstance(value, list):
        return [masked(name, inner) for inner in value]
    return MASK if SECRET.search(name) and value not in (None, "", False) else value


def shown(name: str, value: object) -> object:
    """`value` as a message may repeat it: masked, and cut where it is long."""
    safe = masked(name, value)
    text = safe if isinstance(safe, str) else repr(safe)
    return safe if len(text) <= LONGEST else text[:LONGEST] + "..."
