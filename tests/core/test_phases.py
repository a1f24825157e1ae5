"""The phases of a start add up."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import pytest

from tuner.train import phases
from tuner.train.phases import Phases, process_age


def test_phases_follow_each_other_and_add_up(monkeypatch: pytest.MonkeyPatch) -> None:
    times = iter([100.0, 101.5, 104.0, 104.25])
    monkeypatch.setattr(time, "perf_counter", lambda: next(times))
    monkeypatch.setattr(phases, "process_age", lambda: 3.0)
    found = Phases()
    for name in ("first", "second", "first"):
        found.done(name)
    assert found.seconds == {"first": 4.5 + 0.25, "second": 2.5}
    assert found.total == 7.25


def test_the_first_phase_begins_with_the_process() -> None:
    code = "import time; time.sleep(0.2); from tuner.train.phases import process_age; print(process_age())"
    before = time.monotonic()
    told = float(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout)
    assert 0.2 <= told <= time.monotonic() - before + 0.02  # the system counts in hundredths


def test_a_system_that_does_not_tell_is_no_error(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(phases, "_STATE", tmp_path / "nothing")
    assert process_age() == 0.0
