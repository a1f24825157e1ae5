"""Sampling outside a training run."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from tuner.config.resolve import Settings
from tuner.config.settings import AdapterSettings, ValidationSettings
from tuner.errors import ConfigError
from tuner.model.adapters import add_adapters, load_adapter_state
from tuner.model.runner import BlockRunner
from tuner.plugins.registry import Registry
from tuner.train.export import check_adapter, read_adapter
from tuner.train.plan import plan_model
from tuner.train.validate import default_device, planned_request, write_sample


def sample(
    registry: Registry, settings: Settings, prompt: str, target: Path, lora: Path | None, strength: float, no_sound: bool
) -> Path:
    """Generates one clip and writes it to `target`."""
    device = default_device()
    plan = plan_model(registry, settings, device)
    family = plan.family
    streams = tuple(name for name in family.stream_names if not (no_sound and name != "video"))
    validation = settings.get(ValidationSettings)
    if not (prompt or validation.validation_prompt):
        raise ConfigError("nothing to generate", where="--prompt", remedy='add --prompt "..."')
    request = planned_request(family, settings, sound=not no_sound)
    request = replace(request, prompt=prompt or request.prompt)
    model = family.load(plan.source, streams, plan.context.dtype, device)
    model.requires_grad_(False)
    if lora is not None and strength > 0:
        adapter = read_adapter(registry, lora)
        check_adapter(adapter, plan.source.headers("transformer"), str(lora))
        adapter = replace(adapter, alpha=adapter.alpha * strength)
        add_adapters(model, tuple(adapter.weights), AdapterSettings(lora_rank=adapter.rank, lora_alpha=adapter.alpha), 0)
        load_adapter_state(model, adapter)
    model.eval()
    runner = BlockRunner(family.block_set(model), family.call_block)
    generated = family.sample(model, plan.source, [request], runner, streams)[0]
    return write_sample(generated, target)
