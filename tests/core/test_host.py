"""Free host memory: never more than the control group allows, and file pages count as free."""

from __future__ import annotations

from pathlib import Path

import pytest

from tuner.model import host


def group(folder: Path, limit: str) -> Path:
    """A control group that uses 700 bytes, 500 of them pages of files."""
    (folder / "memory.max").write_text(f"{limit}\n")
    (folder / "memory.current").write_text("700\n")
    (folder / "memory.stat").write_text("anon 200\nactive_file 400\ninactive_file 100\nslab 9\n")
    return folder


def test_the_smaller_of_machine_and_group_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host, "GROUP", tmp_path)
    machine = host.free_host_memory()
    assert machine > 2**20
    group(tmp_path, "1000")
    assert host.free_host_memory() == 1000 - 700 + 500
    group(tmp_path, "100")  # over its limit: nothing is left, which is not the same as not known
    assert host.free_host_memory() == 1
    group(tmp_path, "max")
    assert host.free_host_memory() > 2**20


def test_a_system_that_does_not_say_is_not_known(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host, "GROUP", tmp_path)
    monkeypatch.setattr(host, "_free_on_machine", lambda: None)
    assert host.free_host_memory() == 0
