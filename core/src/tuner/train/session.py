"""A training run from options to files: plan, cache, assemble, train, save, export, sample. One direction, no back and forth."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from accelerate import Accelerator

from tuner.config.resolve import Settings
from tuner.config.settings import DataSettings, TrainSettings, ValidationSettings
from tuner.data.dataset import TrainingSet
from tuner.errors import OutOfMemoryError, TunerError
from tuner.plugins.registry import Registry
from tuner.train.assemble import Assembly, assemble
from tuner.train.caching import CacheSummary, fill_cache
from tuner.train.lock import FolderLock
from tuner.train.loop import Loop
from tuner.train.plan import Plan, make_plan, without_encoders
from tuner.train.results import write_results
from tuner.train.resume import TrainingCheckpoints
from tuner.train.run import RunFolder, RunInfo, now
from tuner.train.signals import StopRequests
from tuner.train.validate import sample_at_end, wants_sample


class Interface(Protocol):
    """What a run tells the person who started it."""

    def plan(self, plan: Plan) -> None:
        """The whole plan, before anything is loaded."""

    def note(self, text: str) -> None:
        """One sentence."""

    def caching(self, done: int, total: int, label: str) -> None:
        """Progress of finding or encoding clips."""

    def training(self, step: int, total: int, metrics: Mapping[str, float]) -> None:
        """After a step, as its numbers arrive."""

    def finished(self, outcome: Outcome) -> None:
        """The last word: which files there are."""


@dataclass(frozen=True)
class Outcome:
    """How a run ended. `exit_code`: 0, or 130/143 where a signal stopped it after saving."""

    exit_code: int
    step: int
    checkpoint: Path | None
    files: tuple[Path, ...]
    sample: Path | None
    cache: CacheSummary | None = None


@dataclass
class Session:
    """Runs one training from plan to end."""

    registry: Registry
    plan: Plan
    interface: Interface
    accelerator: Accelerator

    def run(self) -> Outcome:
        """Raises `TunerError`; whatever was saved before stays."""
        folder = RunFolder(self.plan.context.output_dir)
        with ExitStack() as stack:
            if self.accelerator.is_main_process:
                stack.enter_context(FolderLock(folder.path))
            try:
                outcome = self._run(folder, stack)
            except torch.OutOfMemoryError as error:
                raise OutOfMemoryError(
                    f"the device ran out of memory: {str(error).splitlines()[0]}",
                    remedy="lower train_batch_size or resolution, or switch gradient_checkpointing on",
                ) from error
            self.registry.run_finished(self.info(folder), "stopped" if outcome.exit_code else "finished")
            return outcome

    def info(self, folder: RunFolder) -> RunInfo:
        """The record that event hooks receive."""
        values = {key: entry["value"] for key, entry in self.plan.settings.resolved().items()}
        plugins = tuple((p.distribution or p.name, p.version) for p in self.registry.plugins if p.status == "loaded")
        return RunInfo(folder.path, self.plan.family_name, self.plan.facts.variant.name, values, plugins, now())

    def _run(self, folder: RunFolder, stack: ExitStack) -> Outcome:
        main = self.accelerator.is_main_process
        if main:
            folder.write_run(self.info(folder), str(self.plan.context.device))
            folder.write_config(self.plan.settings.resolved())
            folder.event("started", total_steps=self.plan.total_steps, notices=list(self.plan.notices))
        summary = self._cache(folder)
        dataset = self._dataset(summary)
        checkpoints = TrainingCheckpoints(self.plan, folder, dataset.digest())
        found = checkpoints.find()
        self.interface.note("loading the model")
        assembly = assemble(self.plan, self.plan.context.device)
        stack.callback(assembly.detach)
        start = checkpoints.restore(found, assembly) if found else 0
        self.interface.note(f"going on after step {start}" if found else "starting at step 0")
        if main:
            folder.drop_metrics_after(start)
            folder.event("training", from_step=start)
        stops = stack.enter_context(StopRequests(notify=self.interface.note))
        loop = self._loop(folder, assembly, dataset, checkpoints, stops, start)
        step = loop.run() if start < self.plan.total_steps else start
        return self._conclude(folder, assembly, checkpoints, step, stops.stop, summary)

    def _cache(self, folder: RunFolder) -> CacheSummary:
        """Encodes what is missing; on several ranks the first one does it, the others wait and read."""
        with self.accelerator.main_process_first():
            summary = encode_dataset(self.plan, self.interface)
        if self.accelerator.is_main_process:
            folder.event("cached", **summary.facts())
        self.plan = without_encoders(self.plan, summary.manifest)
        return summary

    def _dataset(self, summary: CacheSummary) -> TrainingSet:
        train = self.plan.settings.get(TrainSettings)
        return TrainingSet(summary.manifest, self.plan.encoders, train.train_batch_size, train.seed, train.caption_dropout_probability)

    def _loop(
        self, folder: RunFolder, assembly: Assembly, dataset: TrainingSet, checkpoints: TrainingCheckpoints, stops: StopRequests, start: int
    ) -> Loop:
        total, main = self.plan.total_steps, self.accelerator.is_main_process

        def on_metrics(step: int, row: Mapping[str, float]) -> None:
            if main:
                folder.metrics(step, {k: v for k, v in row.items() if k not in ("seconds", "samples")})
                folder.heartbeat(step, total, "training")
                self.interface.training(step, total, row)

        def save(step: int) -> None:
            if main:
                path = checkpoints.save(step, assembly)
                folder.event("checkpoint", step=step, path=path.name)
                self.interface.note(f"saved {path}")
                self.registry.checkpoint_saved(self.info(folder), path, step)
            self.accelerator.wait_for_everyone()

        return Loop(
            self.plan, assembly, dataset, on_metrics, save, stops, start,
            self.accelerator.process_index, self.accelerator.num_processes,
        )  # fmt: skip

    def _conclude(
        self, folder: RunFolder, assembly: Assembly, checkpoints: TrainingCheckpoints, step: int, stopped: int, summary: CacheSummary
    ) -> Outcome:
        files: tuple[Path, ...] = ()
        sample = None
        if self.accelerator.is_main_process:
            if not stopped:
                files = write_results(self.plan, assembly, folder.path)
                sample = self._sample(folder, assembly)
            folder.heartbeat(step, self.plan.total_steps, "stopped" if stopped else "finished")
            folder.event("stopped" if stopped else "finished", step=step, files=[f.name for f in files])
        return Outcome(stopped, step, checkpoints.last, files, sample, summary)

    def _sample(self, folder: RunFolder, assembly: Assembly) -> Path | None:
        """A sample that fails is reported and does not fail a finished training."""
        if not wants_sample(self.plan.settings.get(ValidationSettings)):
            return None
        self.interface.note("sampling the validation prompt")
        try:
            return sample_at_end(self.plan, assembly, folder.path)
        except (TunerError, torch.OutOfMemoryError) as error:
            folder.event("sample_failed", reason=str(error))
            self.interface.note(f"the sample failed, the trained weights are safe: {error}")
            return None


def train(registry: Registry, settings: Settings, interface: Interface, *, dry_run: bool = False) -> Outcome:
    """`tuner train`: plans, and unless `dry_run` trains."""
    accelerator = Accelerator()
    plan = make_plan(registry, settings, accelerator.device, report=interface.caching)
    interface.plan(plan)
    if dry_run:
        return Outcome(0, 0, None, (), None)
    outcome = Session(registry, plan, interface, accelerator).run()
    interface.finished(outcome)
    return outcome


def cache(registry: Registry, settings: Settings, interface: Interface) -> CacheSummary:
    """`tuner cache`: plans and encodes, and loads no transformer."""
    accelerator = Accelerator()
    plan = make_plan(registry, settings, accelerator.device, report=interface.caching)
    interface.plan(plan)
    return encode_dataset(plan, interface)


def encode_dataset(plan: Plan, interface: Interface) -> CacheSummary:
    """Fills the cache and says what was done."""
    data, train_settings = plan.settings.get(DataSettings), plan.settings.get(TrainSettings)
    summary = fill_cache(
        plan.manifest, plan.encoders, plan.context.device, batch_size=data.vae_batch_size,
        with_empty_caption=train_settings.caption_dropout_probability > 0, report=interface.caching,
    )  # fmt: skip
    interface.note(summary.describe())
    return summary


