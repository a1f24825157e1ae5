"""What validation was planned to make and measure: records that the plan of a run holds."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Final, Literal

from tuner.data.items import Item
from tuner.data.manifest import Manifest
from tuner.errors import TunerError
from tuner.interfaces.family import SampleRequest
from tuner.train.caching import Beside

PATH_KEY, CONFIG_KEY = "validation_adapter_path", "validation_adapter_config"
Mode = Literal["t2v", "i2v", "s2v", "audio"]
"""A clip from text, from a first frame, to a sound; sound alone."""


@dataclass(frozen=True)
class AdapterUse:
    """An adapter as the user names it: a file, a folder, or `repository:file` of the hub."""

    path: str
    strength: float = 1.0
    key: str = PATH_KEY
    place: Path | None = field(default=None, compare=False)
    """Where it lies on this disk, once that is known: no sample asks the hub."""


@dataclass(frozen=True)
class AdapterRun:
    """Adapters that are used together, under a name for files."""

    name: str
    uses: tuple[AdapterUse, ...]


@dataclass(frozen=True)
class SampleJob:
    """One sample, made at every validation."""

    label: str
    """The name of its file."""
    mode: Mode
    request: SampleRequest
    """Without records."""
    item: Item | None = None
    """The held-out file whose first frame or sound is given."""
    adapters: AdapterRun | None = None
    """What stands beside the trained adapter."""


@dataclass(frozen=True)
class ValidationPlan:
    """Nothing, unless keys or the dataset ask for something."""

    jobs: tuple[SampleJob, ...] = ()
    measured: tuple[Item, ...] = ()
    """Held-out files whose loss is computed."""
    levels: int = 4
    """Noise levels at which it is."""
    interval: int = 0
    at_start: bool = True
    downloads: tuple[str, ...] = ()
    notices: tuple[str, ...] = ()
    problems: tuple[TunerError, ...] = field(default=(), compare=False)

    @property
    def wanted(self) -> bool:
        """Whether there is anything to do."""
        return bool(self.jobs or self.measured)

    def due(self, step: int, total: int) -> bool:
        """Whether there is something to do after `step` of `total` steps; 0: before the first. A function of the step alone."""
        if step == 0:
            return self.wanted and self.at_start
        return self.wanted and (step == total or bool(self.interval and step % self.interval == 0))

    def beside(self, encoders: frozenset[str]) -> Beside:
        """What has to be in the cache before training."""
        items = dict.fromkeys([*(job.item for job in self.jobs if job.item is not None), *self.measured])
        texts = dict.fromkeys(text for job in self.jobs for text in job.request.texts)
        return Beside(tuple(items), tuple(texts), encoders)

    def within(self, manifest: Manifest) -> ValidationPlan:
        """Without the files that could not be decoded or encoded."""
        left = set(manifest.held_out)
        jobs = tuple(job for job in self.jobs if job.item is None or job.item in left)
        return replace(self, jobs=jobs, measured=tuple(item for item in self.measured if item in left))

    def describe(self) -> list[tuple[str, str]]:
        """Label and text of its lines of the plan."""
        if not self.wanted:
            return []
        parts = [f"{_counted(len(self.jobs), 'sample')}: {', '.join(job.label for job in self.jobs)}"] if self.jobs else []
        files, levels = _counted(len(self.measured), "held-out file"), _counted(self.levels, "noise level")
        parts += [f"loss of {files} at {levels}"] if self.measured else []
        times = ["before the first step"] * self.at_start + [f"every {self.interval} steps"] * bool(self.interval) + ["at the end"]
        return [("validation", f"{'; '.join(parts)}; {', '.join(times)}")]


NO_VALIDATION: Final = ValidationPlan()


def _counted(number: int, what: str) -> str:
    return f"{number} {what}" + "s" * (number != 1)
