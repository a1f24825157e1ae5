"""Text files, written whole or not at all."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

from tuner.errors import DiskError


def replace_text(path: Path, text: str, *, remedy: str = "") -> None:
    """Readers see the old file or the new one. A link is followed, the rights of an existing file stay; its folder is made.

    Characters that UTF-8 has no bytes for are escaped. Raises `DiskError`.
    """
    target = path.resolve()
    temporary = target.with_name(f".{target.name}.tmp-{os.getpid()}")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("wb") as file:
            file.write(text.encode("utf-8", "backslashreplace"))
            file.flush()
            os.fsync(file.fileno())
        if target.exists():
            temporary.chmod(target.stat().st_mode & 0o777)
        temporary.replace(target)
    except OSError as error:
        raise DiskError(f"cannot be written: {error.strerror}", where=str(path), remedy=remedy) from error
    finally:
        with suppress(OSError):
            temporary.unlink()
