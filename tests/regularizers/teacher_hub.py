"""A hub on this machine with image encoders: the small DINOv2, and a repository that holds pickled weights alone."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from huggingface_hub import constants

from ltxvideo2.ltx2_hub import FakeHub, serve


@contextmanager
def teacher_hub(teacher: Path, folder: Path, patch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    """`teacher`: what the small one is; `folder`: takes the cache, which is empty."""
    with serve() as server:
        pickled = folder / "pytorch_model.bin"
        pickled.write_bytes(b"pickle")
        files = {name: teacher / name for name in ("config.json", "model.safetensors")}
        server.repositories["facebook/dinov2-small"] = {**files, "pytorch_model.bin": pickled}
        server.repositories["somebody/pickled"] = {"config.json": teacher / "config.json", "pytorch_model.bin": pickled}
        patch.setattr(constants, "ENDPOINT", server.url)
        patch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", server.url + "/{repo_id}/resolve/{revision}/{filename}")
        patch.setattr(constants, "HF_HUB_CACHE", str(folder / "hub"))
        patch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        yield server


def asked(server: FakeHub) -> list[str]:
    """The files that were downloaded, in order."""
    return [path for path, _ in server.asked]
