"""Musubi block swap: a number of blocks is streamed, evenly spread among the others, which stay on the device.

Named after the scheme of musubi-tuner; this one copies to the device only, from page-locked memory, ahead of need in both directions.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from tuner.errors import ConfigError, TunerError
from tuner.interfaces.family import BuildContext
from tuner.interfaces.memory import MemoryFacts, MemoryPlan, MemorySession, MemoryStrategy
from tuner_offload.forecast import Streaming, forecast, full_finetuning_problem, host_memory_problem, unknown
from tuner_offload.options import BlockSwapOptions
from tuner_offload.streamed import HostStore, StreamedBlocks
from tuner_offload.transfer import link_to

KEY = "musubi_blocks_to_swap"


def swapped_blocks(count: int, blocks: int) -> tuple[int, ...]:
    """Which `count` of `blocks` blocks are streamed: as evenly as whole numbers allow, so that every copy has the same time."""
    return tuple(index for index in range(blocks) if (index + 1) * count // blocks > index * count // blocks)


def ring_slots(count: int, blocks: int) -> int:
    """How many slots `count` streamed blocks of `blocks` pass through; the device holds `blocks - count + slots` blocks.

    With two, one block computes while the next one comes: on an H200 that reached the link's limit with every block streamed. Where
    several resident blocks compute between two streamed ones, one slot is enough.
    """
    enough = 1 if 4 * count <= blocks else 2
    return max(1, min(count - 1, enough))


class BlockSwap(MemoryStrategy):
    """S blocks of the transformer in host memory."""

    name = "block_swap"

    def __init__(self, options: BlockSwapOptions, context: BuildContext) -> None:
        self.options = options
        self.device = context.device

    @classmethod
    def candidates(cls, blocks: int) -> Sequence[Mapping[str, object]]:
        """A quarter of the blocks, half, three quarters, all but one."""
        counts = dict.fromkeys(min(blocks * quarters // 4, blocks - 1) for quarters in (1, 2, 3, 4))
        return tuple({KEY: count} for count in counts if count > 0)

    def keys(self, part: str) -> tuple[str, ...]:
        return (KEY,)

    def supports(self, facts: MemoryFacts) -> Sequence[TunerError]:
        problems: list[TunerError] = [*self._device_problem(), *full_finetuning_problem(facts, KEY)]
        blocks = len(facts.block_bytes)
        if count_problems := self._count_problem(blocks):
            return [*problems, *count_problems]
        return [*problems, *host_memory_problem(facts, self.plan(facts).host_bytes, KEY)]

    def _device_problem(self) -> list[TunerError]:
        asked = self.options.musubi_block_swap_device
        if asked.partition(":")[0].lower() in ("cpu", ""):
            return []
        problem = "blocks can be swapped to host memory only"
        return [ConfigError(problem, where="musubi_block_swap_device", value=asked, remedy="set it to cpu")]

    def _count_problem(self, blocks: int) -> list[TunerError]:
        asked = self.options.musubi_blocks_to_swap
        if asked < blocks:
            return []
        return [ConfigError(
            f"{asked} is more than the {blocks - 1} that this model ({blocks} blocks) can swap", where=KEY,
            remedy=f"give at most {blocks - 1}",
        )]  # fmt: skip

    def plan(self, facts: MemoryFacts) -> MemoryPlan:
        count, blocks = self.options.musubi_blocks_to_swap, len(facts.block_bytes)
        if self._count_problem(blocks):
            return unknown(f"{facts.part}: {count} blocks are swapped")
        slots = ring_slots(count, blocks)
        way = Streaming(tuple((index,) for index in swapped_blocks(count, blocks)), slots, True, self.device.type == "cuda")
        return forecast(facts, way, f"{count} of {blocks} blocks stream through {slots}, the others stay")

    def open(self, part: str, blocks: int, device: torch.device) -> MemorySession:
        if problems := self._count_problem(blocks):
            raise problems[0]
        count = self.options.musubi_blocks_to_swap
        link = link_to(device)
        units = tuple((index,) for index in swapped_blocks(count, blocks))
        return StreamedBlocks(units, ring_slots(count, blocks), link, HostStore(link, KEY))
