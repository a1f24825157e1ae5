"""On a GPU: a steady step makes the host wait for nothing and holds no more weights than its ring; two hundred leave nothing behind."""

from __future__ import annotations

import contextlib
import gc
import threading
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path

import psutil
import pytest
import torch

from integration.gpu_runs import (
    CUT,
    DEVICE,
    FP8,
    GROUPS,
    HAS_GPU,
    INSIDE,
    INT8,
    RAMTORCH,
    SAME,
    SWAP,
    TREAD,
    Bench,
    Keys,
    captured,
    graphs,
    lenient,
    needs_gpu,
    steps_of,
)
from tuner.interfaces.memory import MemorySession
from tuner.train.loop import Loop
from tuner_offload.ramtorch import RamTorch

pytestmark = lenient
STEADY: Mapping[str, Keys] = {
    "plain": {},
    "TREAD and CREPA": {**TREAD, **CUT},
    "int8": INT8,
    "products in 8 bits": FP8,
    "groups": GROUPS,
    "groups with TREAD and CREPA": {**GROUPS, **TREAD, **CUT},
    "swapped in 8 bits": {**SWAP, **INT8},
    "layers": RAMTORCH,
    "four batches together": {**GROUPS, **INSIDE, "train_batch_size": 1, "gradient_accumulation_steps": 4},
    "kept by budget": {"gradient_checkpointing": "auto"},
}
MIB = 2**20
GROWTH = 48 * MIB
"""Of the process between step 60 and step 200: what Python's and torch's own allocators may take once more."""


@pytest.fixture(autouse=True)
def every_layer_streams(monkeypatch: pytest.MonkeyPatch) -> None:
    """The tiny flavour's are all small."""
    monkeypatch.setattr(RamTorch, "smallest", 0)


@contextlib.contextmanager
def no_waiting() -> Iterator[None]:
    """Inside, an operation for which the host waits is an error."""
    if not HAS_GPU:
        yield
        return
    with warnings.catch_warnings():  # torch says that it may not find all of them
        warnings.filterwarnings("ignore", message="Synchronization debug mode", category=UserWarning)
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            yield
        finally:
            torch.cuda.set_sync_debug_mode("default")


@needs_gpu
@pytest.mark.parametrize("way", ["called", "replayed"])
@pytest.mark.parametrize("name", STEADY)
def test_a_steady_step_waits_for_nothing(name: str, way: str, bench: Bench) -> None:
    keys = {**SAME, **STEADY[name], **(graphs() if way == "replayed" else {"cuda_graphs": "off"})}
    with bench.loop(keys) as loop, steps_of(loop) as steps:
        for _ in range(5):
            next(steps)
        with no_waiting():
            for _ in range(5):
                next(steps)
        assert captured(loop.assembly) == (way == "replayed" and HAS_GPU)
        loop.flush()
        assert len(loop.rows) == 10  # type: ignore[attr-defined]


def ring_bytes(session: MemorySession) -> int:
    return sum(slot.memory.numel() for slot in session.link.slots)  # type: ignore[attr-defined]


def block_bytes(loop: Loop) -> int:
    """Of the frozen weights of all blocks that are not adapters, wherever they are."""
    blocks = loop.assembly.training.blocks.blocks.blocks
    return sum(p.numel() * p.element_size() for block in blocks for p in block.parameters() if not p.requires_grad)


@needs_gpu
@pytest.mark.parametrize("way", ["called", "replayed"])
@pytest.mark.parametrize(("name", "keys", "units"), [("groups", GROUPS, 2), ("swapped", SWAP, 2), ("layers", RAMTORCH, 4)])
def test_after_a_step_the_ring_alone_is_resident(name: str, keys: Keys, units: int, way: str, bench: Bench) -> None:
    given = {**SAME, **keys, **(graphs() if way == "replayed" else {"cuda_graphs": "off"})}
    with bench.loop(given) as loop, steps_of(loop) as steps:
        session = loop.assembly.session
        held = 0
        for number in range(8):
            next(steps)
            loop.metrics.rows.clear()
            assert len(session.link.slots) == units  # type: ignore[attr-defined]
            if name != "layers":
                assert session._ring.resident() == list(range(units))  # type: ignore[attr-defined]
            if HAS_GPU and number >= 5:
                gc.collect()
                torch.cuda.synchronize()
                held = held or torch.cuda.memory_allocated(DEVICE)
                assert torch.cuda.memory_allocated(DEVICE) == held
        assert ring_bytes(session) < block_bytes(loop)


@needs_gpu
@pytest.mark.parametrize(("name", "keys"), [("groups", {**GROUPS, **TREAD, **CUT}), ("layers", RAMTORCH)])
def test_two_hundred_steps_leave_nothing_behind(name: str, keys: Keys, bench: Bench) -> None:
    process = psutil.Process()
    seen: list[tuple[int, int, int, int]] = []
    resident: list[int] = []
    with bench.loop({**SAME, **keys, **graphs(), "max_train_steps": 200}) as loop, steps_of(loop) as steps:
        for number in range(1, 201 if HAS_GPU else 31):
            next(steps)
            loop.metrics.rows.clear()
            if number in (60, 130, 200, 10, 20, 30):
                gc.collect()
                device = pinned = 0
                if HAS_GPU:
                    torch.cuda.synchronize()
                    device = torch.cuda.memory_allocated(DEVICE)
                    pinned = int(torch.cuda.host_memory_stats().get("segment.current", 0))
                seen.append((device, pinned, threading.active_count(), len(list(Path("/dev/fd").iterdir()))))
                resident.append(process.memory_info().rss)
    steady = seen[-3:]
    assert steady[0] == steady[1] == steady[2], seen
    assert resident[-1] - resident[-3] < GROWTH, resident


@needs_gpu
def test_runs_give_everything_back(bench: Bench) -> None:
    """Graphs, rings and models: as much is held after the third run as after the first."""
    held = []
    for _ in range(3):
        with bench.loop({**SAME, **GROUPS, **TREAD, **graphs(), "max_train_steps": 6}) as loop:
            loop.run()
            assert captured(loop.assembly) == HAS_GPU
        del loop
        gc.collect()
        if HAS_GPU:
            torch.cuda.synchronize()
            torch.cuda.empty_cache()
            held.append((torch.cuda.memory_allocated(DEVICE), torch.cuda.memory_reserved(DEVICE)))
    assert not held or held[2] <= held[0]
