"""Texts of a run as they may be shown to others: without secrets, and without the folders of the machine it ran on."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path

from tuner.config.masking import masked

_FOLDERS = re.compile(r"(?<![\w.:/~<])(?:/[^\s/'\",:;()\[\]{}<>]+){2,}/?|[A-Za-z]:\\[^\s'\",;()\[\]{}<>]+")
"""An absolute path of two or more parts, and not the rest of an address."""


def hidden(text: str, folder: Path | None = None) -> str:
    """`text` with secrets masked and each absolute path cut down to its last part; the run's own folder becomes `.`."""
    if folder is not None:
        text = text.replace(str(folder.resolve()), ".")
    return _FOLDERS.sub(lambda match: "…/" + re.split(r"[/\\]", match.group().rstrip("/\\"))[-1], str(masked(text)))


def shown_value(value: object, key: str = "") -> str:
    """A setting in one line: as JSON would write it, texts without quotes, paths cut."""
    safe = masked(value, key)
    if isinstance(safe, str):
        return _path(safe)
    if isinstance(safe, Mapping | list):
        return hidden(json.dumps(safe, ensure_ascii=False))
    if isinstance(safe, float):
        return f"{safe:g}"
    return "" if safe is None else json.dumps(safe)


def _path(text: str) -> str:
    """A value that is nothing but an absolute path may hold spaces."""
    if text.startswith("/") and "\n" not in text and text.count("/") > 1:
        return "…/" + text.rstrip("/").rpartition("/")[2]
    return hidden(text)
