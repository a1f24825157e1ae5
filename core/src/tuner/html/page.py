"""HTML pages in one file: everything is inline, nothing is fetched, only the page's own script runs; readable in light and dark.

Text that is no `Html` is escaped, so what comes from files and captions cannot become markup. A browser is told so, too: see `policy`.
"""

from __future__ import annotations

import base64
import hashlib
import html
import json
from collections.abc import Iterable, Mapping, Sequence

VOID = frozenset({"br", "hr", "img", "input", "link", "meta"})
"""Elements without an end tag."""
MEDIA_TYPES = ((b"\xff\xd8\xff", "image/jpeg"), (b"\x89PNG\r\n\x1a\n", "image/png"), (b"GIF8", "image/gif"))
"""Beginning of a file -> its type."""
WAVE_HEIGHT = 32
"""Units of a waveform's drawing, for each channel."""

STYLE = """
:root { color-scheme: light dark; --paper: #fff; --ink: #1b1d21; --faint: #5c636e; --line: #d9dde3; --box: #f4f5f7; --mark: #2463c9;
  --good: #1a7340; --bad: #b3261e; --odd: #8a5a00; }
@media (prefers-color-scheme: dark) { :root { --paper: #16181c; --ink: #e6e8eb; --faint: #9aa3af; --line: #343941; --box: #1f2227;
  --mark: #7aabff; --good: #6cc48d; --bad: #ff8a80; --odd: #e3b341; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 84rem; padding: 1.5rem; background: var(--paper); color: var(--ink);
  font: 15px/1.5 system-ui, sans-serif; overflow-wrap: anywhere; }
h1 { font-size: 1.5rem; margin: 0 0 .5rem; } h2 { font-size: 1.15rem; margin: 2rem 0 .5rem; } h3 { font-size: 1rem; margin: 0 0 .25rem; }
p { margin: .25rem 0; } a { color: var(--mark); } img, svg { max-width: 100%; height: auto; }
code, pre { font-family: ui-monospace, monospace; font-size: .9em; } pre { white-space: pre-wrap; }
table { border-collapse: collapse; display: block; overflow-x: auto; margin: .5rem 0; }
th, td { padding: .2rem .8rem .2rem 0; text-align: left; vertical-align: top; border-bottom: 1px solid var(--line);
  overflow-wrap: break-word; } th { color: var(--faint); font-weight: 600; } td:first-child { white-space: nowrap; }
td.number, th.number { text-align: right; font-variant-numeric: tabular-nums; }
input { accent-color: var(--mark); } summary { cursor: pointer; } .faint { color: var(--faint); }
.good { color: var(--good); } .bad { color: var(--bad); } .odd { color: var(--odd); }
.cards { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 20rem), 1fr)); gap: 1rem; }
.card { background: var(--box); border: 1px solid var(--line); border-radius: .5rem; padding: .75rem;
  content-visibility: auto; contain-intrinsic-size: auto 16rem; }
.strip { display: flex; gap: .25rem; } .strip img { flex: 1 1 0; min-width: 0; object-fit: contain; border-radius: .25rem; }
.wave { width: 100%; height: 2.5rem; display: block; color: var(--mark); }
"""


class Html(str):
    """Markup that is ready; it is put into a page as it is."""

    __slots__ = ()


def escaped(text: str) -> Html:
    """Text as markup that shows it, quotes included. Bytes of file names that are no text show as \\udcXX."""
    return Html(html.escape(text.encode("utf-8", "backslashreplace").decode()))


def element(name: str, attributes: Mapping[str, str], *children: str) -> Html:
    """`<name attributes>children</name>`; plain children and all values are escaped."""
    given = "".join(f' {key}="{escaped(value)}"' for key, value in attributes.items())
    opening = f"<{name}{given}>"
    return Html(opening if name in VOID else f"{opening}{join(children)}</{name}>")


def join(parts: Iterable[str], separator: str = "") -> Html:
    """Parts one behind the other; plain ones are escaped."""
    return Html(separator.join(part if isinstance(part, Html) else escaped(part) for part in parts))


def data_uri(content: bytes, media_type: str = "") -> str:
    """The content as an address. `media_type`: found from its beginning when empty. Raises `ValueError` where that tells nothing."""
    media_type = media_type or next((kind for start, kind in MEDIA_TYPES if content.startswith(start)), "")
    if not media_type:
        raise ValueError("neither JPEG, PNG nor GIF: say which media type it is")
    return f"data:{media_type};base64,{base64.b64encode(content).decode('ascii')}"


def image(content: bytes, text: str, title: str = "") -> Html:
    """A picture (JPEG, PNG or GIF) inside the page, decoded when it is scrolled to. `text`: what it shows, in words."""
    hint = {"title": title} if title else {}
    return element("img", {"src": data_uri(content), "alt": text, "loading": "lazy", "decoding": "async", **hint})


def waveform(peaks: Sequence[Sequence[tuple[float, float]]], text: str) -> Html:
    """Sound as a drawing: for each channel (lowest, highest) of each column, in [-1, 1]. `text`: what it shows, in words."""
    columns = max((len(channel) for channel in peaks), default=0)
    paths = [_wave(channel, (2 * index + 1) * WAVE_HEIGHT / 2) for index, channel in enumerate(peaks)]
    box = f"0 0 {max(columns, 1)} {max(len(peaks), 1) * WAVE_HEIGHT}"
    shape = {"viewBox": box, "preserveAspectRatio": "none", "role": "img", "aria-label": text, "class": "wave"}
    return element("svg", shape, *paths)


def _wave(channel: Sequence[tuple[float, float]], middle: float) -> Html:
    """One outline: along the highest values, and back along the lowest."""
    reach = WAVE_HEIGHT / 2 - 1
    above = [f"{x + 0.5:g} {middle - min(1.0, high) * reach - 0.3:.1f}" for x, (_, high) in enumerate(channel)]
    below = [f"{x + 0.5:g} {middle - max(-1.0, low) * reach + 0.3:.1f}" for x, (low, _) in enumerate(channel)]
    return element("path", {"d": f"M{'L'.join([*above, *reversed(below)])}Z", "fill": "currentColor"})


def table(headers: Sequence[str], rows: Iterable[Sequence[str]], numbers: Sequence[int] = ()) -> Html:
    """A table. `numbers`: indices of the columns that hold numbers, set to the right."""
    kinds = [{"class": "number"} if index in numbers else {} for index in range(len(headers))]
    head = element("tr", {}, *(element("th", {"scope": "col", **kind}, text) for text, kind in zip(headers, kinds, strict=True)))
    body = [element("tr", {}, *(element("td", kind, text) for text, kind in zip(row, kinds, strict=True))) for row in rows]
    return element("table", {}, element("thead", {}, head), element("tbody", {}, *body))


def details(summary: str, *children: str, opened: bool = False) -> Html:
    """What is shown when its summary is clicked."""
    return element("details", {"open": ""} if opened else {}, element("summary", {}, summary), *children)


def section(title: str, *children: str) -> Html:
    """A part of a page, with a heading of the second rank."""
    return element("section", {}, element("h2", {}, title), *children)


def data_block(name: str, value: object) -> Html:
    """JSON for the page's script, which finds it by the id `name`; no text in it can end the block.

    Raises `ValueError` for NaN and infinity.
    """
    text = json.dumps(value, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")
    return element("script", {"type": "application/json", "id": name}, Html(text))


def policy(script: str = "", *, beside: bool = False) -> str:
    """What a browser lets the page do: show what is inside it, run exactly `script`, and, if `beside`, show files that lie beside it."""
    places = "data: 'self' file:" if beside else "data:"
    own = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode("ascii")
    rules = ["default-src 'none'", f"img-src {places}", f"media-src {places}", "style-src 'unsafe-inline'"]
    return "; ".join([*rules, *([f"script-src 'sha256-{own}'"] if script else []), "base-uri 'none'", "form-action 'none'"])


def page(title: str, body: Iterable[str], *, style: str = "", script: str = "", beside: bool = False) -> Html:
    """The whole document. `style`: further rules of style sheets, beside `STYLE`. `script`: runs when all of `body` is there; it may not
    hold `</script`. `beside`: pictures and clips in the page's own folder may be shown."""
    head = [
        element("meta", {"charset": "utf-8"}),
        element("meta", {"http-equiv": "Content-Security-Policy", "content": policy(script, beside=beside)}),
        element("meta", {"name": "viewport", "content": "width=device-width, initial-scale=1"}),
        element("title", {}, title),
        element("style", {}, Html(STYLE + style)),
    ]
    own = [element("script", {}, Html(script))] if script else []
    document = element("html", {"lang": "en"}, element("head", {}, *head), element("body", {}, element("h1", {}, title), *body, *own))
    return Html(f"<!doctype html>\n{document}\n")
