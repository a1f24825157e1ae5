"""A small model with LoRA, trained for some steps: resident, or with a session that streams its frozen weights."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from tuner.config.settings import AdapterSettings
from tuner.interfaces.blocks import BlockState
from tuner.interfaces.memory import MemorySession
from tuner.model.adapters import add_adapters
from tuner.model.runner import BlockRunner, Checkpointing
from tuner.testing.blocks import MixingModel, call_mixing_block

DEPTH, WIDTH = 5, 16
CPU = torch.device("cpu")

Prepare = Callable[[nn.Module], None]


@dataclass
class Trained:
    """A model with everything a step needs."""

    net: MixingModel
    runner: BlockRunner
    session: MemorySession
    optimizer: torch.optim.Optimizer
    losses: list[Tensor] = field(default_factory=list)
    gradients: list[Tensor] = field(default_factory=list)

    def trainable(self) -> list[tuple[str, nn.Parameter]]:
        return [(name, p) for name, p in self.net.named_parameters() if p.requires_grad]

    def entered(self, step: int) -> BlockState:
        """Shapes alternate between two buckets; the second has no audio."""
        draw = torch.Generator().manual_seed(step)
        tokens = (5, 3) if step % 2 == 0 else (7, 0)
        video, text = torch.randn(2, tokens[0], 6, generator=draw), torch.randn(2, 4, 6, generator=draw)
        audio = torch.randn(2, tokens[1], 6, generator=draw) if tokens[1] else None
        sigma = torch.rand(2, tokens[0], generator=draw)
        return self.net.enter(video, audio, text, sigma)

    def leave(self, state: BlockState) -> Tensor:
        return torch.stack([p.square().mean() for p in self.net.exit(state).values()]).sum()

    def loss(self, step: int) -> Tensor:
        return self.leave(self.runner.run(self.entered(step)))

    def step(self, step: int, accumulation: int = 1, *, together: bool = False) -> None:
        """Writes down losses and gradients. `together`: each block takes all batches before the next one comes."""
        first = step * accumulation
        if together:
            passed = self.runner.run_all([self.entered(first + micro) for micro in range(accumulation)])
            losses = [self.leave(after) for after, _ in passed]
            torch.stack(losses).sum().backward()
            self.losses += [loss.detach() for loss in losses]
        for micro in range(0 if together else accumulation):
            loss = self.loss(first + micro)
            loss.backward()
            self.losses.append(loss.detach())
        self.gradients += [p.grad.clone() for _, p in self.trainable() if p.grad is not None]
        self.optimizer.step()
        self.optimizer.zero_grad()

    @torch.no_grad()
    def sample(self) -> Tensor:
        return self.loss(1000)


def build(
    open_session: Callable[[], MemorySession] = MemorySession, *, recomputed: Sequence[int] = range(64),
    adapted: Sequence[int] | None = None, prepare: Prepare = lambda block: None, depth: int = DEPTH, width: int = WIDTH,
) -> Trained:  # fmt: skip
    """In the order of a run: blocks are handed over one by one, adapters added, the session attached. `prepare`: quantizes a block."""
    torch.manual_seed(0)
    net = MixingModel(depth, width)
    session = open_session()
    for index, block in enumerate(net.blocks):
        prepare(block)
        session.receive(index, block, CPU)
    targets = [f"blocks.{index}.{name}" for index in (range(depth) if adapted is None else adapted) for name in ("to_v", "audio")]
    add_adapters(net, targets, AdapterSettings(lora_rank=2, lora_alpha=4), 0)
    with torch.no_grad():  # B starts at zero, and nothing would reach A
        for name, parameter in net.named_parameters():
            if "lora_B" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(len(name))) / 4)
    blocks = net.block_set()
    session.attach(blocks)
    runner = BlockRunner(blocks, call_mixing_block, checkpointing=Checkpointing(frozenset(recomputed)), session=session)
    optimizer = torch.optim.SGD([p for p in net.parameters() if p.requires_grad], lr=0.1, momentum=0.9)
    return Trained(net, runner, session, optimizer)


def assert_bitwise(one: Sequence[Tensor], other: Sequence[Tensor]) -> None:
    assert len(one) == len(other) > 0
    assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))
    assert all(bool(a.isfinite().all()) for a in one)
