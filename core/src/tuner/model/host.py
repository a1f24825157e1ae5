"""How much host memory is free: by the machine, and by the control group of a container, which may allow less."""

from __future__ import annotations

import contextlib
import os
import re
from pathlib import Path

GROUP = Path("/sys/fs/cgroup")


def free_host_memory() -> int:
    """Bytes that this process may still take without swapping, at least 1; 0: not known."""
    found = [value for value in (_free_on_machine(), _free_in_group(GROUP)) if value is not None]
    return max(1, min(found)) if found else 0


def memory_limit() -> int:
    """Bytes that a container, a version 2 control group, may take altogether; 0: no limit."""
    with contextlib.suppress(OSError, ValueError):
        return int((GROUP / "memory.max").read_text())
    return 0


def _free_on_machine() -> int | None:
    with contextlib.suppress(OSError):
        match = re.search(r"^MemAvailable:\s+(\d+) kB", Path("/proc/meminfo").read_text(), re.MULTILINE)
        if match:
            return int(match[1]) * 1024
    with contextlib.suppress(OSError, ValueError):
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return None


def _free_in_group(group: Path) -> int | None:
    """Of a version 2 control group. File pages count as used there, though they are given up when memory is wanted."""
    with contextlib.suppress(OSError, ValueError):
        limit = (group / "memory.max").read_text().strip()
        if limit == "max":
            return None
        pages = sum(int(n) for n in re.findall(r"^(?:active|inactive)_file (\d+)$", (group / "memory.stat").read_text(), re.MULTILINE))
        return max(0, int(limit) - int((group / "memory.current").read_text()) + pages)
    return None
