"""A training run from options to files: plan, cache, assemble, train, save, export, sample. One direction, no back and forth."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Protocol

import torch
from accelerate import Accelerator

from tuner.config.resolve import Settings
from tuner.config.settings import DataSettings, RunSettings, TrainSettings
from tuner.data.dataset import TrainingSet
from tuner.data.manifest import require_usable
from tuner.errors import DiskError, EnvironmentProblem, TunerError
from tuner.plugins.registry import Registry
from tuner.train.agreement import Ranks
from tuner.train.assemble import Assembly, assemble
from tuner.train.caching import CacheSummary, fill_cache
from tuner.train.forecast.advise import full_device
from tuner.train.loop import Loop
from tuner.train.phases import Phases
from tuner.train.plan import Plan, with_manifest
from tuner.train.planning import make_plan
from tuner.train.publish.card import fill_outbox
from tuner.train.publish.outbox import Outbox
from tuner.train.publish.upload import Destination, check_destination, later, page, planned_destination, send
from tuner.train.recorder import Recorder
from tuner.train.run import RunFolder, RunInfo, describe_device, now
from tuner.train.samples.plan import family_encoders
from tuner.train.samples.validation import Earlier, Validation
from tuner.train.saving.lock import FolderLock
from tuner.train.saving.results import write_results
from tuner.train.saving.resume import TrainingCheckpoints
from tuner.train.signals import StopRequests, before_training
from tuner.train.trackers import Trackers


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


class Silence:
    """The interface of every rank but the first."""

    def plan(self, plan: Plan) -> None:
        """Nothing."""

    def note(self, text: str) -> None:
        """Nothing."""

    def caching(self, done: int, total: int, label: str) -> None:
        """Nothing."""

    def training(self, step: int, total: int, metrics: Mapping[str, float]) -> None:
        """Nothing."""

    def finished(self, outcome: Outcome) -> None:
        """Nothing."""


@dataclass(frozen=True)
class Outcome:
    """How a run ended. `exit_code`: 0, or 130/143 where a signal stopped it after saving."""

    exit_code: int
    step: int
    checkpoint: Path | None
    files: tuple[Path, ...]
    sample: Path | None
    cache: CacheSummary | None = None
    outbox: Path | None = None
    """What a hub repository of the result holds, ready to be uploaded."""


@dataclass
class Session:
    """Runs one training from plan to end, in one process or as one of several."""

    registry: Registry
    plan: Plan
    interface: Interface
    ranks: Ranks
    destination: Destination
    phases: Phases = field(default_factory=Phases)
    stage: str = "caching"
    """What is going on before the first step, for errors."""
    loop: Loop | None = None
    recorder: Recorder = field(init=False)
    """From the moment on at which the run folder is written to."""

    def run(self) -> Outcome:
        """Raises `TunerError`; whatever was saved before stays."""
        folder = self.ranks.together(lambda: RunFolder(self.plan.context.output_dir))
        with ExitStack() as stack:
            self.ranks.together(lambda: stack.enter_context(FolderLock(folder.path)) if self.ranks.main else None)
            checkpoints = TrainingCheckpoints(self.plan, folder.path, self.ranks.world)
            self.ranks.together(checkpoints.check)
            try:
                with self._memory_errors():
                    outcome = self._run(folder, checkpoints, stack)
            except BaseException as error:
                self._failed(folder, error)
                raise
            if self.ranks.main:
                self.registry.run_finished(self.info(folder), "stopped" if outcome.exit_code else "finished")
            return outcome

    @contextmanager
    def _memory_errors(self) -> Iterator[None]:
        """A device that is full, as an error that says where and what would fit."""
        try:
            yield
        except torch.OutOfMemoryError as error:
            raise full_device(self.plan, error, self.loop.at if self.loop else self.stage) from error

    def info(self, folder: RunFolder) -> RunInfo:
        """The record that event hooks receive."""
        values = {key: entry["value"] for key, entry in self.plan.settings.resolved().items()}
        plugins = tuple((p.distribution or p.name, p.version) for p in self.registry.plugins if p.status == "loaded")
        described = self.plan.source.description
        return RunInfo(folder.path, self.plan.family_name, self.plan.facts.variant.name, values, plugins, now(), described)

    def _failed(self, folder: RunFolder, error: BaseException) -> None:
        """Leaves word of the failure, or of a signal that did not wait for a step, as far as the disk allows."""
        if not self.ranks.main:
            return
        stopped = isinstance(error, (KeyboardInterrupt, SystemExit))
        with suppress(DiskError):
            if stopped:
                folder.event("stopped", step=self.recorder.reached, files=[])
            else:
                folder.event("failed", error=type(error).__name__, reason=error.message if isinstance(error, TunerError) else str(error))
        self.registry.run_finished(self.info(folder), "stopped" if stopped else "failed")

    def _run(self, folder: RunFolder, checkpoints: TrainingCheckpoints, stack: ExitStack) -> Outcome:
        self.recorder = Recorder(folder, self.plan.total_steps, self.interface.note, active=self.ranks.main)
        recorder = stack.enter_context(self.recorder)
        stack.enter_context(before_training(self.interface.note))
        if self.ranks.main:
            folder.write_run(self.info(folder), describe_device(self.plan.context.device.type))
            folder.write_config(self.plan.settings.resolved())
            folder.event("started", total_steps=self.plan.total_steps, notices=list(self.plan.notices))
        recorder.stage("caching")
        summary = self._cache(folder)
        self.phases.done("cache")
        recorder.total = self.plan.total_steps
        recorder.stage("loading")
        dataset = self._dataset(summary)
        found = self.ranks.together(lambda: checkpoints.load(dataset.digest()))
        self.stage = "loading the model"
        self.interface.note(self.stage)
        self.phases.done("data")
        assembly = self.ranks.together(lambda: assemble(self.plan, self.plan.context.device, self.phases))
        stack.callback(assembly.detach)
        start = self.ranks.together(lambda: checkpoints.restore(found, assembly)) if found else 0
        self.interface.note(f"going on after step {start}" if found else "starting at step 0")
        earlier = Earlier.of(folder.path) if found and self.ranks.main else Earlier()
        if self.ranks.main:
            folder.drop_metrics_after(start if found else -1)
            folder.event("training", from_step=start)
        recorder.stage("training", start)
        stops = stack.enter_context(StopRequests(self.interface.note, self.ranks.most if self.ranks.world > 1 else None))
        trackers = self._trackers(folder, stack)
        validation = self._validation(folder, assembly, trackers, earlier, stops, start if found else -1)
        loop = self._loop(folder, assembly, dataset, checkpoints, stops, start, trackers, validation)
        self.loop = loop
        step = loop.run() if start < self.plan.total_steps else start
        return self._conclude(folder, assembly, checkpoints, step, stops.stop, summary, validation)

    def _validation(
        self, folder: RunFolder, assembly: Assembly, trackers: Trackers, earlier: Earlier, stops: StopRequests, resumed_at: int
    ) -> Validation:
        """On several ranks the first one does all of it."""

        def log(step: int, row: Mapping[str, float]) -> None:
            folder.metrics(step, row)
            trackers.log(step, row)

        return Validation(self.plan, assembly, folder, earlier, log, self.interface.note, lambda: stops.asked, resumed_at)

    def _trackers(self, folder: RunFolder, stack: ExitStack) -> Trackers:
        """Those of `report_to`, on the first rank; closed at the end, however that comes."""

        def note(text: str) -> None:
            folder.event("tracker", note=text)
            self.interface.note(text)

        trackers = Trackers.of(self.registry, self.plan.settings, folder.path, note) if self.ranks.main else Trackers((), note)
        stack.callback(trackers.close)

        def heard(kind: str, facts: Mapping[str, object]) -> None:
            if kind == "sample":
                trackers.sample(int(str(facts["step"])), folder.path / str(facts["path"]), str(facts["label"]), str(facts["prompt"]))

        folder.listeners.append(heard)
        return trackers

    def _cache(self, folder: RunFolder) -> CacheSummary:
        """Encodes what is missing; on several ranks the first one does it, the others wait and read."""
        summary = self.ranks.main_first(lambda: encode_dataset(self.plan, self.interface))
        if self.ranks.main:
            folder.event("cached", **summary.facts())
            train = self.plan.settings.get(TrainSettings)
            self.recorder.dataset(summary.manifest, train.train_batch_size, train.seed)
        self.plan = with_manifest(self.plan, summary.manifest)
        return summary

    def _dataset(self, summary: CacheSummary) -> TrainingSet:
        train = self.plan.settings.get(TrainSettings)
        return TrainingSet(summary.manifest, self.plan.encoders, train.train_batch_size, train.seed, train.caption_dropout_probability)

    def _loop(
        self, folder: RunFolder, assembly: Assembly, dataset: TrainingSet, checkpoints: TrainingCheckpoints, stops: StopRequests,
        start: int, trackers: Trackers, validation: Validation,
    ) -> Loop:  # fmt: skip
        total, interval = self.plan.total_steps, self.plan.settings.get(RunSettings).log_interval

        def on_metrics(step: int, row: Mapping[str, float]) -> None:
            if not self.ranks.main:
                return
            if step % interval == 0:
                folder.metrics(step, {k: v for k, v in row.items() if k not in ("seconds", "samples")})
                trackers.log(step, row)
            self.recorder.step(step, row)
            self.interface.training(step, total, row)

        def write(step: int) -> None:
            if self.ranks.main:
                self.recorder.stage("saving", step)
                path = checkpoints.save(step, assembly)
                folder.event("checkpoint", step=step, path=path.name)
                self.interface.note(f"saved {path}")
                self.registry.checkpoint_saved(self.info(folder), path, step)
                self.recorder.stage("training", step)

        def save(step: int) -> None:
            self.ranks.together(lambda: write(step))
            stops.agree()

        def sample(step: int) -> None:
            if self.ranks.main:
                validation.at(step)
                self.recorder.stage("training", step)

        def validate(step: int) -> None:
            self.ranks.together(lambda: sample(step))
            stops.agree()

        def started() -> None:
            self.phases.done("first step")
            if self.ranks.main:
                seconds = {name: round(taken, 3) for name, taken in self.phases.seconds.items()}
                folder.event("start", seconds=seconds, total=round(self.phases.total, 3), bytes=self.plan.facts.bytes)

        return Loop(
            self.plan, assembly, dataset, on_metrics, save, stops, start, self.ranks.rank, self.ranks.world, validation.due, validate,
            started,
        )  # fmt: skip

    def _conclude(
        self, folder: RunFolder, assembly: Assembly, checkpoints: TrainingCheckpoints, step: int, stopped: int, summary: CacheSummary,
        validation: Validation,
    ) -> Outcome:  # fmt: skip
        files: tuple[Path, ...] = ()
        sample, outbox = None, None
        if self.ranks.main:
            if not stopped:
                files = write_results(self.plan, assembly, folder.path)
                sample = validation.at(step) if validation.due(step) else None
                outbox = self._fill_outbox(folder, files)
            self.recorder.stage("stopped" if stopped else "finished", step)
            folder.event("stopped" if stopped else "finished", step=step, files=[f.name for f in files])
            if outbox is not None and self.destination.wanted:
                self._push(folder, outbox)
        return Outcome(stopped, step, checkpoints.last, files, sample, summary, outbox.folder if outbox else None)

    def _fill_outbox(self, folder: RunFolder, files: tuple[Path, ...]) -> Outbox | None:
        """An outbox that cannot be filled is reported and does not fail a finished training."""
        try:
            return fill_outbox(self.plan, folder.path, files, self.destination)
        except DiskError as error:
            folder.event("outbox_failed", reason=str(error))
            self.interface.note(f"nothing was made ready for the hub, the trained weights are safe: {error}")
            return None

    def _push(self, folder: RunFolder, outbox: Outbox) -> None:
        """The same for the upload, which can be made up for."""
        self.interface.note("uploading the result")
        try:
            sent = send(outbox)
        except TunerError as error:
            folder.event("push_failed", reason=str(error))
            self.interface.note(f"{error}\n  -> everything is in {outbox.folder}; send it with `{later(folder.path)}`")
        else:
            folder.event("pushed", repository=sent.repository)
            self.interface.note(f"uploaded to {page(sent.repository)}")


def train(registry: Registry, settings: Settings, interface: Interface, *, dry_run: bool = False) -> Outcome:
    """`tuner train`: plans, and unless `dry_run` trains. A dry run writes nothing."""
    phases = Phases()
    phases.done("imports")
    device, ranks = _start()
    interface = interface if ranks.main else Silence()
    destination = ranks.main_first(lambda: check_destination(settings, interface.note) if ranks.main else planned_destination(settings))
    phases.done("device")
    with TemporaryDirectory() if dry_run else nullcontext() as scratch:
        plan = _plan(registry, settings, interface, device, ranks, Path(scratch) if scratch else None)
        if dry_run:
            TrainingCheckpoints(plan, plan.context.output_dir, ranks.world).check()
            return Outcome(0, 0, None, (), None)
    phases.done("plan")
    outcome = Session(registry, plan, interface, ranks, destination, phases).run()
    interface.finished(outcome)
    return outcome


def cache(registry: Registry, settings: Settings, interface: Interface) -> CacheSummary:
    """`tuner cache`: plans and encodes, and loads no transformer."""
    device, ranks = _start()
    interface = interface if ranks.main else Silence()
    plan = _plan(registry, settings, interface, device, ranks, trains=False)
    return ranks.main_first(lambda: encode_dataset(plan, interface))


def _start() -> tuple[torch.device, Ranks]:
    """This process's device, and its place among the processes that `torchrun` or `accelerate launch` started.

    Raises `EnvironmentProblem` where they do not find each other: each would train a model of its own.
    """
    accelerator = Accelerator(cpu=not torch.accelerator.is_available())  # without a device it joins processes only when told so
    started = int(os.environ.get("WORLD_SIZE") or 1)
    if started != accelerator.num_processes:
        raise EnvironmentProblem(
            f"{started} processes were started, but this one sees {accelerator.num_processes}", where="WORLD_SIZE",
            remedy="start them with `torchrun --nproc_per_node N -m tuner.cli.main train ...`",
        )  # fmt: skip
    return accelerator.device, Ranks(accelerator.process_index, accelerator.num_processes)


def _plan(
    registry: Registry, settings: Settings, interface: Interface, device: torch.device, ranks: Ranks, scratch: Path | None = None,
    trains: bool = True,
) -> Plan:  # fmt: skip
    """The plan, made by the first rank, then by the others, which find its files; shown once."""
    plan = ranks.main_first(
        lambda: make_plan(
            registry, settings, device, rank=ranks.rank, world=ranks.world, report=interface.caching, scratch=scratch, trains=trains
        )
    )
    interface.plan(plan)
    return plan


def encode_dataset(plan: Plan, interface: Interface) -> CacheSummary:
    """Fills the cache and says what was done. Raises `DataError` where `strict` is on and a clip failed."""
    data, train_settings = plan.settings.get(DataSettings), plan.settings.get(TrainSettings)
    summary = fill_cache(
        plan.manifest, plan.encoders, plan.context.device, batch_size=data.vae_batch_size,
        with_empty_caption=train_settings.caption_dropout_probability > 0, report=interface.caching,
        beside=plan.validation.beside(family_encoders(plan)),
    )  # fmt: skip
    interface.note(summary.describe())
    require_usable(summary.manifest, strict=data.strict)
    return summary


