"""Pages: nothing is fetched, text cannot become markup, what is put in comes out."""

from __future__ import annotations

import base64
import hashlib
import io
import json
import re
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image

from tuner.html.page import (
    VOID,
    WAVE_HEIGHT,
    Html,
    data_block,
    data_uri,
    details,
    element,
    escaped,
    image,
    join,
    page,
    policy,
    section,
    table,
    waveform,
)

NASTY = "</script></style><script>alert('1')</script> \"quoted\" & <b>"


class Parsed(HTMLParser):
    """Elements in order with their attributes, and the text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str]]] = []
        self.text: list[str] = []
        self.open: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, {name: value or "" for name, value in attrs}))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text.append(data)

    def all(self, tag: str) -> list[dict[str, str]]:
        return [attributes for name, attributes in self.elements if name == tag]


def picture(kind: str) -> bytes:
    file = io.BytesIO()
    Image.fromarray(np.zeros((4, 6, 3), np.uint8)).save(file, kind)
    return file.getvalue()


def test_plain_text_is_escaped_wherever_it_stands() -> None:
    made = page(
        NASTY,
        [section(NASTY, element("p", {"title": NASTY, "class": "x"}, NASTY)), table((NASTY,), [(NASTY,)]), details(NASTY, NASTY),
         image(picture("PNG"), NASTY, NASTY), join([NASTY, Html("<br>")])],
    )  # fmt: skip
    parsed = Parsed(made)
    assert parsed.open == [] and not parsed.all("script") and not parsed.all("b") and len(parsed.all("br")) == 1
    assert parsed.all("p") == [{"title": NASTY, "class": "x"}]
    assert "".join(parsed.text).count(NASTY) == 9  # title, h1, h2, p, th, td, summary, its content, join
    (shown,) = parsed.all("img")
    assert shown["alt"] == shown["title"] == NASTY
    assert escaped("\udcff") == "\\udcff" and made.encode()


def test_pictures_are_inside_the_page_and_nothing_is_fetched() -> None:
    content = picture("JPEG")
    parsed = Parsed(page("p", [image(content, "a picture"), image(picture("GIF"), "another")]))
    addresses = [image["src"] for image in parsed.all("img")]
    assert [address.partition(";")[0] for address in addresses] == ["data:image/jpeg", "data:image/gif"]
    assert base64.b64decode(addresses[0].partition(",")[2]) == content
    (rules,) = [meta["content"] for meta in parsed.all("meta") if meta.get("http-equiv") == "Content-Security-Policy"]
    assert rules == policy() and "default-src 'none'" in rules and "img-src data:;" in rules and "script-src" not in rules
    assert not re.search(r"(?:src|href)=[\"']?\s*(?:https?:)?//|url\(|@import", page("p", []))
    with pytest.raises(ValueError, match="media type"):
        data_uri(b"RIFF")
    assert data_uri(b"RIFF", "audio/wav") == "data:audio/wav;base64,UklGRg=="


def test_only_the_pages_own_script_may_run() -> None:
    script = "document.title = JSON.parse(document.getElementById('data').textContent).name;"
    parsed = Parsed(page("p", [data_block("data", {"name": NASTY, "numbers": [1, 2.5]})], script=script, beside=True))
    block, own = parsed.all("script")
    assert block == {"type": "application/json", "id": "data"} and own == {}
    (rules,) = [meta["content"] for meta in parsed.all("meta") if "http-equiv" in meta]
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert f"script-src 'sha256-{digest}'" in rules and "media-src data: 'self' file:" in rules
    assert json.loads(next(text for text in parsed.text if "numbers" in text)) == {"name": NASTY, "numbers": [1, 2.5]}
    with pytest.raises(ValueError, match="JSON"):
        data_block("data", float("nan"))


def test_a_waveform_reaches_as_far_as_the_sound() -> None:
    (drawing,) = Parsed(waveform([[(0.0, 0.0), (-1.0, 1.0)], [(-0.5, 0.5), (-3.0, 3.0)]], "two channels")).all("svg")
    assert drawing["viewbox"] == f"0 0 2 {2 * WAVE_HEIGHT}" and drawing["aria-label"] == "two channels"
    paths = re.findall(r'd="M([^"]+)Z"', waveform([[(0.0, 0.0), (-1.0, 1.0)], [(-0.5, 0.5), (-3.0, 3.0)]], "two"))
    heights = [[float(point.split(" ")[1]) for point in path.split("L")] for path in paths]
    middle, reach = WAVE_HEIGHT / 2, WAVE_HEIGHT / 2 - 1
    # Along the top from left to right, back along the bottom; silence is a line of 0.6.
    assert heights[0] == pytest.approx([middle - 0.3, middle - reach - 0.3, middle + reach + 0.3, middle + 0.3])
    assert heights[1] == pytest.approx(
        [3 * middle - reach / 2 - 0.3, 3 * middle - reach - 0.3, 3 * middle + reach + 0.3, 3 * middle + reach / 2 + 0.3], abs=0.051
    )
    assert "<path" not in waveform([], "nothing")


def test_tables_and_details() -> None:
    parsed = Parsed(table(("name", "count"), [("a", "1"), ("b", "2")], numbers=[1]))
    assert [attributes for tag, attributes in parsed.elements if tag in ("th", "td")] == [
        {"scope": "col"}, {"scope": "col", "class": "number"}, {}, {"class": "number"}, {}, {"class": "number"},
    ]  # fmt: skip
    assert parsed.text == ["name", "count", "a", "1", "b", "2"]
    assert Parsed(details("s", "t")).all("details") == [{}] and Parsed(details("s", "t", opened=True)).all("details") == [{"open": ""}]
