"""The tiny checkpoints, written once per session, and opened sources over them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from ltxvideo2.ltx2_flavour import FlavourWritten, write_flavour
from tuner.interfaces.family import Variant
from tuner.interfaces.services import WeightSource
from tuner_ltxvideo2.loading import CombinedFile
from tuner_ltxvideo2.tiny import TinyPaths, write_tiny
from tuner_ltxvideo2.variants import variant_of

torch.set_num_threads(1)


@pytest.fixture(scope="session")
def tiny_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the tiny models lie, one folder per variant."""
    return tmp_path_factory.mktemp("tiny")


@pytest.fixture(scope="session", params=["2.0", "2.3", "2.5"])
def tiny(request: pytest.FixtureRequest, tiny_root: Path) -> TinyPaths:
    """Each variant in turn."""
    return write_tiny(tiny_root / request.param, variant=request.param)


@pytest.fixture(scope="session")
def tiny_source(tiny: TinyPaths) -> WeightSource:
    """The combined file, opened and checked."""
    return CombinedFile().open(tiny.checkpoint, tiny.checkpoint.name)


@pytest.fixture(scope="session")
def tiny_variant(tiny_source: WeightSource) -> Variant:
    return variant_of(tiny_source)


@pytest.fixture(scope="session")
def tiny20(tiny_root: Path) -> TinyPaths:
    """2.0 alone, for what does not differ between variants."""
    return write_tiny(tiny_root / "2.0")


@pytest.fixture(scope="session")
def flavour_written(tmp_path_factory: pytest.TempPathFactory) -> FlavourWritten:
    """Written once; two tests look at it."""
    return write_flavour(tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="session")
def source20(tiny20: TinyPaths) -> WeightSource:
    """2.0 alone, opened."""
    return CombinedFile().open(tiny20.checkpoint, tiny20.checkpoint.name)
