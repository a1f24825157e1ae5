"""The course of CREPA's weight over a run: warm-up, decay, and the cut-off by similarity.

Special here: nothing waits for the device. The smoothed similarity lives there; the host reads the value of a fixed number of steps
ago, which has long arrived, so a decision falls at the same step whenever it is made, and a resumed run makes it where the
uninterrupted one does.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from tuner_regularizers.crepa_options import CrepaOptions

LAG = 4
"""Steps between a value and the decision that rests on it."""


def weight_at(options: CrepaOptions, step: int, total_steps: int) -> float:
    """The weight of step `step` (from 0) in a run of `total_steps`.

    Warm-up: lambda · step / warm-up steps. Then, with p = the share of the decay that is over: linear 1 - p, cosine (1 + cos(pi p)) / 2,
    polynomial (1 - p)^power, as the share of the way that is left from `crepa_lambda_end` to `crepa_lambda`.
    """
    start, end, warmup = options.crepa_lambda, options.crepa_lambda_end, options.crepa_warmup_steps
    if step < warmup:
        return start * step / warmup
    if options.crepa_scheduler == "constant":
        return start
    length = options.crepa_decay_steps or max(1, total_steps - warmup)
    done = min(1.0, (step - warmup) / length)
    left: float = {
        "linear": 1 - done,
        "cosine": (1 + math.cos(math.pi * done)) / 2,
        "polynomial": (1 - done) ** options.crepa_power,
    }[options.crepa_scheduler]
    return end + (start - end) * left


@dataclass(frozen=True)
class _Reading:
    """A value on its way to the host."""

    value: Tensor
    """() float64 on the host."""
    arrived: torch.cuda.Event | None = None

    def read(self) -> float:
        if self.arrived is not None:
            self.arrived.synchronize()
        return float(self.value.item())


class CutOff:
    """Whether the similarity, smoothed over steps, has reached the threshold.

    A step's similarity is the mean over its counted samples, of all batches and all ranks; the smoothed one starts at the first of them.
    """

    def __init__(self, threshold: float, decay: float, recoverable: bool, device: torch.device) -> None:
        self.cut = False
        self._threshold = threshold
        self._decay = decay
        self._recoverable = recoverable
        self._sums = torch.zeros(2, dtype=torch.float64, device=device)
        """Of the step's batches but the last."""
        self._last = torch.zeros_like(self._sums)
        self._smoothed = torch.full((), math.nan, dtype=torch.float64, device=device)
        self._readings: deque[_Reading] = deque()

    @torch.no_grad()
    def add(self, similarity: Tensor, counted: Tensor) -> None:
        """Of one batch, (B,) each. On the device alone. A batch that is carried out once more, because it did not fit, counts once."""
        share = counted.to(self._sums.dtype)
        self._last.copy_(torch.stack(((similarity * share).sum(), share.sum())))

    def next_batch(self) -> None:
        """What is added from here on belongs to another batch of the step."""
        self._sums += self._last
        self._last.zero_()

    def clear(self) -> None:
        """Forgets what was added since the last step ended."""
        self._sums.zero_()
        self._last.zero_()

    @torch.no_grad()
    def end_step(self) -> None:
        """Smooths, and decides on the value of `LAG` steps ago."""
        self.next_batch()
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.all_reduce(self._sums)
        mean = self._sums[0] / self._sums[1]
        smoothed = torch.where(self._smoothed.isnan(), mean, self._decay * self._smoothed + (1 - self._decay) * mean)
        self._smoothed.copy_(torch.where(self._sums[1] > 0, smoothed, self._smoothed))
        self._sums.zero_()
        self._readings.append(self._send())
        if len(self._readings) > LAG:
            reached = self._readings.popleft().read() >= self._threshold
            self.cut = reached or (self.cut and not self._recoverable)

    def _send(self) -> _Reading:
        if self._smoothed.device.type != "cuda":
            return _Reading(self._smoothed.to("cpu", copy=True))
        value = torch.empty((), dtype=torch.float64, pin_memory=True)
        value.copy_(self._smoothed, non_blocking=True)
        arrived = torch.cuda.Event()  # type: ignore[no-untyped-call]
        arrived.record()
        return _Reading(value, arrived)

    def state_dict(self) -> Mapping[str, Tensor]:
        """Waits for the device."""
        pending = torch.tensor([reading.read() for reading in self._readings], dtype=torch.float64)
        return {"smoothed": self._smoothed.to("cpu", copy=True), "pending": pending, "cut": torch.tensor(self.cut)}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Inverse of `state_dict`."""
        self.cut = bool(state["cut"])
        self._smoothed.copy_(state["smoothed"])
        self._readings = deque(_Reading(value.clone()) for value in state["pending"])
