"""What stands for a CUDA graph on the processor: a tape of every operation, run again at the same addresses."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tuner.train import execute


class Tape(TorchDispatchMode):
    """Records operations as they run; `replay` runs them again, and what was new then lies where it lay.

    Memory that is given back between is not used for anything else, as it would be on a GPU: there a wrong address is worse.
    """

    recording: ClassVar[bool] = False

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Callable[..., Any], Sequence[Any], Mapping[str, Any], list[Tensor]]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.calls.append((func, args, kwargs or {}, _tensors(result)))
        return result

    @torch.no_grad()
    def replay(self) -> None:
        for func, args, kwargs, places in self.calls:
            for place, again in zip(places, _tensors(func(*args, **kwargs)), strict=True):
                if place.data_ptr() != again.data_ptr():
                    place.copy_(again)


def _tensors(result: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]


def tape(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets `GraphExecution` use tapes."""

    @contextmanager
    def recording(graph: Tape, pool: object) -> Iterator[None]:
        Tape.recording = True
        try:
            with graph:
                yield
        finally:
            Tape.recording = False

    monkeypatch.setattr(execute, "recording", recording)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Tape)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: (0, 1))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
