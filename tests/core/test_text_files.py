"""Text files, written whole or not at all."""

from __future__ import annotations

from pathlib import Path

import pytest

from tuner.errors import DiskError
from tuner.text_files import replace_text


def test_a_link_is_followed_and_rights_stay(tmp_path: Path) -> None:
    kept, link = tmp_path / "kept.json", tmp_path / "link.json"
    kept.write_text("old")
    kept.chmod(0o640)
    link.symlink_to(kept)
    replace_text(link, "new \udc80")
    assert link.is_symlink() and kept.read_text() == "new \\udc80" and kept.stat().st_mode & 0o777 == 0o640
    replace_text(tmp_path / "made" / "x.txt", "text")
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["kept.json", "link.json", "made", "x.txt"]


def test_what_cannot_be_written_is_named_and_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    with pytest.raises(DiskError, match="cannot be written") as error:
        replace_text(tmp_path / "folder", "text", remedy="another place")
    assert error.value.remedy == "another place" and [path.name for path in tmp_path.iterdir()] == ["folder"]
