"""Where and in which precision the blocks of a part end up while they are read: quantized one by one, then handed to the strategy.

Unquantized blocks are read straight into the memory that the strategy keeps them in. Others are in memory as they are stored one at
a time, so the peak is what the part takes in the end, and a block.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from tuner.errors import PluginError
from tuner.interfaces.blocks import BlockSet
from tuner.interfaces.memory import MemorySession, MemoryStrategy, PartMemory, Placement, Quantizer
from tuner.model.reading import cast_empty

log = logging.getLogger(__name__)

HOST = torch.device("cpu")


class RunMemory(PartMemory):
    """The strategies and quantizers of a run, by part."""

    def __init__(self, strategies: Sequence[MemoryStrategy] = (), quantizers: Mapping[str, Quantizer] | None = None) -> None:
        self.strategies = tuple(strategies)
        self.quantizers = dict(quantizers or {})

    def strategy(self, part: str) -> MemoryStrategy | None:
        """The one that holds `part`; None: it stays on the device."""
        return next((strategy for strategy in self.strategies if part in strategy.parts()), None)

    def precision(self, part: str) -> str:
        return self.quantizers[part].name if part in self.quantizers else super().precision(part)

    def open(self, part: str, blocks: int, device: torch.device) -> Placement:
        strategy = self.strategy(part)
        session = strategy.open(part, blocks, device) if strategy else MemorySession()
        return BlockPlacement(session, self.quantizers.get(part), device, streamed=strategy is not None)


class BlockPlacement(Placement):
    """One part, from the first block that is read until it is closed."""

    def __init__(self, session: MemorySession, quantizer: Quantizer | None, device: torch.device, *, streamed: bool) -> None:
        self.session = session
        self.quantizer = quantizer
        self.device = device
        self.streamed = streamed
        # Quantizing is quick where the weights will be computed with; what is streamed unquantized need not go there first.
        self.reading = HOST if streamed and quantizer is None else device
        self._quantized, self._left = 0, list[str]()
        self._undo: list[Callable[[], None]] = []

    def expect(self, index: int, block: nn.Module, dtype: torch.dtype) -> None:
        if self.quantizer is None:  # else what is read does not stay
            cast_empty(block, dtype)
            self.session.expect(index, block, self.device)

    def received(self, index: int, block: nn.Module) -> None:
        if self.quantizer is not None:
            before = {name for name, module in block.named_modules() if isinstance(module, nn.Linear)}
            done = self.quantizer.quantize(block)
            if lost := before - {name for name, module in block.named_modules() if isinstance(module, nn.Linear)}:
                raise PluginError(
                    f"{len(lost)} linear layers of block {index} are no nn.Linear any more, so adapters would not find them",
                    where=f"quantizer {self.quantizer.name}", value=min(lost), remedy="change the class with `become_quantized`",
                )  # fmt: skip
            self._quantized += len(done.modules)
            self._left += [f"{index}.{name}" for name in done.left]
        self.session.receive(index, block, self.device)

    def attach(self, blocks: BlockSet, *, owner: nn.Module | None = None) -> MemorySession:
        if self.quantizer is not None and self._left:
            counted = f"{len(self._left)} of {len(self._left) + self._quantized}"
            log.warning("%s cannot hold %s linear layers, which stay as they are, such as %s", self.quantizer.name, counted, self._left[0])
        elif self.quantizer is not None and not self._quantized:
            log.warning("%s: no linear layer of %s and the other blocks would take fewer bytes", self.quantizer.name, blocks.names[0])
        self.session.attach(blocks)
        if owner is not None and type(self.session) is not MemorySession:
            self._undo = fire_events(owner, blocks.blocks, self.session)
        return self.session

    def hold(self, module: nn.Module) -> None:
        self.session.hold(module, self.device)

    def close(self) -> None:
        while self._undo:
            self._undo.pop()()
        self.session.detach()


def fire_events(owner: nn.Module, blocks: Sequence[nn.Module], session: MemorySession) -> list[Callable[[], None]]:
    """Lets `owner`'s own forward, which runs `blocks` in order without gradients, tell `session`; returns what takes that back."""
    plain = owner.forward

    @functools.wraps(plain)
    def forward(*arguments: Any, **named: Any) -> Any:
        try:
            session.begin_step(len(blocks))
            result = plain(*arguments, **named)
            session.end_step()
        except BaseException:
            session.abort()
            raise
        return result

    owner.forward = forward  # type: ignore[method-assign]
    handles: list[RemovableHandle] = []
    for index, block in enumerate(blocks):
        handles.append(block.register_forward_pre_hook(_before(session, index)))
        handles.append(block.register_forward_hook(_after(session, index)))
    return [functools.partial(owner.__dict__.pop, "forward", None), *(handle.remove for handle in handles)]


def _before(session: MemorySession, index: int) -> Callable[[nn.Module, Any], None]:
    return lambda block, inputs: session.before_forward(index)


def _after(session: MemorySession, index: int) -> Callable[[nn.Module, Any, Any], None]:
    return lambda block, inputs, outputs: session.after_forward(index)
