"""Builds what trains, in an order that is an invariant: load, adapters, memory strategy, regularizers, runner, optimizer.

Adapters go in before the memory strategy, so that it sees which weights are frozen; regularizers after it, so that they tap
blocks as they will run; the optimizer last, because only then every trainable parameter exists.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from tuner.builtins.losses import FlowMatchingLoss
from tuner.config.rollout_settings import RolloutSettings
from tuner.config.settings import AdapterSettings, ModelSettings, OptimizerSettings, TrainSettings
from tuner.data.randomness import derived_seed
from tuner.errors import ConfigError
from tuner.interfaces.blocks import BlockSet
from tuner.interfaces.losses import LossTerm, Regularizer
from tuner.interfaces.memory import MemorySession
from tuner.model.adapters import add_adapters, resolve_targets
from tuner.model.runner import BlockRunner, Checkpointing
from tuner.train import reflexflow
from tuner.train.execute import Execution, GraphExecution, PlainExecution, reasons_against_graphs
from tuner.train.masters import MasterWeights
from tuner.train.noise import NoiseSampler
from tuner.train.passes import ExtraPasses
from tuner.train.plan import Plan
from tuner.train.rollout import NoiseTransform, Rollout
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

    def detach(self) -> None:
        """In reverse order of `assemble`."""
        for regularizer in reversed(self.regularizers):
            regularizer.detach()
        self.session.detach()


def assemble(plan: Plan, device: torch.device) -> Assembly:
    """Loads the model and builds everything around it."""
    family = plan.family
    placement = plan.memory.open("transformer", plan.facts.blocks, device)
    model = family.load(plan.source, plan.streams, plan.context.dtype, device, placement)
    trained = add_trainable(plan, model, device)
    blocks = family.block_set(model)
    session = placement.attach(blocks)
    regularizers = _attach_regularizers(plan, blocks)
    runner = BlockRunner(
        blocks,
        family.call_block,
        checkpointing=checkpointing(plan.settings.get(ModelSettings), len(blocks)),
        session=session,
        transforms=[t for r in regularizers for t in r.transforms()],
        taps=[t for r in regularizers for t in r.taps()],
    )
    terms = [*stream_losses(plan), *plan.loss_terms, *(t for r in regularizers for t in r.loss_terms())]
    own = dict(trained)
    for regularizer in regularizers:
        if (module := regularizer.trainable()) is not None:
            trained += _named(module.to(device), regularizer.name)
    assembly = _with_optimizer(plan, TrainingModel(family, model, runner, terms, regularizers), trained, regularizers, session, device)
    for regularizer in regularizers:
        regularizer.connect(ExtraPasses(assembly.training, assembly.masters, own))
    return assembly


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
    execution = _execution(plan, training, masters, regularizers, device)
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


def checkpointing(settings: ModelSettings, blocks: int) -> Checkpointing:
    """The policy that `gradient_checkpointing` and its interval ask for."""
    return Checkpointing.every(blocks, settings.gradient_checkpointing_interval) if settings.gradient_checkpointing else Checkpointing()


def stream_losses(plan: Plan) -> Sequence[LossTerm]:
    """The flow-matching loss of each stream that is learned."""
    weights = plan.family.stream_weights()
    rollout = plan.settings.get(RolloutSettings)
    if rollout.enabled() and rollout.scheduled_sampling_reflexflow:
        return reflexflow.stream_losses(plan.family.learned_streams(plan.streams), weights, rollout)
    return [FlowMatchingLoss(stream, weights.get(stream, 1.0)) for stream in plan.family.learned_streams(plan.streams)]


def _attach_regularizers(plan: Plan, blocks: BlockSet) -> tuple[Regularizer, ...]:
    for regularizer in plan.regularizers:
        torch.manual_seed(derived_seed(plan.context.seed, f"attach/{regularizer.name}"))
        regularizer.attach(blocks, plan.context)
    return plan.regularizers
