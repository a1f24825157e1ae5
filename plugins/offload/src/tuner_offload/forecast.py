"""What streaming will cost, from the sizes of blocks alone: bytes exactly, time by a measured rule.

With t_fwd a block's forward time, 2 t_fwd its backward with recomputation, and t_load the time of its copy:
forward takes max(N t_fwd, n t_load) where n loads run beside it, N t_fwd + n t_load where they run in line with it.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass

from tuner.errors import ConfigError, OutOfMemoryError
from tuner.interfaces.memory import MemoryFacts, MemoryPlan
from tuner_offload.transfer import PINNED_SPEED

FORWARD_SECONDS_PER_PARAMETER = 2.2e-11
"""A third of what 18.5e9 parameters in 48 blocks take for forward, recomputation and gradients at 6,144 tokens on an H200: 1.2 s."""
DISK_SPEED = 3e9
"""Bytes a second of a good NVMe drive, read in order."""


@dataclass(frozen=True)
class Streaming:
    """How blocks travel: `units` of them through `slots`."""

    units: tuple[tuple[int, ...], ...]
    slots: int
    beside: bool
    """Copies run beside the computation."""
    cuda: bool
    """The device is not the processor."""
    disk: bool = False


def forecast(facts: MemoryFacts, way: Streaming, words: str) -> MemoryPlan:
    """The plan for a part whose blocks are known. `words`: what is done, for the summary."""
    sizes = [sum(facts.block_bytes[index] for index in unit) for unit in way.units]
    streamed = {index for unit in way.units for index in unit}
    resident = sum(size for index, size in enumerate(facts.block_bytes) if index not in streamed)
    device = resident + sum(max(sizes[place :: way.slots]) for place in range(way.slots))
    host = 2 * max(sizes) if way.disk else sum(sizes)
    one_way = [sum(sizes[way.slots :]), sum(sizes[: len(sizes) - way.slots])]
    overhead = _overhead(facts, way, one_way)
    where = "on disk" if way.disk else "page-locked in host memory" if way.cuda else "in host memory"
    stored = f"{_gb(sum(sizes))} {where}"
    summary = f"{words}: {_gb(device)} of weights on the device, {stored}, {_gb(sum(one_way))} copied a step; {_pace(overhead, way.cuda)}"
    return MemoryPlan(device, host, host if way.cuda else 0, sum(one_way), overhead, summary, one_way[0], way.beside)


def forecast_layers(
    facts: MemoryFacts, streamed: Sequence[Sequence[int]], slots: int, *, beside: bool, cuda: bool, words: str
) -> MemoryPlan:
    """The same for layers that stream one by one. `streamed`: of each block, the bytes of those layers."""
    moved = sum(map(sum, streamed))
    device = sum(facts.block_bytes) - moved + slots * max((size for layers in streamed for size in layers), default=0)
    backward = {"none": 1.0, "some": 1.5}.get(facts.checkpointing, 2.0)
    overhead = _overhead(facts, Streaming((), slots, beside, cuda), [moved, round(backward * moved)])
    stored = f"{_gb(moved)} {'page-locked ' if cuda else ''}in host memory"
    summary = f"{words}: {_gb(device)} of weights on the device, {stored}, {_gb(3 * moved)} copied a step; {_pace(overhead, cuda)}"
    return MemoryPlan(device, moved, moved if cuda else 0, 3 * moved, overhead, summary, moved, beside, inside_blocks=True)


def unknown(words: str) -> MemoryPlan:
    """For a part whose blocks are known only when it is opened."""
    return MemoryPlan(0, 0, 0, 0, 0.0, f"{words}; its size is known when it is opened")


def _overhead(facts: MemoryFacts, way: Streaming, one_way: Sequence[int]) -> float:
    """Extra time of a training step, as a share of the resident one's."""
    if not way.cuda:  # products take the processor so long that copies within its memory do not count
        return 0.0
    speed = DISK_SPEED if way.disk else PINNED_SPEED
    forward = (facts.plain_bytes or sum(facts.block_bytes)) / 2 * FORWARD_SECONDS_PER_PARAMETER
    backward = forward * {"none": 1, "some": 1.5}.get(facts.checkpointing, 2)
    took = 0.0
    for compute, moved in zip((forward, backward), one_way, strict=True):
        took += max(compute, moved / speed) if way.beside else compute + moved / speed
    return took / (forward + backward) - 1 if forward else 0.0


def _pace(overhead: float, cuda: bool) -> str:
    if not cuda:
        return "saves nothing where the processor itself computes"
    reference = "at 6,144 tokens on an H200"
    return f"no slower {reference}" if overhead < 0.005 else f"about {overhead:.0%} slower {reference}, less with more tokens"


def _gb(size: float) -> str:
    return f"{size / 1e9:.1f} GB" if size >= 1e8 else f"{size / 1e6:.1f} MB"


def full_finetuning_problem(facts: MemoryFacts, key: str) -> list[ConfigError]:
    """Refuses to move weights that are trained: they would have to travel back with their gradients."""
    if not facts.full_finetuning:
        return []
    return [
        ConfigError(
            "full fine-tuning changes every weight, and only frozen weights are streamed", where=f"{key}, model_type",
            remedy="set model_type to lora, or switch the memory strategy off",
        )
    ]  # fmt: skip


def host_memory_problem(facts: MemoryFacts, needed: int, key: str) -> list[OutOfMemoryError]:
    """Whether all processes of this machine together find `needed` bytes each; empty where that is so, or not known."""
    here = int(os.environ.get("LOCAL_WORLD_SIZE") or facts.world_size)
    free = facts.host_bytes
    if not free or needed * here <= free:
        return []
    share = f" ({here} processes with {_gb(needed)} each)" if here > 1 else ""
    return [
        OutOfMemoryError(
            f"{_gb(needed * here)} of host memory are needed for the {facts.part}'s blocks{share}, {_gb(free)} are free", where=key,
            remedy="choose an 8-bit base_model_precision, stream fewer blocks (musubi_blocks_to_swap), or set group_offload_to_disk_path",
        )
    ]  # fmt: skip
