"""A memory strategy that moves nothing and forgives nothing: a block's frozen weights are NaN whenever nobody holds the block."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from tuner.errors import ConfigError, TunerError
from tuner.interfaces.blocks import BlockSet
from tuner.interfaces.family import BuildContext
from tuner.interfaces.memory import MemoryFacts, MemoryPlan, MemorySession, MemoryStrategy
from tuner.testing.options import SimulatedOptions

KEY = "simulated_streaming"


class SimulatedStreaming(MemoryStrategy):
    """For tests: who reads weights outside a block's own events reads NaN, and the loss says so."""

    name = KEY

    def __init__(self, options: SimulatedOptions, context: BuildContext) -> None:
        self.options = options

    def keys(self, part: str) -> tuple[str, ...]:
        return (KEY,)

    def supports(self, facts: MemoryFacts) -> Sequence[TunerError]:
        if not facts.full_finetuning:
            return ()
        return [ConfigError("there are no frozen weights to stream", where=f"{KEY}, model_type", remedy="leave one of the two out")]

    def plan(self, facts: MemoryFacts) -> MemoryPlan:
        total = sum(facts.block_bytes)
        return MemoryPlan(total, total, 0, 0, 0.0, "every block's weights twice: to be used, and to be brought back")

    def open(self, part: str, blocks: int, device: torch.device) -> MemorySession:
        return SimulatedSession()


class SimulatedSession(MemorySession):
    """Writes NaN over weights in place, so that graphs which kept them see it too. Raises RuntimeError for events out of order."""

    capturable = False

    def __init__(self) -> None:
        self._kept: list[list[tuple[nn.Parameter, torch.Tensor]]] = []
        self._held: set[int] = set()
        self._under_way = False

    def attach(self, blocks: BlockSet) -> None:
        for block in blocks.blocks:
            frozen = [p for p in block.parameters() if not p.requires_grad and p.is_floating_point()]
            self._kept.append([(parameter, parameter.data.clone()) for parameter in frozen])
        self._take_all_away()

    def begin_step(self, first_backward: int) -> None:
        if self._held:
            raise RuntimeError(f"a pass begins while blocks {sorted(self._held)} are held")
        self._take_all_away()
        self._under_way = True

    def before_forward(self, index: int) -> None:
        self._bring(index)

    def after_forward(self, index: int) -> None:
        self._release(index)

    def before_backward(self, index: int) -> None:
        self._bring(index)

    def after_backward(self, index: int) -> None:
        self._release(index)

    def end_step(self) -> None:
        self._under_way = False

    def abort(self) -> None:
        self._held.clear()
        self._take_all_away()
        self._under_way = False

    def materialize(self) -> None:
        for index in range(len(self._kept)):
            self._write(index)

    def detach(self) -> None:
        self.materialize()
        self._kept.clear()

    def _bring(self, index: int) -> None:
        if not self._under_way:
            raise RuntimeError(f"block {index} is asked for outside a pass")
        self._write(index)
        self._held.add(index)

    def _release(self, index: int) -> None:
        if index not in self._held:
            raise RuntimeError(f"block {index} is released without having been held")
        self._held.discard(index)
        self._take_away(index)

    def _write(self, index: int) -> None:
        for parameter, value in self._kept[index]:
            parameter.data.copy_(value)

    def _take_away(self, index: int) -> None:
        for parameter, _ in self._kept[index]:
            parameter.data.fill_(torch.nan)

    def _take_all_away(self) -> None:
        for index in range(len(self._kept)):
            self._take_away(index)
