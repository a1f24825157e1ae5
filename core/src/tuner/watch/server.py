"""Runs in a browser, read from their folders when somebody looks. Nothing is written, and nothing but reports and samples is shown.

It listens on this machine's own loopback address and answers to that name alone: otherwise a page from elsewhere could have its own name
point here, and read along in a browser that runs on this machine.
"""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
import sys
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from io import BytesIO
from pathlib import Path
from typing import BinaryIO
from urllib.parse import quote, unquote, urlsplit

import tuner
from tuner.errors import ConfigError, EnvironmentProblem
from tuner.html.page import Html, element, page, section, table
from tuner.watch.folder import CONFIG, DATASET, EVENTS, HEARTBEAT, METRICS, PACE, RUN, find_runs
from tuner.watch.hiding import hidden
from tuner.watch.history import read_history
from tuner.watch.report import render
from tuner.watch.samples import TYPES
from tuner.watch.status import read_status
from tuner.watch.words import row

log = logging.getLogger(__name__)

LOOPBACK = "127.0.0.1"
NAMES = frozenset({LOOPBACK, "localhost", "[::1]"})
"""What a request may call this machine; through a tunnel the port is another one."""
HEADERS = ("run", "state", "step", "s/step", "left", "loss", "checkpoint", "remark")
REFRESH = 5
"""Seconds after which a browser asks for the list of runs again."""
READ = (RUN, CONFIG, EVENTS, METRICS, PACE, HEARTBEAT, DATASET)
"""The files that a report is made of."""
KEPT = 8
"""Reports that are held in memory; each has the pictures of its samples."""
RANGE = re.compile(r"bytes=(\d*)-(\d*)")


@dataclass(frozen=True)
class Answer:
    """What a request gets."""

    body: BinaryIO
    size: int
    kind: str
    status: HTTPStatus = HTTPStatus.OK
    headers: Mapping[str, str] = field(default_factory=dict)


def answer(text: str, kind: str = "text/html; charset=utf-8", status: HTTPStatus = HTTPStatus.OK, **headers: str) -> Answer:
    """A text. `headers`: with _ for -."""
    body = text.encode("utf-8", "backslashreplace")
    return Answer(BytesIO(body), len(body), kind, status, {name.replace("_", "-"): value for name, value in headers.items()})


class Pages:
    """The runs in and below a folder, by what they are called there."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._made: dict[Path, tuple[object, str]] = {}
        """Run -> what its files were when its report was made, and the report."""
        self._making = threading.Lock()

    def runs(self) -> dict[str, Path]:
        """As they are now; none is no error."""
        try:
            found = find_runs(self.folder)
        except ConfigError:
            return {}
        own = self.folder.resolve().name or "run"
        return {own if path == self.folder else path.relative_to(self.folder).as_posix(): path for path in found}

    def find(self, address: str, bounds: str = "") -> Answer | None:
        """What lies at a path of this server; None: nothing. `bounds`: a Range header."""
        if address == "/":
            return answer(self.overview(), Refresh=str(REFRESH))
        if address == "/status.json":
            statuses = [read_status(path).as_json() for path in self.runs().values()]
            return answer(json.dumps({"runs": statuses}, indent=2), "application/json")
        for name, path in self.runs().items():
            place = f"/run/{name}"
            if address == place:
                return answer("", status=HTTPStatus.FOUND, Location=link(name))
            if address == f"{place}/":
                return answer(self.report(path))
            if address.startswith(f"{place}/"):
                return sample(path, address.removeprefix(f"{place}/"), bounds)
        return None

    def overview(self) -> str:
        """The list of runs."""
        found = [(name, row(read_status(path))) for name, path in self.runs().items()]
        lines = [[element("a", {"href": link(name)}, name), *(hidden(word) for word in words[1:])] for name, words in found]
        shown = table(HEADERS, lines, numbers=(3, 4)) if lines else element("p", {"class": "faint"}, "There is no run here yet.")
        parts: list[Html] = [element("main", {}, section("Runs", shown)), element("p", {"class": "faint"}, f"tuner {tuner.__version__}")]
        return page(self.folder.resolve().name or "runs", parts)

    def report(self, path: Path) -> str:
        """The page about a run, made anew where something was written since."""
        with self._making:  # one at a time: making it takes a core
            now = [changed(path / name) for name in READ]
            made = self._made.pop(path, None)
            if made is None or made[0] != now:
                made = (now, render(read_history(path)))
            self._made[path] = made
            for oldest in list(self._made)[:-KEPT]:
                del self._made[oldest]
            return made[1]


def link(name: str) -> str:
    """The address of a run's report."""
    return f"/run/{quote(name, errors='surrogateescape')}/"


def changed(path: Path) -> tuple[int, int]:
    """When, and to what size; zeros where there is no such file."""
    try:
        found = path.stat()
    except OSError:
        return 0, 0
    return found.st_mtime_ns, found.st_size


def sample(run: Path, name: str, bounds: str) -> Answer | None:
    """A clip or sound inside a run's folder, or the part of it that `bounds` asks for, which players do."""
    try:
        path = (run / name).resolve()
        if path.suffix not in TYPES or not path.is_relative_to(run.resolve()):
            return None
        file = path.open("rb")
    except (OSError, ValueError):
        return None
    size = os.fstat(file.fileno()).st_size
    asked = RANGE.fullmatch(bounds)
    kind, headers = TYPES[path.suffix], {"Accept-Ranges": "bytes"}
    if not asked or not any(asked.groups()):
        return Answer(file, size, kind, headers=headers)
    first, last = asked.groups()
    begin = int(first) if first else max(0, size - int(last))
    end = min(int(last), size - 1) if first and last else size - 1
    if begin > end:
        file.close()
        return answer("", status=HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE, Content_Range=f"bytes */{size}")
    file.seek(begin)
    span = f"bytes {begin}-{end}/{size}"
    return Answer(file, end - begin + 1, kind, HTTPStatus.PARTIAL_CONTENT, {**headers, "Content-Range": span})


class Handler(BaseHTTPRequestHandler):
    """One connection."""

    protocol_version = "HTTP/1.1"
    timeout = 60
    pages: Pages

    def version_string(self) -> str:
        return "tuner"

    def do_GET(self) -> None:
        self._reply(with_body=True)

    def do_HEAD(self) -> None:
        self._reply(with_body=False)

    def _reply(self, *, with_body: bool) -> None:
        found = self._find()
        with found.body:
            self.send_response(found.status)
            for name, value in {**SAFE, **found.headers, "Content-Type": found.kind, "Content-Length": str(found.size)}.items():
                self.send_header(name, value)
            self.end_headers()
            if with_body:
                self._send(found.body, found.size)

    def _send(self, body: BinaryIO, size: int) -> None:
        try:
            if isinstance(body, BytesIO):
                shutil.copyfileobj(body, self.wfile)
            else:
                self.connection.sendfile(body, body.tell(), size)
        except OSError:  # a player that has seen enough hangs up
            self.close_connection = True

    def _find(self) -> Answer:
        host = self.headers.get("Host", "")
        if re.sub(r":\d*$", "", host).lower() not in NAMES:
            return answer("This server answers to localhost only.", "text/plain", HTTPStatus.MISDIRECTED_REQUEST)
        address = unquote(urlsplit(self.path).path, errors="surrogateescape")
        found = self.pages.find(address, self.headers.get("Range", ""))
        return found or answer("There is nothing here.", "text/plain", HTTPStatus.NOT_FOUND)

    def log_message(self, format: str, *args: object) -> None:
        log.debug(format, *args)


SAFE = {
    "Content-Security-Policy": "frame-ancestors 'none'", "X-Content-Type-Options": "nosniff", "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin", "Cache-Control": "no-cache",
}  # fmt: skip
"""Headers of every answer: no other page may show, embed or read it. What a page itself may do stands in the page."""


class Server(ThreadingHTTPServer):
    """Goes on whatever becomes of one answer."""

    def handle_error(self, request: object, client_address: object) -> None:
        error = sys.exception()
        if isinstance(error, OSError):  # a browser that hung up
            log.debug("an answer was not taken: %s", error)
        else:
            log.error("a page cannot be made", exc_info=error)


def serve(folder: Path, port: int) -> Server:
    """A server of the runs in and below `folder`; 0: on any free port. The caller lets it run. Raises `EnvironmentProblem`."""
    handler = type("FolderHandler", (Handler,), {"pages": Pages(folder)})
    try:
        return Server((LOOPBACK, port), handler)
    except OSError as error:
        raise EnvironmentProblem(
            f"the port cannot be used: {error.strerror}", where="--port", value=port, remedy="name another one, or 0 for any that is free"
        ) from error
