"""The tiny flavour as a user gets it: written into the cache folder the first time it is asked for."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from tuner_ltxvideo2.hub import ModelFiles, locate_model
from tuner_ltxvideo2.tiny import TinyPaths


@dataclass(frozen=True)
class FlavourWritten:
    """What asking for it did."""

    cache: Path
    paths: TinyPaths
    files: ModelFiles
    draws_untouched: bool
    """Whether the caller's random numbers go on as if nothing had been written."""


def write_flavour(cache: Path) -> FlavourWritten:
    """`model_flavour: tiny` with the empty folder `cache`."""
    before = torch.random.get_rng_state()
    files = locate_model("", "", "tiny", "", cache)
    untouched = torch.equal(torch.random.get_rng_state(), before)
    return FlavourWritten(cache, TinyPaths(files.weights, files.weights.parent / "text_encoder"), files, untouched)
