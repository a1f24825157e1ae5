"""What a training checkpoint holds, and when going on from one is exact.

Weights, optimizer, schedule and regularizer state are stored; data order, noise and dropout are functions of the step number
and need no state. Facts that decide the numbers are stored too and must be equal, else the resume is refused with the differences.
"""

from __future__ import annotations

import importlib.metadata
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from tuner.config.options import Options
from tuner.config.settings import CORE_OPTIONS, ModelSettings, OptimizerSettings, RunSettings
from tuner.errors import CheckpointError, ConfigError, PluginError
from tuner.plugins.record import BUILTINS, KINDS, Kind
from tuner.train.assemble import Assembly
from tuner.train.plan import Plan
from tuner.train.saving.checkpoint import (
    LoadedCheckpoint,
    find_checkpoint,
    flatten_state,
    load_checkpoint,
    read_facts,
    read_step,
    require_exact,
    restore_state,
    save_checkpoint,
)
from tuner.train.saving.results import write_adapter_files

HARMLESS = frozenset({
    "output_dir", "cache_dir", "data", "data_backend_config", "strict", "dataloader_prefetch", "vae_batch_size",
    "gradient_checkpointing", "gradient_checkpointing_interval", "cuda_graphs", "cuda_graph_lanes", "checkpoint_step_interval",
    "checkpoints_total_limit", "resume_from_checkpoint", "report_to", "log_interval", "tracker_project_name", "tracker_run_name",
    "num_train_epochs", "pretrained_model_name_or_path", "revision", "text_encoder_path",
})  # fmt: skip
"""Core keys that do not change the numbers of a step, or whose effect is covered by the digests of dataset and model."""
COMPUTING: tuple[Kind, ...] = ("family", "latent_encoder", "loss_term", "regularizer", "memory_strategy", "quantizer", "optimizer")
"""What takes part in a step."""
OPEN_ENDED = frozenset({"constant", "constant_with_warmup"})
"""Schedules that do not depend on the length of the run: such a run may be made longer."""


class TrainingCheckpoints:
    """Saves and restores an `Assembly`."""

    def __init__(self, plan: Plan, folder: Path, world: int = 1) -> None:
        self.plan = plan
        self.folder = folder
        self.last: Path | None = None
        self._exact = exact_facts(plan, world)
        self._found: Path | None = None

    def check(self) -> None:
        """Decides what to go on from, before time is spent on anything: verified, and compared in all but the dataset.

        Raises `ConfigError` where a fresh run would mix with an old one, `CheckpointError` where an exact resume is impossible.
        """
        wanted = self.plan.settings.get(RunSettings).resume_from_checkpoint
        self._found = find_checkpoint(self.folder, wanted or "latest")
        if self._found is None:
            self._require_empty()
            return
        if not wanted:
            raise ConfigError(
                f"the folder already holds {self._found.name} of an earlier run", where=f"output_dir {self.folder}",
                remedy="add --resume_from_checkpoint latest to go on, or choose another output_dir",
            )  # fmt: skip
        self._require_within(read_step(self._found))
        require_exact(self._saved(), self._exact, frozenset({"dataset"}), where=str(self._found))

    def _require_empty(self) -> None:
        """What an earlier run has left for other programs is not written over, whether its checkpoints are kept or not."""
        if left := sorted(self.folder.glob("*.safetensors")):
            raise ConfigError(
                f"the folder already holds {left[0].name} of an earlier run, whose checkpoints are gone", where=f"output_dir {self.folder}",
                remedy="choose another output_dir, or move that file away",
            )  # fmt: skip

    def _require_within(self, step: int) -> None:
        if step > self.plan.total_steps:
            raise ConfigError(
                f"the checkpoint is at step {step}, beyond the planned {self.plan.total_steps}", where="max_train_steps",
                remedy="raise max_train_steps",
            )  # fmt: skip

    def load(self, dataset: str) -> LoadedCheckpoint | None:
        """The checkpoint that `check` decided on; None: there is none. `dataset`: identity of what is trained on, clips and captions.

        Raises `CheckpointError` where that is not what the checkpoint was trained on.
        """
        self._exact["dataset"] = dataset
        if self._found is None:
            return None
        if self._saved().get("dataset") != dataset:
            raise CheckpointError(
                "the run cannot be continued exactly: clips, captions or their sizes are not those that the checkpoint was trained on",
                where=str(self._found), remedy="restore the dataset as it was, or start anew in another output_dir",
            )  # fmt: skip
        self.last = self._found
        return load_checkpoint(self._found)

    def _saved(self) -> Mapping[str, object]:
        exact = read_facts(self._found).get("exact") if self._found else None
        return exact if isinstance(exact, Mapping) else {}

    def restore(self, loaded: LoadedCheckpoint, assembly: Assembly) -> int:
        """Brings everything to the state after step `loaded.step`; returns that number."""
        assembly.masters.load_state(loaded.parts["weights"])
        optimizer = restore_state(loaded.parts.get("optimizer", {}), loaded.facts["optimizer"])
        assembly.optimizer.load_state_dict(optimizer)
        assembly.schedule.load_state_dict(restore_state(loaded.parts.get("schedule", {}), loaded.facts["schedule"]))
        for regularizer in assembly.regularizers:
            regularizer.load_state_dict(loaded.parts.get(f"regularizer-{regularizer.name}", {}))
        self._require_within(loaded.step)  # clips that failed may have made the run shorter
        return loaded.step

    def save(self, step: int, assembly: Assembly) -> Path:
        """Commits `checkpoint-<step>`. Raises `DiskError`; older checkpoints stay."""
        optimizer, optimizer_facts = flatten_state(assembly.optimizer.state_dict())
        schedule, schedule_facts = flatten_state(assembly.schedule.state_dict())
        parts: dict[str, Mapping[str, Tensor]] = {"weights": assembly.masters.state(), "optimizer": optimizer, "schedule": schedule}
        for regularizer in assembly.regularizers:
            parts[f"regularizer-{regularizer.name}"] = regularizer.state_dict()
        facts = {"optimizer": optimizer_facts, "schedule": schedule_facts, "exact": self._exact}
        run = self.plan.settings.get(RunSettings)

        def extra(folder: Path) -> None:
            write_adapter_files(self.plan, assembly, folder, formats=("peft",))

        self.last = save_checkpoint(
            self.folder, step, {k: v for k, v in parts.items() if v}, facts, keep=run.checkpoints_total_limit, extra=extra
        )
        return self.last


def exact_facts(plan: Plan, world: int) -> dict[str, object]:
    """Everything that decides the numbers of a step, but for the dataset, which is known after caching."""
    settings = plan.settings
    unused = set(plan.registry.option_types) - taking_part(plan)
    placing = {key for options in plan.registry.option_types if not options.changes_numbers for key in options.model_fields}
    placing |= {key for options in unused for key in options.model_fields}
    values = {key: entry["value"] for key, entry in settings.resolved().items() if decides(key) and key not in placing}
    follows = any(settings.get(options).follows_length() for options in plan.registry.option_types)
    if settings.get(OptimizerSettings).lr_scheduler in OPEN_ENDED and not follows:
        values.pop("max_train_steps", None)
    libraries = {quantizer.distribution for quantizer in plan.memory.quantizers.values()} - {""}
    versions = {name: _version(name) for name in ("torch", "peft", *sorted(libraries))}
    owners = {plan.registry.owner_of(options) for options in taking_part(plan) if options.changes_numbers} | {BUILTINS}
    versions |= {p.name: p.version for p in plan.registry.plugins if p.name in owners}
    return {
        "settings": values,
        "model": plan.source.fingerprint("transformer"),
        "streams": list(plan.streams),
        "versions": versions,
        "device": plan.context.device.type if plan.context.device.type == "cpu" else torch.cuda.get_device_name(plan.context.device),
        "ranks": world,
    }


def taking_part(plan: Plan) -> set[type[Options]]:
    """The option models of the core, and of what computes in this run: other installed plugins do not decide its numbers."""
    registry = plan.registry
    chosen = {"family": {plan.family_name}, "optimizer": {plan.settings.get(OptimizerSettings).optimizer}}
    model = plan.settings.get(ModelSettings)
    chosen["quantizer"] = {model.base_model_precision, model.text_encoder_1_precision}
    found: set[type[Options]] = set(CORE_OPTIONS)
    for kind in COMPUTING:
        names = chosen.get(kind)
        for component in registry.components(kind):
            if component.name in names if names is not None else plan.settings.get(component.options).enabled():
                found.add(component.options)
    # What a plugin declares beside its components holds for all of them.
    owners = {registry.owner_of(options) for options in found}
    named = {component.options for kind in KINDS for component in registry.components(kind)}
    return found | {options for options in registry.option_types if options not in named and registry.owner_of(options) in owners}


def _version(distribution: str) -> str:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        raise PluginError("no distribution of this name is installed", where="Quantizer.distribution", value=distribution) from None


def decides(key: str) -> bool:
    """Whether a key can change the numbers of a step."""
    return key not in HARMLESS and not key.startswith(("validation_", "push_to_hub", "hub_", "evaluation_", "eval_"))


