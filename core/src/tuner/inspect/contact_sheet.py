"""The contact sheet: a page with pictures, waveform, verdict and remarks of every file of a dataset. One file, no script."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from tuner.data.looks import Heard, Look
from tuner.html.page import Html, details, element, image, join, page, section, table, waveform
from tuner.inspect.inspection import CaptionRow, Inspection, Row, SoundRow

PICTURED = 2000
"""Files whose pictures and waveform are kept, about 16 kB each: what browsers still open at ease."""
SHORT = 200
"""Characters of a caption that is shown at once."""
STYLE = """
.sums { display: flex; flex-wrap: wrap; gap: 0 3rem; align-items: flex-start; } .sums table { max-width: 100%; }
.toggle { margin: .5rem 0; } body:has(#problems:checked) .fine { display: none; }
.card .strip { margin: .5rem 0; min-height: 3rem; } .card ul { margin: .25rem 0; padding-left: 1.1rem; }
"""
MARKS = {"used": "good", "held out": "good", "skipped": "odd", "failed": "bad"}
"""Status -> the class of its colour; the status is written out, too."""


def contact_sheet(inspection: Inspection) -> Html:
    """The whole page."""
    found = [row for row in inspection.rows if not row.fine]
    toggle = element(
        "p", {"class": "toggle"}, element("label", {}, element("input", {"type": "checkbox", "id": "problems"}),
        f" show only {_count(len(found), 'file')} not used or with a remark"),
    ) if found else ""  # fmt: skip
    more = len(inspection.rows) - PICTURED
    cut = element("p", {"class": "faint"}, f"The last {more} files are listed without pictures.") if more > 0 else ""
    body = [element("p", {}, inspection.manifest.describe()), *_summary(inspection), toggle, cut]
    for entry in inspection.datasets:
        cards = [card(row, look) for row, look in zip(inspection.rows, inspection.looks, strict=True) if row.dataset == entry.name]
        body.append(section(f"{entry.name} ({entry.folder})", element("div", {"class": "cards"}, *cards)))
    return page("Dataset", body, style=STYLE)


def _summary(inspection: Inspection) -> Iterator[Html]:
    if inspection.stops:
        yield element("p", {"class": "bad"}, f"Training would not start: {inspection.stops}")
    yield element("p", {}, f"{inspection.family}: {' + '.join(inspection.streams) or 'nothing to train'}. Sound: {inspection.sound}.")
    if tables := list(_sums(inspection)):
        yield element("div", {"class": "sums"}, *tables)
    if inspection.groups:
        yield element("p", {}, f"{inspection.batches} batches an epoch, of {inspection.batch_size}.")
    if inspection.notices:
        yield details(_count(len(inspection.notices), "notice"), *(element("p", {}, notice) for notice in inspection.notices))


def _sums(inspection: Inspection) -> Iterator[Html]:
    """What adds up, table by table."""
    if inspection.groups:
        rows = [(str(g.group[0]), str(g.items), str(g.turns), str(g.batches), str(g.last)) for g in inspection.groups]
        yield table(("Bucket", "Items", "Turns an epoch", "Batches", "In the last batch"), rows, numbers=[1, 2, 3, 4])
    if reasons := inspection.manifest.reasons():
        yield table(("Left out", "Why", "Files"), [(status, why, str(n)) for (status, why), n in reasons.items()], numbers=[2])
    if inspection.remarked:
        yield table(("Remark", "Files"), [(kind, str(n)) for kind, n in inspection.remarked.items()], numbers=[1])


def _count(number: int, word: str) -> str:
    return f"{number} {word}{'' if number == 1 else 's'}"


def card(row: Row, look: Look | None) -> Html:
    """One file."""
    status = element("span", {"class": MARKS[row.status]}, row.status)
    own = join([status, f": {row.detail or row.reason}" if row.reason else ""])
    remarks = [element("li", {"class": "odd"}, remark.text) for remark in row.remarks]
    return element(
        "article", {"class": "card fine" if row.fine else "card"}, element("h3", {}, row.file), *(_strips(row, look) if look else ()),
        element("p", {"class": "faint"}, ", ".join(_facts(row))), element("p", {}, own),
        *([element("ul", {}, *remarks)] if remarks else ()), *([_caption(row.caption)] if row.caption else ()),
    )  # fmt: skip


def _caption(caption: CaptionRow) -> Html:
    words = f"caption, {_count(caption.words, 'word')}"
    return details(words, element("p", {}, caption.text), opened=len(caption.text) <= SHORT)


def _strips(row: Row, look: Look) -> Iterator[Html]:
    """The pictures, with those of its reference and mask, and the waveform."""
    for seen in look.seen:
        names = ("first frame", "middle frame", "last frame") if len(seen.thumbnails) == 3 else ("first frame", "last frame")
        words = names[: len(seen.thumbnails)] if len(seen.thumbnails) > 1 else ("picture",) * len(seen.thumbnails)
        owner = row.file if seen.role == "clip" else f"{seen.role} of {row.file}"
        if seen.thumbnails:
            pictures = [image(content, f"{word} of {owner}") for content, word in zip(seen.thumbnails, words, strict=True)]
            yield element("div", {"class": "strip"}, *pictures)
    if look.heard and look.heard.wave:
        yield waveform([look.heard.wave], _spoken(look.heard))


def _spoken(heard: Heard) -> str:
    return "waveform: silence" if heard.loudness is None else f"waveform: {heard.loudness:.1f} LUFS"


def _facts(row: Row) -> Sequence[str]:
    """Numbers of the file and of what is used of it."""
    facts, media, use = [], row.media, row.use
    if media and media.width:
        facts.append(f"{media.width}x{media.height}")
    if media and media.kind == "video":
        facts.append(f"{media.frames} frames at {media.fps:.4g}/s, {media.seconds:.2f} s")
    elif media and media.kind == "audio":
        facts.append(f"{media.seconds:.2f} s")
    if row.sound:
        facts.append(_sound(row.sound))
    if use:
        begin = f" from second {use.start:.2f}" if use.start else ""
        facts.append(f"brought to {use.bucket}{begin}")
    return [*facts, *(use.files if use else ())]


def _sound(sound: SoundRow) -> str:
    if sound.source == "silence":
        return "trained with silence"
    source = "" if sound.source == "own" else f" of {sound.source}"
    loud = f", {sound.loudness:.1f} LUFS" if sound.loudness is not None else ", silent" if sound.measured else ""
    channels = {1: "mono", 2: "stereo"}.get(sound.channels, f"{sound.channels} channels")
    return f"sound{source}: {channels}, {sound.rate / 1000:g} kHz{loud}{'' if sound.trained else ', not trained'}"
