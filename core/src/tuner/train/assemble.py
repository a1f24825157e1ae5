"""Builds what trains, in an order that is an invariant: load, adapters, memory strategy, regularizers, runner, optimizer.

Adapters go in before the memory strategy, so that it sees which weights are frozen; regularizers after it, so that they tap
blocks as they will run; the optimizer last, because only then every trainable parameter exists.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import nn

from tuner.builtins.losses import FlowMatchingLoss
from tuner.config.rollout_settings import RolloutSettings
from tuner.config.settings import AdapterSettings, DataSettings, ModelSettings, OptimizerSettings, TrainSettings
from tuner.data.randomness import derived_seed
from tuner.errors import ConfigError, PluginError
from tuner.interfaces.blocks import BlockSet
from tuner.interfaces.losses import LossTerm, Regularizer, Tap, Transform
from tuner.interfaces.memory import MemorySession
from tuner.model.adapters import add_adapters, resolve_targets
from tuner.model.compiled import CompiledBlocks
from tuner.model.runner import BlockRunner
from tuner.plugins.guard import listed
from tuner.train import reflexflow
from tuner.train.accumulation import batches_together
from tuner.train.activations import budgeted, policy
from tuner.train.execute import Execution, GraphExecution, PlainExecution, reasons_against_graphs
from tuner.train.masters import MasterWeights
from tuner.train.noise import NoiseSampler
from tuner.train.passes import ExtraPasses
from tuner.train.phases import Phases
from tuner.train.plan import Plan
from tuner.train.rollout import NoiseTransform, Rollout
from tuner.train.rules import repeated, two_of_one_name
from tuner.train.schedule import make_schedule
from tuner.train.step import TrainingModel


@dataclass
class Assembly:
    """All objects of a run; built once."""

    training: TrainingModel
    execution: Execution
    masters: MasterWeights
    optimizer: torch.optim.Optimizer
    schedule: torch.optim.lr_scheduler.LRScheduler
    noise: NoiseSampler
    regularizers: tuple[Regularizer, ...]
    session: MemorySession
    device: torch.device
    noise_transforms: tuple[NoiseTransform, ...] = ()
    """What changes a batch's draws before the forward pass."""
    together: int = 1
    """How many batches of an optimizer step go through the blocks together."""

    def detach(self) -> None:
        """In reverse order of `assemble`."""
        for regularizer in reversed(self.regularizers):
            regularizer.detach()
        self.session.detach()


def assemble(plan: Plan, device: torch.device, phases: Phases | None = None) -> Assembly:
    """Loads the model and builds everything around it. `phases` is told when each part is done."""
    phases = phases or Phases()
    family = plan.family
    placement = plan.memory.open("transformer", plan.facts.blocks, device)
    model = family.load(plan.source, plan.streams, plan.context.dtype, device, placement)
    phases.done("load")
    trained = add_trainable(plan, model, device)
    phases.done("adapters")
    blocks = family.block_set(model)
    session = placement.attach(blocks)
    regularizers = _attach_regularizers(plan, blocks)
    for regularizer in regularizers:
        _check_places(regularizer, len(blocks), family.stream_names)
    runner = BlockRunner(
        blocks,
        family.call_block,
        checkpointing=policy(plan, len(blocks)),
        session=session,
        transforms=[t for r in regularizers for t in r.transforms()],
        taps=[t for r in regularizers for t in r.taps()],
        train_block=compiled(plan),
    )
    runner.lanes = plan.settings.get(ModelSettings).cuda_graph_lanes > 1
    phases.done("attach")
    terms = [*stream_losses(plan), *plan.loss_terms, *(t for r in regularizers for t in r.loss_terms())]
    for name in repeated([term.name for term in terms]):
        raise two_of_one_name("loss term", name)
    own = dict(trained)
    for regularizer in regularizers:
        if (module := regularizer.trainable()) is not None:
            trained += _named(module.to(device), regularizer.name)
    assembly = _with_optimizer(plan, TrainingModel(family, model, runner, terms, regularizers), trained, regularizers, session, device)
    assembly.together = together(plan, runner, own)
    runner.sink = assembly.masters
    for regularizer in regularizers:
        regularizer.connect(ExtraPasses(assembly.training, assembly.masters, own))
    phases.done("optimizer")
    return assembly


def compiled(plan: Plan) -> CompiledBlocks | None:
    """What `dynamo_mode` asks for; None: nothing."""
    mode = plan.settings.get(ModelSettings).dynamo_mode
    if mode in ("", "no", "off"):
        return None
    # Graphs that are compiled once are found again by the next run.
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(Path(plan.settings.get(DataSettings).cache_dir).resolve() / "compiled"))
    return CompiledBlocks(plan.family.call_block, mode)


def _with_optimizer(
    plan: Plan,
    training: TrainingModel,
    trained: list[tuple[str, nn.Parameter]],
    regularizers: tuple[Regularizer, ...],
    session: MemorySession,
    device: torch.device,
) -> Assembly:
    settings = plan.settings.get(OptimizerSettings)
    component = plan.registry.component("optimizer", settings.optimizer)
    factory = component.load()
    masters = MasterWeights(dict(trained), low_precision=bool(getattr(factory, "wants_low_precision", False)))
    optimizer = factory(masters.optimized(), settings.learning_rate, plan.settings.get(component.options))  # type: ignore[operator]
    schedule = make_schedule(optimizer, settings, plan.total_steps)
    train = plan.settings.get(TrainSettings)
    noise = NoiseSampler(train, plan.family.token_shift, train.seed)
    execution = budgeted(plan, _execution(plan, training, masters, regularizers, device), training.blocks, device)
    rollout = plan.settings.get(RolloutSettings)
    transforms = (Rollout(rollout, training, plan.family.token_shift, train.seed),) if rollout.enabled() else ()
    return Assembly(training, execution, masters, optimizer, schedule, noise, regularizers, session, device, transforms)


def _execution(
    plan: Plan, training: TrainingModel, masters: MasterWeights, regularizers: Sequence[Regularizer], device: torch.device
) -> Execution:
    """Raises `ConfigError` where `cuda_graphs` is asked for and the step cannot be replayed."""
    wanted = plan.settings.get(ModelSettings).cuda_graphs
    if wanted == "off":
        return PlainExecution(training, masters)
    against = reasons_against_graphs(training.blocks, device, regularizers, len(plan.loss_terms))
    if plan.settings.get(RolloutSettings).enabled() and type(training.blocks.session) is not MemorySession:
        against.append("the forward passes of scheduled sampling leave other weights on the device than a step does")
    if against and wanted == "on":
        raise ConfigError(f"no CUDA graph of the step is possible: {'; '.join(against)}", where="cuda_graphs", remedy="set it to auto")
    return PlainExecution(training, masters) if against else GraphExecution(training, masters, required=wanted == "on")


def together(plan: Plan, runner: BlockRunner, trained: Mapping[str, nn.Parameter]) -> int:
    """How many batches of an optimizer step go through the blocks together."""
    inside = {id(parameter) for block in runner.blocks.blocks for parameter in block.parameters()}
    return batches_together(
        plan.settings.get(OptimizerSettings), streamed=type(runner.session) is not MemorySession,
        outside=any(id(parameter) not in inside for parameter in trained.values()), regularized=bool(plan.regularizers),
    )  # fmt: skip


def add_trainable(plan: Plan, model: nn.Module, device: torch.device) -> list[tuple[str, nn.Parameter]]:
    """Adds LoRA, or frees every weight for full fine-tuning; returns the trained parameters, on `device`, with stable names."""
    if plan.settings.get(ModelSettings).model_type == "full":
        model.requires_grad_(True)
    else:
        settings = plan.settings.get(AdapterSettings)
        defaults = plan.family.adapter_targets(model, plan.streams)
        targets = resolve_targets(model, settings.peft_lora_target_modules, defaults)
        add_adapters(model, targets, settings, plan.settings.get(TrainSettings).seed)
    model.train()
    trained = _named(model)
    for _, parameter in trained:  # adapters of layers that live in host memory were made there
        parameter.data = parameter.data.to(device)
    return trained


def _named(module: nn.Module, prefix: str = "") -> list[tuple[str, nn.Parameter]]:
    lead = f"{prefix}." if prefix else ""
    return [(lead + name, p) for name, p in module.named_parameters() if p.requires_grad]


def stream_losses(plan: Plan) -> Sequence[LossTerm]:
    """The flow-matching loss of each stream that is learned."""
    weights = plan.family.stream_weights()
    rollout = plan.settings.get(RolloutSettings)
    if rollout.enabled() and rollout.scheduled_sampling_reflexflow:
        return reflexflow.stream_losses(plan.family.learned_streams(plan.streams), weights, rollout)
    return [FlowMatchingLoss(stream, weights.get(stream, 1.0)) for stream in plan.family.learned_streams(plan.streams)]


def _check_places(regularizer: Regularizer, blocks: int, streams: Sequence[str]) -> None:
    """Raises `PluginError` for a transform or tap at a place that is none."""
    who = f"regularizer {regularizer.name}"
    transforms, taps = listed(who, "transforms", regularizer.transforms, Transform), listed(who, "taps", regularizer.taps, Tap)
    listed(who, "loss_terms", regularizer.loss_terms, LossTerm)
    for place in (*transforms, *taps):
        if not 0 <= place.block < blocks:
            raise PluginError(f"block {place.block} is outside 0..{blocks - 1}", where=who, value=type(place).__name__)
    for transform in transforms:
        if transform.when not in ("before", "after"):
            raise PluginError("a transform is called before or after a block", where=who, value=transform.when)
    for tap in taps:
        if tap.stream not in streams:
            raise PluginError(f"there are the streams {', '.join(streams)}", where=who, value=f"tap of {tap.stream}")


def _attach_regularizers(plan: Plan, blocks: BlockSet) -> tuple[Regularizer, ...]:
    context = replace(plan.context, total_steps=plan.total_steps)
    for regularizer in plan.regularizers:
        torch.manual_seed(derived_seed(plan.context.seed, f"attach/{regularizer.name}"))
        regularizer.attach(blocks, context)
    return plan.regularizers
