"""Compiled blocks: `torch.compile` of the one function that all blocks go through.

Blocks are alike and weights are inputs of the graph, so one graph serves all of them; there is another for each shape of tokens, and for
passes with and without gradients. What surrounds the blocks stays as it is. The compiler's own CUDA graphs are not used: they copy what
comes in, and a whole step is replayed by `tuner.train.execute`. Its fused kernels round differently from the plain ones.
"""

from __future__ import annotations

import logging
import threading
import time
import warnings
from collections.abc import Callable
from typing import Any, Final

import torch
from torch import nn

from tuner.interfaces.blocks import BlockState
from tuner.model.states import state_tensors

log = logging.getLogger(__name__)

CallBlock = Callable[[nn.Module, BlockState], BlockState]
MODES: Final = {"reduce-overhead": "default", "max-autotune": "max-autotune-no-cudagraphs"}
"""Modes that only add CUDA graphs of the compiler's own -> the same without them."""
GRAPHS: Final = 64
"""Graphs that are kept: three for each shape. torch's own limit of 8 is for functions whose arguments should not vary."""


class CompiledBlocks:
    """Calls a block through the compiler; plainly from the moment on that it gives up, which is said once."""

    def __init__(self, call_block: CallBlock, mode: str = "default", backend: str = "inductor") -> None:
        self._plain = call_block
        self.failed = ""
        """Why blocks are called plainly; empty: they are not."""
        self._known: set[object] = set()
        self._thread = threading.local()
        arguments: dict[str, Any] = {"mode": MODES.get(mode, mode)} if backend == "inductor" else {}
        self._compiled: CallBlock = torch.compile(call_block, backend=backend, dynamic=False, fullgraph=True, **arguments)

    def __call__(self, block: nn.Module, state: BlockState) -> BlockState:
        if self.failed:
            return self._plain(block, state)
        if not hasattr(self._thread, "allowed"):
            # The compiler's settings belong to a thread, and on a GPU blocks are recomputed in one of autograd's.
            torch._dynamo.config.recompile_limit = self._thread.allowed = max(torch._dynamo.config.recompile_limit, GRAPHS)
        key = self._key(state)
        if key in self._known:
            return self._compiled(block, state)
        self._known.add(key)
        return self._first(block, state)

    @staticmethod
    def _key(state: BlockState) -> object:
        """Equal for states that one graph is for, as far as can be told cheaply."""
        tensors = state_tensors(state).values()
        return torch.is_grad_enabled(), tuple((tensor.shape, tensor.dtype, tensor.requires_grad) for tensor in tensors)

    def _first(self, block: nn.Module, state: BlockState) -> BlockState:
        """The call that compiles."""
        began = time.perf_counter()
        try:
            with warnings.catch_warnings():
                # The compiler looks at every attribute of what comes in, and tokens from the block before are no leaves.
                warnings.filterwarnings("ignore", message="The .grad attribute of a Tensor that is not a leaf")
                # It makes instances of autograd functions, such as those of quantized layers, and is warned of that by torch itself.
                warnings.filterwarnings("ignore", message=".*should not be instantiated", category=DeprecationWarning)
                result = self._compiled(block, state)
        except (
            torch._dynamo.exc.TorchDynamoException, torch._dynamo.exc.FailOnRecompileLimitHit, torch._inductor.exc.InductorError,
        ) as error:  # fmt: skip
            self.failed = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
            log.warning("blocks are not compiled, but called plainly: %s", self.failed)
            return self._plain(block, state)
        sizes = ", ".join(f"{stream.hidden.shape[1]} {name}" for name, stream in state.streams.items())
        way = "with gradients" if torch.is_grad_enabled() else "without"
        log.info("blocks compiled for %s tokens, %s, in %.0f s", sizes, way, time.perf_counter() - began)
        return result
