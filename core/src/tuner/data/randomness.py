"""Counter-based randomness: every draw is a function of (seed, purpose, counters), so nothing has to be stored to resume."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


def derived_seed(seed: int, purpose: str, *counters: int) -> int:
    """A 64-bit number that differs for every (seed, purpose, counters); blake2b, equal on all machines."""
    text = "\x1f".join((str(seed), purpose, *(str(counter) for counter in counters)))
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big")


def generator(seed: int, purpose: str, *counters: int) -> torch.Generator:
    """A fresh CPU generator for one draw."""
    import torch  # the data listing commands use this module without torch

    return torch.Generator().manual_seed(derived_seed(seed, purpose, *counters))


def uniform(seed: int, purpose: str, *counters: int) -> float:
    """One number in [0, 1), without torch."""
    return (derived_seed(seed, purpose, *counters) >> 11) / 2**53
