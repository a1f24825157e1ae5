"""What a run will do: the record that `tuner.train.planning` makes before anything is loaded, and what follows from it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from tuner.config.datasets import DatasetEntry
from tuner.config.problems import listed
from tuner.config.resolve import Settings
from tuner.config.settings import ModelSettings, OptimizerSettings, TrainSettings
from tuner.data.manifest import Manifest
from tuner.errors import ConfigError, TunerError
from tuner.interfaces.encoders import LatentEncoder
from tuner.interfaces.family import BuildContext, ModelFacts, ModelFamily
from tuner.interfaces.losses import LossTerm, Regularizer
from tuner.interfaces.memory import MemoryFacts
from tuner.interfaces.services import WeightSource
from tuner.model.host import free_host_memory
from tuner.model.placing import RunMemory
from tuner.train.forecast.row import Predicted
from tuner.train.forecast.sizes import linear_bytes, transformer_facts
from tuner.train.samples.wanted import NO_VALIDATION, ValidationPlan

if TYPE_CHECKING:
    from tuner.plugins.registry import Registry

NO_CHANGE = "no_change"
"""The precision that leaves weights as they are."""


class PlanProblems(ConfigError):
    """Everything that speaks against a run, at once."""

    def __init__(self, problems: Sequence[TunerError]) -> None:
        super().__init__(str(problems[0]) if len(problems) == 1 else f"{len(problems)} problems with this run:\n{listed(problems)}")
        self.problems = tuple(problems)
        self.exit_code = problems[0].exit_code


@dataclass(frozen=True)
class ModelPlan:
    """The model's side: enough to load it, encode with it or sample from it."""

    registry: Registry
    settings: Settings
    family: ModelFamily
    family_name: str
    source: WeightSource
    context: BuildContext
    memory: RunMemory
    """Opens every part that is loaded: where its weights live, and in which precision."""
    downloads: tuple[str, ...] = field(default=(), kw_only=True)
    """What has to be downloaded before the run, in words; only of a plan that is looked at."""


@dataclass(frozen=True)
class Plan(ModelPlan):
    """A training run."""

    streams: tuple[str, ...]
    facts: ModelFacts
    entries: tuple[DatasetEntry, ...]
    manifest: Manifest
    encoders: tuple[LatentEncoder, ...]
    extras: tuple[str, ...]
    """Of the encoders, those that do not belong to the family: their records come as `Batch.extras`."""
    regularizers: tuple[Regularizer, ...]
    loss_terms: tuple[LossTerm, ...]
    batches_per_epoch: int
    total_steps: int
    notices: tuple[str, ...]
    world: int = 1
    """How many processes train together; each takes batches of its own."""
    validation: ValidationPlan = NO_VALIDATION
    """What is made and measured of the model while it trains."""
    predicted: Predicted | None = None
    """What it will take of its device; None: that has no memory of its own, or cannot be told."""


def memory_facts(plan: Plan, part: str = "transformer") -> MemoryFacts:
    """What a memory strategy decides on."""
    model = plan.settings.get(ModelSettings)
    if part != "transformer":  # its blocks are not known before it is opened, and it runs without gradients
        return MemoryFacts((), False, model.text_encoder_1_precision, "none", plan.world, part, host_bytes=free_host_memory())
    recomputed = "none" if not model.gradient_checkpointing else "some" if model.gradient_checkpointing == "auto" else "all"
    recomputed = "some" if recomputed == "all" and model.gradient_checkpointing_interval > 1 else recomputed
    return transformer_facts(
        plan.facts, plan.memory.quantizers.get("transformer"), plan.context.dtype, precision=model.base_model_precision,
        full_finetuning=model.model_type == "full", checkpointing=recomputed, world=plan.world,
    )  # fmt: skip


def weight_bytes(plan: Plan) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Of the weights of the linear layers of one block: as they are computed with, and as they will lie in memory."""
    quantizer, dtype = plan.memory.quantizers.get("transformer"), plan.context.dtype
    return linear_bytes(plan.facts, None, dtype), linear_bytes(plan.facts, quantizer, dtype)


def quantized_bytes(plan: Plan) -> int:
    """Of the transformer as it will lie in memory."""
    before, after = weight_bytes(plan)
    return plan.facts.bytes - plan.facts.blocks * (sum(before) - sum(after))


def total_steps(settings: Settings, batches_per_epoch: int, world: int = 1) -> int:
    """Optimizer steps of the run: `max_train_steps`, or what `num_train_epochs` makes."""
    train = settings.get(TrainSettings)
    if train.max_train_steps:
        return train.max_train_steps
    if not train.num_train_epochs:
        raise ConfigError("the length of the run is not given", where="max_train_steps", remedy="set max_train_steps or num_train_epochs")
    batches_per_step = settings.get(OptimizerSettings).gradient_accumulation_steps * world
    return math.ceil(train.num_train_epochs * batches_per_epoch / batches_per_step)


def with_manifest(plan: Plan, manifest: Manifest) -> Plan:
    """The plan over what is left of the dataset after caching."""
    batches = manifest.batches_per_epoch(plan.settings.get(TrainSettings).train_batch_size)
    steps = total_steps(plan.settings, batches, plan.world)
    return replace(plan, manifest=manifest, batches_per_epoch=batches, total_steps=steps, validation=plan.validation.within(manifest))
