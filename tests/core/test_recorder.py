"""What a run keeps current for those who watch: its heartbeat, its pace, its report; and that nothing of it can stop the run."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tuner.train import recorder as recording
from tuner.train.recorder import Recorder
from tuner.train.run import RunFolder
from tuner.watch.folder import RunFiles
from tuner.watch.pace import MemoryReading

ROW = {"loss": 0.5, "loss/video": 0.5, "loss/video/sigma_0.00-0.25": 0.5, "lr": 1e-4}


class Clock:
    """Seconds that pass only when told."""

    def __init__(self) -> None:
        self.moment = 50.0

    def __call__(self) -> float:
        return self.moment


def memory() -> MemoryReading:
    return MemoryReading("GPU", 1, 2, 3)


def made(folder: Path, clock: Callable[[], float], said: list[str] | None = None, active: bool = True, beat: float = 60.0) -> Recorder:
    note = [].append if said is None else said.append
    return Recorder(RunFolder(folder), 100, note, active=active, clock=clock, memory=memory, beat=beat)


def beat(folder: Path) -> dict[str, object]:
    return dict(RunFiles(folder).json("heartbeat.json"))


def test_heartbeat_and_pace_follow_the_steps(tmp_path: Path) -> None:
    clock = Clock()
    with made(tmp_path, clock) as recorder:
        assert beat(tmp_path)["state"] == "starting"
        recorder.stage("loading")
        assert beat(tmp_path)["state"] == "loading"
        for step in range(1, 8):
            clock.moment += 0.4
            recorder.step(step, ROW)
        found = beat(tmp_path)
        assert (found["step"], found["total"], found["state"]) == (7, 100, "training")
        assert found["metrics"] == {"loss": 0.5, "loss/video": 0.5, "lr": 1e-4}
        assert found["seconds_per_step"] == pytest.approx(0.4) and found["memory"] == {"place": "GPU", "now": 1, "peak": 2, "limit": 3}
        # 0.4 s a step and a row a second: after steps 3 and 6
        assert [row["step"] for row in RunFiles(tmp_path).rows("pace.jsonl")] == [3, 6]
        recorder.stage("finished", 7)
    assert beat(tmp_path)["state"] == "finished" and (tmp_path / "report.html").is_file()


def test_a_run_that_raises_is_recorded_as_failed_with_a_report(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), made(tmp_path, Clock()) as recorder:
        recorder.folder.event("failed", reason="for a reason")
        raise ZeroDivisionError
    assert beat(tmp_path)["state"] == "failed" and "for a reason" in (tmp_path / "report.html").read_text()


def test_a_run_that_a_signal_ends_is_recorded_as_stopped(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), made(tmp_path, Clock()):
        raise KeyboardInterrupt
    assert beat(tmp_path)["state"] == "stopped" and (tmp_path / "report.html").exists()


def test_reports_follow_news_and_take_a_small_share_of_the_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock, written = Clock(), []

    def write(folder: Path, write: object) -> None:
        clock.moment += 1.0  # a report takes a second
        written.append(clock.moment)

    monkeypatch.setattr(recording, "write_report", write)
    with made(tmp_path, clock) as recorder:
        recorder.step(1, ROW)
        assert written == []
        recorder.folder.event("checkpoint", step=1, path="checkpoint-1")
        recorder.step(2, ROW)
        assert len(written) == 1
        recorder.step(3, ROW)
        assert len(written) == 1  # no news
        recorder.folder.event("sample", step=3)
        clock.moment += 49.0
        recorder.step(4, ROW)
        assert len(written) == 1  # 1 s in 49 s is more than 2 %
        clock.moment += 1.1
        recorder.step(5, ROW)
        assert len(written) == 2
    assert len(written) == 3


def test_a_report_that_fails_is_a_note(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []

    def broken(folder: Path, write: object) -> None:
        raise RecursionError("too deep")

    monkeypatch.setattr(recording, "write_report", broken)
    with made(tmp_path, Clock(), said):
        pass
    assert said == ["report.html was not written: RecursionError: too deep"]


def test_a_dataset_that_cannot_be_described_is_a_note(tmp_path: Path) -> None:
    said: list[str] = []
    with made(tmp_path, Clock(), said) as recorder:
        recorder.dataset(None, 1, 0)  # type: ignore[arg-type]
    assert len(said) == 1 and said[0].startswith("dataset.json was not written: AttributeError")


def test_a_run_that_computes_for_long_beats_on(tmp_path: Path) -> None:
    with made(tmp_path, Clock(), beat=0.02) as recorder:
        recorder.stage("caching")
        first = beat(tmp_path)
        end = time.monotonic() + 30
        while (later := beat(tmp_path))["time"] == first["time"] and time.monotonic() < end:
            time.sleep(0.01)
        assert later["time"] > first["time"] and later["state"] == "caching"  # type: ignore[operator]
        recorder.folder.heartbeat(3, 100, "validating")  # by others, too
        assert beat(tmp_path)["started"] == first["started"] and beat(tmp_path)["state"] == "validating"


def test_what_cannot_be_written_is_said_once_and_ends_nothing(tmp_path: Path) -> None:
    said: list[str] = []
    with made(tmp_path / "run", Clock(), said, beat=0.01) as recorder:
        (tmp_path / "run").rename(tmp_path / "moved")
        time.sleep(0.05)
        for step in (1, 2, 3):
            recorder.step(step, ROW)
        recorder.stage("saving")
    names = [words.partition(" ")[0] for words in said]
    assert sorted(names) == ["heartbeat.json", "report.html"] and all("was not written" in words for words in said)


def test_other_ranks_write_nothing(tmp_path: Path) -> None:
    with made(tmp_path, Clock(), active=False) as recorder:
        recorder.stage("loading")
        recorder.step(1, ROW)
    assert list(tmp_path.iterdir()) == []


def test_listeners_hear_events_after_they_are_written(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    heard: list[object] = []
    run.listeners.append(lambda kind, facts: heard.append((kind, dict(facts), json.loads((tmp_path / "events.jsonl").read_text())["kind"])))
    run.event("sample", step=3, label="x")
    assert heard == [("sample", {"step": 3, "label": "x"}, "sample")]
