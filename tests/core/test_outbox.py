"""The outbox on a real disk, and its way to a hub that is a stub."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard
from huggingface_hub.errors import OfflineModeIsEnabled
from huggingface_hub.utils import validate_repo_id

from core.hub_stub import HubStub, refusal
from tuner.cli.main import run
from tuner.config.resolve import Settings, resolve
from tuner.errors import CheckpointError, ConfigError, DiskError, HubError
from tuner.model.licence import UNKNOWN_LICENCE
from tuner.plugins.loader import load_plugins
from tuner.train.publish import outbox as boxes
from tuner.train.publish.outbox import Outbox, fill, last_samples, read, repository_name
from tuner.train.publish.upload import check_destination, send

CARD = f"---\nlicense: other\ntags:\n- lora\n---\n\n# waves\n\n{UNKNOWN_LICENCE}\n\nload OWNER/waves\n"


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> HubStub:
    return HubStub().install(monkeypatch)


@pytest.fixture
def box(tmp_path: Path) -> Outbox:
    """A run with one weight file and one sample, filled."""
    folder = tmp_path / "a run"
    (folder / "validation" / "step_9").mkdir(parents=True)
    (folder / "validation" / "step_10").mkdir()
    (folder / "validation" / "step_9" / "old.mp4").write_bytes(b"old")
    (folder / "validation" / "step_10" / "sample.mp4").write_bytes(b"clip")
    (folder / "validation" / "step_10" / "notes.txt").write_bytes(b"none")
    (folder / "lora.safetensors").write_bytes(b"weights")
    return fill(Outbox(folder, "waves", "OWNER/waves", base="maker/model"), CARD, [folder / "lora.safetensors"], last_samples(folder))


def settings(**values: Any) -> Settings:
    registry = load_plugins({"TUNER_PLUGINS": "builtins"})
    flags = {key: str(value) for key, value in {"push_to_hub": True, **values}.items()}
    return resolve(registry.option_types, config_file=None, flags=flags, environ={}, hint=registry.hint())


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# --- the folder --------------------------------------------------------------------------------------------------
def test_it_holds_links_and_is_read_back(box: Outbox, monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = {"README.md": CARD.encode(), "lora.safetensors": b"weights", "samples/sample.mp4": b"clip"}
    weights = box.run / "lora.safetensors"
    assert contents(box.folder) == wanted and read(box.run) == box
    assert (box.folder / "lora.safetensors").stat().st_ino == weights.stat().st_ino

    def no_links(*_: object) -> None:
        raise OSError(errno.EPERM, "no links here")

    monkeypatch.setattr(os, "link", no_links)
    (box.folder / "left-over").touch()
    fill(box, CARD, [weights], last_samples(box.run))
    assert contents(box.folder) == wanted and weights.stat().st_nlink == 1
    assert sorted(path.name for path in box.folder.parent.iterdir()) == ["outbox.json", "waves"]


def test_what_cannot_be_read_or_written_says_why(box: Outbox, tmp_path: Path) -> None:
    with pytest.raises(DiskError, match="cannot be filled"):
        fill(box, CARD, [tmp_path / "gone"], [])
    (tmp_path / "file").touch()
    with pytest.raises(CheckpointError, match="nothing is ready"):
        read(tmp_path)
    box.card.write_bytes(b"\xff")
    with pytest.raises(CheckpointError, match="UTF-8"):
        box.card_text()
    box.card.unlink()
    with pytest.raises(CheckpointError, match=r"README\.md"):
        read(box.run)
    (box.run / boxes.FOLDER / boxes.RECORD).write_text('{"name": 1, "other": 2}')
    with pytest.raises(CheckpointError, match=r"outbox\.json cannot be read"):
        read(box.run)


@pytest.mark.parametrize("text", ["my run", "..", "a--b", "-x.", "ä", "a.git", "x" * 200, "", "ok-1.0_b"])
def test_any_folder_name_becomes_a_repository_name(text: str) -> None:
    validate_repo_id(repository_name(text))
    assert repository_name("ok-1.0_b") == "ok-1.0_b" and repository_name("my run") == "my-run"


# --- before the run ----------------------------------------------------------------------------------------------
def test_where_a_result_goes(hub: HubStub) -> None:
    told: list[str] = []

    def goes(**values: Any) -> tuple[str, str, bool, bool]:
        found = check_destination(settings(**values), told.append)
        return found.name, found.repository, found.private, found.online

    assert goes(output_dir="some where/my run") == ("my-run", "ann/my-run", True, True)
    assert goes(tracker_run_name="blue", hub_private=False) == ("blue", "ann/blue", False, True)
    assert goes(hub_model_id="red") == ("red", "ann/red", True, True)
    assert goes(hub_model_id="Club/red") == ("red", "Club/red", True, True)
    assert goes(hub_model_id="ann/red", push_to_hub=False) == ("red", "ann/red", True, False)
    for failure in (OfflineModeIsEnabled("off"), ConnectionError("https://hub?key=secret"), refusal(503)):
        hub.failing["whoami"] = failure
        assert goes(hub_model_id="red") == ("red", "", True, False)
    assert len(told) == 3 and all("when training has ended" in line and "secret" not in line for line in told)


READ = {"accessToken": {"role": "read"}}
WRITE = {"accessToken": {"role": "write"}}


def fine(name: str, *permissions: str) -> dict[str, Any]:
    """What a fine-grained token for one owner or repository looks like."""
    return {"accessToken": {"role": "fineGrained", "fineGrained": {"scoped": [{"entity": {"name": name}, "permissions": permissions}]}}}


@pytest.mark.parametrize(
    ("auth", "repository", "problem"),
    [
        (WRITE, "ann/x", ""), (READ, "ann/x", "may read"), ({}, "ann/x", ""),
        (fine("ann", "repo.write"), "ann/x", ""), (fine("ann/x", "repo.write"), "ann/x", ""),
        (fine("ann", "repo.content.read"), "ann/x", "may read"), (fine("ann/y", "repo.write"), "ann/x", "may read"),
        (WRITE, "club/x", ""), (WRITE, "readers/x", "may only read"), (WRITE, "bob/x", "no member"), (WRITE, "ann/open", "is public"),
    ],
)  # fmt: skip
def test_a_run_that_cannot_be_uploaded_fails_first(auth: dict[str, Any], repository: str, problem: str, hub: HubStub) -> None:
    hub.private |= {"ann/open": False, "ann/x": True}
    orgs = [{"name": "club", "roleInOrg": "contributor"}, {"name": "readers", "roleInOrg": "read"}]
    hub.who = {"name": "ann", "orgs": orgs, "auth": auth}
    asked = settings(hub_model_id=repository)
    if not problem:
        assert check_destination(asked, pytest.fail).repository == repository
        return
    with pytest.raises(HubError, match=problem):
        check_destination(asked, pytest.fail)


def test_no_token_a_bad_token_a_bad_name(hub: HubStub, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.failing["whoami"] = refusal(401)
    with pytest.raises(HubError, match="does not accept the token") as caught:
        check_destination(settings(), pytest.fail)
    assert "hf auth login" in caught.value.remedy and caught.value.exit_code == 8
    with pytest.raises(ConfigError, match="hub_model_id"):
        check_destination(settings(hub_model_id="a/b/c", push_to_hub=False), pytest.fail)
    hub.calls.clear()
    hub.install(monkeypatch, token=None)
    with pytest.raises(HubError, match="no token") as caught:
        check_destination(settings(), pytest.fail)
    assert "hf auth login" in caught.value.remedy and hub.calls == []


# --- sending -----------------------------------------------------------------------------------------------------
def test_sending_completes_the_card_and_may_be_repeated(box: Outbox, hub: HubStub) -> None:
    hub.cards["maker/model"] = {"license": "other", "license_name": "own: one", "license_link": "https://x/licence"}
    box.card.write_text(CARD + "my own words\n")
    sent = send(box)
    assert hub.private == {"ann/waves": True} and hub.files["ann/waves"] == contents(box.folder)
    card = ModelCard(box.card.read_text())
    assert (card.data.license, card.data.license_name, card.data.license_link) == ("other", "own: one", "https://x/licence")
    assert card.data.tags == ["lora"] and "[own: one](https://x/licence)" in card.text
    assert "load ann/waves" in card.text and "my own words" in card.text and UNKNOWN_LICENCE not in card.text
    again = read(box.run)
    assert again == sent and again.repository == "ann/waves" and again.sent is not None and again.sent["repository"] == "ann/waves"
    before = contents(box.folder)
    send(again)
    assert contents(box.folder) == before == hub.files["ann/waves"]


def test_private_stays_private_and_public_is_asked_for(box: Outbox, hub: HubStub) -> None:
    send(box)
    hub.calls.clear()
    send(read(box.run), private=False)
    assert hub.private == {"ann/waves": False}
    assert hub.calls.index("upload_folder") < hub.calls.index("update_repo_settings")
    hub.private["ann/open"], hub.files = False, {}
    with pytest.raises(HubError, match=r"this one is public[^>]*-> add --public"):
        send(box, "ann/open")
    assert hub.files == {}


def test_push_sends_later(
    box: Outbox, hub: HubStub, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.failing["upload_folder"] = refusal(403)
    assert run(["push", str(box.run)]) == 8
    printed = capsys.readouterr().err
    assert "ann/waves: the upload failed" in printed and "HTTP 403" in printed and "hf auth login" in printed and "signature" not in printed
    hub.failing["upload_folder"] = RuntimeError("transfer of https://store/x?sig=abc broke")
    assert run(["push", str(box.run)]) == 8
    assert "sig=abc" not in (printed := capsys.readouterr().err) and "transfer of ... broke" in printed
    assert read(box.run).sent is None
    del hub.failing["upload_folder"]
    assert run(["push", str(box.run), "--repo", "club/sea", "--public"]) == 0
    assert capsys.readouterr().out.strip().endswith("/club/sea") and hub.private["club/sea"] is False
    assert b"load club/sea" in hub.files["club/sea"]["README.md"]
    assert run(["push", str(box.run), "--repo", "a b"]) == 2
    assert run(["push", str(box.run.parent)]) == 6 and not (box.run.parent / ".lock").exists()
    hub.install(monkeypatch, token=None)
    assert run(["push", str(box.run)]) == 8
    assert "there is no token" in capsys.readouterr().err


def test_pushing_costs_no_torch() -> None:
    code = "import sys, tuner.cli.push, tuner.train.publish.outbox, tuner.train.publish.upload; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
