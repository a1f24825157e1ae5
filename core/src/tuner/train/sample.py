"""Sampling outside a training run."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from torch import nn

from tuner.config.resolve import Settings
from tuner.config.settings import AdapterSettings, ValidationSettings
from tuner.errors import ConfigError
from tuner.interfaces.family import Generated, SampleRequest
from tuner.interfaces.memory import Placement
from tuner.model.adapters import adapted_layers, add_adapters, load_adapter_state
from tuner.model.runner import BlockRunner
from tuner.plugins.registry import Registry
from tuner.train.export import check_adapter, read_adapter
from tuner.train.plan import ModelPlan, plan_model
from tuner.train.results import load_full
from tuner.train.validate import adjustments, check_target, default_device, planned_request, write_sample

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Trained:
    """What training left, to be put over the base model."""

    weights: Path | None = None
    """Full weights: the file that full fine-tuning writes, or its run folder."""
    lora: Path | None = None
    """An adapter file, or the run or checkpoint folder that holds one."""
    strength: float = 1.0
    """Scale of the adapter; 0 leaves it out."""


def sample(registry: Registry, settings: Settings, prompt: str, target: Path, trained: Trained, no_sound: bool) -> Path:
    """Generates one clip and writes it to `target`. Raises `ConfigError` where that is no place for one, before anything is loaded."""
    check_target(target)
    return write_sample(generate(registry, settings, prompt, trained, no_sound), target)


def generate(registry: Registry, settings: Settings, prompt: str, trained: Trained, no_sound: bool = False) -> Generated:
    """One clip of what the validation keys describe. Raises `ConfigError`, `CheckpointError`."""
    plan = plan_model(registry, settings, default_device())
    if trained.weights is not None and "transformer" in plan.memory.quantizers:
        raise ConfigError(
            "full weights are not put over a quantized model", where="base_model_precision", value=plan.memory.precision("transformer"),
            remedy="set it to no_change",
        )  # fmt: skip
    family = plan.family
    family.check_sampling(plan.source)
    streams = tuple(name for name in family.stream_names if not (no_sound and name != "video"))
    request = _request(plan, prompt, sound=not no_sound)
    device = plan.context.device
    placement = plan.memory.open("transformer", family.inspect(plan.source, streams).blocks, device)
    try:
        model = _trained_model(plan, streams, trained, placement)
        blocks = family.block_set(model)
        runner = BlockRunner(blocks, family.call_block, session=placement.attach(blocks))
        return family.sample(model, plan.source, [request], runner, streams)[0]
    finally:
        placement.close()


def _request(plan: ModelPlan, prompt: str, *, sound: bool) -> SampleRequest:
    validation = plan.settings.get(ValidationSettings)
    if not (prompt or validation.validation_prompt):
        raise ConfigError("nothing to generate", where="--prompt", remedy='add --prompt "..."')
    for notice in adjustments(plan.family, plan.settings):
        log.info(notice)
    request = planned_request(plan.family, plan.settings, sound=sound)
    return replace(request, prompt=prompt or request.prompt)


def _trained_model(plan: ModelPlan, streams: Sequence[str], trained: Trained, placement: Placement) -> nn.Module:
    """The base model with `trained` over it, in evaluation mode. An adapter is checked before the model is loaded."""
    headers = plan.source.headers("transformer")
    adapter = None
    if trained.lora is not None and trained.strength > 0:
        adapter = read_adapter(plan.registry, trained.lora)
        check_adapter(adapter, headers, str(trained.lora))
    model = plan.family.load(plan.source, streams, plan.context.dtype, plan.context.device, placement)
    model.requires_grad_(False)
    if trained.weights is not None:
        load_full(plan.family, model, headers, trained.weights)
    if adapter is not None:
        loaded = {name for name, _ in model.named_modules()}  # without sound its layers are not there
        weights = {name: pair for name, pair in adapter.weights.items() if name in loaded}
        adapter = replace(adapter, alpha=adapter.alpha * trained.strength, weights=weights)
    if adapter is not None and adapter.weights:
        add_adapters(model, tuple(adapter.weights), AdapterSettings(lora_rank=adapter.rank, lora_alpha=adapter.alpha), 0)
        load_adapter_state(model, adapter)
        for layer in adapted_layers(model).values():  # of layers that live in host memory they were made there
            for matrices in (layer.lora_A, layer.lora_B):
                matrices.to(plan.context.device)
    return model.eval()
