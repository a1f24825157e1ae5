"""What is told of a run in a line, on the terminal and in a browser."""

from __future__ import annotations

from datetime import timedelta

from tuner.watch.pace import GIB
from tuner.watch.status import RunStatus

LONG_AGO = 60.0
"""Seconds after which it is said that a run has not been heard of, or has not ended a step."""


def row(run: RunStatus) -> tuple[str, ...]:
    """One line of the table."""
    step = f"{run.step}/{run.total}" if run.total else ""
    seconds = f"{run.seconds_per_step:.3g}" if run.seconds_per_step else ""
    return str(run.path), run.state, step, seconds, duration(run.eta), losses(run.metrics), run.checkpoint, remark(run)


def checkpoints(run: RunStatus) -> str:
    """The last one, and when the next comes."""
    following = f"at step {run.next_checkpoint}" if run.next_checkpoint else ""
    if not run.checkpoint:
        return f"the first one {following}" if following else ""
    return run.checkpoint + (f", next {following}" if following else "")


def progress(run: RunStatus) -> str:
    """`step/total (share)`."""
    return f"{run.step}/{run.total} ({run.step / run.total:.0%})" if run.total else ""


def pace(run: RunStatus) -> str:
    """Seconds a step, and samples a second."""
    if not run.seconds_per_step:
        return ""
    samples = run.metrics.get("samples")
    return f"{run.seconds_per_step:.3g} s/step" + (f", {samples / run.seconds_per_step:.3g} samples/s" if samples else "")


def losses(metrics: object) -> str:
    """`video 0.123 | audio 0.045`, or the total where there are no parts."""
    if not isinstance(metrics, dict):
        return ""
    parts = {name.removeprefix("loss/"): value for name, value in metrics.items() if name.startswith("loss/")}
    parts = parts or {name: value for name, value in metrics.items() if name not in ("grad_norm", "lr", "seconds", "samples")}
    return " | ".join(f"{name} {value:.4f}" for name, value in parts.items())


def memory(run: RunStatus) -> str:
    """Now, peak and limit."""
    numbers = [run.memory.get(name) for name in ("now", "peak", "limit")]
    if not all(isinstance(value, int) for value in numbers):
        return ""
    now, peak, limit = (value / GIB for value in numbers if isinstance(value, int))
    return f"{run.memory.get('place')} {now:.1f} GiB, at most {peak:.1f} of {limit:.1f}"


def duration(seconds: float | None) -> str:
    """`1:02:03`; empty where it is not known."""
    return "" if seconds is None else str(timedelta(seconds=round(seconds)))


def remark(run: RunStatus) -> str:
    """What is odd about it."""
    if run.state == "failed":
        return run.reason.strip().splitlines()[0] if run.reason.strip() else ""
    if run.state == "died":
        since = f"nothing heard of it for {duration(run.silent)}; " if run.silent is not None else ""
        return since + ("go on with --resume_from_checkpoint latest" if run.checkpoint else "no checkpoint was saved")
    if run.state == "running" and run.silent is not None and run.silent > LONG_AGO:
        return f"no heartbeat for {duration(run.silent)}"
    if run.state == "running" and run.waiting is not None and run.waiting > max(LONG_AGO, 20 * (run.seconds_per_step or 0)):
        return f"no step for {duration(run.waiting)}"
    return ""
