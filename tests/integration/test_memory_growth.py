"""Two hundred steps under each kind of strategy leave nothing behind: tensors, threads and open files stay as many as they were."""

from __future__ import annotations

import gc
import threading
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import cast

import pytest
import torch
from torch import Tensor, nn

from integration.project import Project, add_clip
from tuner.builtins.losses import FlowMatchingLoss
from tuner.builtins.optimizers import AdamW
from tuner.builtins.options import AdamOptions
from tuner.config.resolve import resolve
from tuner.config.settings import AdapterSettings, OptimizerSettings, TrainSettings
from tuner.data.dataset import TrainingSet
from tuner.interfaces.blocks import BlockSet, BlockState
from tuner.interfaces.family import Batch, Noise, Prediction
from tuner.model.adapters import add_adapters
from tuner.model.runner import BlockRunner, Checkpointing
from tuner.plugins.loader import load_plugins
from tuner.testing.blocks import MixingModel, call_mixing_block
from tuner.train.assemble import Assembly
from tuner.train.execute import PlainExecution
from tuner.train.loop import Item, Loop
from tuner.train.masters import MasterWeights
from tuner.train.noise import NoiseSampler
from tuner.train.plan import Plan
from tuner.train.planning import make_plan
from tuner.train.schedule import make_schedule
from tuner.train.session import Silence, encode_dataset
from tuner.train.signals import StopRequests
from tuner.train.step import TrainingModel
from tuner_ltxvideo2.family import LTX2Family
from tuner_ltxvideo2.tiny import TinyPaths
from tuner_offload.ramtorch import RamTorch

CPU = torch.device("cpu")
STEPS, WATCHED, DEPTH = 200, (20, 110, 200), 4
STRATEGIES: Mapping[str, Mapping[str, object]] = {
    "groups": {"enable_group_offload": True, "group_offload_use_stream": True},
    "groups on disk": {"enable_group_offload": True, "group_offload_to_disk_path": "disk"},
    "swapped": {"musubi_blocks_to_swap": 3},
    "layers": {"ramtorch": True},
}


class SmallFamily(LTX2Family):
    """The data and draws of the real family before blocks that cost a fraction of a millisecond."""

    def enter(self, model: nn.Module, batch: Batch, noise: Noise) -> BlockState:
        video, audio = (noise.streams[name].noisy for name in ("video", "audio"))
        text = batch.text["video"][:, :8, :32].repeat(1, 1, 4).float()
        return cast(MixingModel, model).enter(video, audio, text, noise.streams["video"].sigma[:, None].expand(video.shape[:2]))

    def exit(self, model: nn.Module, state: BlockState) -> Prediction:
        return Prediction(cast(MixingModel, model).exit(state))

    def call_block(self, block: nn.Module, state: BlockState) -> BlockState:
        return call_mixing_block(block, state)

    def block_set(self, model: nn.Module) -> BlockSet:
        return cast(MixingModel, model).block_set()


@pytest.fixture(autouse=True)
def only_new_objects() -> Iterator[None]:
    """What was there before the test is neither searched for garbage nor counted, which takes most of the time otherwise."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory, tiny: TinyPaths) -> Project:
    folder = tmp_path_factory.mktemp("growth")
    for name in ("amber", "birch"):
        add_clip(folder / "clips", name)
    return Project(folder, tiny)


class ShortLoop(Loop):
    """Reads two batches, again and again."""

    def prepare(self, index: int) -> Item:
        made: dict[int, Item] = self.__dict__.setdefault("made", {})
        if index % 2 not in made:
            made[index % 2] = super().prepare(index % 2)
        return made[index % 2]


def planned(project: Project, keys: Mapping[str, object]) -> Plan:
    registry = load_plugins({})
    config = project.config(max_train_steps=STEPS, checkpoint_step_interval=0, dataloader_prefetch=0, **keys)
    return make_plan(registry, resolve(registry.option_types, config_file=config), CPU)


def assembled(plan: Plan) -> Assembly:
    """As `assemble` does it, around the small model."""
    family = SmallFamily(plan.family.options, plan.context)  # type: ignore[attr-defined]
    placement = plan.memory.open("transformer", DEPTH, CPU)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = MixingModel(DEPTH, 16, 128)
    for index, block in enumerate(net.blocks):
        placement.received(index, block)
    add_adapters(net, [f"blocks.{index}.to_v" for index in range(DEPTH)], AdapterSettings(lora_rank=2), 0)
    blocks = family.block_set(net)
    session = placement.attach(blocks)
    runner = BlockRunner(blocks, family.call_block, checkpointing=Checkpointing.every(DEPTH), session=session)
    training = TrainingModel(family, net, runner, [FlowMatchingLoss(name) for name in plan.streams])
    masters = MasterWeights({name: p for name, p in net.named_parameters() if p.requires_grad}, low_precision=False)
    optimizer = AdamW(masters.optimized(), 1e-4, AdamOptions())
    schedule = make_schedule(optimizer, plan.settings.get(OptimizerSettings), STEPS)
    noise = NoiseSampler(plan.settings.get(TrainSettings), plan.family.token_shift, 0)
    return Assembly(training, PlainExecution(training, masters), masters, optimizer, schedule, noise, (), session, CPU)


def alive() -> tuple[Counter[tuple[int, ...]], int, int]:
    """Tensors by shape, threads, open files."""
    gc.collect()
    shapes = Counter(tuple(found.shape) for found in gc.get_objects() if issubclass(type(found), Tensor))
    return shapes, threading.active_count(), len(list(Path("/dev/fd").iterdir()))


def trained(plan: Plan, dataset: TrainingSet) -> tuple[list[object], list[float]]:
    """What is alive, and how many loads there were, after each of the steps `WATCHED`. Nothing of it is left when it returns."""
    assembly = assembled(plan)
    counted: list[object] = []
    loads: list[float] = []

    def watch(step: int, row: Mapping[str, float]) -> None:
        if step in WATCHED:
            counted.append(alive())
            loads.append(assembly.session.stats()["loads"])

    with StopRequests(lambda text: None) as stops:
        assert ShortLoop(plan, assembly, dataset, watch, lambda step: None, stops).run() == STEPS
    assembly.detach()
    return counted, loads


@pytest.mark.parametrize("name", STRATEGIES)
def test_two_hundred_steps_leave_nothing_behind(name: str, project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(project.folder)
    monkeypatch.setattr(RamTorch, "smallest", 0)
    plan = planned(project, STRATEGIES[name])
    summary = encode_dataset(plan, Silence())
    train = plan.settings.get(TrainSettings)
    dataset = TrainingSet(summary.manifest, plan.encoders, train.train_batch_size, train.seed, 0.0)
    _, *outside = alive()
    counted, loads = trained(replace(plan, manifest=summary.manifest), dataset)
    assert len(counted) == len(WATCHED) and all(found == counted[0] for found in counted)
    assert loads[1] - loads[0] == loads[2] - loads[1] > 0
    _, *afterwards = alive()
    assert afterwards == outside and not list(Path("disk").glob("*/*"))
