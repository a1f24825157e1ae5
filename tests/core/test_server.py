"""`tuner server`: what a browser gets, and what nobody gets."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.client import HTTPConnection, HTTPResponse, RemoteDisconnected
from pathlib import Path
from urllib.parse import quote

import pytest

from core.watched import NASTY, SECRET, Page, write_run
from tuner.cli.main import run as tuner
from tuner.watch import server as module
from tuner.watch.server import Pages, serve

ODD = "wäves & <co>"


class Client:
    """Asks a server, each time over a connection of its own."""

    def __init__(self, port: int) -> None:
        self.port = port

    def ask(self, address: str, method: str = "GET", **headers: str) -> tuple[HTTPResponse, bytes]:
        connection = HTTPConnection("127.0.0.1", self.port, timeout=20)
        connection.putrequest(method, address, skip_host="Host" in headers)
        for name, value in headers.items():
            connection.putheader(name, value)
        connection.endheaders()
        found = connection.getresponse()
        body = found.read()
        connection.close()
        return found, body


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("output")
    write_run(made / "first", samples=False)
    write_run(made / "later" / ODD)
    (made / "private.mp4").write_bytes(b"not a run's")
    (made / "later" / ODD / "validation" / "link.mp4").symlink_to(made / "private.mp4")
    return made


@pytest.fixture
def client(folder: Path) -> Iterator[Client]:
    with serve(folder, 0) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield Client(server.server_address[1])
        server.shutdown()
        thread.join()


def test_the_list_leads_to_reports_and_those_to_samples(client: Client, folder: Path) -> None:
    found, body = client.ask("/")
    assert (found.status, found.headers["Refresh"]) == (200, "5")
    links = [anchor["href"] for anchor in Page(body.decode()).named("a")]
    assert links == ["/run/first/", f"/run/later/{quote(ODD)}/"] and "<co>" not in body.decode()
    moved, _ = client.ask(links[1].rstrip("/"))
    assert (moved.status, moved.headers["Location"]) == (302, links[1])
    found, body = client.ask(links[1])
    clips = sorted({source for source in Page(body.decode()).addresses() if source.endswith(".mp4")})
    assert found.status == 200 and len(clips) == 2 and SECRET not in body.decode() and NASTY not in body.decode()
    found, body = client.ask(links[1] + clips[0])
    assert found.headers["Content-Type"] == "video/mp4" and body == (folder / "later" / ODD / "validation/step_0/own name.mp4").read_bytes()
    for name, wanted in (("X-Content-Type-Options", "nosniff"), ("Content-Security-Policy", "frame-ancestors 'none'"),
                         ("Cross-Origin-Resource-Policy", "same-origin")):  # fmt: skip
        assert found.headers[name] == wanted
    found, body = client.ask("/status.json")
    assert [run["state"] for run in json.loads(body)["runs"]] == ["finished"] * 2 and found.headers["Content-Type"] == "application/json"
    found, body = client.ask("/", "HEAD")
    assert found.status == 200 and int(found.headers["Content-Length"]) > 500 and not body


@pytest.mark.parametrize(("asked", "status", "part"), [
    ("bytes=0-3", 206, slice(0, 4)), ("bytes=10-", 206, slice(10, None)), ("bytes=-5", 206, slice(-5, None)),
    ("bytes=2-999999999", 206, slice(2, None)), ("bytes=999999999-", 416, slice(0, 0)), ("bytes=5-2", 416, slice(0, 0)),
    ("bytes=-0", 416, slice(0, 0)), ("bytes=-", 200, slice(None)), ("bytes=0-1,4-5", 200, slice(None)), ("lines=1-2", 200, slice(None)),
])  # fmt: skip
def test_players_get_the_part_they_ask_for(client: Client, folder: Path, asked: str, status: int, part: slice) -> None:
    whole = (folder / "later" / ODD / "validation/step_0/own name.mp4").read_bytes()
    found, body = client.ask(f"/run/later/{quote(ODD)}/validation/step_0/own%20name.mp4", Range=asked)
    assert found.status == status and body == whole[part]
    if status == 206:
        first = range(len(whole))[part][0]
        assert found.headers["Content-Range"] == f"bytes {first}-{first + len(body) - 1}/{len(whole)}"


@pytest.mark.parametrize("address", [
    "/run", "/run/", "/run/nothing/", "/run/first/run.json", "/run/first/../private.mp4", "/run/first/%2e%2e/private.mp4",
    "/run/first//etc/passwd", "/run/first/a%00.mp4", "/run/first/validation/none.mp4", "/run/first/validation", "/private.mp4",
    f"/run/later/{quote(ODD)}/validation/link.mp4", f"/run/later/{quote(ODD)}/config.resolved.json", "/../private.mp4", "/%ff",
])  # fmt: skip
def test_nothing_else_is_given_away(client: Client, address: str) -> None:
    found, body = client.ask(address)
    assert found.status == 404 and b"not a run's" not in body


def test_it_answers_to_this_machine_alone(client: Client) -> None:
    for name, status in (("localhost:9999", 200), ("127.0.0.1", 200), ("[::1]:80", 200), ("evil.example", 421), ("localhost.evil:80", 421),
                         ("", 421)):  # fmt: skip
        found, body = client.ask("/", Host=name)
        assert found.status == status and (b"first" in body) == (status == 200)
    assert client.ask("/", "POST")[0].status == 501


def test_a_report_is_made_anew_when_something_was_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run, made, render = write_run(tmp_path / "run", steps=3, samples=False), [], module.render
    monkeypatch.setattr(module, "render", lambda history: made.append(history) or render(history))
    monkeypatch.setattr(module, "KEPT", 1)
    pages = Pages(tmp_path)
    first = pages.report(tmp_path / "run")
    assert pages.report(tmp_path / "run") == first and len(made) == 1
    run.event("notice", text="something new")
    assert "something new" in pages.report(tmp_path / "run") and len(made) == 2
    write_run(tmp_path / "other", steps=3, samples=False)
    pages.report(tmp_path / "other")
    assert list(pages._made) == [tmp_path / "other"]


def test_a_run_that_cannot_be_shown_does_not_end_it(
    client: Client, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(Pages, "report", lambda self, path: 1 / 0)
    with pytest.raises(RemoteDisconnected):
        client.ask("/run/first/")
    assert client.ask("/")[0].status == 200 and "ZeroDivisionError" in caplog.text


def test_a_folder_that_is_a_run_or_has_none_yet(tmp_path: Path) -> None:
    assert "There is no run here yet" in Pages(tmp_path).overview()
    write_run(tmp_path, steps=3, samples=False)
    assert list(Pages(tmp_path).runs()) == [tmp_path.name]


def test_the_command_says_where_and_ends_with_ctrl_c(folder: Path) -> None:
    command = [sys.executable, "-m", "tuner.cli.main", "server", str(folder), "--port", "0"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    said = re.fullmatch(r"http://127\.0\.0\.1:(\d+)/\n", process.stdout.readline())
    assert said and client_of(said).ask("/")[0].status == 200
    process.send_signal(signal.SIGINT)
    assert process.communicate(timeout=20) == ("", "") and process.returncode == 0


def client_of(said: re.Match[str]) -> Client:
    return Client(int(said[1]))


def test_a_port_in_use_and_a_missing_folder(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with serve(folder, 0) as server:
        assert tuner(["server", str(folder), "--port", str(server.server_address[1])]) == 3
    assert "--port: the port cannot be used: Address already in use" in capsys.readouterr().err
    assert tuner(["server", "nowhere"]) == 2
    assert "there is no such folder" in capsys.readouterr().err
