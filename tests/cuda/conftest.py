"""One project for all runs: clips of two lengths, and some of one length alone."""

from __future__ import annotations

import pytest

from integration.gpu_runs import Bench
from integration.project import Project, add_clip
from tuner_ltxvideo2.tiny import write_tiny


@pytest.fixture(scope="session")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    folder = tmp_path_factory.mktemp("cuda")
    for name, frames in (("amber", 17), ("birch", 17), ("cedar", 33), ("dusk", 33)):
        add_clip(folder / "mixed", name, frames=frames)
    for name in ("elder", "fern"):
        add_clip(folder / "same", name, frames=17)
    return Bench(Project(folder, write_tiny(tmp_path_factory.mktemp("tiny"))))
