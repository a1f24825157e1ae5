"""Errors a user can act on: each says what is wrong, where, which value was seen and what to do.

Anything that is not a `TunerError` is a bug of ours and ends with exit code 1 and a traceback.
"""

from __future__ import annotations


class TunerError(Exception):
    """A failure that the user can mend.

    `message`: what is wrong. `where`: the key, file or sample. `value`: what was seen there. `remedy`: what to do.
    """

    exit_code = 1

    def __init__(self, message: str, *, where: str = "", value: object = None, remedy: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.where = where
        self.value = value
        self.remedy = remedy

    def __str__(self) -> str:
        seen = "" if self.value is None else f" (got {self.value!r})"
        where = f"{self.where}: " if self.where else ""
        remedy = f"\n  -> {self.remedy}" if self.remedy else ""
        return f"{where}{self.message}{seen}{remedy}"


class ConfigError(TunerError):
    """Usage or configuration: an unknown key, a value outside its limits, two keys that exclude each other."""

    exit_code = 2


class EnvironmentProblem(TunerError):
    """The machine or its libraries lack something."""

    exit_code = 3


class DataError(TunerError):
    """The dataset: missing, empty, or nothing usable in it."""

    exit_code = 4


class OutOfMemoryError(TunerError):
    """Device or host memory was not enough; says in which phase."""

    exit_code = 5


class CheckpointError(TunerError):
    """A model checkpoint, adapter file or training checkpoint that does not fit or is damaged."""

    exit_code = 6


class NumericError(TunerError):
    """A loss or gradient that is not finite."""

    exit_code = 7


class HubError(TunerError):
    """The network or the model hub."""

    exit_code = 8


class DiskError(TunerError):
    """No space, or a folder that cannot be written."""

    exit_code = 9


class PluginError(TunerError):
    """A plugin that is missing, broken or built for another version."""

    exit_code = 10
