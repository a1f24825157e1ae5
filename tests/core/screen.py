"""A small terminal, for what the commands draw on one."""

from __future__ import annotations

import re


class Screen:
    """What a terminal of so many columns shows after all that was written to it. Knows the control sequences that a live line uses."""

    def __init__(self, columns: int) -> None:
        self.columns, self.lines, self.row, self.column = columns, [""], 0, 0

    def write(self, text: str) -> None:
        for part in re.findall(r"\x1b\[[0-9;?]*[a-zA-Z]|\r|\n|[^\x1b\r\n]+", text):
            if part == "\r":
                self.column = 0
            elif part == "\n":
                self.row, self.column = self.row + 1, 0
                self.lines += [""] * (self.row + 1 - len(self.lines))
            elif part.startswith("\x1b["):
                self.control(part)
            else:
                self.put(part)

    def control(self, sequence: str) -> None:
        if sequence.endswith("A"):
            self.row -= int(sequence[2:-1] or 1)
        elif sequence == "\x1b[2K":
            self.lines[self.row] = ""
        else:
            assert sequence in ("\x1b[?25l", "\x1b[?25h") or sequence.endswith("m"), f"unknown control sequence {sequence!r}"

    def put(self, text: str) -> None:
        assert self.column + len(text) <= self.columns, f"a line is broken by the terminal: {text!r}"
        old = self.lines[self.row].ljust(self.column)
        self.lines[self.row] = old[: self.column] + text + old[self.column + len(text) :]
        self.column += len(text)
