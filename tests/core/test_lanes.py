"""Small work beside large work: when there is a second lane, what waits for what, and whose memory is kept. On stand-ins for streams."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch

from tuner.interfaces.memory import MemorySession
from tuner.model import lanes
from tuner.model.lanes import lane_for, permitted
from tuner.model.runner import BlockRunner
from tuner.testing.blocks import MixingModel, call_mixing_block

DEVICE = torch.device("cuda", 0)


class Streams:
    """What torch.cuda has of them, and what happened."""

    def __init__(self) -> None:
        self.happened: list[str] = []
        self.now = self.stream("main")
        self.capturing = True

    def stream(self, name: str) -> Any:
        made = SimpleNamespace(name=name, device=DEVICE)
        made.wait_stream = lambda other: self.happened.append(f"{name} waits for {other.name}")
        return made

    @contextmanager
    def on(self, stream: Any) -> Iterator[None]:
        before, self.now = self.now, stream
        try:
            yield
        finally:
            self.now = before

    def tensor(self, name: str, cuda: bool = True) -> Any:
        record = lambda stream: self.happened.append(f"{name} is kept for {stream.name}")
        return SimpleNamespace(is_cuda=cuda, device=DEVICE, record_stream=record)


@pytest.fixture
def streams(monkeypatch: pytest.MonkeyPatch) -> Streams:
    made = Streams()
    monkeypatch.setattr(torch.cuda, "Stream", lambda device, priority: made.stream("lane"))
    monkeypatch.setattr(torch.cuda, "stream", made.on)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: made.now)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: made.capturing)
    monkeypatch.setattr(lanes, "_streams", {})
    return made


def test_what_crosses_is_waited_for_and_kept(streams: Streams) -> None:
    with permitted(True):
        lane = lane_for(streams.tensor("tokens"))
    lane.fork(streams.tensor("given"))
    with lane.beside():
        streams.happened.append(f"small work on {streams.now.name}")
    with lane.beside(False):
        streams.happened.append(f"large work on {streams.now.name}")
    lane.join(streams.tensor("made"))
    assert streams.happened == [
        "lane waits for main", "given is kept for lane", "small work on lane", "large work on main", "main waits for lane",
        "made is kept for main",
    ]  # fmt: skip


def test_there_is_one_lane_unless_a_capture_may_have_two(streams: Streams) -> None:
    tokens = streams.tensor("tokens")
    for allowed, capturing, cuda in ((False, True, True), (True, False, True), (True, True, False)):
        streams.capturing = capturing
        with permitted(allowed):
            lane = lane_for(cast(Any, streams.tensor("tokens", cuda)))
        lane.fork(tokens)
        with lane.beside():
            streams.happened.append(streams.now.name)
        lane.join(tokens)
    assert streams.happened == ["main"] * 3
    with permitted(True), permitted(False):
        assert lane_for(tokens)._stream is None


def test_a_lane_comes_back_where_it_was_left(streams: Streams, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device=None: streams.now)
    lanes.rejoin()  # there was none yet
    with permitted(True):
        lane_for(streams.tensor("tokens"))
    lanes.rejoin()
    assert streams.happened == ["main waits for lane"]
    away = {"lane": False}
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: away.get(streams.now.name, True))
    lanes.rejoin()  # joined already
    away["lane"] = True

    def refused(other: Any) -> None:
        raise RuntimeError("the capture was invalidated")

    streams.now.wait_stream = refused
    lanes.rejoin()
    assert streams.happened == ["main waits for lane"]


class Asking:
    """A block's caller that notes whether it might use a lane."""

    def __init__(self) -> None:
        self.answers: list[bool] = []

    def __call__(self, block: Any, state: Any) -> Any:
        self.answers.append(getattr(lanes._thread, "permitted", False))
        return call_mixing_block(block, state)


@pytest.mark.parametrize(("wanted", "inside"), [(True, False), (True, True), (False, False)])
def test_the_runner_permits_it_where_weights_stay_while_a_block_computes(wanted: bool, inside: bool) -> None:
    model, asking, session = MixingModel(depth=2), Asking(), MemorySession()
    session.inside_blocks = inside
    runner = BlockRunner(model.block_set(), asking, session=session)
    runner.lanes = wanted
    state = model.enter(torch.randn(1, 4, 6), None, torch.randn(1, 3, 6), torch.rand(1, 4))
    runner.run(state)
    assert asking.answers == [wanted and not inside] * 2
    with torch.no_grad():  # sampling is not captured
        runner.run(state)
    assert asking.answers[2:] == [False] * 2
