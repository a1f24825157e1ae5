"""The status line's numbers, against figures worked out by hand on a clock that the test turns."""

from __future__ import annotations

import fcntl
import io
import os
import re
import struct
import termios
import threading
from collections.abc import Callable

import pytest
from rich.console import Console

from core.screen import Screen
from tuner.cli.status_line import CacheBar, StatusLine, is_interactive, wrap_fields
from tuner.watch.pace import MemoryReading, StepTimer, read_memory

GIB = 2**30
ROW = {
    "loss": 0.5, "loss/video": 0.12345, "loss/audio": 0.5, "loss/video/sigma_0.00-0.25": 9.0, "grad_norm": 0.314, "lr": 1e-4,
    "samples": 2.0,
}  # fmt: skip


class Clock:
    """Seconds that pass only when told."""

    def __init__(self) -> None:
        self.moment = 100.0

    def __call__(self) -> float:
        return self.moment


def memory() -> MemoryReading:
    return MemoryReading("GPU", 20 * GIB, 22 * GIB, 24 * GIB)


def plain_console() -> tuple[Console, io.StringIO]:
    file = io.StringIO()
    return Console(file=file, force_terminal=False, width=80), file


def terminal(width: int = 200) -> tuple[Console, io.StringIO]:
    file = io.StringIO()
    return Console(file=file, force_terminal=True, width=width, height=20, color_system=None, _environ={"TERM": "xterm"}), file


def visible(text: str) -> str:
    """Without control sequences."""
    return re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", text)


def test_plain_line_holds_every_field() -> None:
    clock = Clock()
    console, file = plain_console()
    line = StatusLine(console, 100, interactive=False, first_step=9, checkpoint_interval=25, clock=clock, memory=memory)
    clock.moment += 2.0
    line.update(10, ROW)
    assert file.getvalue() == (
        "10/100  2.00 s/step  1.00 samples/s  GPU 20.0/22.0/24.0 GiB  loss video 0.1235 | audio 0.5000  grad 0.314  lr 1.00e-04"
        "  ETA 0:03:00  next checkpoint 25\n"
    )


def test_plain_lines_come_first_per_interval_and_last() -> None:
    clock = Clock()
    console, file = plain_console()
    with StatusLine(console, 20, interactive=False, interval=30.0, clock=clock, memory=memory) as line:
        for step in range(1, 21):
            clock.moment += 7.0
            line.update(step, ROW)
        line.close()
    # 7 s a step: the interval of 30 s is over after five steps each
    assert [text.partition("/")[0] for text in file.getvalue().splitlines()] == ["1", "6", "11", "16", "20"]


def test_stopped_run_shows_its_last_step_once() -> None:
    clock = Clock()
    console, file = plain_console()
    line = StatusLine(console, 1000, interactive=False, clock=clock, memory=memory)
    for step in (1, 2):
        clock.moment += 1.0
        line.update(step, {"loss": 0.25})
    line.close()
    line.close()
    lines = file.getvalue().splitlines()
    assert [text.partition("/")[0] for text in lines] == ["1", "2"]
    assert "loss 0.2500" in lines[1]
    assert "next checkpoint 1000" in lines[1]
    assert "samples/s" not in lines[1]
    assert "grad" not in lines[1]


def test_pace_is_the_median_of_the_last_twenty() -> None:
    timer = StepTimer(0, 0.0)
    moment = 0.0
    durations = [50.0] * 5 + [1.0] * 11 + [9.0] * 9
    for step, seconds in enumerate([*durations, 1.0], start=1):
        moment += seconds
        timer.arrived(step, moment)
    # the group of the newest step is still open: closed are the 25 before, of which the last 20 hold 11 ones and 9 nines
    assert timer.seconds_per_step() == 1.0


def test_pace_of_steps_that_arrive_in_bursts() -> None:
    timer = StepTimer(0, 0.0)
    moment = 0.0
    assert timer.seconds_per_step() is None
    for burst in range(3):
        moment += 20.0
        for step in range(10):
            timer.arrived(burst * 10 + step + 1, moment + step * 1e-4)
    assert timer.seconds_per_step() == pytest.approx(2.0, rel=1e-3)


@pytest.mark.parametrize("size", [1, 10])
def test_first_steps_of_unknown_duration_only_start_the_clock(size: int) -> None:
    timer = StepTimer(None, 500.0)
    for burst in range(4):
        for step in range(size):
            timer.arrived(1000 + burst * size + step, 500.0 + burst * 3.0 * size)
        if burst == 0:
            assert timer.seconds_per_step() is None
    assert timer.seconds_per_step() == pytest.approx(3.0)


def test_pace_of_steps_faster_than_a_burst() -> None:
    timer = StepTimer(0, 0.0)
    for step in range(1, 2001):
        timer.arrived(step, step * 0.004)
    assert timer.seconds_per_step() == pytest.approx(0.004, rel=1e-6)
    assert StepTimer(0, 0.0).seconds_per_step() is None


def test_notes_stand_above_and_are_not_markup() -> None:
    clock = Clock()
    console, file = plain_console()
    line = StatusLine(console, 5, interactive=False, clock=clock, memory=memory)
    line.note("clip [1/3] " + "x" * 100)
    assert file.getvalue() == "clip [1/3] " + "x" * 100 + "\n"


def test_live_line_redraws_in_place_and_restores_the_cursor() -> None:
    clock = Clock()
    console, file = terminal()
    with StatusLine(console, 3, interactive=True, clock=clock, memory=memory) as line:
        for step in (1, 2, 3):
            clock.moment += 1.5
            line.update(step, ROW)
            if step == 2:
                line.note("saved checkpoint-2")
    text = file.getvalue()
    assert "\x1b[?25l" in text
    assert text.rindex("\x1b[?25h") > text.rindex("\x1b[?25l")
    assert "\x1b[2K" in text
    assert "saved checkpoint-2\n" in visible(text)
    assert "3/3  1.50 s/step  1.33 samples/s" in visible(text)
    assert "ETA 0:00:00" in visible(text)


def test_live_line_is_not_redrawn_for_every_fast_step() -> None:
    clock = Clock()
    console, file = terminal()
    with StatusLine(console, 10_000, interactive=True, clock=clock, memory=memory) as line:
        for step in range(1, 501):
            clock.moment += 0.001
            line.update(step, ROW)
    drawn = {int(number) for number in re.findall(r"(\d+)/10000", visible(file.getvalue()))}
    # 0.5 s at one drawing per 0.1 s, and the last
    assert 1 in drawn
    assert 500 in drawn
    assert len(drawn) <= 7


def test_narrow_terminal_breaks_between_fields() -> None:
    assert wrap_fields(["1/20", "2.00 s/step", "loss video 0.1 | audio 0.2", "x"], 20) == "1/20  2.00 s/step\nloss video 0.1 | audio 0.2\nx"


def on_a_terminal(columns: int, work: Callable[[Console], None]) -> list[str]:
    """Runs `work` on a console over a real pseudo-terminal; returns the lines that its screen shows in the end."""
    ours, theirs = os.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    received: list[bytes] = []

    def read() -> None:
        while True:
            try:
                received.append(os.read(ours, 65536))
            except OSError:  # the other side is closed
                return

    reader = threading.Thread(target=read)
    reader.start()
    with os.fdopen(theirs, "w", encoding="utf-8") as file:
        console = Console(file=file, color_system=None, _environ={"TERM": "xterm", "COLUMNS": str(columns)})
        assert console.is_terminal
        work(console)
    reader.join(30)
    os.close(ours)
    screen = Screen(columns)
    screen.write(b"".join(received).decode())
    return [line.rstrip() for line in screen.lines]


@pytest.mark.parametrize("columns", [200, 60])
def test_a_pseudo_terminal_shows_notes_and_one_live_line(columns: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CI", raising=False)

    def work(console: Console) -> None:
        clock = Clock()
        assert is_interactive(console)
        with StatusLine(console, 30, interactive=True, first_step=0, checkpoint_interval=10, clock=clock, memory=memory) as line:
            for step in range(1, 26):
                clock.moment += 2.0
                line.update(step, ROW)
                if step % 10 == 0:
                    line.note(f"saved checkpoint-{step}")

    fields = ["25/30", "2.00 s/step", "1.00 samples/s", "GPU 20.0/22.0/24.0 GiB", "loss video 0.1235 | audio 0.5000", "grad 0.314",
              "lr 1.00e-04", "ETA 0:00:10", "next checkpoint 30"]  # fmt: skip
    shown = [line for line in on_a_terminal(columns, work) if line]
    assert shown[:2] == ["saved checkpoint-10", "saved checkpoint-20"]
    assert shown[2:] == wrap_fields(fields, columns).splitlines() and len(shown) == (3 if columns == 200 else 5)


def test_very_short_steps_keep_their_digits() -> None:
    clock = Clock()
    console, file = plain_console()
    line = StatusLine(console, 100, interactive=False, first_step=0, clock=clock, memory=memory)
    clock.moment += 0.0456
    line.update(1, {})
    assert "0.0456 s/step" in file.getvalue()


def test_memory_of_this_process() -> None:
    reading = read_memory()
    assert reading.place == "RAM"
    assert 0 < reading.now <= reading.peak <= reading.limit


@pytest.mark.parametrize(
    ("ci", "term", "expected"), [("", "xterm", True), ("false", "xterm", True), ("true", "xterm", False), ("", "dumb", False)]
)
def test_interactive_needs_a_terminal_without_ci(monkeypatch: pytest.MonkeyPatch, ci: str, term: str, expected: bool) -> None:
    monkeypatch.setenv("CI", ci)
    assert is_interactive(Console(file=io.StringIO(), force_terminal=True, _environ={"TERM": term})) is expected
    assert not is_interactive(plain_console()[0])


def test_cache_bar_plain_lines() -> None:
    clock = Clock()
    console, file = plain_console()
    with CacheBar(console, interactive=False, interval=10.0, clock=clock) as bar:
        for done in range(8):
            bar.report(done, 7, "video latents")
            clock.moment += 4.0
        bar.report(7, 7, "video latents")
        bar.report(1, 1, "captions")
        bar.note("2 clips have no sound")
    assert file.getvalue().splitlines() == [
        "video latents: 0/7", "video latents: 3/7", "video latents: 6/7", "video latents: 7/7", "captions: 1/1", "2 clips have no sound",
    ]  # fmt: skip


def test_cache_bar_on_a_terminal() -> None:
    clock = Clock()
    console, file = terminal()
    with CacheBar(console, interactive=True, clock=clock) as bar:
        bar.report(1, 4, "video latents")
        clock.moment += 1.0
        bar.report(4, 4, "video latents")
        clock.moment += 1.0
        bar.report(2, 3, "captions")
    text = visible(file.getvalue())
    assert re.search(r"video latents .*4/4", text)
    assert re.search(r"captions .*2/3", text)
    assert file.getvalue().rindex("\x1b[?25h") > file.getvalue().rindex("\x1b[?25l")
