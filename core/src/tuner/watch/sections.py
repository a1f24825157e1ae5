"""The parts of a report as markup, in the order of the page."""

from __future__ import annotations

import base64
from collections.abc import Iterable, Mapping, Sequence
from datetime import timedelta

from tuner.html.page import Html, details, element, image, join, section, table, waveform
from tuner.watch.charts import Chart, figure
from tuner.watch.folder import Row, mapping, number, rows, text
from tuner.watch.hiding import hidden, shown_value
from tuner.watch.history import History
from tuner.watch.pace import GIB

EVENTS = 300
"""Of more events, the first and the last ones are shown."""
BUCKETS = 30


def duration(seconds: float) -> str:
    """`1:02:03`."""
    return str(timedelta(seconds=round(seconds)))


def moment(time: str) -> str:
    """An ISO time as people read it, to the second."""
    return time[:19].replace("T", " ") + (" UTC" if time.endswith("+00:00") else "")


def overview(history: History, made: str) -> Html:
    """The state of the run at the moment at which the page was made."""
    status = history.status
    facts = [
        ("State", f"{status.state} ({status.doing})" if status.state == "running" else status.state),
        ("Step", f"{status.step} of {status.total}" if status.total else ""),
        ("Model", status.model),
        ("Loss", " | ".join(_loss(name, value) for name, value in status.metrics.items() if name.startswith("loss/"))
         or (f"{status.metrics['loss']:.4f}" if "loss" in status.metrics else "")),
        ("Held-out loss", " | ".join(_loss(name, value) for name, value in status.heldout.items())),
        ("Pace", f"{status.seconds_per_step:.3g} s a step" if status.seconds_per_step else ""),
        ("Left", duration(status.eta) if status.eta is not None else ""),
        ("Peak memory", _memory(status.memory)),
        ("Last checkpoint", status.checkpoint),
        ("Started", moment(status.started)),
        ("Page made", made),
    ]  # fmt: skip
    tiles = [element("div", {}, element("dt", {}, label), element("dd", {}, words)) for label, words in facts if words]
    failure = [element("p", {"class": "bad", "role": "alert"}, hidden(status.reason, history.folder))] if status.reason else []
    return section("Overview", *failure, element("dl", {"class": "tiles"}, *tiles))


def _loss(name: str, value: float) -> str:
    return f"{name.removeprefix('loss/')}\N{NO-BREAK SPACE}{value:.4f}"


def _memory(memory: Mapping[str, object]) -> str:
    peak, limit = number(memory.get("peak")), number(memory.get("limit"))
    if peak is None or limit is None:
        return ""
    return f"{text(memory.get('place'))}: {peak / GIB:.1f} of {limit / GIB:.1f} GiB"


def curves(found: Sequence[Chart]) -> Html:
    """A figure for each chart, and what the script's controls act on."""
    if not found:
        return section("Curves", element("p", {"class": "faint"}, "No step has been logged yet."))
    controls = element("div", {"id": "controls", "class": "controls", "hidden": ""})
    without = element("noscript", {}, element("p", {"class": "faint"}, "Curves are drawn by a script; their numbers are below each title."))
    figures = [figure(chart, index) for index, chart in enumerate(found)]
    return section("Curves", without, controls, element("div", {"class": "charts"}, *figures))


def dataset(history: History) -> Html:
    """Sums, the audio ledger, buckets, reasons, and clips with a picture each."""
    facts = history.dataset
    if not facts:
        return Html("")
    left_out = [[text(row.get("status")), text(row.get("reason")), str(row.get("files", ""))] for row in rows(facts.get("left_out"))]
    buckets = [[text(row.get("bucket")), str(row.get("items", ""))] for row in rows(facts.get("buckets"))]
    clips = rows(facts.get("clips"))
    more = int(number(facts.get("items")) or 0) - len(clips)
    return section(
        "Dataset",
        element("p", {}, hidden(text(facts.get("summary")))), element("p", {}, f"Sound: {hidden(text(facts.get('sound')))}"),
        *([table(["left out", "reason", "files"], left_out, numbers=[2])] if left_out else []),
        *([table(["bucket", "items"], buckets[:BUCKETS], numbers=[1])] if buckets else []),
        *([element("p", {"class": "faint"}, f"and {len(buckets) - BUCKETS} more buckets")] if len(buckets) > BUCKETS else []),
        element("div", {"class": "clips"}, *(clip(row) for row in clips)),
        *([element("p", {"class": "faint"}, f"{more} more items are not shown.")] if more > 0 else []),
    )  # fmt: skip


def clip(row: Row) -> Html:
    """One clip: what it looks or sounds like, and its caption."""
    name = text(row.get("name"))
    picture = _bytes(text(row.get("picture")))
    wave = [(low, high) for pair in _list(row.get("wave")) for low, high in [_pair(pair)]]
    facts = [text(row.get("dataset")), text(row.get("bucket")), f"{number(row.get('seconds')) or 0:g} s"]
    sound = {"yes": "sound", "silence": "silence for sound", "no": "no sound", "alone": "sound alone"}.get(text(row.get("sound")), "")
    marks = [sound, "held out" if row.get("held_out") else "", f"{row.get('repeats')} repeats" if number(row.get("repeats")) else ""]
    return element(
        "div", {"class": "card"},
        *([image(picture, f"first frame of {name}")] if picture else []), *([waveform([wave], f"waveform of {name}")] if wave else []),
        element("h3", {}, name), element("p", {"class": "faint"}, ", ".join(part for part in [*facts, *marks] if part)),
        element("p", {}, text(row.get("caption"))),
    )  # fmt: skip


def _bytes(encoded: str) -> bytes:
    try:
        return base64.b64decode(encoded, validate=True)
    except ValueError:
        return b""


def _list(value: object) -> list[object]:
    return value if isinstance(value, list) else []


def _pair(value: object) -> tuple[float, float]:
    low, high = value if isinstance(value, list) and len(value) == 2 else (0, 0)
    return number(low) or 0.0, number(high) or 0.0


def settings(history: History) -> Html:
    """All keys with value and origin: first those that somebody set."""
    found = [(key, shown_value(entry.get("value"), key), text(entry.get("origin"))) for key, entry in sorted(history.config.items())]
    if not found:
        return Html("")
    chosen = [row for row in found if row[2] != "default"]
    rest = [row for row in found if row[2] == "default"]
    headers = ["key", "value", "origin"]
    return section("Settings", table(headers, chosen), details(f"{len(rest)} keys at their defaults", table(headers, rest)))


def happened(history: History) -> Html:
    """Notices of the plan, then the events."""
    notices = [notice for row in history.events if row.get("kind") == "started" for notice in _list(row.get("notices"))]
    items = [element("li", {}, hidden(str(notice), history.folder)) for notice in dict.fromkeys(map(str, notices))]
    listed = list(history.events)
    if len(listed) > EVENTS:
        listed = [*listed[: EVENTS // 6], *listed[-(EVENTS - EVENTS // 6) :]]
    lines = [[moment(text(row.get("time"))), text(row.get("kind")), _facts(row, history)] for row in listed]
    more = len(history.events) - len(listed)
    return join([
        *([section("Notices", element("ul", {}, *items))] if items else []),
        section(
            "Events", table(["time", "event", "facts"], lines),
            *([element("p", {"class": "faint"}, f"{more} events in between are in events.jsonl.")] if more else []),
        ),
    ])  # fmt: skip


def _facts(row: Row, history: History) -> str:
    """An event's facts in one line; lists and captions are elsewhere on the page."""
    skipped = ("time", "kind", "notices", "prompt")
    facts = {name: value for name, value in row.items() if name not in skipped and value not in (None, "", [], {})}
    return hidden(", ".join(f"{name}: {_fact(value)}" for name, value in facts.items()), history.folder)


def _fact(value: object) -> str:
    if isinstance(value, dict):
        return " ".join(f"{name} {_fact(inner)}" for name, inner in value.items())
    if isinstance(value, list):
        return "; ".join(_fact(inner) for inner in value)
    return f"{value:.5g}" if isinstance(value, float) else str(value)


def made_with(history: History) -> Html:
    """Device, system and versions."""
    run = history.run
    found: Iterable[tuple[str, object]] = [
        ("base model", run.get("base_model")), ("device", run.get("device")), ("system", run.get("system")),
        *(mapping(run.get("versions")) | mapping(run.get("plugins"))).items(),
    ]  # fmt: skip
    lines = [[name, hidden(str(value), history.folder)] for name, value in found if value]
    return section("Made with", table(["what", "version"], lines)) if lines else Html("")
