"""Fixtures: the tiny checkpoint once, a project per test."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from integration.processes import Launcher
from integration.project import Project, add_clip
from tuner_ltxvideo2.tiny import TinyPaths, write_tiny

torch.set_num_threads(1)


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> TinyPaths:
    """The 2.0 architecture made small."""
    return write_tiny(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="session")
def launcher() -> Iterator[Launcher]:
    """Starts commands in processes of their own."""
    with Launcher() as started:
        yield started


@pytest.fixture
def project(tmp_path: Path, tiny: TinyPaths, monkeypatch: pytest.MonkeyPatch) -> Project:
    """Three clips with sound and one without."""
    for name in ("amber", "birch", "cedar"):
        add_clip(tmp_path / "clips", name)
    add_clip(tmp_path / "clips", "dusk", sound=False)
    monkeypatch.chdir(tmp_path)
    return Project(tmp_path, tiny)
