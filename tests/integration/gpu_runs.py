"""Runs of the tiny flavour by the product's own loop, on a GPU where there is one, and what they leave behind.

`TUNER_CUDA_TESTS=cpu` carries the tests of this folder out on the processor, called plainly, to see that they run.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor

from integration.project import Project
from tuner.config.resolve import resolve
from tuner.config.settings import TrainSettings
from tuner.data.dataset import TrainingSet
from tuner.data.prefetch import Prefetcher
from tuner.plugins.loader import load_plugins
from tuner.train.assemble import Assembly, assemble
from tuner.train.execute import GraphExecution
from tuner.train.loop import Item, Loop
from tuner.train.plan import Plan, with_manifest
from tuner.train.planning import make_plan
from tuner.train.session import Silence, encode_dataset
from tuner.train.signals import StopRequests

Keys = Mapping[str, object]

CPU, HAS_GPU = torch.device("cpu"), torch.cuda.is_available()
DEVICE = torch.device("cuda", 0) if HAS_GPU else CPU
ASKED = HAS_GPU or os.environ.get("TUNER_CUDA_TESTS") == "cpu"
needs_gpu = pytest.mark.skipif(not ASKED, reason="no CUDA device")
STEPS = 12 if HAS_GPU else 2
lenient = pytest.mark.filterwarnings("default")
"""What drivers and compilers warn of is not what these tests are about."""

SAME = {"data": "same"}
"""Clips of one shape."""
INSIDE = {"peft_lora_target_modules": ["to_q", "to_k", "to_v", "to_out.0"]}
"""Nothing outside the blocks is trained."""
GROUPS = {"enable_group_offload": True, "group_offload_use_stream": True}
SWAP = {"musubi_blocks_to_swap": 3}
RAMTORCH = {"ramtorch": True}
INT8 = {"base_model_precision": "int8-torchao"}
PACKED = {"base_model_precision": "bf16-packed"}
FP8 = {"base_model_compute": "fp8"}
TREAD = {"tread_config": {"routes": [{"selection_ratio": 0.5, "start_layer_idx": 1, "end_layer_idx": -2}]}}
CREPA = {"crepa_enabled": True, "crepa_encoder": "tiny", "crepa_encoder_image_size": 56, "crepa_block_index": 1, "crepa_warmup_steps": 2}
CUT = {**CREPA, "crepa_similarity_threshold": 0.99}
"""Watches the similarity in every step."""


def plugin(name: str) -> tuple[str, Any]:
    """One of the example plugins."""
    return name, importlib.import_module(f"tuner_{name.replace('-', '_')}.plugin")


@dataclass
class Result:
    """What a run leaves: the rows of its metrics, its trained weights in float32, how many shapes were replayed."""

    rows: list[dict[str, float]]
    weights: dict[str, Tensor]
    captured: int
    together: int


@dataclass
class Bench:
    """A project whose cache all runs share."""

    project: Project
    _done: dict[str, Result] = field(default_factory=dict)

    def plan(self, keys: Keys, device: torch.device = DEVICE, extra: Sequence[tuple[str, Any]] = ()) -> tuple[Plan, TrainingSet]:
        """With everything cached that it asks for."""
        registry = load_plugins({}, extra=list(extra))
        values = {"max_train_steps": STEPS, "mixed_precision": "bf16", "checkpoint_step_interval": 0, "data": "mixed", **keys}
        values["data"] = str(self.project.folder / str(values["data"]))
        plan = make_plan(registry, resolve(registry.option_types, config_file=self.project.config(**values)), device)
        plan = with_manifest(plan, encode_dataset(plan, Silence()).manifest)
        train = plan.settings.get(TrainSettings)
        return plan, TrainingSet(plan.manifest, plan.encoders, train.train_batch_size, train.seed, 0.0)

    @contextmanager
    def loop(self, keys: Keys, device: torch.device = DEVICE, extra: Sequence[tuple[str, Any]] = ()) -> Iterator[Loop]:
        """Ready to run; its rows arrive in `loop.rows`."""
        plan, dataset = self.plan(keys, device, extra)
        torch.manual_seed(0)
        assembly = assemble(plan, device)
        rows: list[dict[str, float]] = []

        def arrived(step: int, row: Mapping[str, float]) -> None:
            rows.append({name: value for name, value in row.items() if name not in ("seconds", "samples")})

        with StopRequests(lambda text: None) as stops:
            loop = Loop(plan, assembly, dataset, arrived, lambda step: None, stops)
            loop.rows = rows  # type: ignore[attr-defined]
            try:
                yield loop
            finally:
                assembly.detach()

    def run(self, keys: Keys, device: torch.device = DEVICE, extra: Sequence[tuple[str, Any]] = ()) -> Result:
        """From beginning to end, once for equal keys."""
        name = f"{sorted(map(str, keys.items()))} {device} {[name for name, _ in extra]}"
        if name not in self._done:
            with self.loop(keys, device, extra) as loop:
                assert loop.run() == loop.plan.total_steps
                self._done[name] = result_of(loop)
        return self._done[name]


def result_of(loop: Loop) -> Result:
    """What there is now."""
    weights = {name: tensor.detach().to("cpu", copy=True) for name, tensor in loop.assembly.masters.state().items()}
    return Result(list(loop.rows), weights, captured(loop.assembly), loop.assembly.together)  # type: ignore[attr-defined]


def captured(assembly: Assembly) -> int:
    """How many shapes are replayed."""
    execution = getattr(assembly.execution, "inner", assembly.execution)
    return execution.captured if isinstance(execution, GraphExecution) else 0


def graphs(device: torch.device = DEVICE) -> Keys:
    """Steps are replayed, or it is an error; on a processor they are called plainly."""
    return {"cuda_graphs": "on" if device.type == "cuda" else "auto"}


def assert_same(found: Result, expected: Result, *, weights: bool = True) -> None:
    """To the last bit."""
    assert len(found.rows) == len(expected.rows) > 0
    for number, (one, other) in enumerate(zip(found.rows, expected.rows, strict=True)):
        assert one == other, f"step {number + 1}"
    assert found.weights.keys() == expected.weights.keys()
    different = [name for name, tensor in expected.weights.items() if not torch.equal(tensor, found.weights[name])]
    assert not weights or not different, different[:4]


@contextmanager
def steps_of(loop: Loop) -> Iterator[Iterator[int]]:
    """Carries out a step each time that it is asked for the next one; metrics stay on the device."""
    loop.flush_steps = 1 << 30
    feed: Prefetcher[Item] = Prefetcher(loop.prepare, 0, 2)

    def walk() -> Iterator[int]:
        number = 0
        while True:
            loop.step(number, feed)
            number += 1
            yield number

    try:
        yield walk()
    finally:
        feed.close()
