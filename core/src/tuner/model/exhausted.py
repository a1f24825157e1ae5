"""Which memory an error says has run out."""

from __future__ import annotations

import torch


def lacking_memory(error: BaseException) -> str:
    """Which memory ran out; empty: it is another error."""
    if isinstance(error, torch.OutOfMemoryError):
        return "device"
    # Torch reports a failed allocation of host memory as a plain RuntimeError.
    return "host" if isinstance(error, MemoryError) or "DefaultCPUAllocator" in str(error) else ""
