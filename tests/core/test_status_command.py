"""`tuner status`: what is told of runs that go on, ended, failed or died, from their folders alone."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import threading
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from core.watched import GIB, write_run
from tuner.cli.main import run as tuner
from tuner.train.run import RunFolder, now
from tuner.watch.folder import RunFiles, find_runs
from tuner.watch.status import read_status

Capture = pytest.CaptureFixture[str]


def change_beat(folder: Path, **facts: object) -> None:
    """Changes heartbeat.json; None removes a key."""
    beat = json.loads((folder / "heartbeat.json").read_text()) | facts
    (folder / "heartbeat.json").write_text(json.dumps({key: value for key, value in beat.items() if value is not None}))


def running(folder: Path, step: int = 12, total: int = 40) -> RunFolder:
    """A run of this very process."""
    run = write_run(folder, steps=20, state="training", samples=False)
    metrics = {"loss": 0.75, "loss/video": 0.5, "loss/audio": 0.25, "grad_norm": 0.125, "lr": 1e-4, "samples": 3.0}
    memory = {"place": "GPU", "now": 10 * GIB, "peak": 12 * GIB, "limit": 24 * GIB}
    facts = {"started": now(), "stepped": now(), "seconds_per_step": 1.5, "metrics": metrics, "memory": memory}
    run.heartbeat(step, total, "training", facts)
    return run


def ended_process() -> int:
    """The number of a process that is no more."""
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


def test_a_run_that_goes_on(tmp_path: Path) -> None:
    running(tmp_path)
    status = read_status(tmp_path)
    assert (status.state, status.doing, status.step, status.total, status.model) == ("running", "training", 12, 40, "tiny 2.0")
    assert status.eta == 1.5 * 28 and status.seconds_per_step == 1.5 and status.pid == os.getpid() and status.host == socket.gethostname()
    assert status.metrics["loss/video"] == 0.5 and status.heldout == {"video": 20.5, "audio": 0.25}
    assert status.checkpoint == "checkpoint-20" and status.next_checkpoint == 20 and status.memory["limit"] == 24 * GIB
    assert status.silent is not None and status.silent < 60 and status.waiting is not None and status.waiting < 60


@pytest.mark.parametrize("state", ["finished", "stopped", "failed"])
def test_runs_that_ended(tmp_path: Path, state: str) -> None:
    run = write_run(tmp_path, state=state)
    run.event("failed", error="DataError", reason="the disk\nis gone")
    status = read_status(tmp_path)
    assert status.state == state and status.eta is None and status.next_checkpoint is None and status.waiting is None
    assert status.reason == ("the disk\nis gone" if state == "failed" else "")
    assert status.sample == "validation/step_20/noise.wav"


def test_a_process_that_is_gone_has_died(tmp_path: Path) -> None:
    running(tmp_path)
    change_beat(tmp_path, pid=ended_process())
    assert read_status(tmp_path).state == "died"


def test_another_process_with_its_number_does_not_count(tmp_path: Path) -> None:
    running(tmp_path)
    change_beat(tmp_path, started="2020-01-01T00:00:00+00:00")  # this process is younger than that
    assert read_status(tmp_path).state == "died"


@pytest.mark.parametrize(("seconds", "state"), [(5, "running"), (119, "running"), (121, "died")])
def test_on_another_machine_the_heartbeat_tells(tmp_path: Path, seconds: int, state: str) -> None:
    running(tmp_path)
    change_beat(tmp_path, host="far-away", pid=1)
    beat = datetime.fromisoformat(json.loads((tmp_path / "heartbeat.json").read_text())["time"])
    assert read_status(tmp_path, now=beat + timedelta(seconds=seconds)).state == state
    assert read_status(tmp_path, now=beat - timedelta(seconds=9)).silent == 0  # clocks differ


def test_without_a_heartbeat_the_last_event_tells(tmp_path: Path) -> None:
    run = write_run(tmp_path, steps=20, state="finished", samples=False)
    run.event("finished", step=20)
    for content in ("{", None):
        if content is None:
            (tmp_path / "heartbeat.json").unlink()
        else:
            (tmp_path / "heartbeat.json").write_text(content)
        assert read_status(tmp_path).state == "finished"
    run.event("resumed", step=20)
    assert read_status(tmp_path).state == "died"


def test_half_written_files_are_read_as_far_as_they_are_whole(tmp_path: Path) -> None:
    running(tmp_path)
    for name in ("events.jsonl", "metrics.jsonl"):
        with (tmp_path / name).open("a") as file:
            file.write('{"kind": "checkpoint", "path": "checkpoint-99", "st')
    assert read_status(tmp_path).checkpoint == "checkpoint-20"
    assert RunFiles(tmp_path).last_row("metrics.jsonl")["step"] == 20
    (tmp_path / "heartbeat.json").write_text("{")
    status = read_status(tmp_path)
    assert status.state == "died" and status.metrics["loss"] == 0.05 and status.total == 0


# --- the command -------------------------------------------------------------------------------------------------
def test_one_run_in_words(tmp_path: Path, capsys: Capture) -> None:
    running(tmp_path / "waves")
    assert tuner(["status", str(tmp_path)]) == 0
    shown = dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines())
    assert shown["run"] == str(tmp_path / "waves") and shown["state"] == "running (training)" and shown["step"] == "12/40 (30%)"
    assert shown["pace"] == "1.5 s/step, 2 samples/s" and shown["left"] == "0:00:42" and shown["loss"] == "video 0.5000 | audio 0.2500"
    assert shown["memory"] == "GPU 10.0 GiB, at most 12.0 of 24.0" and shown["checkpoint"] == "checkpoint-20, next at step 20"
    assert shown["gradient"] == "0.125" and shown["rate"] == "1.00e-04" and shown["process"] == f"{os.getpid()} on {socket.gethostname()}"
    assert "remark" not in shown and shown["held"].split() == ["out", "video", "20.5000", "|", "audio", "0.2500"]


def test_several_runs_a_row_each(tmp_path: Path, capsys: Capture) -> None:
    running(tmp_path / "a")
    write_run(tmp_path / "deep" / "b", samples=False)
    failed = write_run(tmp_path / "c", state="failed", samples=False)
    failed.event("failed", error="NumericError", reason="loss is not finite\nmore")
    running(tmp_path / "d")
    change_beat(tmp_path / "d", pid=ended_process())
    unsaved = RunFolder(tmp_path / "e")
    unsaved.event("started")
    (tmp_path / "e" / "run.json").write_text("{}")
    unsaved.heartbeat(3, 9, "training")
    change_beat(tmp_path / "e", pid=ended_process())
    (tmp_path / ".hidden").mkdir()
    write_run(tmp_path / ".hidden" / "e", samples=False)
    assert tuner(["status", str(tmp_path)]) == 0
    head, *rows = capsys.readouterr().out.splitlines()
    assert head.split() == ["RUN", "STATE", "STEP", "S/STEP", "LEFT", "LOSS", "CHECKPOINT", "REMARK"]
    assert [row.split()[1] for row in rows] == ["running", "failed", "died", "finished", "died"]
    assert rows[1].endswith("loss is not finite") and "--resume_from_checkpoint latest" in rows[2]
    assert "no checkpoint was saved" in rows[4]


def test_json_is_one_object(tmp_path: Path, capsys: Capture) -> None:
    running(tmp_path / "waves")
    assert tuner(["status", str(tmp_path), "--json"]) == 0
    (run,) = json.loads(capsys.readouterr().out)["runs"]
    assert (run["name"], run["state"], run["step"], run["total"], run["eta"]) == ("waves", "running", 12, 40, 42.0)
    assert run["path"] == str(tmp_path / "waves") and run["metrics"]["grad_norm"] == 0.125


def test_the_current_folder_is_the_default(tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    write_run(tmp_path / "output", samples=False)
    monkeypatch.chdir(tmp_path)
    assert tuner(["status"]) == 0 and "finished" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["", "nowhere", "file"])
def test_no_run_is_exit_code_2(tmp_path: Path, capsys: Capture, name: str) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "a" / "b" / "c" / "d").mkdir(parents=True)
    RunFolder(tmp_path / "a" / "b" / "c" / "d").event("too deep")
    assert tuner(["status", str(tmp_path / name)]) == 2
    assert "RUN" in capsys.readouterr().err


def test_remarks(tmp_path: Path, capsys: Capture) -> None:
    def remark(**facts: object) -> str:
        change_beat(tmp_path, **facts)
        tuner(["status", str(tmp_path)])
        return next((line.split(maxsplit=1)[1] for line in capsys.readouterr().out.splitlines() if line.startswith("remark")), "")

    running(tmp_path)
    ago = (datetime.now(UTC) - timedelta(seconds=100)).isoformat()
    assert remark() == ""
    assert remark(stepped=ago).startswith("no step for 0:01:4")
    assert remark(seconds_per_step=30.0) == ""  # steps of half a minute may keep one waiting
    assert remark(stepped=now(), time=ago).startswith("no heartbeat for 0:01:4")


def test_watching_ends_with_the_run(tmp_path: Path, capsys: Capture) -> None:
    run = running(tmp_path)

    def finish() -> None:
        time.sleep(0.5)
        run.heartbeat(40, 40, "finished")

    thread = threading.Thread(target=finish)
    thread.start()
    assert tuner(["status", str(tmp_path), "--watch", "0.2"]) == 0
    thread.join()
    shown = capsys.readouterr().out
    assert shown.count("running (training)") >= 1
    assert "state       finished" in shown and "40/40 (100%)" in shown


def test_runs_are_found_in_order_and_not_inside_runs(tmp_path: Path) -> None:
    write_run(tmp_path / "b", samples=False)
    write_run(tmp_path / "b" / "outbox", samples=False)
    write_run(tmp_path / "a" / "x", samples=False)
    (tmp_path / "link").symlink_to(tmp_path / "b")
    assert find_runs(tmp_path) == [tmp_path / "a" / "x", tmp_path / "b"]


def test_status_costs_no_torch() -> None:
    program = "import sys, tuner.cli.status; print([name for name in ('torch', 'av', 'numpy', 'pydantic') if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.strip() == "[]"
