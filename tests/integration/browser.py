"""Pages in a real browser: a headless Chromium that reaches files and nothing else. What it fetches and what it complains of is kept."""

from __future__ import annotations

import io
import os
import shutil
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import pytest
from PIL import Image
from playwright.sync_api import Browser, FloatRect, Locator, Page, ViewportSize, sync_playwright

NAMES = ("chromium", "chromium-browser", "google-chrome")
"""Programs, the first of which is taken: the system's own, so that nothing is downloaded beside pip."""
FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync", "--host-resolver-rules=MAP * ~NOTFOUND",
)  # fmt: skip
"""No sandbox, since that needs rights which containers lack. The last one gives no name an address, whatever a page asks for."""
PATIENCE = 30.0
"""Seconds until something that does not come is a failure; several processes share the machine."""
BROKEN_WORDS = r"""() => {
  const broken = [], range = document.createRange();
  for (const cell of document.querySelectorAll("td, th, dt, dd, h1, h2, h3, figcaption, button, a")) {
    const walker = document.createTreeWalker(cell, NodeFilter.SHOW_TEXT);
    while (walker.nextNode()) {
      for (const word of walker.currentNode.data.matchAll(/\w+/g)) {
        range.setStart(walker.currentNode, word.index);
        range.setEnd(walker.currentNode, word.index + word[0].length);
        if (new Set([...range.getClientRects()].map((box) => box.top)).size > 1) broken.push(word[0]);
      }
    }
  }
  return broken;
}"""


@dataclass
class Opened:
    """A page that is shown."""

    page: Page
    folder: Path
    requests: list[str] = field(default_factory=list)
    """Every address, in order."""
    complaints: list[str] = field(default_factory=list)
    """Whatever stands on the console, and errors that no script caught."""

    @property
    def outside(self) -> list[str]:
        """Requests for anything that is neither inside the page nor in its folder or below."""
        return [address for address in self.requests if not address.startswith(("data:", "blob:", self.folder.as_uri() + "/"))]

    def count(self, selector: str) -> int:
        """How many elements there are."""
        return self.page.locator(selector).count()

    def ask(self, script: str) -> Any:
        """What a JavaScript function gives."""
        return self.page.evaluate(script)

    def wait_for(self, script: str) -> None:
        """Until what a JavaScript function gives is true. Playwright's own way to wait needs `eval`, which the pages forbid."""
        deadline = time.monotonic() + PATIENCE
        while not self.ask(script):
            assert time.monotonic() < deadline, f"never true: {script}"
            self.page.wait_for_timeout(50)

    @property
    def overhang(self) -> int:
        """Pixels by which the page is wider than the window."""
        return int(self.ask("() => document.documentElement.scrollWidth - window.innerWidth"))

    @property
    def broken_words(self) -> list[str]:
        """Words of tables, tiles and headings that do not stand on one line."""
        return list(self.ask(BROKEN_WORDS))

    @property
    def paper(self) -> int:
        """Brightness of the background, 0 to 255."""
        return int(self.ask("() => Number(getComputedStyle(document.body).backgroundColor.match(/\\d+/)[0])"))

    def picture(self, name: str, last: Locator) -> None:
        """Writes the window down to the element `last` as a PNG, where the variable SCREENSHOTS names a folder for it.

        256 colours take a third of the bytes; chosen by k-means, small spots of colour keep theirs.
        """
        if SCREENSHOTS is not None:
            box = last.bounding_box()
            assert box is not None
            clip: FloatRect = {"x": 0, "y": 0, "width": self.ask("() => window.innerWidth"), "height": box["y"] + box["height"] + 12}
            shown = Image.open(io.BytesIO(self.page.screenshot(clip=clip)))
            shown.convert("RGB").quantize(256, kmeans=4, dither=Image.Dither.NONE).save(SCREENSHOTS / name, optimize=True)


SCREENSHOTS = Path(os.environ["SCREENSHOTS"]).absolute() if os.environ.get("SCREENSHOTS") else None
"""Where pictures for the docs go: `make screenshots`."""


def find_browser(environment: Mapping[str, str] = os.environ) -> str:
    """The program. Without one tests are skipped, but not in CI, unless `.ci/run` could not install one and said so."""
    found = next((path for name in NAMES if (path := shutil.which(name))), None)
    if found is None:
        missing = f"none of {', '.join(NAMES)} is installed; on Debian: apt-get install chromium"
        expected = environment.get("CI", "").lower() not in ("", "0", "false") and not environment.get("WITHOUT_BROWSER")
        (pytest.fail if expected else pytest.skip)(missing)
    return found


@contextmanager
def browser() -> Iterator[Browser]:
    """A browser with a profile of its own, new and empty."""
    program = find_browser()
    with sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=program, args=list(FLAGS))
        try:
            yield started
        finally:
            started.close()


@contextmanager
def opened(program: Browser, file: Path, *, width: int = 1200, height: int = 900, dark: bool = False) -> Iterator[Opened]:
    """Opens a file as a double click would."""
    scheme: Literal["dark", "light"] = "dark" if dark else "light"
    size: ViewportSize = {"width": width, "height": height}
    window = program.new_context(viewport=size, color_scheme=scheme, device_scale_factor=1.25 if SCREENSHOTS else 1)
    shown = Opened(window.new_page(), file.parent)
    window.on("request", lambda request: shown.requests.append(request.url))
    window.on("console", lambda message: shown.complaints.append(f"{message.type}: {message.text}"))
    window.on("weberror", lambda problem: shown.complaints.append(f"error: {problem.error}"))
    try:
        shown.page.goto(file.as_uri())
        yield shown
    finally:
        window.close()
