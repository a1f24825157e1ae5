"""What worker processes do in tests. Imports little, so that a process is up at once."""

from __future__ import annotations

import os
import sys
import threading
from pathlib import Path

from tuner.errors import DataError


def letters(path: Path) -> int:
    """A decoder that works, except for one file."""
    if path.name == "bad":
        raise DataError("is bad", where=str(path))
    return len(path.name)


def act(path: Path, what: str) -> int:
    """`letters`, or the process, a decoder that never answers, one that takes its process along, or one that fails."""
    if what == "who":
        return os.getpid()
    if what == "lose":
        raise ConnectionResetError
    if what == "hang":
        threading.Event().wait()
    if what == "die":
        os._exit(41)
    if what == "hunger":
        raise MemoryError
    return letters(path)


def has_torch(path: Path) -> bool:
    """Whether decoding brings torch into the process."""
    import tuner.data.decode
    import tuner.data.media_index  # noqa: F401

    return "torch" in sys.modules
