"""Trackers in their threads: rows arrive in order; whatever a tracker does, the run goes on and says it once."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
import threading
import tomllib
from collections.abc import Callable, Mapping
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tuner.builtins.trackers import TensorBoard, Trackio, Wandb
from tuner.config.options import Options
from tuner.config.resolve import resolve
from tuner.errors import EnvironmentProblem
from tuner.interfaces.services import Tracker
from tuner.plugins.loader import load_plugins
from tuner.train.trackers import Trackers, TrackerThread, chosen_trackers


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


# --- the three by name -------------------------------------------------------------------------------------------
SETTINGS = {"tracker_project_name": "waves", "tracker_run_name": "one", "resume_from_checkpoint": "", "lora_rank": 16, "data": None}


def tell(tracker: Tracker, folder: Path, steps: range, *, resumed: bool = False) -> None:
    """What a run tells a tracker, in a thread as in a run."""
    said: list[str] = []
    thread = TrackerThread(tracker.name, lambda: tracker, {**SETTINGS, "resume_from_checkpoint": "latest" if resumed else ""})
    trackers = Trackers([thread], said.append)
    for step in steps:
        trackers.log(step, {"loss": 1 / step, "loss/video": 0.5, "heldout/video": 0.25})
    trackers.sample(steps[-1], folder / "clip.mp4", "first", "a cat")
    trackers.sample(steps[-1], folder / "hum.wav", "second", "a hum")
    trackers.close(60)
    assert said == []


def test_tensorboard_files_hold_every_step_once(tmp_path: Path) -> None:
    event_accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    TensorBoard.check()
    tell(TensorBoard(Options(), tmp_path), tmp_path, range(1, 7))
    tell(TensorBoard(Options(), tmp_path), tmp_path, range(5, 9), resumed=True)  # as after a resume from step 4
    read = event_accumulator.EventAccumulator(str(tmp_path / "tensorboard"))
    read.Reload()
    assert read.Tags()["scalars"] == ["loss", "loss/video", "heldout/video"]
    assert [(event.step, event.value) for event in read.Scalars("loss")] == [(n, pytest.approx(1 / n)) for n in range(1, 9)]
    assert {tag.partition("/text_summary")[0] for tag in read.Tags()["tensors"]} == {"settings", "samples/first", "samples/second"}
    assert b"lora_rank" in read.Tensors("settings/text_summary")[-1].tensor_proto.string_val[0]


class FakeRun:
    """A run of wandb or trackio: remembers what it is told."""

    def __init__(self, told: list[object]) -> None:
        self.told = told

    def log(self, values: Mapping[str, object], step: int | None = None) -> None:
        self.told.append((dict(values), step))

    def define_metric(self, name: str, step_metric: str) -> None:
        self.told.append((name, step_metric))

    def finish(self) -> None:
        self.told.append("finish")


class Refused(Exception):
    """What wandb raises without a login."""


@pytest.fixture
def library(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], tuple[SimpleNamespace, list[object]]]:
    """Puts a small stand-in with the library's names in its place."""

    def install(name: str) -> tuple[SimpleNamespace, list[object]]:
        told: list[object] = []

        def init(**given: object) -> FakeRun:
            told.append(given)
            return FakeRun(told)

        def login(**given: object) -> bool:
            if not sys.stdin.isatty() and "key" not in told:
                raise Refused("No API key configured.")
            return True

        fake = SimpleNamespace(
            init=init, login=login, Settings=lambda **given: given, errors=SimpleNamespace(Error=Refused), __spec__=ModuleSpec(name, None),
            Video=lambda path, **given: ("video", Path(path).name, given), Audio=lambda path, **given: ("audio", Path(path).name, given),
        )  # fmt: skip
        monkeypatch.setitem(sys.modules, name, fake)  # type: ignore[arg-type]
        return fake, told

    return install


def test_wandb_gets_rows_samples_and_settings_and_goes_on_after_a_resume(tmp_path: Path, library: Any) -> None:
    _, told = library("wandb")
    tell(Wandb(Options(), tmp_path), tmp_path, range(1, 3))
    first = told[0]
    assert isinstance(first, dict)
    assert (first["project"], first["name"], first["dir"]) == ("waves", "one", str(tmp_path)) and first["config"]["lora_rank"] == 16
    assert told[1:] == [
        ("*", "step"), ({"step": 1, "loss": 1.0, "loss/video": 0.5, "heldout/video": 0.25}, None),
        ({"step": 2, "loss": 0.5, "loss/video": 0.5, "heldout/video": 0.25}, None),
        ({"step": 2, "samples/first": ("video", "clip.mp4", {"caption": "a cat", "format": "mp4"})}, None),
        ({"step": 2, "samples/second": ("audio", "hum.wav", {"caption": "a hum"})}, None), "finish",
    ]  # fmt: skip
    told.clear()
    tell(Wandb(Options(), tmp_path), tmp_path, range(2, 4), resumed=True)
    assert isinstance(told[0], dict) and told[0]["id"] == first["id"] and told[0]["resume"] == "allow"
    told.clear()
    tell(Wandb(Options(), tmp_path), tmp_path, range(1, 2))
    assert isinstance(told[0], dict) and told[0]["id"] != first["id"]  # begun anew in the same folder


def test_trackio_gets_rows_and_samples(tmp_path: Path, library: Any) -> None:
    _, told = library("trackio")
    Trackio.check()
    tell(Trackio(Options(), tmp_path), tmp_path, range(1, 2))
    tell(Trackio(Options(), tmp_path), tmp_path, range(2, 3), resumed=True)
    assert [entry["resume"] for entry in told if isinstance(entry, dict)] == ["never", "allow"]
    assert told[1:5] == [
        ({"loss": 1.0, "loss/video": 0.5, "heldout/video": 0.25}, 1), ({"samples/first": ("video", "clip.mp4", {"caption": "a cat"})}, 1),
        ({"samples/second": ("audio", "hum.wav", {"caption": "a hum"})}, 1), "finish",
    ]  # fmt: skip


def test_wandb_asks_nothing_and_is_logged_in_before_the_run(library: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    _, told = library("wandb")
    monkeypatch.delenv("WANDB_MODE", raising=False)
    terminal = sys.stdin
    with pytest.raises(EnvironmentProblem, match="wandb login") as problem:
        Wandb.check()
    assert problem.value.where == "report_to" and problem.value.exit_code == 3 and sys.stdin is terminal
    monkeypatch.setenv("WANDB_MODE", "offline")
    Wandb.check()
    monkeypatch.delenv("WANDB_MODE")
    told.append("key")
    Wandb.check()


@pytest.mark.parametrize("name", ["tensorboard", "wandb", "trackio"])
def test_a_library_that_is_missing_is_named_with_the_pip_line(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda wanted: None)
    registry = load_plugins()
    settings = resolve(registry.option_types, flags={"report_to": f"{name}, {name}"}, environ={})
    with pytest.raises(EnvironmentProblem) as problem:
        chosen_trackers(registry, settings)
    assert f"pip install 'tuner-framework[{name}]'" in problem.value.remedy and problem.value.where == "report_to"
    extras = tomllib.loads((Path(__file__).parents[2] / "core" / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert any(line.startswith(name) for line in extras[name])


def test_trackers_are_imported_only_when_chosen() -> None:
    program = (
        "import sys; from tuner.plugins.loader import load_plugins; load_plugins().component('tracker', 'wandb').load()\n"
        "print([name for name in ('tensorboard', 'wandb', 'trackio') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=120)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize("hangs", [False, True])
def test_one_whose_library_fails_or_hangs_leaves_the_run_alone(tmp_path: Path, library: Any, hangs: bool) -> None:
    fake, _ = library("trackio")
    gate = threading.Event()

    def broken(**given: object) -> FakeRun:
        if hangs:
            gate.wait()
        raise ConnectionError("no server")

    fake.init = broken
    said: list[str] = []
    thread = TrackerThread("trackio", lambda: Trackio(Options(), tmp_path), SETTINGS)
    trackers = Trackers([thread], said.append)
    trackers.sample(1, tmp_path / "clip.mp4", "first", "a cat")
    trackers.log(1, {"loss": 1.0})
    trackers.close(0.05 if hangs else 60)
    assert len(said) == 1 and ("did not finish in time" if hangs else "no server") in said[0]
    gate.set()
    thread.join(60)
