"""What speaks against a run and can be known before anything is loaded: rules that need the model's names, the machine, or the disk."""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from torch import nn

from tuner.config.entries import FolderEntry, PictureEntry
from tuner.config.settings import AdapterSettings, ModelSettings, OptimizerSettings, RunSettings, TrainSettings
from tuner.data.epochs import group_turns
from tuner.errors import ConfigError, DiskError, PluginError, TunerError
from tuner.interfaces.losses import TrainingFacts
from tuner.model.adapters import resolve_targets
from tuner.plugins.guard import listed

if TYPE_CHECKING:
    from tuner.train.plan import Plan

SHORTEST_SIDE, LONGEST_SIDE = 16, 8192
"""In pixels; what is beyond is a mistake in the unit rather than a wish: no model makes such pictures."""


def problems(plan: Plan) -> list[TunerError]:
    """All of them; `TunerError`s that name keys."""
    found: list[TunerError] = [*_output_problems(plan), *_size_problems(plan), *_graph_problems(plan), *_order_problems(plan)]
    try:
        facts = training_facts(plan)
    except ConfigError as error:
        return [*found, error]
    found += _name_problems(plan)
    for regularizer in plan.regularizers:
        found += listed(f"regularizer {regularizer.name}", "check", partial(regularizer.check, facts), TunerError)
    return found


def _name_problems(plan: Plan) -> list[TunerError]:
    """Two things of one name: one would be left out, or their numbers mixed. Encoders of one class share what they make alike."""
    terms = repeated([*plan.streams, *(term.name for term in plan.loss_terms)])
    encoders = repeated([name for name, _ in {(encoder.name, type(encoder)): None for encoder in plan.encoders}])
    return [*(two_of_one_name("loss term", name) for name in terms), *(two_of_one_name("encoder", name) for name in encoders)]


def repeated(names: Sequence[str]) -> list[str]:
    """Those that are there more than once."""
    return [name for name, count in Counter(names).items() if count > 1]


def two_of_one_name(kind: str, name: str) -> PluginError:
    """Streams count among loss terms. Whose the two are, plugins' authors know."""
    remedy = "switch one of them off, or ask the plugin's author for a name of its own"
    return PluginError("two of this run have one name", where=kind, value=name, remedy=remedy)


def _output_problems(plan: Plan) -> list[TunerError]:
    folder = Path(plan.settings.get(RunSettings).output_dir).expanduser()
    taken = next((path for path in (folder, *folder.parents) if path.exists()), None)
    if taken is not None and not taken.is_dir():
        return [ConfigError("is a file, no folder", where="output_dir", value=str(taken), remedy="name a folder, which is made")]
    if taken is not None and not os.access(taken, os.W_OK | os.X_OK):
        return [DiskError("cannot be written", where=f"output_dir {taken}", remedy="set another output_dir")]
    return _inside_data_problems(plan, folder.resolve())


def _inside_data_problems(plan: Plan, folder: Path) -> list[TunerError]:
    """Samples of a run that lay among the clips would be clips of the next run."""
    remedy = "name a folder outside the data"
    return [
        ConfigError(f"lies inside the dataset folder {data}", where="output_dir", value=str(folder), remedy=remedy)
        for data in dict.fromkeys(entry.instance_data_dir for entry in plan.entries if isinstance(entry, FolderEntry))
        if folder.is_relative_to(data.resolve())
    ]


def _size_problems(plan: Plan) -> list[TunerError]:
    small = {entry.id: entry.resolution for entry in plan.entries if isinstance(entry, PictureEntry)
             if entry.resolution_type != "area" and entry.resolution < SHORTEST_SIDE}  # fmt: skip
    sizes = {item.dataset: item.bucket for item in plan.manifest.items if max(item.bucket.width, item.bucket.height) > LONGEST_SIDE}
    remedy = "resolution counts pixels, or megapixels where resolution_type is area"
    return [
        *(ConfigError(f"dataset {dataset!r} would be scaled to {asked:g} pixels", where="resolution", remedy=remedy)
          for dataset, asked in small.items()),
        *(ConfigError(
            f"dataset {dataset!r} would be scaled to {bucket.width}x{bucket.height}; a side has at most {LONGEST_SIDE} pixels",
            where="resolution", remedy=remedy,
        )
        for dataset, bucket in sizes.items()),
    ]  # fmt: skip


def notices(plan: Plan) -> tuple[str, ...]:
    """What is carried out as asked, but hardly meant."""
    return (*_long_warm_up(plan), *_large_batch(plan), *_products(plan))


def _products(plan: Plan) -> Iterator[str]:
    model, device = plan.settings.get(ModelSettings), plan.context.device.type
    if model.base_model_compute and plan.settings.origin("base_model_precision") == "default":
        yield f"base_model_compute: {model.base_model_compute} holds the blocks in {model.base_model_precision}"
    if model.base_model_compute and device != "cuda":
        yield f"base_model_compute: {device} has no products of 8-bit floats; their numbers are computed, not their speed"


def _long_warm_up(plan: Plan) -> Iterator[str]:
    optimizer = plan.settings.get(OptimizerSettings)
    if optimizer.lr_warmup_steps > plan.total_steps > 0:
        share = (plan.total_steps - 1) / optimizer.lr_warmup_steps
        yield (
            f"lr_warmup_steps: {optimizer.lr_warmup_steps} is more than the {plan.total_steps} steps of the run, so the learning rate ends "
            f"at {share:.0%} of learning_rate"
        )


def _large_batch(plan: Plan) -> Iterator[str]:
    asked = plan.settings.get(TrainSettings).train_batch_size
    most = max((group.turns for group in group_turns(plan.manifest.items, asked)), default=asked)
    if asked > most:
        yield f"train_batch_size: {asked} is more than any bucket has to give in an epoch; the largest batch has {most}"


def _graph_problems(plan: Plan) -> list[TunerError]:
    device = plan.context.device
    if plan.settings.get(ModelSettings).cuda_graphs != "on" or device.type == "cuda":
        return []
    remedy = "set it to auto: then it is used wherever it can be"
    return [ConfigError(f"this run trains on {device.type}, which has no CUDA graphs", where="cuda_graphs", value="on", remedy=remedy)]


def _order_problems(plan: Plan) -> list[TunerError]:
    settings = plan.settings.get(OptimizerSettings)
    if settings.gradient_accumulation_order != "layer" or not plan.regularizers:
        return []
    names = ", ".join(regularizer.name for regularizer in plan.regularizers)
    problem = f"{names} prepares one batch at a time, so that blocks cannot take several"
    return [ConfigError(problem, where="gradient_accumulation_order", value="layer", remedy="set it to auto, or batch")]


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
