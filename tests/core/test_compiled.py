"""Compiled blocks: one graph for all of them, the plain numbers, and plain calls where the compiler gives up.

`aot_eager` follows the whole way of compilation but the writing of kernels, so its numbers are those of plain calls to the last bit.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters

from tuner.interfaces.blocks import BlockState
from tuner.model.compiled import CompiledBlocks
from tuner.model.runner import BlockRunner, Checkpointing
from tuner.testing.blocks import MixingModel, call_mixing_block

DEPTH = 4


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def given(net: MixingModel, tokens: int = 5) -> BlockState:
    draw = torch.Generator().manual_seed(tokens)
    video, audio, text = (torch.randn(2, count, 6, generator=draw) for count in (tokens, 3, 4))
    return net.enter(video, audio, text, torch.rand(2, tokens, generator=draw))


def gradients(net: MixingModel, runner: BlockRunner, tokens: int = 5) -> list[Tensor]:
    net.zero_grad()
    torch.stack([p.square().sum() for p in net.exit(runner.run(given(net, tokens))).values()]).sum().backward()
    return [p.grad.clone() for p in net.parameters() if p.grad is not None]


@pytest.mark.parametrize("recomputed", [False, True])
def test_one_graph_for_all_blocks_gives_the_plain_numbers(recomputed: bool, caplog: pytest.LogCaptureFixture) -> None:
    torch.manual_seed(0)
    net = MixingModel(DEPTH)
    policy = Checkpointing.every(DEPTH) if recomputed else Checkpointing()
    blocks = CompiledBlocks(call_mixing_block, backend="aot_eager")
    plain = BlockRunner(net.block_set(), call_mixing_block, checkpointing=policy)
    compiled = BlockRunner(net.block_set(), call_mixing_block, checkpointing=policy, train_block=blocks)
    expected = gradients(net, plain)
    with caplog.at_level(logging.INFO, "tuner"):
        assert all(torch.equal(a, b) for a, b in zip(gradients(net, compiled), expected, strict=True))
    graphs = counters["stats"]["unique_graphs"]
    assert graphs == (2 if recomputed else 1) and not counters["graph_break"] and not blocks.failed
    assert caplog.text.count("blocks compiled for 5 video, 3 audio tokens") == graphs
    gradients(net, compiled)
    assert counters["stats"]["unique_graphs"] == graphs
    expected = gradients(net, plain, 7)
    assert all(torch.equal(a, b) for a, b in zip(gradients(net, compiled, 7), expected, strict=True))
    assert counters["stats"]["unique_graphs"] == 2 * graphs
    with torch.no_grad():
        compiled.run(given(net, 9))
    assert counters["stats"]["unique_graphs"] == 2 * graphs, "samples have many shapes, each of which would be compiled"


def test_what_cannot_be_compiled_is_called_plainly_and_that_is_said_once(caplog: pytest.LogCaptureFixture) -> None:
    def reading(block: nn.Module, state: BlockState) -> BlockState:
        if float(state.streams["video"].hidden.detach().sum()) == 0:
            raise AssertionError
        return call_mixing_block(block, state)

    torch.manual_seed(0)
    net = MixingModel(DEPTH)
    blocks = CompiledBlocks(reading, backend="aot_eager")
    expected = gradients(net, BlockRunner(net.block_set(), reading))
    found = gradients(net, BlockRunner(net.block_set(), reading, train_block=blocks))
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    assert blocks.failed and caplog.text.count("called plainly") == 1


def test_shapes_beyond_the_compilers_own_limit_are_compiled_in_every_thread() -> None:
    """The compiler's settings belong to a thread, and on a GPU backward passes run in one of autograd's."""
    net = MixingModel(1)
    blocks = CompiledBlocks(call_mixing_block, backend="eager")
    runner = BlockRunner(net.block_set(), call_mixing_block, checkpointing=Checkpointing.every(1), train_block=blocks)
    shapes = range(2, 12)
    found: list[Tensor] = []

    def work() -> None:
        found.extend(gradients(net, runner, tokens)[0] for tokens in shapes)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert len(found) == len(shapes) and not blocks.failed
