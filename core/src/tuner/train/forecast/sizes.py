"""How large the transformer's blocks lie in memory, in a precision."""

from __future__ import annotations

import torch

from tuner.interfaces.family import ModelFacts
from tuner.interfaces.memory import MemoryFacts, Quantizer
from tuner.model.host import free_host_memory


def linear_bytes(facts: ModelFacts, quantizer: Quantizer | None, dtype: torch.dtype) -> tuple[int, ...]:
    """Of the weights of each linear layer of a block, as they will lie in memory."""
    shapes = [torch.Size(shape) for shape in facts.linear_shapes]
    return tuple(quantizer.bytes_of(shape, dtype) if quantizer else shape.numel() * dtype.itemsize for shape in shapes)


def transformer_facts(
    facts: ModelFacts, quantizer: Quantizer | None, dtype: torch.dtype, *,
    precision: str, full_finetuning: bool, checkpointing: str, world: int, host: int = 0,
) -> MemoryFacts:  # fmt: skip
    """What a memory strategy decides on. `host`: bytes of host memory that are free; 0: as many as there are now."""
    before, after = linear_bytes(facts, None, dtype), linear_bytes(facts, quantizer, dtype)
    return MemoryFacts(
        block_bytes=(facts.block_bytes - sum(before) + sum(after),) * facts.blocks, full_finetuning=full_finetuning, quantizer=precision,
        checkpointing=checkpointing, world_size=world, linear_bytes=after, linear_names=facts.linear_names,
        host_bytes=host or free_host_memory(), plain_bytes=facts.block_bytes * facts.blocks,
    )  # fmt: skip
