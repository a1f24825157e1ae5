"""Adapters from one layout to another, checked against the model they belong to."""

from __future__ import annotations

from pathlib import Path

import torch

from tuner.config.resolve import Settings
from tuner.config.settings import ModelSettings
from tuner.errors import ConfigError
from tuner.plugins.registry import Registry
from tuner.train.planning import plan_model
from tuner.train.saving.adapter_files import check_adapter, find_adapter, formats, read_adapter


def export(registry: Registry, settings: Settings, source: Path, target: Path | None, layout: str) -> Path:
    """Writes the adapter found at `source` to `target`, a file or an existing folder; returns the file's path.

    Raises `ConfigError`, `CheckpointError` where it does not fit the model, `DiskError`.
    """
    adapter = read_adapter(registry, source)
    known = formats(registry)
    family = settings.get(ModelSettings).model_family
    wanted = layout or next((name for name, f in known.items() if not family or not f.families or family in f.families), "")
    if wanted not in known:
        raise ConfigError("no such layout", where="--layout", value=wanted, remedy=f"one of: {', '.join(known)}")
    facts: dict[str, str] = {}
    if family:
        model = plan_model(registry, settings, torch.device("cpu"))
        check_adapter(adapter, model.source.headers("transformer"), str(source))
        facts = {"base_model": model.source.description, "family": family}
    base = target or (source.parent if source.is_file() else source)
    path = base / f"lora-{wanted}.safetensors" if base.is_dir() else base
    if path.exists() and path.samefile(find_adapter(source)):
        raise ConfigError("the target is the source", where="--output", value=str(path))
    known[wanted].write(path, adapter, facts)
    return path
