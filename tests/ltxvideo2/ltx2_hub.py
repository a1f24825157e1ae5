"""A hub on this machine: the few endpoints that a download needs, over real HTTP, with files that may be gated or break off."""

from __future__ import annotations

import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

COMMIT = "c0ffee" + "0" * 34


@dataclass
class FakeHub:
    """What the server holds and what it was asked."""

    repositories: dict[str, dict[str, Path]] = field(default_factory=dict)
    """Name -> path in the repository -> file."""
    gated: set[str] = field(default_factory=set)
    """Whose licence was not accepted."""
    break_after: dict[str, int] = field(default_factory=dict)
    """Path -> bytes after which its first download breaks off."""
    asked: list[tuple[str, str]] = field(default_factory=list)
    """(path in the repository, range) of every request for content."""
    url: str = ""


class _Handler(BaseHTTPRequestHandler):
    hub: FakeHub
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: object) -> None:
        """Nothing."""

    def do_HEAD(self) -> None:
        self._answer(body=False)

    def do_GET(self) -> None:
        self._answer(body=True)

    def _answer(self, *, body: bool) -> None:
        path = self.path.partition("?")[0]
        if found := re.match(r"/api/models/([^/]+/[^/]+)(?:/revision/(.+)|/auth-check)?$", path):
            self._metadata(found[1], auth="/auth-check" in path, revision=found[2] or "main")
        elif found := re.match(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)$", path):
            self._content(found[1], found[3], body)
        else:
            self._send(404, b"{}")

    def _metadata(self, name: str, *, auth: bool, revision: str) -> None:
        files = self.hub.repositories.get(name)
        if files is None:
            self._send(404, b"{}", {"X-Error-Code": "RepoNotFound"})
        elif revision not in ("main", "v1", COMMIT):
            self._send(404, b"{}", {"X-Error-Code": "RevisionNotFound"})
        elif auth and name in self.hub.gated:
            self._send(403, b"{}", {"X-Error-Code": "GatedRepo"})
        else:
            told = {
                "id": name, "modelId": name, "sha": COMMIT, "gated": "auto" if name in self.hub.gated else False,
                "siblings": [{"rfilename": path, "size": file.stat().st_size} for path, file in files.items()],
            }  # fmt: skip
            self._send(200, json.dumps(told).encode())

    def _content(self, name: str, path: str, body: bool) -> None:
        file = self.hub.repositories.get(name, {}).get(path)
        if file is None:
            self._send(404, b"", {"X-Error-Code": "EntryNotFound"})
            return
        content = file.read_bytes()
        headers = {"X-Repo-Commit": COMMIT, "ETag": f'"{hashlib.sha256(content).hexdigest()}"', "Accept-Ranges": "bytes"}
        wanted = self.headers.get("Range", "")
        status = 200
        if body:
            self.hub.asked.append((path, wanted))
            if found := re.match(r"bytes=(\d+)-(\d*)", wanted):
                first, last = int(found[1]), min(int(found[2] or len(content)), len(content) - 1)
                headers["Content-Range"] = f"bytes {first}-{last}/{len(content)}"
                content, status = content[first : last + 1], 206
        broken = self.hub.break_after.pop(path, 0) if body else 0
        self._send(status, content, headers, body=body, sent=broken)

    def _send(self, status: int, content: bytes, headers: dict[str, str] | None = None, *, body: bool = True, sent: int = 0) -> None:
        self.send_response(status)
        for name, value in {"Content-Type": "application/json", **(headers or {}), "Content-Length": str(len(content))}.items():
            self.send_header(name, value)
        self.end_headers()
        if body:
            self.wfile.write(content[:sent] if sent else content)
        if sent:
            self.close_connection = True


@contextmanager
def serve() -> Iterator[FakeHub]:
    """A hub that runs until the end of the block."""
    hub = FakeHub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": hub}))
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
