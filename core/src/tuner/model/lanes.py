"""A second lane in a captured step: small work of a block beside its large work.

A kernel takes a few microseconds however little it computes, and a graph that was captured on one stream starts kernels one after the
other. Where a block has parts that do not need each other for a while, a family may put the small ones on the lane: the graph then has
branches, which a device works off side by side. The kernels are the same, so the numbers are.

Special here: memory. torch's allocator gives freed memory back to the stream it was made on and knows nothing of the other one, so every
tensor that crosses is named: its memory is then not used again within the graph. Gradients that cross in backward are looked after by
autograd, which walks back on the streams that the way there was on. Outside of a capture, and where nobody permits it, there is one lane,
and nothing is done.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import torch
from torch import Tensor

_thread = threading.local()
_streams: dict[torch.device, torch.cuda.Stream] = {}


@contextmanager
def permitted(yes: bool) -> Iterator[None]:
    """Whether blocks called inside, in this thread, may use the lane."""
    before = getattr(_thread, "permitted", False)
    _thread.permitted = yes
    try:
        yield
    finally:
        _thread.permitted = before


class Lane:
    """Work goes `beside` between `fork` and `join`. Without a stream all of it stays where it is."""

    def __init__(self, stream: torch.cuda.Stream | None = None) -> None:
        self._stream = stream

    def fork(self, *given: Tensor) -> None:
        """What was queued so far is done before what the lane gets from now on. `given`: all tensors made outside that it will read."""
        if self._stream is not None:
            self._stream.wait_stream(torch.cuda.current_stream(self._stream.device))
            for tensor in given:
                tensor.record_stream(self._stream)

    @contextmanager
    def beside(self, small: bool = True) -> Iterator[None]:
        """Inside, work is queued on the lane if it is `small`."""
        if self._stream is None or not small:
            yield
        else:
            with torch.cuda.stream(self._stream):
                yield

    def join(self, *made: Tensor) -> None:
        """What is queued from now on waits for the lane. `made`: all tensors of the lane that will be read."""
        if self._stream is not None:
            current = torch.cuda.current_stream(self._stream.device)
            current.wait_stream(self._stream)
            for tensor in made:
                tensor.record_stream(current)


def rejoin() -> None:
    """After an exception in a capture: a lane that is away in it comes back to the current stream, without which it cannot be ended."""
    for device, stream in _streams.items():
        with torch.cuda.stream(stream):
            away = torch.cuda.is_current_stream_capturing()
        if away:
            with suppress(RuntimeError):  # a capture that was invalidated takes nothing more
                torch.cuda.current_stream(device).wait_stream(stream)


def lane_for(tokens: Tensor) -> Lane:
    """The lane of the device of `tokens`; one without a stream unless a step is being captured and this is `permitted`."""
    if torch.compiler.is_compiling() or not getattr(_thread, "permitted", False):
        return Lane()
    if not (tokens.is_cuda and torch.cuda.is_current_stream_capturing()):
        return Lane()
    if tokens.device not in _streams:
        # The small work goes first wherever both could: the large work takes what is left.
        _streams[tokens.device] = torch.cuda.Stream(tokens.device, priority=-1)  # type: ignore[no-untyped-call]
    return Lane(_streams[tokens.device])
