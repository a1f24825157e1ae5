"""What a finished run leaves for other programs: adapter files in every layout that fits the family, or the full weights."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import save_file

from tuner.config.settings import AdapterSettings, ModelSettings
from tuner.interfaces.services import AdapterState, CheckpointFormat
from tuner.model.adapters import adapter_state
from tuner.train.assemble import Assembly
from tuner.train.plan import Plan

FILE_NAMES = {"peft": "pytorch_lora_weights.safetensors"}
"""The name diffusers looks for; other layouts are `lora.<layout>.safetensors`... see `file_name`."""


def file_name(layout: str) -> str:
    """Of an adapter file in `layout`."""
    return FILE_NAMES.get(layout, "lora.safetensors")


def write_results(plan: Plan, assembly: Assembly, folder: Path) -> tuple[Path, ...]:
    """Writes the trained weights for use elsewhere; the most widely readable file comes first."""
    if plan.settings.get(ModelSettings).model_type == "full":
        return (write_full(plan, assembly, folder / "transformer.safetensors"),)
    return write_adapter_files(plan, assembly, folder)


def write_adapter_files(plan: Plan, assembly: Assembly, folder: Path, formats: Sequence[str] | None = None) -> tuple[Path, ...]:
    """Writes the adapter in `formats` (default: all that fit the family, the family's own first)."""
    if plan.settings.get(ModelSettings).model_type == "full":
        return ()
    adapter = trained_adapter(plan, assembly)
    found = []
    for component in plan.registry.components("checkpoint_format"):
        layout: CheckpointFormat = component.load()()  # type: ignore[operator]
        fits = not layout.families or plan.family_name in layout.families
        if fits and (formats is None or component.name in formats):
            found.append((not layout.families, component.name, layout))
    written = []
    for _, name, layout in sorted(found, key=lambda entry: entry[:2]):
        path = folder / file_name(name)
        layout.write(path, adapter, adapter_facts(plan))
        written.append(path)
    return tuple(written)


def trained_adapter(plan: Plan, assembly: Assembly) -> AdapterState:
    """The adapter with the masters' precision."""
    settings = plan.settings.get(AdapterSettings)
    return adapter_state(assembly.training.model, settings.lora_rank, settings.lora_alpha or float(settings.lora_rank))


def adapter_facts(plan: Plan) -> dict[str, str]:
    """Metadata of the file: base model and variant; never captions or paths."""
    return {"base_model": plan.source.description, "family": plan.family_name, "variant": plan.facts.variant.name}


def write_full(plan: Plan, assembly: Assembly, path: Path) -> Path:
    """All trained weights under the published checkpoint's names, in the run's dtype, with the checkpoint's own metadata."""
    assembly.session.materialize()
    dtype = plan.context.dtype
    weights = {
        plan.family.original_name(name): parameter.detach().to("cpu", dtype).contiguous()
        for name, parameter in assembly.training.model.state_dict().items()
        if isinstance(parameter, torch.Tensor)
    }
    temporary = path.with_suffix(".tmp")
    save_file(weights, temporary, metadata=adapter_facts(plan))
    temporary.replace(path)
    return path
