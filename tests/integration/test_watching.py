"""Watching a real run: its folder, its page, its status, its trackers."""

from __future__ import annotations

import json
import os
import pty
import signal
import threading
from pathlib import Path

import pytest

from core.watched import Page
from integration.project import Project
from tuner.train import recorder as recording
from tuner.train import session
from tuner.watch.status import read_status

Capture = pytest.CaptureFixture[str]
SAMPLE = {
    "validation_disable": False, "validation_prompt": "a <b>drifting</b> pattern", "validation_resolution": "64x64",
    "validation_num_video_frames": 9, "validation_num_inference_steps": 1, "validation_guidance": 1, "validation_step_interval": 2,
}  # fmt: skip


def test_a_run_leaves_a_page_with_everything_in_it(project: Project, capsys: Capture) -> None:
    assert project.train(**SAMPLE) == 0
    capsys.readouterr()
    page = Page(Path("out/report.html").read_text())
    drawn = {chart["title"]: chart["series"] for chart in page.data["charts"]}  # type: ignore[attr-defined, index]
    rows = project.metrics()
    assert drawn["Loss"][0]["y"] == [float(f"{row['loss']:.5g}") for row in rows]
    assert {"Loss of video by noise level", "Loss of audio by noise level", "Learning rate", "Gradient norm"} <= set(drawn)
    assert [video["src"] for video in page.named("video")] == [str(event["path"]) for event in project.events("sample")]
    clips = len(list(Path("clips").glob("*.mp4")))
    assert len(page.named("img")) == clips and f"found {clips} = used {clips}" in page.text
    assert "a <b>drifting</b> pattern" in page.text and not page.named("b") and "finished" in page.text
    assert str(Path.cwd()) not in Path("out/report.html").read_text()
    assert project.tuner("status", "out") == 0
    told = dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines())
    assert told["state"] == "finished" and told["step"] == "4/4 (100%)" and told["checkpoint"] == "checkpoint-4"
    assert told["report"] == "out/report.html"


def test_a_page_that_cannot_be_made_costs_nothing(project: Project, capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*arguments: object) -> None:
        raise ZeroDivisionError("in a chart")

    monkeypatch.setattr(recording, "write_report", broken)
    assert project.train() == 0
    shown = capsys.readouterr().out
    assert "report.html was not written: ZeroDivisionError: in a chart" in shown
    assert Path("out/lora.safetensors").is_file() and not Path("out/report.html").exists()


def test_a_run_that_fails_says_so_on_its_page(project: Project, capsys: Capture) -> None:
    assert project.train(max_train_steps=6, learning_rate=1e30, max_grad_norm=0) == 7
    status = read_status(Path("out"))
    assert status.state == "failed" and "finite" in status.reason
    assert "finite" in Page(Path("out/report.html").read_text()).text


def test_a_run_that_is_ended_before_its_first_step_was_stopped(project: Project, capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(session, "assemble", lambda *arguments: signal.raise_signal(signal.SIGTERM))
    with pytest.raises(SystemExit) as ended:
        project.train()
    assert ended.value.code == 143 and "SIGTERM: ending" in capsys.readouterr().out
    assert read_status(Path("out")).state == "stopped" and project.events("stopped")[0]["step"] == 0 and not project.events("failed")


def test_tensorboard_gets_what_metrics_jsonl_holds(project: Project, capsys: Capture) -> None:
    event_accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    assert project.train(report_to="tensorboard", **SAMPLE) == 0
    assert project.events("tracker") == []
    read = event_accumulator.EventAccumulator("out/tensorboard")
    read.Reload()
    rows = project.metrics()
    for name in ("loss", "loss/video", "lr"):
        assert [(e.step, e.value) for e in read.Scalars(name)] == [(row["step"], pytest.approx(row[name], rel=1e-6)) for row in rows]
    assert "settings/text_summary" in read.Tags()["tensors"]
    assert [event.step for event in read.Tensors("samples/sample/text_summary")] == [event["step"] for event in project.events("sample")]


def test_a_tracker_without_its_library_stops_the_run_before_it_begins(
    project: Project, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert project.train(report_to="trackio") == 3
    assert "pip install 'tuner-framework[trackio]'" in capsys.readouterr().err and not Path("out").exists()
    assert project.train(report_to="tensorbord") == 2
    assert "did you mean tensorboard" in capsys.readouterr().err


def test_the_command_on_a_terminal_draws_one_live_line(project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CI", raising=False)
    monkeypatch.setenv("TERM", "xterm")
    ours, theirs = pty.openpty()
    received: list[bytes] = []

    def read() -> None:
        while True:
            try:
                received.append(os.read(ours, 65536))
            except OSError:
                return

    reader = threading.Thread(target=read)
    reader.start()
    with os.fdopen(theirs, "w", encoding="utf-8") as terminal, monkeypatch.context() as patch:
        patch.setattr("sys.stdout", terminal)
        assert project.train() == 0
    reader.join(30)
    os.close(ours)
    shown = b"".join(received).decode()
    assert "\x1b[?25l" in shown and shown.rindex("\x1b[?25h") > shown.rindex("\x1b[?25l")
    assert "4/4" in shown and "s/step" in shown and "RAM" in shown and "ETA 0:00:00" in shown and "next checkpoint" in shown
    assert "loss video" in shown.replace("\r\n", " ") and "/out/checkpoint-2" in shown


def test_the_heartbeat_names_process_and_numbers(project: Project, capsys: Capture) -> None:
    assert project.train() == 0
    beat = json.loads(Path("out/heartbeat.json").read_text())
    assert beat["pid"] == os.getpid() and beat["state"] == "finished" and beat["metrics"]["loss"] == project.metrics()[-1]["loss"]
    assert beat["memory"]["place"] == "RAM" and 0 < beat["memory"]["now"] <= beat["memory"]["limit"]
    assert set(json.loads(Path("out/pace.jsonl").read_text().splitlines()[-1])) == {"time", "step", "seconds", "memory"}
