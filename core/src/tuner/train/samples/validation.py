"""Samples and held-out losses of the model that trains, at the steps that the plan names.

Special here: training must not notice. Blocks run under their memory strategy and stay where they are, no random number of the run is
drawn, and whatever goes wrong is one line in events.jsonl. Text and what is given were encoded before training, so beside the
model only a decoder is in memory, for as long as it decodes.
"""

from __future__ import annotations

import gc
import hashlib
import json
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch

from tuner.data.records import RecordPlaces
from tuner.errors import NumericError, TunerError
from tuner.interfaces.family import Generated, SampleRequest
from tuner.model.exhausted import lacking_memory
from tuner.train.assemble import Assembly
from tuner.train.passes import evaluating
from tuner.train.plan import Plan
from tuner.train.run import RunFolder
from tuner.train.samples.adapters import beside
from tuner.train.samples.heldout import SEED, HeldOutLosses, held_out_losses
from tuner.train.samples.plan import describe_losses, family_encoders
from tuner.train.samples.prompts import OWN
from tuner.train.samples.validate import write_sample
from tuner.train.samples.wanted import SampleJob

FAILURES: tuple[type[Exception], ...] = (
    TunerError, RuntimeError, ValueError, TypeError, LookupError, AttributeError, AssertionError, ArithmeticError, OSError, MemoryError,
)
"""What models, decoders and codecs of anybody's may raise. A sample is a service: training goes on without it."""


@dataclass(frozen=True)
class Earlier:
    """What this run made before it was interrupted, from its events."""

    samples: Mapping[tuple[int, str, str], Path] = field(default_factory=dict)
    """(step, label, prompt) -> file."""
    losses: Mapping[tuple[int, str], Mapping[str, float]] = field(default_factory=dict)
    """(step, grid) -> stream -> loss."""

    @staticmethod
    def of(folder: Path) -> Earlier:
        """Of the run folder `folder`, since the run began anew for the last time."""
        rows = _rows(folder / "events.jsonl")
        starts = [index for index, row in enumerate(rows) if row.get("kind") == "training" and row.get("from_step") == 0]
        rows = rows[starts[-1] :] if starts else []
        samples = {
            (int(str(row["step"])), str(row["label"]), str(row["prompt"])): path
            for row in rows
            if row.get("kind") == "sample" and (path := folder / str(row["path"])).is_file()
        }
        losses = {(int(str(row["step"])), str(row["grid"])): row["losses"] for row in rows if row.get("kind") == "heldout"}
        return Earlier(samples, losses)  # type: ignore[arg-type]


def _rows(path: Path) -> list[dict[str, object]]:
    """Whole lines; what a crash left of one is passed over."""
    found = []
    for line in path.read_bytes().splitlines() if path.is_file() else ():
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if isinstance(row, dict):
            found.append(row)
    return found


@dataclass
class Validation:
    """Built once a run. `log`: takes the numbers of a step. `stopped`: whether the person wants the run to end."""

    plan: Plan
    assembly: Assembly
    folder: RunFolder
    earlier: Earlier
    log: Callable[[int, Mapping[str, float]], None]
    note: Callable[[str], None]
    stopped: Callable[[], bool]
    resumed_at: int = -1
    """The step after which the run goes on; its numbers are in the log already if they are among the earlier ones."""

    def __post_init__(self) -> None:
        known = family_encoders(self.plan)
        encoders = [encoder for encoder in self.plan.encoders if encoder.name in known]
        self.names = {encoder.reads: encoder.name for encoder in encoders if encoder.of == "clip"}
        self.places = RecordPlaces(encoders, self.plan.manifest.geometry, self.plan.manifest.text_cache)

    def due(self, step: int) -> bool:
        """Whether there is something to do after that step."""
        return self.plan.validation.due(step, self.plan.total_steps)

    def at(self, step: int) -> Path | None:
        """Makes and measures what is due after `step`, less what was done before an interruption.

        Ends after the sample under way where a stop is asked for. Returns the file of `validation_prompt`'s sample, else the first one.
        """
        written: dict[str, Path] = {}
        self.folder.heartbeat(step, self.plan.total_steps, "validating")
        with self._undisturbed():
            self._measure(step)
            for job in self.plan.validation.jobs:
                if self.stopped():
                    break
                path = self._sample(step, job)
                if path is not None:
                    written[job.label] = path
        return written.get(OWN) or next(iter(written.values()), None)

    @contextmanager
    def _undisturbed(self) -> Iterator[None]:
        """Evaluation mode; random numbers go on afterwards as if nothing had been."""
        device = self.assembly.device
        try:
            with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []), evaluating(self.assembly.training.model):
                yield
        finally:
            _free(device)

    # --- losses --------------------------------------------------------------------------------------------------
    def _measure(self, step: int) -> None:
        wanted = self.plan.validation
        if not wanted.measured or self.stopped():
            return
        grid = self.grid()
        known = self.earlier.losses.get((step, grid))
        if known is not None:
            if step != self.resumed_at:
                self._log(step, known)
            return
        began = time.perf_counter()
        try:
            found = held_out_losses(
                self.assembly.training, self.places, wanted.measured, wanted.levels, self.plan.streams, self.assembly.device, self.stopped
            )
            if found is None:
                return
            if not found.finite():
                raise NumericError("held-out losses are not finite", where="heldout", value=dict(found.mean))
        except FAILURES as error:
            self._failed("heldout_failed", step, "held-out losses", error)
            return
        self._report(step, grid, found, time.perf_counter() - began)

    def _report(self, step: int, grid: str, found: HeldOutLosses, seconds: float) -> None:
        self.folder.event(
            "heldout", step=step, losses=dict(found.mean), items=found.items, by_level=found.by_level, grid=grid, seconds=round(seconds, 3)
        )
        self._log(step, found.mean)
        self.note(f"step {step}: held-out loss {describe_losses(found.mean)}")

    def _log(self, step: int, losses: Mapping[str, float]) -> None:
        self.log(step, {f"heldout/{name}": value for name, value in losses.items()})

    def grid(self) -> str:
        """Identity of what is measured: equal for losses that can be compared."""
        wanted = self.plan.validation
        parts = [SEED, wanted.levels, list(self.plan.streams), [item.key for item in wanted.measured]]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]

    # --- samples -------------------------------------------------------------------------------------------------
    def _sample(self, step: int, job: SampleJob) -> Path | None:
        """The file; None: it failed."""
        known = self.earlier.samples.get((step, job.label, job.request.prompt))
        if known is not None:
            return known
        began = time.perf_counter()
        target = self.folder.path / "validation" / f"step_{step}" / f"{job.label}.mp4"
        _free(self.assembly.device)
        try:
            path = write_sample(self._generated(job), target)
        except FAILURES as error:
            self._failed("sample_failed", step, job.label, error)
            return None
        seconds = time.perf_counter() - began
        self.folder.event(
            "sample", step=step, path=path.relative_to(self.folder.path).as_posix(), prompt=job.request.prompt, label=job.label,
            mode=job.mode, seconds=round(seconds, 3),
        )  # fmt: skip
        self.note(f"step {step}: sampled {path.name} in {seconds:.1f} s")
        return path

    def _generated(self, job: SampleJob) -> Generated:
        """Once more without what is held for replayed steps, where it does not fit beside that."""
        try:
            return self._generate(job)
        except torch.OutOfMemoryError:
            if not self.assembly.execution.release():
                raise
        self._settle()
        return self._generate(job)

    def _generate(self, job: SampleJob) -> Generated:
        training, plan = self.assembly.training, self.plan
        request = self.complete(job)
        with beside(training.model, plan.registry, job.adapters, self.assembly.device):
            return plan.family.sample(training.model, plan.source, [request], training.blocks, plan.streams)[0]

    def complete(self, job: SampleJob) -> SampleRequest:
        """The request with its records from the cache. Raises `MissingRecord`."""
        places = {prompt: self.places.caption(prompt, self.names["text"]) for prompt in job.request.texts}
        request = replace(job.request, text={prompt: place.cache.read(place.key) for prompt, place in places.items()})
        if job.item is None:
            return request
        records = self.places.read(job.item, job.item.caption)
        if job.mode == "i2v":
            return replace(request, first_frame=records[self.names["video"]])
        return replace(request, given_sound=records[self.names["audio"]])

    def _failed(self, kind: str, step: int, label: str, error: Exception) -> None:
        lacking = lacking_memory(error)
        what = f"not enough {lacking} memory" if lacking else type(error).__name__
        reason = error.message if isinstance(error, TunerError) else f"{what}: {(str(error).splitlines() or ['?'])[0]}"
        self._settle()
        self.folder.event(kind, step=step, label=label, reason=reason)
        self.note(f"step {step}: {label} failed, training is not affected: {reason}")

    def _settle(self) -> None:
        """Brings streamed weights back to where a step begins: a pass that broke off left them anywhere, and a replay does not look."""
        blocks = self.assembly.training.blocks
        blocks.session.begin_step(len(blocks.blocks))
        blocks.session.end_step()
        _free(self.assembly.device)


def _free(device: torch.device) -> None:
    """Gives memory back that nothing uses, so that what comes next finds it in one piece."""
    if device.type == "cuda":
        gc.collect()
        torch.cuda.empty_cache()
