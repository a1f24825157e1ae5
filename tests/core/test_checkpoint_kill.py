"""kill -9 before every file operation of a save, and a disk that really fills up: there is always a whole checkpoint.

The operations are seen through Python's audit events. One process loads torch once and forks a victim per operation.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tuner.train.saving.checkpoint import find_checkpoint, load_checkpoint, save_checkpoint

SCENARIOS = {"after killed ones": (1, 2, 3, 2, 1), "the only one replaced": (2, 2, 2, 1, 0)}
"""Two steps saved beforehand, the step of the killed save, how many it keeps, and whether it finds the remains of killed ones."""

VICTIMS = """
import json, os, shutil, signal, sys
from pathlib import Path
import torch
from tuner.train.saving.checkpoint import save_checkpoint

torch.set_num_threads(1)
EVENTS = {"open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate", "os.chmod"}
left = -1

def kill(event, arguments):
    global left
    if left >= 0 and event in EVENTS:
        if left == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        left -= 1

def save(folder, step, value, keep):
    parts = {"weights": {"a": torch.full((8,), value)}, "optimizer": {"m": torch.full((3,), value)}}
    save_checkpoint(folder, step, parts, {"value": value}, keep=keep, extra=lambda path: (path / "adapter").write_text(str(value)))

def scenario(root, first, second, third, keep, leftovers):
    global left
    save(root / "start", first, 1.0, 0)
    save(root / "start", second, 2.0, 0)
    if leftovers:
        shutil.copytree(root / "start" / f"checkpoint-{first}", root / "start" / ".checkpoint-7.tmp-1")
        shutil.copytree(root / "start" / f"checkpoint-{first}", root / "start" / ".checkpoint-0.pruned-1")
        os.rename(root / "start" / f"checkpoint-{first}", root / "start" / f".checkpoint-{first}.old-1")
    for count in range(1000):
        folder = root / str(count)
        shutil.copytree(root / "start", folder)
        victim = os.fork()
        if victim == 0:
            left = count
            save(folder, third, 3.0, keep)
            left = -1
            os._exit(0)
        status = os.waitpid(victim, 0)[1]
        if os.WIFEXITED(status):
            assert os.WEXITSTATUS(status) == 0
            return
        assert os.WTERMSIG(status) == signal.SIGKILL
    raise AssertionError("never came to the end of a save")

sys.addaudithook(kill)
for name, numbers in json.loads(sys.argv[2]).items():
    scenario(Path(sys.argv[1]) / name, *numbers)
"""


def value_of(path: Path | None) -> float:
    """The value that a checkpoint holds, the same in every file of it."""
    assert path is not None
    loaded = load_checkpoint(path)
    value = loaded.facts["value"]
    assert isinstance(value, float)
    assert torch.equal(loaded.parts["weights"]["a"], torch.full((8,), value))
    assert torch.equal(loaded.parts["optimizer"]["m"], torch.full((3,), value))
    assert (path / "adapter").read_text() == str(value)
    return value


@pytest.fixture(scope="module")
def killed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Scenario -> one run folder per operation: number n is what a save left that was killed before its operation n."""
    root = tmp_path_factory.mktemp("killed")
    subprocess.run([sys.executable, "-c", VICTIMS, str(root), json.dumps(SCENARIOS)], check=True)
    return root


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_kill_before_every_file_operation(killed: Path, scenario: str) -> None:
    _, second, third, keep, _ = SCENARIOS[scenario]
    shutil.rmtree(killed / scenario / "start")
    victims = sorted((killed / scenario).iterdir(), key=lambda path: int(path.name))
    assert len(victims) > 20
    found = [value_of(find_checkpoint(folder, "latest")) for folder in victims]
    # the killed save is absent up to one point, and there from then on
    assert found == sorted(found)
    assert {found[0], found[-1]} == {2.0, 3.0}
    for folder in victims:
        save_checkpoint(folder, 9, {}, {}, keep=keep)
        expected = ["checkpoint-9"] if keep == 1 else [f"checkpoint-{third if value_there(folder, third) else second}", "checkpoint-9"]
        assert sorted(path.name for path in folder.iterdir()) == expected


def value_there(folder: Path, step: int) -> bool:
    return (folder / f"checkpoint-{step}").exists()


FULL_DISK = """
import os, shutil, sys
from pathlib import Path
import torch
from tuner.errors import DiskError
from tuner.train.saving.checkpoint import find_checkpoint, load_checkpoint, save_checkpoint

run = Path(sys.argv[1]) / "run"
torch.set_num_threads(1)
parts = {"weights": {"a": torch.ones(500_000)}}
save_checkpoint(run, 1, parts, {}, keep=1)

def fill(folder):  # what another program does meanwhile: 100 kB stay free
    with (folder / "filler").open("wb") as file:
        file.write(bytes(shutil.disk_usage(folder).free - 100_000))

for extra in (fill, None):
    if extra is None:
        with (run.parent / "filler").open("wb") as file:
            file.write(bytes(shutil.disk_usage(run).free - 3_000_000))
    try:
        save_checkpoint(run, 2, parts, {}, keep=1, extra=extra)
    except DiskError as error:
        print(error.message)
    assert [path.name for path in run.iterdir()] == ["checkpoint-1"]
    assert torch.equal(load_checkpoint(find_checkpoint(run, "latest")).parts["weights"]["a"], torch.ones(500_000))
(run.parent / "filler").unlink()
save_checkpoint(run, 2, parts, {}, keep=1)
assert [path.name for path in run.iterdir()] == ["checkpoint-2"]
"""


def own_file_system(folder: Path) -> list[str]:
    """A command line's beginning that mounts 12 MiB over `folder` for what follows, in name spaces of its own."""
    return ["unshare", "-rm", "sh", "-c", 'mount -t tmpfs -o size=12m none "$0" && exec "$@"', str(folder)]


def test_disk_that_fills_up(tmp_path: Path) -> None:
    if shutil.which("unshare") is None or subprocess.run([*own_file_system(tmp_path), "true"], check=False, capture_output=True).returncode:
        pytest.skip("no file system of limited size can be mounted here")
    command = [*own_file_system(tmp_path), sys.executable, "-c", FULL_DISK, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    in_the_middle, beforehand = done.stdout.splitlines()
    assert in_the_middle.endswith("older ones are untouched: No space left on device")
    assert "are free; nothing was written" in beforehand
