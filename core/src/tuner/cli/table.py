"""Plain columns and lines for the terminal: the same text whether people or programs read it, and no word broken where it is narrow."""

from __future__ import annotations

import re
import shutil
import sys
import textwrap
import unicodedata
from collections.abc import Sequence
from typing import TextIO

NARROWEST = 30
"""Characters that the last column should have at least."""
INDENT = 4
"""Of columns that did not fit beside the first ones, and of what has nothing to stand below."""
LABEL = re.compile(r"\s*\S.*?\s{2,}|\s*")
"""What the rest of a line stands below: a label with space behind it, or the space before a text."""


def terminal_width(stream: TextIO | None = None) -> int:
    """Characters of a line; 0 where `stream`, by default stdout, is no terminal."""
    return shutil.get_terminal_size().columns if (stream or sys.stdout).isatty() else 0


def folded(text: str, width: int | None = None) -> str:
    """On a terminal lines end between words, and go on below their text. A word that is longer, such as a path, stays whole to be copied.

    `width`: of the terminal; that of stdout when not given; 0: as it is.
    """
    width = terminal_width() if width is None else width
    return "\n".join(part for line in text.split("\n") for part in (_folded(line, width) if 0 < width < len(line) else [line]))


def _folded(line: str, width: int) -> list[str]:
    label = LABEL.match(line)
    assert label is not None  # it matches nothing, too
    below = label.end() if label[0].strip() else label.end() + INDENT
    longest = max(map(len, line[label.end() :].split()), default=0)
    below = below if below <= width // 2 and below + longest <= width else INDENT
    return textwrap.wrap(line, width, subsequent_indent=" " * below, break_long_words=False, break_on_hyphens=False)


def visible(text: str) -> str:
    """With control characters and bytes that are no text, which names of files may hold, as escapes; lines and tabs stay."""
    return "".join(char.encode("unicode_escape").decode() if _unsafe(char) else char for char in text)


def _unsafe(char: str) -> bool:
    return char not in "\n\t" and unicodedata.category(char) in ("Cc", "Cs")


def columns(headers: Sequence[str], rows: Sequence[Sequence[str]], margin: int = 0) -> str:
    """Aligned columns, `margin` spaces before them. On a terminal the last one is wrapped to its width, and columns for which there is no
    room stand on further lines, indented; elsewhere each row stays one line."""
    table = [list(headers), *(list(row) for row in rows)]
    widths = [max(len(row[index]) for row in table) for index in range(len(headers))]
    width = terminal_width()
    room = max(1, width - margin) if width else 0
    lines: list[str] = []
    for row in table:
        for group in _groups(widths, room):
            lines += _lines([row[index] for index in group], [widths[index] for index in group], room, group[0])
    return "\n".join((" " * margin + line).rstrip() for line in lines)


def _groups(widths: Sequence[int], room: int) -> list[list[int]]:
    """Indices of the columns that stand beside each other."""
    groups: list[list[int]] = [[0]]
    used = widths[0]
    for index, width in enumerate(widths[1:], 1):
        least = min(width, NARROWEST) if index == len(widths) - 1 else width
        if room and used + 2 + least > room:
            groups.append([])
            used = INDENT - 2
        groups[-1].append(index)
        used += 2 + width
    return groups


def _lines(cells: Sequence[str], widths: Sequence[int], room: int, first: int) -> list[str]:
    """A row's cells of one group. `first`: the index of its first column; what does not begin a row and is empty has no line."""
    lead = INDENT if first else 0
    start = " " * lead + "".join(f"{cell:<{width}}  " for cell, width in zip(cells[:-1], widths, strict=False))
    beside = room - len(start)
    last = textwrap.wrap(cells[-1], max(1, beside), break_on_hyphens=False) if room and len(cells[-1]) > beside else [cells[-1]]
    text = (start + ("\n" + " " * len(start)).join(last)).rstrip()
    return text.split("\n") if text or not first else []
