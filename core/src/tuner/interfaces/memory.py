"""Memory strategies: where frozen weights live while they are not needed. And quantizers: how many bytes they take.

A part is one network: "transformer", "text_encoder", "vae". The life of a part under a strategy: `open` before anything is read,
`expect` before a block is read as it is, `receive` for each block as soon as its weights are there (and quantized), `attach` once all
blocks are there and adapters are added, then the block events of every pass, and `detach`. So host memory never holds a part twice.
"""

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
    """Of the frozen weights of each block, as they will lie in memory (after quantization)."""
    full_finetuning: bool
    quantizer: str
    """The precision key's value: "no_change", or a quantizer's name."""
    checkpointing: str
    """"none", "some" or "all" blocks are recomputed in backward."""
    world_size: int = 1
    part: str = "transformer"
    linear_bytes: tuple[int, ...] = ()
    """Of the weights of the frozen linear layers of one block, in order; empty: not known."""
    linear_names: tuple[str, ...] = ()
    """Their names inside the block; empty: not known."""
    host_bytes: int = 0
    """Host memory that is free; 0: not known."""
    plain_bytes: int = 0
    """Of the weights of all blocks as products read them, whatever they lie in memory as; 0: the same."""


@dataclass(frozen=True)
class MemoryPlan:
    """Predicted cost, printed before anything loads. Bytes; overhead as a share of the resident step's time."""

    device_bytes: int
    """Of block weights that lie on the device at the same time."""
    host_bytes: int
    """Of block weights in host memory, pinned or not."""
    pinned_bytes: int
    traffic_bytes: int
    """Copied to the device in a training step with every block recomputed."""
    overhead: float
    summary: str
    forward_bytes: int = 0
    """Of `traffic_bytes`, those of the walk forward."""
    beside: bool = True
    """Whether copies run beside the computation."""
    inside_blocks: bool = False
    """As in `MemorySession`."""


class MemorySession:
    """One part under a strategy. The base class keeps everything on the device.

    The runner calls the block events around each block. A step is `begin_step`, a forward walk 0..N-1, where gradients are wanted
    a backward walk N-1..first_backward, then `end_step`; or `abort` in place of the rest.
    """

    capturable: bool = True
    """Whether a steady step's events only queue work on the device, in the same order every time: then a CUDA graph may hold them."""
    inside_blocks: bool = False
    """Whether weights come and go while a block computes: its work then has to be queued one after the other."""

    def expect(self, index: int, block: nn.Module, device: torch.device) -> None:
        """Block `index` is about to be read, unquantized; its weights, of their final dtype, are on the meta device.

        Who knows where they will live gives them memory there, all or some: they are read straight into it, and others to wherever the
        loader puts them. Not every loader asks.
        """

    def receive(self, index: int, block: nn.Module, device: torch.device) -> None:
        """All weights of block `index` have been read (and quantized): takes them to where they will live. No adapters yet."""
        block.to(device)

    def attach(self, blocks: BlockSet) -> None:
        """All blocks are there and adapters are added: from here on the events come."""

    def hold(self, module: nn.Module, device: torch.device) -> None:
        """Takes over a whole module without blocks that only runs without gradients, such as a VAE; instead of `receive` and `attach`."""
        module.to(device)

    def begin_step(self, first_backward: int) -> None:
        """Before the first block of a pass over N blocks; backward will visit blocks N-1 down to `first_backward` (N: none)."""

    def before_forward(self, index: int) -> None:
        """Block `index` is about to run; its weights must be usable afterwards."""

    def after_forward(self, index: int) -> None:
        """Block `index` has run."""

    def before_backward(self, index: int) -> None:
        """Block `index` is about to be recomputed and differentiated, or its kept graph walked back."""

    def after_backward(self, index: int) -> None:
        """Its gradients are complete."""

    def end_step(self) -> None:
        """After backward (or after a forward pass without gradients)."""

    def abort(self) -> None:
        """An exception ended the pass anywhere; the next step must be right."""

    def materialize(self) -> None:
        """All weights usable at once, for saving or merging, though perhaps not on the device; the next step still works."""

    def stats(self) -> Mapping[str, float]:
        """Counters, for tests and benchmarks."""
        return {}

    def detach(self) -> None:
        """The plain modules are back, with the bytes they had; events may no longer come. Streamed weights are left in host memory."""


class MemoryStrategy(ABC):
    """A policy over an ordered list of blocks. Built once a run as `Strategy(options, context)`."""

    name: str

    @classmethod
    def candidates(cls, blocks: int) -> Sequence[Mapping[str, object]]:
        """Settings worth trying for a transformer of so many blocks where memory is short: key -> value, each enough to switch it on."""
        return ()

    def parts(self) -> frozenset[str]:
        """Which parts its options ask it to hold."""
        return frozenset({"transformer"})

    def keys(self, part: str) -> tuple[str, ...]:
        """The keys that ask it to hold `part`, to be named where another strategy is asked to hold it too."""
        return ()

    @abstractmethod
    def supports(self, facts: MemoryFacts) -> Sequence[TunerError]:
        """What speaks against using it on this part."""

    @abstractmethod
    def plan(self, facts: MemoryFacts) -> MemoryPlan:
        """What it will cost."""

    @abstractmethod
    def open(self, part: str, blocks: int, device: torch.device) -> MemorySession:
        """A session for a part with so many blocks (0: a module without blocks, for `hold`), before any weight is read."""


class Placement(ABC):
    """What becomes of the blocks of one part while it is read: their precision and their place. The core implements it.

    A family's loader calls `expect`, reads a block's weights into the memory that they have then, or onto `reading` those that have
    none, calls `received`, and goes on to the next block. Weights outside the blocks it reads to their device itself. Who loads a part
    calls `attach` or `hold` afterwards and `close` at the end.
    """

    reading: torch.device
    """Where the loader puts a block's weights."""
    streamed: bool = False
    """Whether a strategy brings the weights to the device in turn: what else is large is then better left in host memory too."""

    def expect(self, index: int, block: nn.Module, dtype: torch.dtype) -> None:
        """Block `index`, without memory, is about to be read in `dtype`. Its weights may have memory afterwards, which is to be filled."""

    @abstractmethod
    def received(self, index: int, block: nn.Module) -> None:
        """All weights of block `index` are there."""

    @abstractmethod
    def attach(self, blocks: BlockSet, *, owner: nn.Module | None = None) -> MemorySession:
        """All blocks are there. `owner`: the module whose own forward loops over them without gradients; it then fires the events."""

    @abstractmethod
    def hold(self, module: nn.Module) -> None:
        """Takes over a whole module without blocks (see `MemorySession.hold`), which was read onto `reading`."""

    @abstractmethod
    def close(self) -> None:
        """Detaches; the weights may be freed."""


class PartMemory(ABC):
    """Opens parts under the strategy and precision that the run's options ask for."""

    def precision(self, part: str) -> str:
        """What the weights of `part` are rounded to: a quantizer's name, or "no_change". Who caches what a part computes needs it."""
        return "no_change"

    @abstractmethod
    def open(self, part: str, blocks: int, device: torch.device) -> Placement:
        """A placement for a part that will compute on `device`; a plain one where nothing is asked for."""


@dataclass(frozen=True)
class QuantizedPart:
    """What a quantizer did: module names it changed and bytes before and after."""

    modules: tuple[str, ...] = field(default_factory=tuple)
    bytes_before: int = 0
    bytes_after: int = 0
    left: tuple[str, ...] = field(default_factory=tuple)
    """Names of modules that it would have changed, but whose numbers it cannot hold."""


class Quantizer(ABC):
    """Replaces the weights of linear layers by fewer bytes, block by block while loading."""

    name: str
    distribution: str = ""
    """The installed package whose version decides the numbers, so that a resume compares it; empty: none."""
    compute: str = ""
    """What `quantize`d layers multiply in, one of `computes`; set by the run before the first block is read."""

    @property
    def computes(self) -> frozenset[str]:
        """Values of `base_model_compute` that its layers can carry out; "" is to multiply in the model's own dtype."""
        return frozenset({""})

    @abstractmethod
    def quantize(self, module: nn.Module) -> QuantizedPart:
        """Quantizes the linear layers inside `module` in place, on the device they are on.

        They stay `nn.Linear`s under their names, where adapters look for them: `tuner.model.quantized.become_quantized` changes a layer's
        class to one that computes with the new weight.
        """

    @abstractmethod
    def bytes_of(self, weight: torch.Size, dtype: torch.dtype) -> int:
        """Bytes that a linear layer's weight of this shape takes afterwards, scales included; from the shape alone."""
