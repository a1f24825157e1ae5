"""A capture that breaks off can be ended: the stream of the copies has come back. Streams and events of CUDA's rules, without a device."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch

from tuner_offload.transfer import CudaLink

CPU = torch.device("cpu")


class Stream:
    """In a capture from the moment on at which it waits for something that is captured."""

    def __init__(self, device: object = None) -> None:
        self.captured = False
        self.away = False
        """Something was issued that the origin of the capture has not waited for."""
        self.waited = 0

    def wait_event(self, event: Event) -> None:
        if event.source is not None and event.captured != self.captured and not event.captured:
            raise RuntimeError("dependency created on uncaptured work in another stream")
        self.captured |= event.captured
        if event.source is not None and event.source is not self:
            event.source.away = False
            self.away = True

    def synchronize(self) -> None:
        assert not self.captured, "operation not permitted when stream is capturing"
        self.waited += 1


class Event:
    def __init__(self) -> None:
        self.source: Stream | None = None
        self.captured = False

    def record(self, stream: Stream) -> None:
        self.source, self.captured = stream, stream.captured


@pytest.fixture
def origin(monkeypatch: pytest.MonkeyPatch) -> Stream:
    """The current stream."""
    current = [Stream()]

    @contextmanager
    def on(stream: Stream) -> Iterator[None]:
        current.append(stream)
        yield
        current.pop()

    for name, stand_in in {
        "Stream": Stream, "Event": Event, "stream": on, "current_stream": lambda device=None: current[-1],
        "is_current_stream_capturing": lambda: current[-1].captured,
    }.items():  # fmt: skip
        monkeypatch.setattr(torch.cuda, name, stand_in)
    return current[0]


def copying(link: CudaLink) -> Stream:
    stream = link._stream
    assert isinstance(stream, Stream)
    return stream


def test_after_an_error_inside_a_capture_the_copies_stream_has_come_back(origin: Stream) -> None:
    link = CudaLink(CPU)
    slot = link.slot(4)
    origin.captured = True
    link.fork()
    link.load(slot, slot.copies([(0, torch.zeros(4, dtype=torch.uint8))]))
    assert copying(link).captured and copying(link).away
    link.drain()
    assert not copying(link).away and not copying(link).waited


def test_an_error_before_the_copies_stream_left_is_no_reason_to_wait_for_it(origin: Stream) -> None:
    """What was issued outside a capture must not be waited for inside."""
    link = CudaLink(CPU)
    origin.captured = True
    link.drain()
    assert not copying(link).captured and not copying(link).waited


def test_outside_a_capture_the_host_waits(origin: Stream) -> None:
    link = CudaLink(CPU)
    link.fork()
    link.drain()
    assert copying(link).waited == 1
