"""Trackers in their threads: rows arrive in order; whatever a tracker does, the run goes on and says it once."""

from __future__ import annotations

import threading
from collections.abc import Mapping

import pytest

from tuner.interfaces.services import Tracker
from tuner.train.trackers import Trackers, TrackerThread


class Notebook(Tracker):
    """Remembers what it is told; fails or waits where a test wants that."""

    name = "notebook"

    def __init__(self, fail: str = "", gate: threading.Event | None = None) -> None:
        self.fail = fail
        self.gate = gate
        self.entered = threading.Event()
        self.rows: list[tuple[int, dict[str, float]]] = []
        self.settings: dict[str, object] = {}
        self.closed = False

    def start(self, settings: Mapping[str, object]) -> None:
        self.settings = dict(settings)
        self._maybe("start")

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        self.entered.set()
        if self.gate is not None:
            self.gate.wait()
        self._maybe("log")
        self.rows.append((step, dict(metrics)))

    def close(self) -> None:
        self._maybe("close")
        self.closed = True

    def _maybe(self, place: str) -> None:
        if self.fail == place:
            raise ValueError(f"no {place} today")


def running(tracker: Tracker, waiting: int = 10) -> TrackerThread:
    return TrackerThread("notebook", lambda: tracker, {"seed": 1}, waiting)


def test_rows_arrive_in_order_and_it_is_closed() -> None:
    notebook, said = Notebook(), []
    trackers = Trackers([running(notebook)], said.append)
    for step in range(5):
        trackers.log(step, {"loss": step / 2})
    trackers.close(60)
    assert notebook.settings == {"seed": 1} and notebook.closed
    assert notebook.rows == [(step, {"loss": step / 2}) for step in range(5)]
    assert said == []


@pytest.mark.parametrize("place", ["make", "start", "log", "close", "exit"])
def test_one_that_fails_is_said_once_and_the_other_goes_on(place: str) -> None:
    def make() -> Tracker:
        if place == "exit":
            raise SystemExit("not logged in")
        if place == "make":
            raise ValueError("no make today")
        return Notebook(place)

    good, said = Notebook(), []
    trackers = Trackers([TrackerThread("bad", make, {}), running(good)], said.append)
    for step in range(3):
        trackers.log(step, {"loss": 1.0})
    trackers.close(60)
    assert len(good.rows) == 3 and good.closed
    assert len(said) == 1 and "tracker bad failed" in said[0]
    assert ("not logged in" if place == "exit" else f"no {place} today") in said[0]


def test_one_that_hangs_costs_rows_not_the_run() -> None:
    gate, said = threading.Event(), []
    stuck = Notebook(gate=gate)
    thread = running(stuck, waiting=4)
    trackers = Trackers([thread], said.append)
    trackers.log(0, {"loss": 1.0})
    assert stuck.entered.wait(60)
    for step in range(1, 50):
        trackers.log(step, {"loss": 1.0})
    assert len(said) == 1 and "does not keep up" in said[0] and "from step 5" in said[0]
    trackers.close(0.01)
    assert len(said) == 2 and "did not finish" in said[1]
    gate.set()
    thread.join(60)
    assert stuck.closed and [step for step, _ in stuck.rows] == [0, 2, 3, 4]


def test_none_is_nothing() -> None:
    trackers = Trackers([], lambda text: pytest.fail(text))
    trackers.log(0, {"loss": 1.0})
    trackers.close()
