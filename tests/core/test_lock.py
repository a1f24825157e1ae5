"""The run folder's lock: exclusive across processes, and gone with its holder."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tuner.errors import ConfigError, DiskError
from tuner.train.saving.lock import FolderLock

HOLDER = """
import sys
from pathlib import Path
from tuner.train.saving.lock import FolderLock
with FolderLock(Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""


def test_second_run_is_refused_with_the_pid_of_the_first_and_a_killed_run_leaves_no_lock(tmp_path: Path) -> None:
    with subprocess.Popen([sys.executable, "-c", HOLDER, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == b"held\n"
        with pytest.raises(ConfigError, match=f"process {holder.pid} on ") as refusal:
            FolderLock(tmp_path).acquire()
        assert refusal.value.exit_code == 2
        assert str(tmp_path) in refusal.value.where
        assert refusal.value.remedy
        holder.kill()
        holder.wait()
        with FolderLock(tmp_path):
            assert (tmp_path / ".lock").read_text().split()[0] == str(os.getpid())


def test_released_lock_can_be_taken_again(tmp_path: Path) -> None:
    first, second = FolderLock(tmp_path), FolderLock(tmp_path)
    with first, pytest.raises(ConfigError):
        second.acquire()
    with second:
        pass
    second.release()


def test_folder_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(DiskError, match="cannot be written"):
        FolderLock(tmp_path / "absent").acquire()
