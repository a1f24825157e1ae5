"""Figures beside their limits, and the file that a program leaves them in."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Figure:
    """One number that was measured."""

    name: str
    value: float
    unit: str = "s"
    most: float | None = None
    least: float | None = None

    @property
    def kept(self) -> bool:
        """Whether it is within its limits."""
        return (self.most is None or self.value <= self.most) and (self.least is None or self.value >= self.least)

    def describe(self) -> str:
        """The number with its limit."""
        asked = [f"at most {self.most:g}"] if self.most is not None else []
        asked += [f"at least {self.least:g}"] if self.least is not None else []
        verdict = f" ({', '.join(asked)}{'' if self.kept else ': missed'})" if asked else ""
        return f"{self.value:.3f} {self.unit}".rstrip() + verdict


def write_json(path: Path | None, machine: Mapping[str, str], rows: Sequence[Any], figures: Sequence[Figure], **facts: object) -> None:
    """Writes what there is so far: a program that is stopped leaves the rows that it got to. `rows`: dataclasses. No `path`: nothing."""
    if path is None:
        return
    result = {"machine": dict(machine), **facts, "rows": [asdict(row) for row in rows], "figures": [asdict(figure) for figure in figures]}
    path.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


def read_figures(path: Path) -> list[Figure]:
    """Those of a file that `write_json` wrote; none where it is not there or was being written."""
    try:
        return [Figure(**figure) for figure in json.loads(path.read_text(encoding="utf-8")).get("figures", ())]
    except (OSError, ValueError):
        return []
