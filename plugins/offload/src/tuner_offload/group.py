"""Group offload: all blocks of a part are streamed, some consecutive ones at a time; or its leaf modules one by one.

With a stream the next group is copied beside the computation and two groups are on the device; without, one group is, and computation waits
for every copy. Unlike the scheme of the same name in diffusers it serves backward too: groups come back in the opposite order.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from tuner.errors import ConfigError, TunerError
from tuner.interfaces.family import BuildContext
from tuner.interfaces.memory import MemoryFacts, MemoryPlan, MemorySession, MemoryStrategy
from tuner_offload.disk import DiskStore, folder_problem
from tuner_offload.forecast import Streaming, forecast, forecast_layers, full_finetuning_problem, host_memory_problem, unknown
from tuner_offload.leaf import SMALLEST, LeafSession, slots_of
from tuner_offload.options import GroupOffloadOptions
from tuner_offload.streamed import HostStore, StreamedBlocks, Units
from tuner_offload.transfer import link_to

KEYS = {"transformer": "enable_group_offload", "text_encoder": "group_offload_text_encoder", "vae": "group_offload_vae"}
"""Part -> the key that asks for it."""


class GroupOffload(MemoryStrategy):
    """Groups of blocks, or leaf modules."""

    name = "group_offload"

    def __init__(self, options: GroupOffloadOptions, context: BuildContext) -> None:
        self.options = options
        self.device = context.device

    @classmethod
    def candidates(cls, blocks: int) -> Sequence[Mapping[str, object]]:
        """Block by block, copied beside the computation."""
        return ({"enable_group_offload": True, "group_offload_use_stream": True},)

    def parts(self) -> frozenset[str]:
        return frozenset(part for part, key in KEYS.items() if getattr(self.options, key))

    def keys(self, part: str) -> tuple[str, ...]:
        return (KEYS[part],)

    def _leaves(self, part: str) -> bool:
        """Whether `part` is streamed leaf by leaf: asked for, or without blocks to group."""
        return self.options.group_offload_type == "leaf_level" or part == "vae"

    def supports(self, facts: MemoryFacts) -> Sequence[TunerError]:
        problems: list[TunerError] = [*full_finetuning_problem(facts, KEYS[facts.part])]
        asked, blocks = self.options.group_offload_blocks_per_group, len(facts.block_bytes)
        disk = self.options.group_offload_to_disk_path
        if blocks and asked > blocks and not self._leaves(facts.part):
            problems.append(ConfigError(
                f"{asked} is more than the {blocks} blocks that this model has", where="group_offload_blocks_per_group",
                remedy=f"give at most {max(1, blocks // 3)}: with fewer than three groups all of them are on the device at once",
            ))  # fmt: skip
        if disk and self._leaves(facts.part):
            key = KEYS["vae"] if facts.part == "vae" else "group_offload_type"
            what = "the VAE is" if facts.part == "vae" else "leaf_level groups are"
            problems.append(ConfigError(
                f"{what} kept in host memory, never on disk", where=f"{key}, group_offload_to_disk_path",
                remedy="leave one of the two out",
            ))  # fmt: skip
        elif disk:
            problems += folder_problem(Path(disk), sum(facts.block_bytes) * facts.world_size)
        else:
            problems += host_memory_problem(facts, sum(facts.block_bytes), KEYS[facts.part])
        return problems

    def plan(self, facts: MemoryFacts) -> MemoryPlan:
        blocks, stream = len(facts.block_bytes), self.options.group_offload_use_stream
        if self._leaves(facts.part):
            return self._leaf_plan(facts)
        if not blocks:
            return unknown(f"{facts.part}: all blocks stream in groups of {self.options.group_offload_blocks_per_group}")
        units = self._units(blocks)
        slots = self._slots(units)
        words = f"{len(units)} groups of {len(units[0])} {'block' if len(units[0]) == 1 else 'blocks'} stream through {slots}"
        way = Streaming(units, slots, stream, self.device.type == "cuda", bool(self.options.group_offload_to_disk_path))
        return forecast(facts, way, words)

    def _leaf_plan(self, facts: MemoryFacts) -> MemoryPlan:
        if not facts.linear_bytes:
            return unknown(f"{facts.part}: layers stream one by one")
        stream, large = self.options.group_offload_use_stream, [size for size in facts.linear_bytes if size >= SMALLEST]
        words = f"{len(large) * len(facts.block_bytes)} linear layers stream one by one through {slots_of(stream)}"
        streamed = [large] * len(facts.block_bytes)
        return forecast_layers(facts, streamed, slots_of(stream), beside=stream, cuda=self.device.type == "cuda", words=words)

    def _units(self, blocks: int) -> Units:
        size = self.options.group_offload_blocks_per_group
        return tuple(tuple(range(first, min(first + size, blocks))) for first in range(0, blocks, size))

    def _slots(self, units: Units) -> int:
        return min(2 if self.options.group_offload_use_stream else 1, len(units))

    def open(self, part: str, blocks: int, device: torch.device) -> MemorySession:
        stream, disk = self.options.group_offload_use_stream, self.options.group_offload_to_disk_path
        # What a thread reads from disk is copied on a stream in any case: that thread cannot queue copies in line with the computation.
        link = link_to(device, stream=stream or bool(disk))
        if self._leaves(part) or not blocks:
            return LeafSession(link, KEYS[part], stream=stream)
        units = self._units(blocks)
        store = DiskStore(link, Path(disk), part) if disk else HostStore(link, KEYS[part])
        return StreamedBlocks(units, self._slots(units), link, store)
