"""Curves of any length in little room: steps fall into buckets of equal width, each with its mean, lowest and highest value."""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np

BUCKETS = 1000
"""At most so many points a curve, about as many as a screen shows; at least half of them where every one of so many steps has a value."""


@dataclass(frozen=True)
class Curve:
    """Points of one curve, in the order of steps."""

    steps: tuple[float, ...]
    """Middle of the steps that a point stands for."""
    mean: tuple[float, ...]
    low: tuple[float, ...]
    high: tuple[float, ...]


def bucketed(steps: Iterable[float], values: Iterable[float], most: int = BUCKETS) -> Curve | None:
    """A curve of at most `most` points. Values that are not finite are left out; None where nothing is left.

    Point k stands for the steps [k·w, (k+1)·w), where w is the least power of two that gives few enough of them.
    """
    x, y = np.asarray(steps, np.float64), np.asarray(values, np.float64)
    x, y = x[np.isfinite(y)], y[np.isfinite(y)]
    if not len(x):
        return None
    order = np.argsort(x, kind="stable")
    x, y = x[order], y[order]
    width = 1
    while x[-1] // width - x[0] // width >= most:
        width *= 2
    index, first, count = np.unique(x // width, return_index=True, return_counts=True)
    return Curve(
        steps=tuple((index * width + (width - 1) / 2).tolist()), mean=tuple((np.add.reduceat(y, first) / count).tolist()),
        low=tuple(np.minimum.reduceat(y, first).tolist()), high=tuple(np.maximum.reduceat(y, first).tolist()),
    )  # fmt: skip


def gather(rows: Iterable[Mapping[str, object]], most: int = BUCKETS) -> dict[str, Curve]:
    """Name -> curve, of rows `{"step": n, name: number, ...}`; what is no number is passed over. Names in the order of appearance."""
    found: dict[str, tuple[array[float], array[float]]] = {}
    for row in rows:
        step = row.get("step")
        if type(step) not in (int, float):
            continue
        for name, value in row.items():
            if type(value) in (int, float) and name != "step":
                if name not in found:
                    found[name] = array("d"), array("d")
                found[name][0].append(step)  # type: ignore[arg-type]
                found[name][1].append(value)  # type: ignore[arg-type]
    curves = {name: bucketed(steps, values, most) for name, (steps, values) in found.items()}
    return {name: curve for name, curve in curves.items() if curve is not None}
