"""What a person sees while a run works: a live line on a terminal, now and then a plain line elsewhere.

Importing this costs no torch.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping
from datetime import timedelta
from types import TracebackType

from rich.console import Console
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.text import Text

from tuner.watch.pace import MemoryReading, StepTimer, read_memory

REDRAW = 0.1
"""Seconds between two drawings of the live line."""
SEPARATOR = "  "


def is_interactive(console: Console) -> bool:
    """Whether a line can be redrawn in place: a terminal with a cursor, and no CI that records every redrawing."""
    return console.is_terminal and not console.is_dumb_terminal and os.environ.get("CI", "").lower() in ("", "0", "false")


def describe_step(
    step: int, total: int, metrics: Mapping[str, float], pace: float | None, memory: MemoryReading, next_checkpoint: int | None
) -> list[str]:
    """The fields of a status line, those that are known."""
    fields = [f"{step}/{total}"]
    if pace is not None:
        fields.append(f"{pace:.{2 if pace >= 0.1 else 4}f} s/step")
        if metrics.get("samples") and pace > 0:
            fields.append(f"{metrics['samples'] / pace:.2f} samples/s")
    fields.append(str(memory))
    if losses := _losses(metrics):
        fields.append(f"loss {losses}")
    if "grad_norm" in metrics:
        fields.append(f"grad {metrics['grad_norm']:.3g}")
    if "lr" in metrics:
        fields.append(f"lr {metrics['lr']:.2e}")
    if pace is not None:
        fields.append(f"ETA {timedelta(seconds=round(pace * (total - step)))}")
    if next_checkpoint is not None:
        fields.append(f"next checkpoint {next_checkpoint}")
    return fields


def _losses(metrics: Mapping[str, float]) -> str:
    """`video 0.123 | audio 0.045`: the entries `loss/<name>` without their sub-entries, or the total where there are none."""
    terms = {name.removeprefix("loss/"): value for name, value in metrics.items() if name.startswith("loss/") and name.count("/") == 1}
    if terms:
        return " | ".join(f"{name} {value:.4f}" for name, value in terms.items())
    return f"{metrics['loss']:.4f}" if "loss" in metrics else ""


def wrap_fields(fields: list[str], width: int) -> str:
    """As few lines as hold the fields, none of which is broken."""
    lines = [fields[0]]
    for field in fields[1:]:
        if len(lines[-1]) + len(SEPARATOR) + len(field) <= width:
            lines[-1] += SEPARATOR + field
        else:
            lines.append(field)
    return "\n".join(lines)


class StatusLine:
    """The state of a training run.

    `interactive`: redraw one line in place; else a plain line for the first step, the last, and one per `interval` seconds.
    `first_step`: what was finished when this was made, just before training; None: it is made when the first step arrives, whose
    duration is then unknown. `checkpoint_interval`: steps; 0: only at the end.
    """

    def __init__(
        self, console: Console, total_steps: int, *, interactive: bool, first_step: int | None = None, checkpoint_interval: int = 0,
        interval: float = 30.0, clock: Callable[[], float] = time.monotonic, memory: Callable[[], MemoryReading] = read_memory,
    ) -> None:
        self.console = console
        self.total_steps = total_steps
        self._interval = REDRAW if interactive else interval
        self._checkpoint_interval = checkpoint_interval
        self._clock, self._memory = clock, memory
        self._timer = StepTimer(first_step, clock())
        self._live = Live(console=console, auto_refresh=False) if interactive else None
        self._latest: tuple[int, dict[str, float]] | None = None
        """Step and metrics that arrived last."""
        self._drawn: tuple[int, float] | None = None
        """Step and time of the last drawing."""

    def update(self, step: int, metrics: Mapping[str, float]) -> None:
        """After step `step`. Reads from `metrics`: `loss/<stream>` or `loss`, `grad_norm`, `lr`, `samples` (per step)."""
        moment = self._clock()
        self._timer.arrived(step, moment)
        self._latest = (step, dict(metrics))
        if self._drawn is None or moment - self._drawn[1] >= self._interval or step >= self.total_steps:
            self._draw(moment)

    def note(self, text: str) -> None:
        """One sentence above the line; it stays."""
        self.console.print(Text(text), soft_wrap=True)

    def close(self) -> None:
        """Shows the last state and leaves the terminal in order. May be called twice."""
        if self._latest is not None and (self._drawn is None or self._drawn[0] != self._latest[0]):
            self._draw(self._clock())
        if self._live is not None:
            self._live.stop()

    def _draw(self, moment: float) -> None:
        if self._latest is None:
            return
        step, metrics = self._latest
        self._drawn = (step, moment)
        pace = self._timer.seconds_per_step()
        fields = describe_step(step, self.total_steps, metrics, pace, self._memory(), self._next_checkpoint(step))
        if self._live is None:
            self.note(SEPARATOR.join(fields))
            return
        self._live.start()
        self._live.update(Text(wrap_fields(fields, self.console.width)), refresh=True)

    def _next_checkpoint(self, step: int) -> int | None:
        if step >= self.total_steps:
            return None
        if not self._checkpoint_interval:
            return self.total_steps
        return min(self.total_steps, (step // self._checkpoint_interval + 1) * self._checkpoint_interval)

    def __enter__(self) -> StatusLine:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()


class CacheBar:
    """Progress of finding and encoding clips: a bar per label, or plain lines (first, one per `interval` seconds, last)."""

    def __init__(
        self, console: Console, *, interactive: bool, interval: float = 30.0, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.console = console
        self._interval, self._clock = interval, clock
        columns = (TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        self._progress = Progress(*columns, console=console, get_time=clock, auto_refresh=False) if interactive else None
        self._bars: dict[str, TaskID] = {}
        self._printed: dict[str, tuple[int, float]] = {}
        """Label -> items done and time of its last plain line or drawing."""

    def report(self, done: int, total: int, label: str) -> None:
        """`done` of `total` items of the stage `label`."""
        moment = self._clock()
        printed = self._printed.get(label)
        if self._progress is not None:
            self._bar(done, total, label)
        due = printed is None or moment - printed[1] >= (REDRAW if self._progress else self._interval)
        if due or (done >= total and printed is not None and printed[0] != done):
            self._printed[label] = (done, moment)
            self._show(f"{label}: {done}/{total}")

    def _bar(self, done: int, total: int, label: str) -> None:
        assert self._progress is not None
        self._progress.start()
        if label not in self._bars:
            self._bars[label] = self._progress.add_task(label, total=total)
        self._progress.update(self._bars[label], completed=done, total=total)

    def _show(self, line: str) -> None:
        if self._progress is None:
            self.console.print(Text(line), soft_wrap=True)
        else:
            self._progress.refresh()

    def note(self, text: str) -> None:
        """One sentence above the bars; it stays."""
        self.console.print(Text(text), soft_wrap=True)

    def close(self) -> None:
        """Leaves the terminal in order. May be called twice."""
        if self._progress is not None:
            self._progress.stop()

    def __enter__(self) -> CacheBar:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()
