"""Which curves of a run stand in which chart, as the report's script draws them, and as tables for those without a script."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

from tuner.html.page import Html, details, element, table
from tuner.watch.history import History
from tuner.watch.series import Curve

ROWS = 24
"""Lines of a table beside a chart."""
MOST = 12
"""Curves in a chart."""
MOST_CHARTS = 40
DIGITS = 5
"""Significant digits of a number in the page."""


@dataclass(frozen=True)
class Chart:
    """Curves with a common unit, over steps."""

    title: str
    curves: Mapping[str, Curve]
    unit: str = ""
    zero: bool = False
    """Whether the axis begins at 0."""
    limit: float | None = None
    """A line that the curves should stay below, such as the size of the memory."""
    noisy: bool = False
    """Whether the reader may smooth it: what differs from batch to batch."""
    left_out: int = 0
    """Curves beyond `MOST`."""


def charts(history: History) -> list[Chart]:
    """All charts with at least one curve, the losses first."""
    found = [chart for chart in _all(history) if chart.curves]
    return [_bounded(chart) for chart in found[:MOST_CHARTS]]


def _all(history: History) -> Iterator[Chart]:
    metrics, pace = history.metrics, history.pace
    losses = {name: curve for name, curve in metrics.items() if name == "loss" or (name.startswith("loss/") and name.count("/") == 1)}
    yield Chart("Loss", {name.removeprefix("loss/") if name != "loss" else "total": curve for name, curve in losses.items()}, noisy=True)
    yield Chart("Held-out loss", history.heldout)
    bands: dict[str, dict[str, Curve]] = {}
    others: dict[str, dict[str, Curve]] = {}
    for name, curve in metrics.items():
        stream, _, band = name.removeprefix("loss/").partition("/")
        if name.startswith("loss/") and band:
            bands.setdefault(stream, {})[band.replace("sigma_", "sigma ").replace("-", " to ")] = curve
        elif name not in losses and name not in ("lr", "grad_norm", "samples", "seconds"):
            others.setdefault(name.partition("/")[0], {})[name] = curve
    for stream, curves in bands.items():
        yield Chart(f"Loss of {stream} by noise level", dict(sorted(curves.items())), noisy=True)
    yield Chart("Learning rate", _named(metrics, {"lr": "learning rate"}), zero=True)
    yield Chart("Gradient norm", _named(metrics, {"grad_norm": "before clipping"}), noisy=True)
    yield Chart("Seconds a step", _named(pace, {"seconds": "median of 20 steps"}), "s", zero=True)
    limit = history.status.memory.get("limit")
    place = str(history.status.memory.get("place", ""))
    yield Chart(
        f"Memory ({place})" if place else "Memory", _named(pace, {"memory/now": "now", "memory/peak": "peak"}), "GiB", zero=True,
        limit=limit / 2**30 if isinstance(limit, int) and place == "GPU" else None,
    )  # fmt: skip
    for name, curves in others.items():
        yield Chart(name, curves, noisy=True)


def _named(curves: Mapping[str, Curve], names: Mapping[str, str]) -> dict[str, Curve]:
    return {words: curves[name] for name, words in names.items() if name in curves}


def _bounded(chart: Chart) -> Chart:
    kept = dict(list(chart.curves.items())[:MOST])
    return replace(chart, curves=kept, left_out=len(chart.curves) - len(kept))


def chart_data(chart: Chart) -> dict[str, object]:
    """For the script: of each curve x, y, and lo and hi where a point stands for several steps."""
    return {
        "title": chart.title, "unit": chart.unit, "zero": chart.zero, "noisy": chart.noisy,
        "limit": None if chart.limit is None else shortened(chart.limit),
        "series": [{"name": name, **_points(curve)} for name, curve in chart.curves.items()],
    }  # fmt: skip


def _points(curve: Curve) -> dict[str, object]:
    points: dict[str, object] = {"x": [shortened(x, 9) for x in curve.steps], "y": [shortened(y) for y in curve.mean]}
    if curve.low != curve.high:
        points |= {"lo": [shortened(y) for y in curve.low], "hi": [shortened(y) for y in curve.high]}
    return points


def shortened(value: float, digits: int = DIGITS) -> float:
    """With so many significant digits; a whole number without a fraction, which takes less room."""
    short = float(f"{value:.{digits}g}")
    return int(short) if short.is_integer() and abs(short) < 1e15 else short


def figure(chart: Chart, index: int) -> Html:
    """A place for chart `index` of the script's data, with its numbers as a table below."""
    left = f" {chart.left_out} more curves are in metrics.jsonl." if chart.left_out else ""
    unit = f" ({chart.unit})" if chart.unit else ""
    return element(
        "figure", {"class": "chart", "data-chart": str(index)}, element("figcaption", {}, chart.title + unit + left),
        details("Numbers", numbers(chart)),
    )  # fmt: skip


def numbers(chart: Chart) -> Html:
    """At most `ROWS` points of all curves, the first and the last among them; "" where a curve has none near a step."""
    longest = max(chart.curves.values(), key=lambda curve: len(curve.steps))
    count = min(ROWS, len(longest.steps))
    places = [round(index * (len(longest.steps) - 1) / max(1, count - 1)) for index in range(count)]
    rows = [[f"{longest.steps[place]:g}", *(_near(curve, longest.steps[place]) for curve in chart.curves.values())] for place in places]
    return table(["step", *chart.curves], rows, numbers=range(len(chart.curves) + 1))


def _near(curve: Curve, step: float) -> str:
    index = min(bisect_left(curve.steps, step), len(curve.steps) - 1)
    gap = curve.steps[1] - curve.steps[0] if len(curve.steps) > 1 else 1
    return f"{curve.mean[index]:.4g}" if abs(curve.steps[index] - step) <= gap else ""
