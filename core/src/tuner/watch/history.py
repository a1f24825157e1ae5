"""All that a run has written of itself, in the form in which the report shows it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from tuner.watch.folder import CONFIG, DATASET, METRICS, PACE, RUN, Row, RunFiles, mapping, number, text
from tuner.watch.pace import GIB
from tuner.watch.series import Curve, gather
from tuner.watch.status import RunStatus, read_status


@dataclass(frozen=True)
class Sample:
    """One sample, or one that failed."""

    step: int
    label: str
    prompt: str = ""
    path: str = ""
    """Below the run folder; empty: there is none."""
    mode: str = ""
    """What was given: t2v, i2v, s2v, audio."""
    reason: str = ""
    """Why it failed."""


@dataclass(frozen=True)
class History:
    """What the files of a run hold at one moment."""

    folder: Path
    status: RunStatus
    run: Row
    config: Mapping[str, Row]
    dataset: Row
    events: Sequence[Row]
    metrics: Mapping[str, Curve]
    """By name: "loss", "loss/video", "loss/video/sigma_0.00-0.25", "lr", "grad_norm", ..."""
    pace: Mapping[str, Curve]
    """"seconds" a step, "memory/now" and "memory/peak" in GiB."""
    heldout: Mapping[str, Curve]
    samples: Sequence[Sample]


def read_history(folder: Path) -> History:
    """Reads a run folder; what is missing is empty."""
    files = RunFiles(folder)
    events = files.events()
    began = text(events[0].get("time")) if events else ""
    config = {key: mapping(entry) for key, entry in files.json(CONFIG).items()}
    metrics = gather(files.rows(METRICS))
    heldout = gather(_flat("losses", row) for row in events if row.get("kind") == "heldout")
    heldout = heldout or {name.removeprefix("heldout/"): curve for name, curve in metrics.items() if name.startswith("heldout/")}
    return History(
        folder=folder, status=read_status(folder), run=files.json(RUN), config=config, dataset=files.json(DATASET), events=events,
        metrics={name: curve for name, curve in metrics.items() if not name.startswith("heldout/")},
        pace=gather(_paced(row) for row in files.rows(PACE) if text(row.get("time")) >= began), heldout=heldout,
        samples=find_samples(events),
    )  # fmt: skip


def _flat(key: str, row: Row) -> Row:
    return {"step": row.get("step"), **mapping(row.get(key))}


def _paced(row: Row) -> Row:
    memory = {f"memory/{name}": value / GIB for name in ("now", "peak") if (value := number(mapping(row.get("memory")).get(name)))}
    return {"step": row.get("step"), "seconds": row.get("seconds"), **memory}


def find_samples(events: Sequence[Row]) -> list[Sample]:
    """Samples by step and label, the newest where a step was sampled twice."""
    found: dict[tuple[int, str], Sample] = {}
    for row in events:
        if row.get("kind") in ("sample", "sample_failed") and (step := number(row.get("step"))) is not None:
            path = _inside(text(row.get("path")))
            label = text(row.get("label")) or PurePosixPath(path).stem or "sample"
            given = text(row.get("mode")) or text(row.get("task"))
            sample = Sample(int(step), label, text(row.get("prompt")), path, given, text(row.get("reason")))
            found[sample.step, label] = sample
    return sorted(found.values(), key=lambda sample: sample.step)


def _inside(path: str) -> str:
    """A path below the run folder; empty for any other."""
    parts = PurePosixPath(path).parts
    return path if parts and not path.startswith("/") and ".." not in parts else ""
