"""What the headers of a checkpoint tell of its sizes, before any weight is read. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from tuner.errors import CheckpointError

if TYPE_CHECKING:
    from tuner.interfaces.services import TensorHeader

Headers = Mapping[str, "TensorHeader"]
"""Name of a tensor -> its header."""


def shape_of(headers: Headers, name: str) -> tuple[int, ...]:
    """Shape of the tensor `name`. Raises `CheckpointError` where it is missing."""
    if name not in headers:
        raise CheckpointError(
            "the checkpoint lacks a tensor that tells its size", where=name, remedy="download it again, or give a complete checkpoint"
        )
    return headers[name].shape


def count_of(headers: Headers, prefix: str) -> int:
    """How many numbered modules stand under `prefix`."""
    start = prefix + "."
    return len({name[len(start) :].split(".", 1)[0] for name in headers if name.startswith(start)})
