"""A row of `tuner plan`: one combination of memory settings and what it costs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from tuner.train.forecast.machine import GIB, RESERVE, SPARE, Machine


@dataclass(frozen=True)
class Row:
    """One combination of settings and what it costs. Bytes, seconds a step."""

    residency: str
    """What the strategy says of itself; "resident" without one."""
    precision: str
    checkpointing: str
    """"none", "some" or "all" blocks are recomputed."""
    keys: Mapping[str, object]
    """All keys that make this row, with their values."""
    peak: int
    parts: Mapping[str, int]
    """What the peak is made of."""
    pinned: int
    host: int
    seconds: float
    error: float
    current: bool = False
    """It is what the configuration says now."""
    problem: str = ""
    """Why it cannot be used at all."""
    where: str = ""
    """The keys concerned."""
    kept: int = 0
    """Blocks that keep their activations."""

    def needs(self) -> int:
        """Bytes of a device's memory that this takes, with what torch does not count."""
        return int(self.peak * (1 + SPARE)) + RESERVE

    def fits(self, machine: Machine) -> bool:
        """Whether it can be used there."""
        return not self.problem and self.needs() <= machine.memory


@dataclass(frozen=True)
class Predicted:
    """A run's row, and the device it is for."""

    row: Row
    machine: Machine
    block: int = 0
    """Bytes that a block takes whose activations are kept; where it was asked how many can."""

    def describe(self) -> str:
        """One line for the plan."""
        parts = ", ".join(f"{name} {gib(size)}" for name, size in self.row.parts.items() if size)
        parts += f"; activations of {self.row.kept} blocks are kept" if self.block else ""
        return f"predicted {gib(self.row.needs())} of {gib(self.machine.memory)} on the device ({parts}), {self.row.seconds:.2g} s a step"

    @property
    def notices(self) -> tuple[str, ...]:
        """Empty where it fits."""
        if self.row.needs() <= self.machine.memory:
            return ()
        over = gib(self.row.needs() - self.machine.memory)
        others = f" (other programs hold {gib(self.machine.taken)} of it)" if self.machine.taken else ""
        return (f"the device's memory is predicted to be {over} too small{others}: {self.describe()}; `tuner plan` shows what fits",)


def gib(size: float) -> str:
    """Bytes as people read them."""
    return f"{size / GIB:.1f} GiB" if size >= GIB / 10 else f"{size / 2**20:.0f} MiB"
