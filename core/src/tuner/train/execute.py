"""How one batch's forward and backward pass is carried out: called plainly, or replayed as a CUDA graph.

A graph is captured per shape of batch once the same shape has run plainly a few times, so that every lazily built table and every
library's workspace is there. All graphs share one pool of memory, because only one of them runs at a time, and one set of
gradients. What a replay computes is what was captured: nothing in the step may depend on a Python value that changes from step to
step. The kernels are those of the plain step, so the numbers are, too.
"""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any, TypeVar

import torch
from torch import Tensor

from tuner.errors import EnvironmentProblem
from tuner.interfaces.family import Batch, Noise
from tuner.interfaces.losses import LossValue, Regularizer
from tuner.model.runner import BlockRunner
from tuner.train.masters import MasterWeights
from tuner.train.step import StepResult, TrainingModel, train_step

log = logging.getLogger(__name__)
T = TypeVar("T")

PLAIN_FIRST = 3
"""Plain steps of a shape before it is captured."""
GRAPHS_KEPT = 4
"""Shapes beyond this number run plainly: each graph holds its own copy of the step's inputs and results."""


class Execution(ABC):
    """Carries out forward and backward of one batch; gradients arrive in the masters."""

    def __init__(self, training: TrainingModel, masters: MasterWeights) -> None:
        self.training = training
        self.masters = masters

    @abstractmethod
    def __call__(self, batch: Batch, noise: Noise, step: int, share: float) -> StepResult:
        """`share`: of this batch in the optimizer step's loss. The result's tensors hold until the next call."""


class PlainExecution(Execution):
    """Calls the step."""

    def __call__(self, batch: Batch, noise: Noise, step: int, share: float) -> StepResult:
        result = train_step(self.training, batch, noise, step)
        if result.loss.requires_grad:  # a batch without a stream whose modules alone are trained teaches nothing
            (result.loss * share).backward()  # type: ignore[no-untyped-call]
        self.masters.collect()
        return result


@dataclass
class _Graph:
    """One captured shape: its inputs, its results, and the gradients it leaves."""

    graph: torch.cuda.CUDAGraph
    inputs: list[Tensor]
    result: StepResult
    gradients: list[Tensor | None]
    """For each of the masters' tensors: where the graph writes its gradient; the same for all graphs."""
    kept: list[Tensor]
    """What the step reads and did not make itself, such as rotary tables: others may drop it, the graph still points there."""


class GraphExecution(Execution):
    """Replays a CUDA graph of the step for each shape of batch that comes often enough."""

    def __init__(self, training: TrainingModel, masters: MasterWeights, *, required: bool = True) -> None:
        """`required`: a step that cannot be captured is an error; otherwise it is carried out plainly, and that is said once."""
        super().__init__(training, masters)
        self._required = required
        self._limit = GRAPHS_KEPT
        self.plain = PlainExecution(training, masters)
        self._seen: dict[object, int] = {}
        self._graphs: dict[object, _Graph] = {}
        self._pool: Any = None
        self._gradients: list[Tensor] = []

    @property
    def captured(self) -> int:
        """How many shapes are replayed."""
        return len(self._graphs)

    def __call__(self, batch: Batch, noise: Noise, step: int, share: float) -> StepResult:
        keys = tuple(regularizer.graph_key() for regularizer in self.training.regularizers)
        shape = (signature(batch), signature(noise), share, keys)
        if shape not in self._graphs:
            self._seen[shape] = self._seen.get(shape, 0) + 1
            if self._seen[shape] <= PLAIN_FIRST or len(self._graphs) >= self._limit:
                return self.plain(batch, noise, step, share)
            captured = self._capture(batch, noise, step, share)
            if captured is None:
                return self.plain(batch, noise, step, share)
            self._graphs[shape] = captured
        return self._replay(self._graphs[shape], batch, noise, share)

    def _capture(self, batch: Batch, noise: Noise, step: int, share: float) -> _Graph | None:
        """None: it cannot be captured, and will not be tried again."""
        own_batch, own_noise = copied(batch), copied(noise)
        if not self._gradients:
            self._gradients = [torch.empty_like(master, requires_grad=False) for master in self.masters.optimized()]
        graph = torch.cuda.CUDAGraph()
        torch.cuda.synchronize()
        try:
            # Other threads (the one that pins batches) may go on calling the driver meanwhile.
            with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
                result = train_step(self.training, own_batch, own_noise, step)
                (result.loss * share).backward()  # type: ignore[no-untyped-call]
                gradients = self._keep(self.masters.gather())
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            reason = f"the training step could not be captured: {str(error).splitlines()[0]}"
            if self._required:
                raise EnvironmentProblem(reason, where="cuda_graphs", remedy="set it to auto, or off") from error
            log.warning("%s; it is carried out plainly", reason)
            self._limit = len(self._graphs)
            self.training.blocks.abort()
            self.masters.gather()  # what the attempt left there was never computed
            return None
        self._pool = graph.pool()
        detached = replace(result, loss=result.loss.detach(), terms=tuple(_detached(term) for term in result.terms), entered=None)
        kept = [tensor.detach() for tensor in tensors(result.entered)]
        return _Graph(graph, [*tensors(own_batch), *tensors(own_noise)], detached, gradients, kept)

    def _keep(self, found: list[Tensor | None]) -> list[Tensor | None]:
        """Writes gradients where they stay, so that the graph's own memory holds none of them after a replay."""
        pairs = [(own, given) for own, given in zip(self._gradients, found, strict=True) if given is not None]
        torch._foreach_copy_([own for own, _ in pairs], [given for _, given in pairs])
        return [None if given is None else own for own, given in zip(self._gradients, found, strict=True)]

    def _replay(self, held: _Graph, batch: Batch, noise: Noise, share: float) -> StepResult:
        for own, given in zip(held.inputs, [*tensors(batch), *tensors(noise)], strict=True):
            own.copy_(given, non_blocking=True)
        held.graph.replay()
        # A sole batch's gradients may stay where the graph wrote them; those that are added up must not be overwritten.
        self.masters.add(held.gradients, copy=share != 1)
        return held.result


def tensors(value: object) -> Iterator[Tensor]:
    """Every tensor of a (nested) frozen dataclass or mapping, in a fixed order; samples keep theirs on the host."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        for key in sorted(value):
            yield from tensors(value[key])
    elif is_dataclass(value) and not isinstance(value, type):
        for field in fields(value):
            if field.name != "samples":
                yield from tensors(getattr(value, field.name))


def copied(value: T) -> T:
    """The same structure with its own tensors."""
    return _copied(value)  # type: ignore[return-value]


def _copied(value: object) -> object:
    if isinstance(value, Tensor):
        return value.clone()
    if isinstance(value, dict):
        return {key: _copied(item) for key, item in value.items()}
    if is_dataclass(value) and not isinstance(value, type):
        return replace(value, **{f.name: _copied(getattr(value, f.name)) for f in fields(value) if f.name != "samples"})
    return value


def signature(value: object) -> object:
    """Equal for two values that the same kernels can be replayed over: structure, shapes, dtypes, and every plain value."""
    if isinstance(value, Tensor):
        return tuple(value.shape), value.dtype
    if isinstance(value, dict):
        return tuple((key, signature(value[key])) for key in sorted(value))
    if is_dataclass(value) and not isinstance(value, type):
        return tuple((f.name, signature(getattr(value, f.name))) for f in fields(value) if f.name != "samples")
    return value


def _detached(term: LossValue) -> LossValue:
    return replace(term, values=term.values.detach())


def reasons_against_graphs(runner: BlockRunner, device: torch.device, regularizers: Sequence[Regularizer], extra_terms: int) -> list[str]:
    """Why this run's step cannot be replayed; empty: it can."""
    found = []
    if device.type != "cuda":
        found.append(f"the device is {device.type}")
    if drawing := [r.name for r in regularizers if not r.capturable]:
        found.append(f"{', '.join(drawing)} may do something else in every step")
    if extra_terms:
        found.append("loss terms of plugins may depend on the step's number")
    if runner.draws:
        found.append("dropout draws anew for every step")
    if not runner.session.capturable:
        found.append("weights are brought in a way that cannot be replayed")
    return found
