"""report.html: a run as one page that needs no network and no program but a browser. See docs/guides/watching.md."""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime
from importlib import resources
from pathlib import Path

from tuner.html.page import Html, data_block, element, page
from tuner.watch import sections
from tuner.watch.charts import chart_data, charts
from tuner.watch.folder import REPORT
from tuner.watch.history import History, read_history
from tuner.watch.samples import grid, media_for

Write = Callable[[str, str], None]
"""`write(name, text)` puts a file into the run folder in one go."""


def write_report(folder: Path, write: Write) -> None:
    """Writes report.html into the run in `folder`, with links to the samples beside it."""
    write(REPORT, render(read_history(folder)))


def render(history: History, *, single_file: bool = False, made: str = "") -> Html:
    """The page. `made`: when; now by default.

    `single_file`: it is to stand alone, so samples are part of it as far as they fit (see `samples.INLINE_BYTES`).
    """
    found = charts(history)
    made = made or datetime.now(UTC).strftime("%Y-%m-%d %H:%M:%S UTC")
    parts = [
        ("overview", sections.overview(history, made)), ("curves", sections.curves(found)),
        ("samples", grid(history, media_for(history, single_file))), ("dataset", sections.dataset(history)),
        ("settings", sections.settings(history)), ("events", sections.happened(history)), ("versions", sections.made_with(history)),
    ]  # fmt: skip
    shown = [(name, part) for name, part in parts if part]
    links = [element("a", {"href": f"#{name}"}, name) for name, _ in shown]
    body = [
        element("nav", {"aria-label": "parts of this page"}, *links),
        element("main", {}, *(element("div", {"id": name}, part) for name, part in shown)),
        data_block("data", {"charts": [chart_data(chart) for chart in found]}),
    ]
    return page(history.status.name, body, style=part_of_page("report.css"), script=part_of_page("report.js"), beside=True)


def part_of_page(name: str) -> str:
    """The style sheet or the script, which lie beside this module."""
    return (resources.files("tuner.watch") / name).read_text(encoding="utf-8")
