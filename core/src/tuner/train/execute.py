"""How forward and backward pass of one batch, or of several together, are carried out: called plainly, or replayed as a CUDA graph.

A graph is captured per shape of batch once the same shape has run plainly a few times, so that every lazily built table and every
library's workspace is there. All graphs share one pool of memory, because only one of them runs at a time, and one set of
gradients. What a replay computes is what was captured: nothing in the step may depend on a Python value that changes from step to
step. The kernels are those of the plain step, so the numbers are, too.
"""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from tuner.errors import EnvironmentProblem
from tuner.interfaces.losses import Regularizer
from tuner.interfaces.memory import MemorySession
from tuner.model.lanes import rejoin
from tuner.model.runner import BlockRunner
from tuner.train.masters import MasterWeights
from tuner.train.step import Item, StepResult, TrainingModel, train_together

log = logging.getLogger(__name__)
T = TypeVar("T")

PLAIN_FIRST = 3
"""Plain steps of a shape before it is captured."""
GRAPHS_KEPT = 4
"""Shapes beyond this number run plainly: each graph holds its own copy of the step's inputs and results."""


class Execution(ABC):
    """Carries out forward and backward; gradients arrive in the masters."""

    makes_room: bool = True
    """Whether a step that does not fit is tried again without what `release` gives back; False where somebody around it does that."""

    def __init__(self, training: TrainingModel, masters: MasterWeights) -> None:
        self.training = training
        self.masters = masters

    @abstractmethod
    def __call__(self, items: Sequence[Item], step: int, share: float) -> list[StepResult]:
        """`share`: of each batch in the optimizer step's loss. The results have no graph; their tensors hold until the next call."""

    @property
    def to_come(self) -> int:
        """Bytes that are held beside a step from some step on, but not in the first ones."""
        return 0

    def release(self) -> bool:
        """Gives memory back that is held for steps to come; whether there was any."""
        return False


class PlainExecution(Execution):
    """Calls the step."""

    def __call__(self, items: Sequence[Item], step: int, share: float) -> list[StepResult]:
        results = _forward_backward(self.training, items, step, share)
        self.masters.collect()
        return [_detached(result) for result in results]


def _forward_backward(training: TrainingModel, items: Sequence[Item], step: int, share: float) -> list[StepResult]:
    """Leaves gradients in the model's parameters."""
    results = train_together(training, items, step)
    # A batch without a stream whose modules alone are trained teaches nothing.
    if losses := [result.loss * share for result in results if result.loss.requires_grad]:
        total = losses[0] if len(losses) == 1 else torch.stack(losses).sum()
        total.backward()  # type: ignore[no-untyped-call]
    training.blocks.leave()  # where nothing was to be learned
    return results


@dataclass
class _Graph:
    """One captured shape: its inputs, its results, and the gradients it leaves."""

    graph: torch.cuda.CUDAGraph
    inputs: list[Tensor]
    results: list[StepResult]
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
        self._said = False
        self.plain = PlainExecution(training, masters)
        self._seen: dict[object, int] = {}
        self._graphs: dict[object, _Graph] = {}
        self._pool: Any = None
        self._gradients: list[Tensor] = []

    @property
    def captured(self) -> int:
        """How many shapes are replayed."""
        return len(self._graphs)

    @property
    def to_come(self) -> int:
        """The gradients that the graphs write."""
        return sum(master.nbytes for master in self.masters.optimized())

    def __call__(self, items: Sequence[Item], step: int, share: float) -> list[StepResult]:
        keys = tuple(regularizer.graph_key() for regularizer in self.training.regularizers)
        shape = (signature(tuple(items)), share, keys)
        if shape not in self._graphs:
            self._seen[shape] = self._seen.get(shape, 0) + 1
            if self._seen[shape] <= PLAIN_FIRST:
                return self._plainly(items, step, share)
            if len(self._graphs) >= self._limit:
                self._say_how_many()
                return self._plainly(items, step, share)
            captured = self._capture(items, step, share)
            if captured is None:
                return self.plain(items, step, share)
            self._graphs[shape] = captured
        return self._replay(self._graphs[shape], items, share)

    def _say_how_many(self) -> None:
        """Once, and only where no failure said more."""
        if self._limit == GRAPHS_KEPT and not self._said:
            self._said = True
            log.warning("%d shapes of batches are replayed as CUDA graphs; those of further shapes are carried out plainly", self._limit)

    def _plainly(self, items: Sequence[Item], step: int, share: float) -> list[StepResult]:
        """Once more without the graphs, where it does not fit beside what they hold; then no others are made."""
        fresh = all(parameter.grad is None for parameter in self.masters.optimized())
        try:
            return self.plain(items, step, share)
        except torch.OutOfMemoryError as error:
            if not (fresh and self.makes_room and self.release()):
                raise
            log.warning("a step did not fit beside those that are replayed (%s); all are carried out plainly", str(error).splitlines()[0])
            self._limit = 0
        # Here the exception is gone, and with it the tensors that its traceback kept alive.
        self.training.blocks.abort()
        self.masters.gather()
        torch.cuda.empty_cache()
        return self.plain(items, step, share)

    def release(self) -> bool:
        if not self._graphs:
            return False
        torch.cuda.synchronize()  # one of them may be running
        self._graphs.clear()
        self._seen.clear()
        self._pool = None
        return True

    def _capture(self, items: Sequence[Item], step: int, share: float) -> _Graph | None:
        """None: it cannot be captured, and will not be tried again."""
        own = copied(tuple(items))
        pool = self._pool or torch.cuda.graph_pool_handle()
        if not self._gradients:
            self._gradients = [torch.empty_like(master, requires_grad=False) for master in self.masters.optimized()]
        for item in own:  # other shapes may have pushed out its tables, and to build those brings numbers from the host
            with torch.no_grad():
                self.training.family.enter(self.training.model, item.batch, item.noise)
        graph = torch.cuda.CUDAGraph()
        failed: list[BaseException] = []
        with _set_aside(self.masters.optimized()):
            try:
                with recording(graph, pool):
                    results, gradients = self._recorded(own, step, share, failed)
            except RuntimeError as error:
                self.training.blocks.abort()
                self.masters.gather()  # what the attempt left there was never computed
                self._not_captured(failed.pop() if failed else error)
                return None
        self._pool = pool
        kept = [tensor.detach() for result in results for tensor in tensors(result.entered)]
        return _Graph(graph, list(tensors(own)), [_detached(result) for result in results], gradients, kept)

    def _recorded(
        self, own: Sequence[Item], step: int, share: float, failed: list[BaseException]
    ) -> tuple[list[StepResult], list[Tensor | None]]:
        """`failed` gets what went wrong, because ending the capture may raise, too."""
        try:
            results = _forward_backward(self.training, own, step, share)
            return results, self._keep(self.masters.gather())
        except BaseException as error:
            failed.append(error)
            self.training.blocks.abort()  # inside: a capture can be ended only when the stream of the copies has come back
            rejoin()  # and that of the small work
            raise

    def _not_captured(self, error: BaseException) -> None:
        """Raises where graphs are required, and what no driver says; else says so, and no further shape is captured."""
        if not isinstance(error, RuntimeError):
            raise error
        full = next((e for e in (error, error.__context__) if isinstance(e, torch.OutOfMemoryError)), None)
        if full is not None and self._required:
            raise full
        reason = f"the training step could not be captured: {(str(full or error).splitlines() or [type(error).__name__])[0]}"
        if self._required:
            raise EnvironmentProblem(reason, where="cuda_graphs", remedy="set it to auto, or off") from error
        log.warning("%s; it is carried out plainly", reason)
        if full is not None:
            self.release()
        self._limit = len(self._graphs)

    def _keep(self, found: list[Tensor | None]) -> list[Tensor | None]:
        """Writes gradients where they stay, so that the graph's own memory holds none of them after a replay."""
        pairs = [(own, given) for own, given in zip(self._gradients, found, strict=True) if given is not None]
        if pairs:
            torch._foreach_copy_([own for own, _ in pairs], [given for _, given in pairs])
        return [None if given is None else own for own, given in zip(self._gradients, found, strict=True)]

    def _replay(self, held: _Graph, items: Sequence[Item], share: float) -> list[StepResult]:
        for own, given in zip(held.inputs, tensors(tuple(items)), strict=True):
            own.copy_(given, non_blocking=True)
        held.graph.replay()
        # Gradients of the whole step may stay where the graph wrote them; those that others are added to must not be overwritten.
        self.masters.add(held.gradients, copy=round(1 / share) != len(items))
        return held.results


@contextmanager
def recording(graph: torch.cuda.CUDAGraph, pool: Any) -> Iterator[None]:
    """What is issued inside goes into `graph`, and is not run."""
    with torch.cuda.stream(torch.cuda.current_stream()):  # torch stays on the stream of a capture that fails
        torch.cuda.synchronize()
        try:
            # Other threads (the one that pins batches) may go on calling the driver meanwhile.
            with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
                yield
        except BaseException:
            leave_pool(torch.cuda.current_device(), pool)
            raise


def leave_pool(device: int, pool: Any) -> None:
    """After a capture that failed. One that cannot even be ended is never ended for torch's allocator (torch 2.11): it would go on taking
    itself for capturing, give no cached memory back when memory is short, and keep that of the pool for good."""
    with suppress(RuntimeError, AttributeError):  # it was ended; or a torch without these
        torch._C._cuda_endAllocateToPool(device, pool)
        torch._C._cuda_releasePool(device, pool)


@contextmanager
def _set_aside(parameters: Sequence[nn.Parameter]) -> Iterator[None]:
    """Gradients of the batches before: a captured backward pass would add to them, in every replay again."""
    held = [parameter.grad for parameter in parameters]
    for parameter in parameters:
        parameter.grad = None
    try:
        yield
    finally:
        for parameter, gradient in zip(parameters, held, strict=True):
            parameter.grad = gradient


def tensors(value: object) -> Iterator[Tensor]:
    """Every tensor of a (nested) frozen dataclass, tuple or mapping, in a fixed order; samples keep theirs on the host."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, tuple):
        for item in value:
            yield from tensors(item)
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
    if isinstance(value, tuple):
        return tuple(_copied(item) for item in value)
    if isinstance(value, dict):
        return {key: _copied(item) for key, item in value.items()}
    if is_dataclass(value) and not isinstance(value, type):
        return replace(value, **{f.name: _copied(getattr(value, f.name)) for f in fields(value) if f.name != "samples"})
    return value


def signature(value: object) -> object:
    """Equal for two values that the same kernels can be replayed over: structure, shapes, dtypes, and every plain value.

    Counts of given tokens are for whoever chooses work by them, and says so with `Regularizer.graph_key`.
    """
    if isinstance(value, Tensor):
        return tuple(value.shape), value.dtype
    if isinstance(value, tuple):
        return tuple(signature(item) for item in value)
    if isinstance(value, dict):
        return tuple((key, signature(value[key])) for key in sorted(value))
    if is_dataclass(value) and not isinstance(value, type):
        return tuple((f.name, signature(getattr(value, f.name))) for f in fields(value) if f.name not in ("samples", "most_given"))
    return value


def _detached(result: StepResult) -> StepResult:
    terms = tuple(replace(term, values=term.values.detach()) for term in result.terms)
    return replace(result, loss=result.loss.detach(), terms=terms, entered=None)


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
    passing = [r.name for r in regularizers if type(r).connect is not Regularizer.connect]
    if passing and type(runner.session) is not MemorySession:
        found.append(f"the forward passes of {', '.join(passing)} leave other weights on the device than a step does")
    return found
