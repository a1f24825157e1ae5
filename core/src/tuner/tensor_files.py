"""Safetensors files, written whole or not at all."""

from __future__ import annotations

import os
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from tuner.errors import DiskError


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str], *, what: str, remedy: str = "") -> None:
    """Writes contiguous CPU tensors to `path`, making its folder; an earlier file stays until the new one is on the disk.

    `what`: for the error, such as "the adapter". Raises `DiskError`.
    """
    partial = path.with_name(path.name + ".part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file(dict(tensors), partial, metadata={"format": "pt", **metadata})
        share(partial)
        with partial.open("rb") as file:
            os.fsync(file.fileno())
        partial.replace(path)
    except (OSError, SafetensorError) as error:
        with suppress(OSError):
            partial.unlink(missing_ok=True)
        raise DiskError(f"{what} cannot be written: {error}", where=str(path), remedy=remedy) from error


def share(path: Path) -> None:
    """Gives a file the permissions that the umask allows: safetensors makes files that only their owner can read."""
    mask = os.umask(0)
    os.umask(mask)
    path.chmod(0o666 & ~mask)
