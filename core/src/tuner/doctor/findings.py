"""What `tuner doctor` finds: rows with a verdict, from checks of which none can take the others along."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from tuner.errors import EnvironmentProblem, TunerError
from tuner.plugins.record import reason_of

Verdict = Literal["ok", "note", "problem"]
ENVIRONMENT = EnvironmentProblem.exit_code


@dataclass(frozen=True)
class Row:
    """One thing that was looked at."""

    group: str
    """What it belongs to: python, libraries, plugins, gpu, host, disk, media, hub, configuration."""
    name: str
    verdict: Verdict
    """`note`: training works, something else does not or not well; `problem`: training would not work."""
    found: str
    remedy: str = ""
    exit_code: int = ENVIRONMENT
    """Of a problem."""

    def as_json(self) -> dict[str, object]:
        """For `--json`."""
        return {"group": self.group, "name": self.name, "verdict": self.verdict, "found": self.found, "remedy": self.remedy}


@dataclass(frozen=True)
class Check:
    """Looks at something; `name` stands in the row of a check that fails itself."""

    group: str
    name: str
    look: Callable[[], Iterable[Row]]


def examine(checks: Sequence[Check]) -> list[Row]:
    """All rows of all checks. One that fails is a row itself: a problem where it raises what a user can mend, else a note."""
    rows: list[Row] = []
    for check in checks:
        try:
            for row in check.look():
                rows.append(row)  # one by one: those before a failure stay
        except TunerError as error:
            rows.append(problem_of(check.group, check.name, error))
        except Exception as error:  # whatever a driver, a library or a plugin raises: the other checks go on
            rows.append(Row(check.group, check.name, "note", f"could not be looked at: {reason_of(error)}"))
    return rows


def problem_of(group: str, name: str, error: TunerError) -> Row:
    """An error as a row."""
    seen = "" if error.value is None else f" (got {error.value!r})"
    where = f"{error.where}: " if error.where else ""
    return Row(group, name, "problem", f"{where}{error.message}{seen}", error.remedy, error.exit_code)


def exit_code(rows: Sequence[Row]) -> int:
    """0 without a problem; that of the environment where it has one, else that of the first problem."""
    codes = [row.exit_code for row in rows if row.verdict == "problem"]
    return ENVIRONMENT if ENVIRONMENT in codes else next(iter(codes), 0)
