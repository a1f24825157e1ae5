"""The training loop: batches in, optimizer steps, metrics, checkpoints. It keeps no state that a step number does not give."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace

import torch

from tuner.builtins.losses import SigmaBands
from tuner.config.settings import DataSettings, OptimizerSettings, RunSettings
from tuner.data.dataset import TrainingSet
from tuner.data.prefetch import Prefetcher
from tuner.data.randomness import derived_seed
from tuner.errors import DataError, NumericError, TunerError
from tuner.interfaces.family import Batch, Sample
from tuner.model.selection import with_counts
from tuner.train.assemble import Assembly
from tuner.train.metrics import StepMetrics
from tuner.train.placement import to_device
from tuner.train.plan import Plan
from tuner.train.signals import StopRequests
from tuner.train.step import Item

NOT_FINITE = "start anew in another output_dir with a lower learning_rate or max_grad_norm; the last checkpoint has the weights from before"
"""What to do where training has left the numbers."""
FLUSH_STEPS = 10
"""On a GPU, metrics cross to the host once in so many steps: reading each would stop the queue of kernels."""


@dataclass
class Loop:
    """Runs from `start` to `plan.total_steps`. `on_metrics`, `save` and `validate` are called between steps."""

    plan: Plan
    assembly: Assembly
    dataset: TrainingSet
    on_metrics: Callable[[int, Mapping[str, float]], None]
    save: Callable[[int], None]
    stops: StopRequests
    start: int = 0
    rank: int = 0
    world: int = 1
    due: Callable[[int], bool] = lambda step: False
    """Whether `validate` is wanted after that step. The last one's is whoever's that called."""
    validate: Callable[[int], None] = lambda step: None
    started: Callable[[], None] = lambda: None
    """Called once, when the device has done the first step."""
    metrics: StepMetrics = field(default_factory=StepMetrics)
    at: str = "the first step"
    """Step and batch that are worked on, for errors."""

    def __post_init__(self) -> None:
        self.accumulation = self.plan.settings.get(OptimizerSettings).gradient_accumulation_steps
        self.device = self.assembly.device
        self.flush_steps = FLUSH_STEPS if self.device.type == "cuda" else 1
        self.bands = SigmaBands()

    def run(self) -> int:
        """Trains; returns the number of finished steps, which is less than planned where a stop was asked for."""
        self._validate(self.start)
        depth = self.plan.settings.get(DataSettings).dataloader_prefetch
        feed = Prefetcher(self.prepare, self.start * self.accumulation, depth, self.plan.total_steps * self.accumulation)
        interval = self.plan.settings.get(RunSettings).checkpoint_step_interval
        step = saved = self.start
        try:
            while step < self.plan.total_steps and not self.stops.stop:
                self.step(step, feed)
                if step == self.start:
                    self._first_step()
                step += 1
                wanted = interval and step % interval == 0 and step < self.plan.total_steps
                if wanted or self.stops.take_checkpoint_request():
                    self.checkpoint(step)
                    saved = step
                if step < self.plan.total_steps and not self.stops.stop:
                    self._validate(step)
        except DataError:
            if step > saved and self.world == 1:  # what was trained on good data is kept
                with suppress(TunerError):
                    self.checkpoint(step)
            raise
        finally:
            feed.close()
        self.flush()
        if saved != step or step == self.start:
            self.checkpoint(step)
        return step

    def _first_step(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        self.started()

    def _validate(self, step: int) -> None:
        if self.due(step):
            self.flush()
            self.validate(step)

    def checkpoint(self, step: int) -> None:
        """Weights that are not finite must not replace good ones: neither the losses of the steps nor what the last one left."""
        self.flush()
        if not self.assembly.masters.are_finite():
            raise NumericError(
                f"trained weights are not finite after step {step}", where="weights",
                remedy=NOT_FINITE,
            )  # fmt: skip
        self.save(step)

    def prepare(self, index: int) -> Item:
        """Item `index` of this rank, on the host. Runs in the prefetch thread; a pure function of its arguments."""
        epoch, place = self.dataset.locate(index * self.world + self.rank)
        samples = self.dataset.load(epoch, self.dataset.epoch_plan(epoch)[place])
        batch = with_counts(self.plan.family.collate(samples, self.plan.streams))
        batch = replace(batch, extras={**batch.extras, **cached_features(samples, self.plan.extras)})
        item = Item(batch, self.assembly.noise.sample(batch, index))
        return to_device(item, self.device, pin=True) if self.device.type == "cuda" else item

    def step(self, step: int, feed: Prefetcher[Item]) -> None:
        """One optimizer step over `accumulation` batches."""
        began = time.perf_counter()
        run, seed = self.assembly, self.plan.context.seed
        # Dropout and stochastic rounding draw from the global generators: seeded per step, resume repeats them.
        torch.manual_seed(derived_seed(seed, "step", step, self.rank))
        losses: dict[str, torch.Tensor] = {}
        samples = 0
        waiting: list[Item] = []
        for micro in range(self.accumulation):
            waiting.append(self._next(step, micro, feed))
            samples += len(waiting[-1].batch.samples)
            if len(waiting) < run.together and micro + 1 < self.accumulation:
                continue
            for item, result in zip(waiting, run.execution(waiting, step, 1 / self.accumulation), strict=True):
                self.bands.add(result.terms, item.noise)
                losses["loss"] = losses.get("loss", 0) + result.loss.detach() / self.accumulation
            waiting.clear()
        losses["loss"] = self._reduce(losses["loss"])
        losses["grad_norm"] = run.masters.clip_(self.plan.settings.get(OptimizerSettings).max_grad_norm)
        rate = float(run.schedule.get_last_lr()[0])
        run.optimizer.step()
        run.schedule.step()
        run.masters.publish()
        for parameter in run.masters.optimized():
            parameter.grad = None
        for regularizer in run.regularizers:
            regularizer.after_step(step)
        host = {"lr": rate, "seconds": time.perf_counter() - began, "samples": float(samples)}
        self.metrics.add(step + 1, losses | self.bands.take(), host)
        if (step + 1) % self.flush_steps == 0:
            self.flush()

    def _next(self, step: int, micro: int, feed: Prefetcher[Item]) -> Item:
        """The next batch on the device, with everything drawn for it."""
        run = self.assembly
        item = to_device(next(feed), self.device)
        for change in run.noise_transforms:
            item = replace(item, noise=change(item.batch, item.noise, step))
        self.at = f"step {step + 1}, {describe_batch(item.batch)}"
        for regularizer in run.regularizers:
            generator = torch.Generator().manual_seed(derived_seed(self.plan.context.seed, regularizer.name, step, micro, self.rank))
            regularizer.begin_step(step, item.batch, item.noise, generator)
        return item

    def _reduce(self, loss: torch.Tensor) -> torch.Tensor:
        """Averages gradients over ranks, in one flat buffer, and what is logged; returns the average loss.

        A rank whose batches lacked a stream has no gradients for its modules: it gives zeros, so that all buffers have one layout.
        """
        if self.world == 1:
            return loss
        gradients = []
        for parameter in self.assembly.masters.optimized():
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            gradients.append(parameter.grad)
        flat = torch.cat([g.flatten() for g in gradients])
        torch.distributed.all_reduce(flat)
        flat /= self.world
        for gradient, piece in zip(gradients, torch.split(flat, [g.numel() for g in gradients]), strict=True):
            gradient.copy_(piece.view_as(gradient))
        totals = self.bands.totals()
        logged = torch.cat([loss.double().reshape(1), totals.flatten()])
        torch.distributed.all_reduce(logged)
        self.bands.replace(logged[1:].view_as(totals))
        return (logged[0] / self.world).to(loss.dtype)

    def flush(self) -> None:
        """Hands all pending rows to `on_metrics`. Raises `NumericError` at the first one that is not finite."""
        for step, row in self.metrics.flush():
            self.on_metrics(step, row)
            for name in ("loss", "grad_norm"):
                if row[name] != row[name] or row[name] in (float("inf"), float("-inf")):
                    terms = [key.removeprefix("loss/") for key, value in row.items() if key.count("/") == 1 and not math.isfinite(value)]
                    culprits = f", because of the term {', '.join(terms)}" if terms else ""
                    raise NumericError(
                        f"{name} is not finite at step {step}{culprits}", where=name, value=row[name],
                        remedy=NOT_FINITE,
                    )  # fmt: skip


def describe_batch(batch: Batch) -> str:
    """How many samples, and their size."""
    first = batch.samples[0]
    size = f"{first.width}x{first.height}x{first.frames}" if first.frames else f"{first.seconds:g} s of sound"
    return f"batch of {len(batch.samples)} x {size}"


def cached_features(samples: Sequence[Sample], encoders: Sequence[str]) -> dict[str, torch.Tensor]:
    """"encoder.tensor" -> (B, ...): records beside the family's own; left out where not every sample of the batch has them."""
    found: dict[str, torch.Tensor] = {}
    for encoder in encoders:
        records = [sample.records.get(encoder) for sample in samples]
        present = [record for record in records if record is not None]
        if len(present) == len(records):
            found |= {f"{encoder}.{name}": torch.stack([record.tensors[name] for record in present]) for name in present[0].tensors}
    return found
