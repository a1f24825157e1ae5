"""Memory strategies: where frozen weights live while they are not needed. And quantizers: how many bytes they take."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import nn

from tuner.errors import TunerError
from tuner.interfaces.blocks import BlockSet


@dataclass(frozen=True)
class MemoryFacts:
    """What a strategy needs to know to plan."""

    block_bytes: tuple[int, ...]
    full_finetuning: bool
    quantizer: str
    """`base_model_precision`."""
    checkpointing: str
    """"none", "some" or "all" blocks are recomputed in backward."""
    world_size: int = 1


@dataclass(frozen=True)
class MemoryPlan:
    """Predicted cost, printed before anything loads. Bytes; overhead as a share of the resident step's time."""

    device_bytes: int
    host_bytes: int
    pinned_bytes: int
    traffic_bytes: int
    overhead: float
    summary: str


class MemorySession:
    """Attached to one list of blocks. The runner calls these around each block; the base class does nothing (resident)."""

    def begin_step(self) -> None:
        """Before the first block of a forward pass."""

    def before_forward(self, index: int) -> None:
        """Block `index` is about to run; its weights must be usable afterwards."""

    def after_forward(self, index: int) -> None:
        """Block `index` has run."""

    def before_backward(self, index: int) -> None:
        """Block `index` is about to be recomputed and differentiated."""

    def after_backward(self, index: int) -> None:
        """Its gradients are complete."""

    def end_step(self) -> None:
        """After backward (or after a forward pass without gradients)."""

    def abort(self) -> None:
        """An exception ended the pass anywhere; the next step must be right."""

    def materialize(self) -> None:
        """All weights usable at once, for saving or merging."""

    def stats(self) -> Mapping[str, float]:
        """Counters for the log."""
        return {}

    def detach(self) -> None:
        """The plain model is back."""


class MemoryStrategy(ABC):
    """A policy over an ordered list of blocks."""

    name: str

    @abstractmethod
    def supports(self, facts: MemoryFacts) -> Sequence[TunerError]:
        """What speaks against using it here."""

    @abstractmethod
    def plan(self, facts: MemoryFacts) -> MemoryPlan:
        """What it will cost."""

    @abstractmethod
    def attach(self, blocks: BlockSet, device: torch.device) -> MemorySession:
        """Takes over the frozen weights of `blocks`."""


@dataclass(frozen=True)
class QuantizedPart:
    """What a quantizer did: module names it changed and bytes before and after."""

    modules: tuple[str, ...] = field(default_factory=tuple)
    bytes_before: int = 0
    bytes_after: int = 0


class Quantizer(ABC):
    """Replaces the weights of linear layers by fewer bytes, block by block while loading."""

    name: str

    @abstractmethod
    def quantize(self, module: nn.Module) -> QuantizedPart:
        """Quantizes the linear layers inside `module` in place."""
