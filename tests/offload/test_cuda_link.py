"""On a GPU: copies beside the computation, streamed training equal to resident bit for bit in bf16, and steps replayed as a CUDA graph."""

from __future__ import annotations

import contextlib
import copy
import warnings
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor, nn

from tuner.interfaces.blocks import BlockSet, BlockState, TokenStream
from tuner.interfaces.memory import MemorySession
from tuner.model.runner import BlockRunner, Checkpointing
from tuner_offload.arena import HostArena
from tuner_offload.disk import DiskStore
from tuner_offload.streamed import HostStore, StreamedBlocks
from tuner_offload.transfer import CudaLink

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
BLOCKS, WIDTH = 8, 1024


class Residual(nn.Module):
    """x + W2 gelu(W1 (x + b)); the trained b comes, as adapters do, when the block has been handed over."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(WIDTH, 4 * WIDTH, bias=False).requires_grad_(False)
        self.down = nn.Linear(4 * WIDTH, WIDTH, bias=False).requires_grad_(False)
        self.register_parameter("shift", None)

    def forward(self, hidden: Tensor) -> Tensor:
        return hidden + torch.as_tensor(self.down(nn.functional.gelu(self.up(hidden + self.shift))))


class Stack(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Residual() for _ in range(BLOCKS))


def block_set(model: Stack) -> BlockSet:
    return BlockSet.of(model, list(model.blocks), {"video": WIDTH})


def call(block: nn.Module, state: BlockState) -> BlockState:
    return state.with_hidden({"video": block(state.streams["video"].hidden)})


def steps(model: Stack, session: MemorySession, recomputed: Checkpointing, count: int, *, graph: bool = False) -> list[Tensor]:
    """Gradients of each step; from the fourth on replayed, with `graph`."""
    device = torch.device("cuda")
    runner = BlockRunner(block_set(model), call, checkpointing=recomputed, session=session)
    hidden = torch.zeros(2, 256, WIDTH, device=device, dtype=torch.bfloat16)
    trained = [block.shift for block in model.blocks]

    def step() -> None:
        state = runner.run(BlockState({"video": TokenStream(hidden)}))
        state.streams["video"].hidden.float().square().mean().backward()

    found: list[Tensor] = []
    recorded = torch.cuda.CUDAGraph() if graph else None
    for number in range(count):
        hidden.copy_(torch.randn(hidden.shape, generator=torch.Generator().manual_seed(number)))
        if recorded is not None and number >= 3:
            if number == 3:
                forget_gradients(trained)  # those of the graph are its own
                with torch.cuda.graph(recorded):
                    step()
            recorded.replay()
        else:
            forget_gradients(trained)
            step()
        found += [p.grad.clone() for p in trained if p.grad is not None]
    return found


def forget_gradients(trained: list[nn.Parameter]) -> None:
    for parameter in trained:
        parameter.grad = None


@contextlib.contextmanager
def no_waiting() -> Iterator[None]:
    """Inside, an operation for which the host waits is an error."""
    with warnings.catch_warnings():  # torch says that it may not find all of them
        warnings.filterwarnings("ignore", message="Synchronization debug mode", category=UserWarning)
        torch.cuda.set_sync_debug_mode("error")
        try:
            yield
        finally:
            torch.cuda.set_sync_debug_mode("default")


def made(link: CudaLink | None, open_session: Callable[[CudaLink], MemorySession] | None) -> tuple[Stack, MemorySession]:
    torch.manual_seed(0)
    model = Stack().bfloat16()
    session = open_session(link) if open_session is not None and link is not None else MemorySession()
    for index, block in enumerate(model.blocks):
        session.receive(index, block, torch.device("cuda"))
        block.shift = nn.Parameter(torch.zeros(WIDTH, device="cuda", dtype=torch.bfloat16))
    session.attach(block_set(model))
    return model, session


UNITS = tuple((index,) for index in range(BLOCKS))


@pytest.mark.parametrize("graph", [False, True])
@pytest.mark.parametrize("recomputed", [0, BLOCKS])
@pytest.mark.parametrize(("slots", "stream"), [(2, True), (3, True), (1, False)])
def test_streamed_steps_equal_resident_ones(slots: int, stream: bool, recomputed: int, graph: bool) -> None:
    policy = Checkpointing(frozenset(range(recomputed)))
    expected = steps(*made(None, None), policy, 6)
    link = CudaLink(torch.device("cuda"), stream=stream)
    model, session = made(link, lambda link: StreamedBlocks(UNITS, slots, link, HostStore(link, "enable_group_offload")))
    found = steps(model, session, policy, 6, graph=graph)
    assert len(found) == len(expected) and all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    assert session.stats()["misses"] == 0
    before = copy.deepcopy(model.blocks[3].up.weight.shape)
    session.detach()
    assert model.blocks[3].up.weight.shape == before and model.blocks[3].up.weight.device.type == "cpu"


def test_steps_from_disk_equal_resident_ones(tmp_path: object) -> None:
    policy = Checkpointing(frozenset(range(BLOCKS)))
    expected = steps(*made(None, None), policy, 4)
    link = CudaLink(torch.device("cuda"))
    model, session = made(link, lambda link: StreamedBlocks(UNITS, 2, link, DiskStore(link, tmp_path, "transformer")))  # type: ignore[arg-type]
    found = steps(model, session, policy, 4)
    session.detach()
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_a_steady_step_neither_allocates_for_weights_nor_waits_on_the_host() -> None:
    link = CudaLink(torch.device("cuda"))
    model, session = made(link, lambda link: StreamedBlocks(UNITS, 2, link, HostStore(link, "enable_group_offload")))
    policy = Checkpointing(frozenset(range(BLOCKS)))
    steps(model, session, policy, 2)
    torch.cuda.synchronize()
    with no_waiting():
        session.begin_step(0)
        for index in [*range(BLOCKS)]:
            session.before_forward(index)
            session.after_forward(index)
        for index in reversed(range(BLOCKS)):
            session.before_backward(index)
            session.after_backward(index)
        before = torch.cuda.memory_allocated()
        session.end_step()
        assert torch.cuda.memory_allocated() == before
    session.abort()
    session.detach()


def test_memory_is_registered_as_it_is_and_a_failure_leaves_no_trace() -> None:
    link = CudaLink(torch.device("cuda"))
    arena = HostArena(10_000_001)
    assert arena.register(link) and arena.memory.is_pinned()
    again = HostArena.__new__(HostArena)
    again.memory, again._registration = arena.memory, None
    assert not again.register(link)  # already registered: the runtime says no
    torch.ones(2, device="cuda").sum().item()
    arena.close()
    assert not arena.memory.is_pinned()
