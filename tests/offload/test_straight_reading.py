"""Streamed weights are read straight into the memory that they are kept in; who reads them elsewhere is served, too."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from tuner.interfaces.family import BuildContext
from tuner.interfaces.memory import MemorySession, MemoryStrategy
from tuner.model.placing import BlockPlacement
from tuner.model.reading import memory_for
from tuner_offload.arena import Packing
from tuner_offload.block_swap import BlockSwap
from tuner_offload.group import GroupOffload
from tuner_offload.options import BlockSwapOptions, GroupOffloadOptions, RamTorchOptions
from tuner_offload.ramtorch import RamTorch

CPU, WIDTH, BLOCKS = torch.device("cpu"), 256, 4


class Block(nn.Module):
    """A large layer and small ones, one of them a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.large = nn.Linear(WIDTH, WIDTH)
        self.small = nn.LayerNorm(WIDTH)
        self.register_buffer("scale", torch.ones(3))


def strategies(folder: Path) -> dict[str, MemoryStrategy]:
    context = BuildContext(CPU, torch.bfloat16, 0, 0, folder)
    groups = GroupOffloadOptions(enable_group_offload=True, group_offload_use_stream=True)
    return {
        "groups": GroupOffload(groups, context),
        "leaves": GroupOffload(groups.model_copy(update={"group_offload_type": "leaf_level"}), context),
        "swap": BlockSwap(BlockSwapOptions(musubi_blocks_to_swap=2), context),
        "ramtorch": RamTorch(RamTorchOptions(ramtorch=True), context),
        "disk": GroupOffload(groups.model_copy(update={"group_offload_to_disk_path": str(folder / "disk")}), context),
    }


def read(session: MemorySession, *, expected: bool) -> tuple[list[nn.Module], list[dict[str, torch.Tensor]]]:
    """Blocks read as a loader reads them, and what they should hold."""
    placement = BlockPlacement(session, None, CPU, streamed=True)
    blocks, values = [], []
    for index in range(BLOCKS):
        with torch.device("meta"):
            block = Block()
        if expected:
            placement.expect(index, block, torch.bfloat16)
        draw = torch.Generator().manual_seed(index)
        value = {name: torch.randn(tensor.shape, generator=draw).bfloat16() for name, tensor in block.state_dict().items()}
        for name, target in memory_for(block, value, lambda name: torch.bfloat16, CPU).items():
            target.copy_(value[name])
        placement.received(index, block)
        blocks.append(block)
        values.append(value)
    return blocks, values


@pytest.mark.parametrize("expected", [True, False], ids=["asked before", "not asked"])
@pytest.mark.parametrize("name", ["groups", "leaves", "swap", "ramtorch", "disk"])
def test_the_weights_are_those_that_were_read(name: str, expected: bool, tmp_path: Path) -> None:
    session = strategies(tmp_path)[name].open("transformer", BLOCKS, CPU)
    blocks, values = read(session, expected=expected)
    for block, value in zip(blocks, values, strict=True):
        for key, tensor in block.state_dict().items():
            assert torch.equal(tensor, value[key]), key
    session.detach()


@pytest.mark.parametrize("name", ["groups", "leaves", "swap", "ramtorch"])
def test_nothing_is_copied_once_it_has_been_read(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def never(packing: Packing, flat: torch.Tensor, tensors: object) -> None:
        raise AssertionError("a second copy")

    monkeypatch.setattr(Packing, "write", never)
    session = strategies(tmp_path)[name].open("transformer", BLOCKS, CPU)
    read(session, expected=True)
    session.detach()


def test_weights_that_were_put_elsewhere_are_copied(tmp_path: Path) -> None:
    """A loader may replace parameters in place of filling them."""
    session = strategies(tmp_path)["groups"].open("transformer", 1, CPU)
    placement = BlockPlacement(session, None, CPU, streamed=True)
    with torch.device("meta"):
        block = Block()
    placement.expect(0, block, torch.float32)
    own = nn.Parameter(torch.randn(WIDTH, WIDTH), requires_grad=False)
    block.large.weight = own
    for name, target in memory_for(block, block.state_dict(), lambda name: torch.float32, CPU).items():
        if name != "large.weight":
            target.zero_()
    placement.received(0, block)
    assert torch.equal(block.large.weight, own)
    assert block.large.weight.data_ptr() != own.data_ptr()
    session.detach()
