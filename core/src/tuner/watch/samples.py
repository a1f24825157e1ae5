"""The grid of samples of a report: a row for each prompt, a column for each step, played in the page."""

from __future__ import annotations

import base64
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote

from tuner.html.page import Html, data_uri, element, section
from tuner.watch.hiding import hidden
from tuner.watch.history import History, Sample
from tuner.watch.posters import poster

CELLS = 600
"""Of more samples, steps in between are left out: the first and the last stay."""
LABELS = 60
"""Rows at most."""
POSTER_SECONDS = 10.0
"""How long making pictures may take; those that are missing then are made for the next report."""
INLINE_BYTES = 30 * 2**20
"""Clips inside a page, all together: a browser still opens it at once."""
TYPES = {".mp4": "video/mp4", ".wav": "audio/wav"}
MODES = {"t2v": "text to video", "i2v": "image to video", "s2v": "sound to video", "audio": "sound"}


@dataclass(frozen=True)
class Media:
    """Gives the address of a sample: a link to its file, or all of it where it fits into the page."""

    folder: Path
    linked: bool = True
    """Whether the page lies in the run folder."""
    inside: frozenset[str] = frozenset()
    """Paths below the run folder that become part of the page."""

    def address(self, path: str) -> str:
        """For `src`. Empty: it cannot be played from this page."""
        file = self.folder / path
        if path in self.inside:
            return data_uri(file.read_bytes(), TYPES[file.suffix])
        return quote(path) if self.linked and file.is_file() else ""

    def absence(self, path: str) -> str:
        """Why there is no address."""
        return "too large for this page" if (self.folder / path).is_file() else "the file is gone"


def media_for(history: History, single_file: bool) -> Media:
    """`single_file`: the page is to stand alone; the newest samples become part of it, up to `INLINE_BYTES`."""
    room, inside = INLINE_BYTES if single_file else 0, set()
    for sample in reversed(history.samples):
        size = _size(history.folder / sample.path) if sample.path else 0
        if 0 < size <= room and Path(sample.path).suffix in TYPES:
            inside.add(sample.path)
            room -= size
    return Media(history.folder, not single_file, frozenset(inside))


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return 0


def chosen(samples: Sequence[Sample]) -> tuple[list[str], list[int]]:
    """Labels and steps of the grid: at most `LABELS` labels and `CELLS` cells, steps spread evenly with the first and the last."""
    labels = list(dict.fromkeys(sample.label for sample in samples))[:LABELS]
    steps = sorted({sample.step for sample in samples})
    most = max(2, CELLS // max(1, len(labels)))
    if len(steps) > most:
        steps = [steps[round(index * (len(steps) - 1) / (most - 1))] for index in range(most)]
    return labels, steps


def grid(history: History, media: Media, clock: Callable[[], float] = time.monotonic) -> Html:
    """The section of samples; empty where there are none."""
    if not history.samples:
        return Html("")
    labels, steps = chosen(history.samples)
    cells = {(sample.label, sample.step): sample for sample in history.samples}
    prompts = {sample.label: sample for sample in history.samples if sample.prompt or sample.mode}
    end = clock() + POSTER_SECONDS
    head = element("tr", {}, element("th", {"scope": "col"}, "prompt"), *(element("th", {"scope": "col"}, f"step {n}") for n in steps))
    body = []
    for label in labels:
        found = [cells.get((label, step)) for step in steps]
        shown = [element("td", {}, *([cell(sample, media, clock() < end)] if sample else [])) for sample in found]
        body.append(element("tr", {}, row_head(label, prompts.get(label)), *shown))
    labels_left = len({sample.label for sample in history.samples}) - len(labels)
    steps_left = len({sample.step for sample in history.samples}) - len(steps)
    left = ", ".join(words for count, words in ((labels_left, f"{labels_left} prompts"), (steps_left, f"{steps_left} steps")) if count)
    rest = [element("p", {"class": "faint"}, f"Not shown here: {left}; their files are in the folder validation.")] if left else []
    parts = [element("thead", {}, head), element("tbody", {}, *body)]
    return section("Samples", element("table", {"class": "samples"}, *parts), *rest)


def row_head(label: str, sample: Sample | None) -> Html:
    """Label, prompt, and a place for the button that plays the row."""
    texts = [] if sample is None else [({"class": "faint"}, MODES.get(sample.mode, sample.mode)), ({}, sample.prompt)]
    words = [element("p", kind, text) for kind, text in texts if text]
    return element("th", {"scope": "row", "data-row": label}, element("strong", {}, label), *words)


def cell(sample: Sample, media: Media, picture: bool) -> Html:
    """A clip or a sound with the browser's own controls, or why there is none."""
    name = f"{sample.label} at step {sample.step}"
    if sample.reason and not sample.path:
        return element("p", {"class": "bad"}, f"failed: {hidden(sample.reason, media.folder)}")
    address = media.address(sample.path) if sample.path else ""
    if not address:
        return element("p", {"class": "faint"}, media.absence(sample.path))
    common = {"controls": "", "preload": "none", "src": address, "aria-label": name}
    if sample.path.endswith(".wav"):
        return element("audio", common)
    still = poster(media.folder / sample.path) if picture else b""
    shown = {"poster": f"data:image/jpeg;base64,{base64.b64encode(still).decode('ascii')}"} if still else {}
    return element("video", {**common, "playsinline": "", **shown}, element("a", {"href": address}, name))
