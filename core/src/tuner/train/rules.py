"""What speaks against a run and can be known before anything is loaded: rules that need the model's names, the machine, or the disk."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from torch import nn

from tuner.config.settings import AdapterSettings, ModelSettings, RunSettings
from tuner.errors import ConfigError, TunerError
from tuner.interfaces.losses import TrainingFacts
from tuner.model.adapters import resolve_targets

if TYPE_CHECKING:
    from tuner.train.plan import Plan


def problems(plan: Plan) -> list[TunerError]:
    """All of them; `TunerError`s that name keys."""
    found: list[TunerError] = [*_output_problems(plan), *_graph_problems(plan)]
    try:
        facts = training_facts(plan)
    except ConfigError as error:
        return [*found, error]
    return [*found, *(problem for regularizer in plan.regularizers for problem in regularizer.check(facts))]


def _output_problems(plan: Plan) -> list[TunerError]:
    folder = Path(plan.settings.get(RunSettings).output_dir).expanduser()
    taken = next((path for path in (folder, *folder.parents) if path.exists()), None)
    if taken is None or taken.is_dir():
        return []
    return [ConfigError("is a file, no folder", where="output_dir", value=str(taken), remedy="name a folder, which is made")]


def _graph_problems(plan: Plan) -> list[TunerError]:
    device = plan.context.device
    if plan.settings.get(ModelSettings).cuda_graphs != "on" or device.type == "cuda":
        return []
    remedy = "set it to auto: then it is used wherever it can be"
    return [ConfigError(f"this run trains on {device.type}, which has no CUDA graphs", where="cuda_graphs", value="on", remedy=remedy)]


def training_facts(plan: Plan) -> TrainingFacts:
    """What regularizers are checked against. Raises `ConfigError` for adapter targets that the model does not have."""
    full = plan.settings.get(ModelSettings).model_type == "full"
    return TrainingFacts(
        blocks=plan.facts.blocks, trained_blocks=_every_block(plan) if full else _adapted_blocks(plan), streams=plan.streams,
        learned_streams=plan.family.learned_streams(plan.streams),
        shapes=tuple(dict.fromkeys(item.shape for item in plan.manifest.items)), full_finetuning=full,
        datasets=tuple(dict.fromkeys(item.dataset for item in plan.manifest.items)),
    )  # fmt: skip


def _every_block(plan: Plan) -> tuple[int, ...]:
    return tuple(range(plan.facts.blocks))


def _adapted_blocks(plan: Plan) -> tuple[int, ...]:
    wanted = plan.settings.get(AdapterSettings).peft_lora_target_modules
    # Layers that are not named are the family's choice, which is the same in every block.
    model = plan.family.empty(plan.source, plan.streams, plan.context.dtype) if wanted else None
    if model is None:
        return _every_block(plan)
    targets = resolve_targets(model, wanted, plan.family.adapter_targets(model, plan.streams))
    return tuple(index for index, name in enumerate(plan.family.block_set(model).names) if _inside(model, name, targets))


def _inside(model: nn.Module, block: str, targets: Sequence[str]) -> bool:
    lead = re.compile(re.escape(block) + r"\.")
    return any(lead.match(target) for target in targets)
