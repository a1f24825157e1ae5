"""Groups on disk: whole safetensors files that go away, a reader that never runs ahead into memory in use, failures with their key."""

from __future__ import annotations

import gc
import os
import threading
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from offload.simulated import SimulatedLink
from offload.streams import CPU, Trained, build
from tuner.errors import DiskError
from tuner_offload import disk
from tuner_offload.disk import DiskStore, ScratchFolder, folder_problem
from tuner_offload.streamed import StreamedBlocks

DEPTH = 3


def on_disk(folder: Path) -> Trained:
    link = SimulatedLink()
    units = tuple((index,) for index in range(DEPTH))
    return build(lambda: StreamedBlocks(units, 2, link, DiskStore(link, folder, "transformer")), depth=DEPTH, width=8)


def test_files_hold_the_weights_by_name_and_go_away(tmp_path: Path) -> None:
    model, plain = on_disk(tmp_path), build(depth=DEPTH, width=8)
    assert not model.session.capturable
    folder = next(tmp_path.iterdir())
    assert sorted(file.name for file in folder.iterdir()) == [".lock", *(f"block-{index:04d}.safetensors" for index in range(DEPTH))]
    stored = load_file(folder / "block-0001.safetensors")
    assert set(stored) == {f"{name}.{kind}" for name in ("to_q", "to_k", "to_v", "audio") for kind in ("weight", "bias")}
    assert torch.equal(stored["to_k.weight"], plain.net.blocks[1].to_k.weight)
    model.step(0)
    model.session.materialize()
    block = model.net.blocks[1]
    with torch.no_grad():
        block.to_k.weight.mul_(2)  # what is written into a materialized weight is what later steps compute with
        plain.net.blocks[1].to_k.weight.mul_(2)
    plain.optimizer, model.optimizer = (torch.optim.SGD(m.net.parameters(), 0.0) for m in (plain, model))
    for _, parameter in [*model.trainable(), *plain.trainable()]:
        parameter.data.fill_(0.1)
    assert torch.equal(model.loss(1), plain.loss(1))
    model.session.detach()
    assert not list(tmp_path.iterdir())
    assert torch.equal(block.to_k.weight, plain.net.blocks[1].to_k.weight)


def test_two_hundred_steps_leave_no_tensors_threads_or_files(tmp_path: Path) -> None:
    def held() -> tuple[int, int, int]:
        gc.collect()
        tensors = sum(issubclass(type(thing), torch.Tensor) for thing in gc.get_objects())
        return tensors, threading.active_count(), len(list(Path("/proc/self/fd").iterdir()))

    model = on_disk(tmp_path)

    def passes(count: int) -> None:
        """Training passes without their computation, and a whole step at the end."""
        for _ in range(count):
            model.session.begin_step(0)
            for index in range(DEPTH):
                model.session.before_forward(index)
                model.session.after_forward(index)
            for index in reversed(range(DEPTH)):
                model.session.before_backward(index)
                model.session.after_backward(index)
            model.session.end_step()
        model.step(0)
        model.losses.clear()
        model.gradients.clear()

    passes(2)
    before = held()
    passes(200)
    assert held() == before
    model.session.detach()
    assert threading.active_count() == before[1] - 1


def test_a_file_that_is_damaged_ends_the_step_with_the_key(tmp_path: Path) -> None:
    model = on_disk(tmp_path)
    model.step(0)
    file = next(tmp_path.glob("*/block-0002.safetensors"))
    size = file.stat().st_size
    whole = file.read_bytes()
    os.truncate(file, size - 100)
    with pytest.raises(DiskError, match=r"group_offload_to_disk_path: a block cannot be read: the file ended early"):
        for step in range(2):
            model.step(step)
    file.write_bytes(whole)
    model.optimizer.zero_grad()
    model.step(1)
    model.session.detach()


def test_what_a_killed_process_left_is_cleared_away(tmp_path: Path) -> None:
    left = ScratchFolder(tmp_path, "transformer")
    (left.path / "block-0000.safetensors").write_bytes(b"x")
    living = ScratchFolder(tmp_path, "transformer")
    os.close(left._lock)  # the kernel does so when a process ends
    strange = tmp_path / "tuner-transformer-mine"
    strange.mkdir()
    (strange / "note.txt").write_text("kept")
    last = ScratchFolder(tmp_path, "transformer")
    assert sorted(tmp_path.iterdir()) == sorted([living.path, last.path, strange]) and (strange / "note.txt").exists()
    living.close()
    last.close()
    assert list(tmp_path.iterdir()) == [strange]


def test_places_that_cannot_hold_the_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert folder_problem(tmp_path / "new" / "folder", 10) == []
    assert not (tmp_path / "new").exists()
    (file := tmp_path / "file").write_text("")
    assert "cannot be written" in str(folder_problem(file / "folder", 10)[0])
    assert "1000000.0 GB are needed there" in str(folder_problem(tmp_path, 10**15)[0])
    with pytest.raises(DiskError, match="group_offload_to_disk_path: the folder cannot be made"):
        ScratchFolder(file, "transformer")

    def full(tensors: object, path: Path) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(disk, "save_file", full)
    link = SimulatedLink()
    store = DiskStore(link, tmp_path, "transformer")
    session = StreamedBlocks(((0,),), 1, link, store)
    block = build(depth=1).net.blocks[0]
    with pytest.raises(DiskError, match="a block cannot be written: No space left on device"):
        session.receive(0, block, CPU)
    session.detach()
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
