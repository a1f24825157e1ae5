"""What is captured into a graph touches no tensor of the host, and reads nothing that somebody may throw away.

The meta device stands for a GPU, as in the tests of the steady step; where values matter, the processor does.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._pytree import tree_leaves

from ltxvideo2.ltx2_models import text_widths, transformer
from ltxvideo2.test_steady_step import META, STREAMS, Watch
from tuner.builtins.losses import FlowMatchingLoss
from tuner.config.settings import AdapterSettings
from tuner.interfaces.family import BuildContext, ClipShape
from tuner.interfaces.losses import Regularizer
from tuner.model.adapters import add_adapters
from tuner.model.runner import BlockRunner, Checkpointing
from tuner.model.selection import with_counts
from tuner.train import execute
from tuner.train.execute import GraphExecution
from tuner.train.masters import MasterWeights
from tuner.train.step import Item, TrainingModel
from tuner_ltxvideo2 import inputs
from tuner_ltxvideo2.family import LTX2Family
from tuner_ltxvideo2.options import LTX2Options
from tuner_ltxvideo2.transformer import RotaryTables
from tuner_regularizers.crepa import RECORD, Crepa
from tuner_regularizers.crepa_options import CrepaOptions
from tuner_regularizers.tread import Tread
from tuner_regularizers.tread_options import TreadConfig, TreadOptions

CPU = torch.device("cpu")
SHAPES = tuple(ClipShape(64, 64, frames, 25.0, frames / 25) for frames in (9, 17, 25))
TREAD = TreadConfig.model_validate({"routes": [{"selection_ratio": 0.5, "start_layer_idx": 1, "end_layer_idx": 1}]})
CREPA = {"crepa_enabled": True, "crepa_encoder": "tiny", "crepa_encoder_image_size": 56, "crepa_block_index": 1}


class Recording(Watch):
    """Stands for a graph: knows the tensors that were there before and are read."""

    all: ClassVar[list[Recording]] = []

    def __init__(self) -> None:
        super().__init__()
        self.read: dict[int, StorageWeakRef] = {}
        self._own: set[int] = set()
        self.all.append(self)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for tensor in found((args, kwargs)):
            storage = tensor.untyped_storage()
            if storage._cdata not in self._own:
                self.read.setdefault(storage._cdata, StorageWeakRef(storage))
        result = super().__torch_dispatch__(func, types, args, kwargs)
        self._own.update(tensor.untyped_storage()._cdata for tensor in found(result))
        return result

    def replay(self) -> None:
        """What was computed while it was recorded is what there is."""


def found(values: object) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(values) if isinstance(leaf, Tensor)]


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> list[Recording]:
    """All that are made."""
    made: list[Recording] = []
    monkeypatch.setattr(Recording, "all", made)

    @contextmanager
    def recording(graph: Recording, pool: object) -> Iterator[None]:
        with graph:
            yield

    monkeypatch.setattr(execute, "PLAIN_FIRST", 1)
    monkeypatch.setattr(execute, "recording", recording)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Recording)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: (0, 1))
    return made


@dataclass
class Setup:
    """What is trained."""

    regularizers: Sequence[Callable[[BuildContext], Regularizer]] = ()
    batches: int = 1
    recomputed: bool = True
    rates: tuple[float, ...] = (25.0, 25.0)


def tread(context: BuildContext) -> Regularizer:
    return Tread(TreadOptions(tread_config=TREAD), context)


def crepa(context: BuildContext) -> Regularizer:
    return Crepa(CrepaOptions(**CREPA), context)  # type: ignore[arg-type]


def cut_crepa(context: BuildContext) -> Regularizer:
    return Crepa(CrepaOptions(**CREPA, crepa_similarity_threshold=0.9), context)  # type: ignore[arg-type]


class Trained:
    """LTX-2 with three small blocks, of whose tables one of each kind is kept."""

    def __init__(self, setup: Setup, device: torch.device) -> None:
        self.setup, self.device = setup, device
        net = nn.Module.to(transformer(layers=3), device, torch.bfloat16)
        add_adapters(net, [name for name, _ in net.named_modules() if name.endswith(("to_q", "to_out.0"))], AdapterSettings(lora_rank=4), 0)
        context = BuildContext(device, torch.bfloat16, 0, 0, Path(), geometry=LTX2Family.geometry, total_steps=20)
        self.family = LTX2Family(LTX2Options(), context)
        self.family._tables = RotaryTables(capacity=1, spare=0)
        blocks = self.family.block_set(net)
        self.regularizers = tuple(make(context) for make in setup.regularizers)
        trained = {name: p for name, p in net.named_parameters() if p.requires_grad}
        for regularizer in self.regularizers:
            regularizer.attach(blocks, context)
            if (module := regularizer.trainable()) is not None:
                trained |= {f"{regularizer.name}.{name}": p for name, p in module.to(device).named_parameters()}
        self.runner = BlockRunner(
            blocks, self.family.call_block, checkpointing=Checkpointing.every(3) if setup.recomputed else Checkpointing(),
            transforms=[t for r in self.regularizers for t in r.transforms()], taps=[t for r in self.regularizers for t in r.taps()],
        )  # fmt: skip
        terms = [*(FlowMatchingLoss(name) for name in STREAMS), *(t for r in self.regularizers for t in r.loss_terms())]
        self.masters = self.runner.sink = MasterWeights(trained, low_precision=False)
        self.text = {name: (6, width) for name, width in text_widths(net).items()}
        self.training = TrainingModel(self.family, net.train(), self.runner, terms, self.regularizers)
        self.execution = GraphExecution(self.training, self.masters)

    def item(self, shape: ClipShape) -> Item:
        batch, noise = inputs.dummy_batch(shape, 2, self.text, torch.bfloat16, self.device)
        features = torch.randn(2, *batch.streams["video"].grid, 32, dtype=torch.float16, device=self.device)
        extras = {RECORD: features} if crepa in self.setup.regularizers or cut_crepa in self.setup.regularizers else {}
        return Item(with_counts(replace(batch, frame_rate=self.setup.rates, extras=extras)), noise)

    def step(self, shape: ClipShape, number: int) -> None:
        items = [self.item(shape) for _ in range(self.setup.batches)]
        for regularizer in self.regularizers:
            regularizer.begin_step(number, items[0].batch, items[0].noise, torch.Generator().manual_seed(number))
        self.execution(items, number, 1 / len(items))
        for parameter in self.masters.optimized():
            parameter.grad = None

    def observe(self, shape: ClipShape) -> None:
        """As samples and held-out losses do between steps."""
        item = self.item(shape)
        with torch.no_grad():
            self.runner.observe(self.family.enter(self.training.model, item.batch, item.noise))

    def run(self) -> None:
        """Every shape until each is captured, with other passes in between."""
        for number in range(2 * (execute.PLAIN_FIRST + 2)):
            self.step(SHAPES[number % 2], number)
            self.observe(SHAPES[2])


CASES = {
    "two batches together": Setup(batches=2),
    "rates of their own": Setup(rates=(24.0, 30.0)),
    "TREAD and CREPA": Setup([tread, cut_crepa]),
    "both, nothing recomputed": Setup([tread, crepa], recomputed=False),
}


@pytest.mark.parametrize("name", CASES)
def test_what_is_captured_touches_no_tensor_of_the_host(name: str, graphs: list[Recording]) -> None:
    """Also where more shapes take turns than tables are kept for."""
    trained = Trained(CASES[name], META)
    trained.run()
    assert trained.execution.captured == len(graphs) == 2
    assert not any(graph.host for graph in graphs), [dict(graph.host) for graph in graphs]


@pytest.mark.parametrize("name", CASES)
def test_what_a_captured_step_reads_is_kept(name: str, graphs: list[Recording]) -> None:
    """A graph points to memory: where a tensor was thrown away, it would read what others have written there."""
    trained = Trained(CASES[name], CPU)
    trained.run()
    for shape in reversed(SHAPES):
        trained.observe(shape)
    gc.collect()
    assert len(graphs) == 2
    assert [sum(ref.expired() for ref in graph.read.values()) for graph in graphs] == [0, 0]
