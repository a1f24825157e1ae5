"""On a GPU: layers streamed one by one train bit for bit as resident ones in bf16, replayed as a CUDA graph too, in the memory of four."""

from __future__ import annotations

import pytest
import torch

from offload.test_cuda_link import BLOCKS, WIDTH, Stack, made, no_waiting, steps
from tuner.interfaces.memory import MemorySession
from tuner.model.runner import Checkpointing
from tuner_offload.leaf import SLOTS, LeafSession
from tuner_offload.transfer import CudaLink

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")


@pytest.mark.parametrize("graph", [False, True])
@pytest.mark.parametrize("recomputed", [0, BLOCKS])
@pytest.mark.parametrize("stream", [True, False])
def test_layer_by_layer_equals_resident(stream: bool, recomputed: int, graph: bool) -> None:
    policy = Checkpointing(frozenset(range(recomputed)))
    expected = steps(*made(None, None), policy, 6)
    link = CudaLink(torch.device("cuda"), stream=stream)
    model, session = made(link, lambda link: LeafSession(link, "ramtorch", stream=stream))
    found = steps(model, session, policy, 6, graph=graph)
    assert len(found) == len(expected) and all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    assert all(block.up.weight.is_pinned() for block in model.blocks)
    session.detach()
    assert not any(block.up.weight.is_pinned() for block in model.blocks)


@torch.no_grad()
def test_a_held_network_equals_a_resident_one() -> None:
    torch.manual_seed(0)
    layers = [torch.nn.Conv3d(32, 32, 3, padding=1) for _ in range(9)]
    network = torch.nn.Sequential(*layers).bfloat16().cuda()
    given = [torch.randn(1, 32, 5, 16, 16, device="cuda", dtype=torch.bfloat16) for _ in range(3)]
    expected = [network(each) for each in given]
    session = LeafSession(CudaLink(torch.device("cuda")), "ramtorch_vae", stream=True, smallest=0)
    session.hold(network.cpu(), torch.device("cuda"))
    assert all(torch.equal(network(each), wanted) for each, wanted in zip(given, expected, strict=True))
    session.detach()


def test_a_steady_step_waits_for_nothing_on_the_host_and_takes_four_layers() -> None:
    link = CudaLink(torch.device("cuda"))
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    model, session = made(link, lambda link: LeafSession(link, "ramtorch", stream=True))
    assert torch.cuda.memory_allocated() - before < (SLOTS + 0.1) * 2 * WIDTH * 4 * WIDTH
    steps(model, session, Checkpointing(frozenset(range(BLOCKS))), 2)
    hidden = torch.randn(2, 256, WIDTH, device="cuda", dtype=torch.bfloat16)
    torch.cuda.synchronize()
    with no_waiting():
        walk(model, session, hidden)
    session.detach()


def walk(model: Stack, session: MemorySession, hidden: torch.Tensor) -> None:
    """A pass without gradients."""
    with torch.no_grad():
        session.begin_step(BLOCKS)
        for block in model.blocks:
            hidden = block(hidden)
        session.end_step()
