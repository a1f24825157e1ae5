"""Plain columns for the terminal: the same text whether people or programs read it."""

from __future__ import annotations

import shutil
import sys
import textwrap
import unicodedata
from collections.abc import Sequence

NARROWEST = 30
"""Below so many characters the last column is not wrapped."""


def visible(text: str) -> str:
    """With control characters and bytes that are no text, which names of files may hold, as escapes; lines and tabs stay."""
    return "".join(char.encode("unicode_escape").decode() if _unsafe(char) else char for char in text)


def _unsafe(char: str) -> bool:
    return char not in "\n\t" and unicodedata.category(char) in ("Cc", "Cs")


def columns(headers: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Aligned columns. On a terminal the last one is wrapped to its width; elsewhere each row stays one line."""
    table = [list(headers), *(list(row) for row in rows)]
    widths = [max(len(row[index]) for row in table) for index in range(len(headers) - 1)]
    indent = sum(widths) + 2 * len(widths)
    room = shutil.get_terminal_size().columns - indent if sys.stdout.isatty() else 0
    return "\n".join(_line(row, widths, indent, room) for row in table)


def _line(row: Sequence[str], widths: Sequence[int], indent: int, room: int) -> str:
    start = "".join(f"{cell:<{width}}  " for cell, width in zip(row, widths, strict=False))
    last = textwrap.wrap(row[-1], room) if room >= NARROWEST else [row[-1]]
    return (start + ("\n" + " " * indent).join(last)).rstrip()
