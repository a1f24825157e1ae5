"""`gradient_checkpointing: auto`: the activations of as many blocks are kept as the device's memory takes.

How many is forecast before the run (`tuner.train.forecast.advise`) and corrected once after the first steps by what they really took.
Blocks at the end of the model are kept, whose activations are freed first on the way back. Which blocks are recomputed changes no bit
of a gradient.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch

from tuner.config.settings import ModelSettings
from tuner.interfaces.family import Batch
from tuner.model.runner import BlockRunner, Checkpointing
from tuner.train.execute import Execution
from tuner.train.step import Item, StepResult

if TYPE_CHECKING:
    from tuner.train.plan import Plan

log = logging.getLogger(__name__)

WATCHED = 2
"""Calls after the first step, whose optimizer made its states, until the forecast is corrected."""


def policy(plan: Plan, blocks: int) -> Checkpointing:
    """What `gradient_checkpointing` and its interval ask for; where it is `auto` and nothing was forecast every block is recomputed."""
    settings = plan.settings.get(ModelSettings)
    if settings.gradient_checkpointing == "auto":
        return keep_last(blocks, plan.predicted.row.kept if plan.predicted else 0)
    return Checkpointing.every(blocks, settings.gradient_checkpointing_interval) if settings.gradient_checkpointing else Checkpointing()


def keep_last(blocks: int, kept: int) -> Checkpointing:
    """All blocks but the last `kept` are recomputed."""
    return Checkpointing(frozenset(range(blocks - kept)))


def corrected(kept: int, blocks: int, peak: int, budget: int, block: int) -> int:
    """How many blocks to keep instead of `kept`, when a step that kept so many took `peak` of `budget` bytes; each takes `block`.

    All that is over is taken back; of what is left over half is used, because larger batches may come.
    """
    left = budget - peak
    more = -(-left // block) - 1 if left < 0 else left // block // 2
    return max(0, min(blocks, kept + more))


class ActivationBudget(Execution):
    """Carries out steps through another execution, and corrects how many blocks keep their activations.

    A step that does not fit is carried out once more with every block recomputed and no graphs held, which gives the same numbers.
    """

    def __init__(
        self, inner: Execution, runner: BlockRunner, *, budget: int, block: int, largest: Callable[[Batch], bool], peak: Callable[[], int],
    ) -> None:  # fmt: skip
        """`budget`, `block`: bytes of the device, and of one block's activations. `largest`: whether a batch is of the largest shape.

        `peak`: bytes that were held at most since it was last asked.
        """
        super().__init__(inner.training, inner.masters)
        self.inner, self.runner = inner, runner
        inner.makes_room = False  # steps without graphs are slower than steps that recompute more
        self.budget, self.block = budget, block
        self._largest, self._peak = largest, peak
        self._first: int | None = None
        self._seen = 0

    @property
    def kept(self) -> int:
        """Blocks that keep their activations now."""
        return len(self.runner.blocks) - len(self.runner.checkpointing.recomputed)

    def __call__(self, items: Sequence[Item], step: int, share: float) -> list[StepResult]:
        fresh = all(parameter.grad is None for parameter in self.masters.optimized())
        on_gpu = self._device.type == "cuda"
        drawn = torch.get_rng_state(), torch.cuda.get_rng_state(self._device) if on_gpu and self.runner.draws else None
        if self._seen < WATCHED:
            self._peak()  # of loading, caching or sampling
        try:
            results = self.inner(items, step, share)
        except torch.OutOfMemoryError as error:
            if not fresh or not (self.inner.release() or self.kept):
                raise
            if self.kept:
                log.warning("activations of %d blocks did not fit (%s); every block is recomputed", self.kept, str(error).splitlines()[0])
            self._keep(0)
            self._seen = WATCHED
        else:
            self._watch(items, step)
            return results
        self.runner.abort()
        self.masters.gather()
        if on_gpu:
            torch.cuda.empty_cache()
        torch.set_rng_state(drawn[0])
        if drawn[1] is not None:
            torch.cuda.set_rng_state(drawn[1], self._device)
        return self.inner(items, step, share)

    def release(self) -> bool:
        return self.inner.release()

    @property
    def _device(self) -> torch.device:
        return self.masters.optimized()[0].device

    def _watch(self, items: Sequence[Item], step: int) -> None:
        """Corrects once, after so many steps of the largest shape; too much is taken back at any time."""
        if self._seen >= WATCHED:
            return
        peak = self._peak() + self.inner.to_come
        self._first = step if self._first is None else self._first
        self._seen += step > self._first and any(self._largest(item.batch) for item in items)
        if self._seen < WATCHED and peak <= self.budget:
            return
        now = corrected(self.kept, len(self.runner.blocks), peak, self.budget, self.block)
        if now != self.kept:
            log.info("activations of %d blocks are kept, not of %d: steps took %.1f GiB at most", now, self.kept, peak / 2**30)
            self._keep(now)
            self.inner.release()

    def _keep(self, kept: int) -> None:
        self.runner.checkpointing = keep_last(len(self.runner.blocks), kept)


def budgeted(plan: Plan, inner: Execution, runner: BlockRunner, device: torch.device) -> Execution:
    """`inner` under a budget, where one was asked for and a forecast was possible."""
    if plan.predicted is None or plan.settings.get(ModelSettings).gradient_checkpointing != "auto" or device.type != "cuda":
        return inner
    shapes = [item.shape for item in plan.manifest.items]
    most = max(shape.width * shape.height * shape.frames for shape in shapes)

    def largest(batch: Batch) -> bool:
        first = batch.samples[0]
        return first.width * first.height * first.frames == most

    def peak() -> int:
        found = torch.cuda.max_memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        return int(found)

    room = plan.predicted.machine.room
    return ActivationBudget(inner, runner, budget=room, block=plan.predicted.block, largest=largest, peak=peak)
