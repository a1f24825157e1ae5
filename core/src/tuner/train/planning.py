"""Decides what a run will do, before anything is loaded: components by name, variant from headers, the dataset, all rules checked."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from tuner.component import Component
from tuner.config.datasets import DatasetEntry, configured_datasets
from tuner.config.resolve import Settings
from tuner.config.settings import FP8_WEIGHTS, DataSettings, ModelSettings, OptimizerSettings, RunSettings, TrainSettings
from tuner.config.validation_settings import ValidationSettings
from tuner.data.manifest import Manifest, scan
from tuner.data.randomness import derived_seed
from tuner.errors import CheckpointError, ConfigError, TunerError
from tuner.interfaces.family import BuildContext, Located
from tuner.interfaces.memory import Quantizer
from tuner.interfaces.services import Loader, WeightSource
from tuner.model import fp8
from tuner.model.placing import RunMemory
from tuner.plugins.guard import listed
from tuner.plugins.record import Kind
from tuner.train import rules
from tuner.train.forecast.advise import forecast
from tuner.train.plan import NO_CHANGE, ModelPlan, Plan, PlanProblems, memory_facts, total_steps, weight_bytes
from tuner.train.samples.plan import validation_of
from tuner.train.samples.validate import adjustments, wants_samples
from tuner.train.trackers import chosen_trackers

if TYPE_CHECKING:
    from tuner.plugins.registry import Registry

Report = Callable[[int, int, str], None]


def chosen_family(registry: Registry, settings: Settings) -> Component:
    """Raises `ConfigError`."""
    name = settings.get(ModelSettings).model_family
    if not name:
        names = ", ".join(c.name for c in registry.components("family")) or "none: install one"
        raise ConfigError("no model family was chosen", where="model_family", remedy=f"add --family NAME; installed: {names}")
    return registry.component("family", name)


def plan_model(registry: Registry, settings: Settings, device: torch.device, rank: int = 0, scratch: Path | None = None) -> ModelPlan:
    """Finds family and weights. Raises `ConfigError`, `CheckpointError`, `HubError`.

    `scratch`: takes what would otherwise be written into the cache.
    """
    model, component = settings.get(ModelSettings), chosen_family(registry, settings)
    dtype = torch.bfloat16 if model.mixed_precision == "bf16" else torch.float32
    output = Path(settings.get(RunSettings).output_dir)
    memory = RunMemory()
    context = BuildContext(device, dtype, settings.get(TrainSettings).seed, rank, output, memory)
    family = component.load()(settings.get(component.options), context)  # type: ignore[operator]
    located = family.preview(model, scratch) if scratch else family.locate(model, Path(settings.get(DataSettings).cache_dir))
    source = open_source(registry, located, component.name)
    context = replace(context, geometry=family.geometry)
    plan = ModelPlan(registry, settings, family, component.name, source, context, memory, downloads=located.downloads)
    memory.strategies, memory.quantizers = _enabled(plan, "memory_strategy"), _quantizers(plan)
    return plan


def _quantizers(plan: ModelPlan) -> dict[str, Quantizer]:
    """Part -> what makes its linear layers smaller. Raises `ConfigError` for a precision that nothing installed offers."""
    model = plan.settings.get(ModelSettings)
    asked = {"transformer": model.base_model_precision, "text_encoder": model.text_encoder_1_precision}
    chosen = {part: plan.registry.component("quantizer", name) for part, name in asked.items() if name != NO_CHANGE}
    made: dict[str, Quantizer] = {part: c.load()(plan.settings.get(c.options), plan.context) for part, c in chosen.items()}  # type: ignore[operator]
    if "transformer" in made:
        made["transformer"].compute = model.base_model_compute
    return made


def open_source(registry: Registry, located: Located, name: str) -> WeightSource:
    """Asks the loaders of the family `name` who can read what lies there."""
    loaders: list[Loader] = [component.load()() for component in registry.components("loader")]  # type: ignore[operator]
    fitting = [loader for loader in loaders if name in loader.families]
    for loader in fitting:
        if loader.accepts(located.weights):
            return loader.open(located.weights, located.description)
    raise CheckpointError(
        f"none of the {len(fitting)} layouts that {name} reads is found there",
        where="pretrained_model_name_or_path",
        value=located.description,
        remedy="give a hub repository, a folder in the diffusers layout, or one .safetensors file in the original layout",
    )


def make_plan(
    registry: Registry, settings: Settings, device: torch.device, *,
    rank: int = 0, world: int = 1, report: Report | None = None, scratch: Path | None = None, trains: bool = True,
) -> Plan:  # fmt: skip
    """The whole plan of a training run. Reads file headers and probes clips; loads no weights.

    `trains`: False for what needs no length, which is 0 steps then unless one is given.
    `scratch`: for a plan that is only looked at; what would be kept in the cache goes into that folder or nowhere.
    """
    entries = read_datasets(registry, settings)  # before anything is downloaded
    model = plan_model(registry, settings, device, rank, scratch)
    data = settings.get(DataSettings)
    registry.component("optimizer", settings.get(OptimizerSettings).optimizer).load()
    chosen_trackers(registry, settings)
    sample_notices: tuple[str, ...] = ()
    if wants_samples(settings.get(ValidationSettings)):
        model.family.check_sampling(model.source)
        sample_notices = adjustments(model.family, settings)
    manifest = find_clips(entries, model, report, remember=scratch is None)
    streams = model.family.select_streams(manifest.streams_available)
    validation = validation_of(model, entries, manifest, streams, preview=scratch is not None)
    facts = model.family.inspect(model.source, streams)
    regularizers = _enabled(model, "regularizer")
    extras = [*_enabled(model, "latent_encoder"), *(e for r in regularizers for e in r.encoders())]
    encoders = [*model.family.encoders(model.source, streams, manifest.companions), *extras]
    batches = manifest.batches_per_epoch(settings.get(TrainSettings).train_batch_size)
    plan = Plan(
        registry, settings, model.family, model.family_name, model.source, model.context, model.memory,
        streams=streams, facts=facts, entries=tuple(entries), manifest=manifest, encoders=tuple(encoders),
        extras=tuple(encoder.name for encoder in extras),
        regularizers=regularizers, loss_terms=_enabled(model, "loss_term"),
        batches_per_epoch=batches, total_steps=total_steps(settings, batches, world) if trains or _has_length(settings) else 0,
        notices=(*settings.notices, *model.family.notices(), *manifest.notices, *sample_notices, *validation.notices), world=world,
        validation=validation, downloads=(*model.downloads, *validation.downloads),
    )  # fmt: skip
    problems = [*precision_problems(plan), *memory_problems(plan), *rules.problems(plan), *registry.check_plan(plan), *validation.problems]
    plan = replace(plan, notices=(*plan.notices, *rules.notices(plan)))
    plan = plan if problems else with_forecast(plan)
    if data.strict and plan.notices:
        problems = [*problems, ConfigError("strict is on and something would be adjusted or ignored:\n  " + "\n  ".join(plan.notices))]
    if problems:
        raise PlanProblems(problems)
    return replace(plan, downloads=(*plan.downloads, *(text for encoder in extras for text in encoder.downloads())))


def with_forecast(plan: Plan) -> Plan:
    """The plan with what it will take of the device, and a notice where that is more than there is."""
    predicted = forecast(plan)
    if predicted is None:
        return plan
    return replace(plan, predicted=predicted, notices=(*plan.notices, *predicted.notices))


def precision_problems(plan: Plan) -> list[TunerError]:
    """What speaks against the precisions that were asked for."""
    model, (before, after) = plan.settings.get(ModelSettings), weight_bytes(plan)
    asked, key = model.base_model_precision, "base_model_precision"
    if asked == NO_CHANGE:
        return []
    if model.model_type == "full":
        problem, remedy = "full fine-tuning needs the weights as they are", f"set {key} to {NO_CHANGE}, or model_type to lora"
        return [ConfigError(problem, where=key, value=asked, remedy=remedy)]
    if before and before == after:
        return [ConfigError("no layer of this model's blocks would take fewer bytes", where=key, value=asked, remedy=f"use {NO_CHANGE}")]
    return compute_problems(plan)


def compute_problems(plan: Plan) -> list[TunerError]:
    """What speaks against the products that were asked for."""
    quantizer, key, device = plan.memory.quantizers["transformer"], "base_model_compute", plan.context.device
    if quantizer.compute not in quantizer.computes:
        remedy = f"set base_model_precision to {FP8_WEIGHTS}, or leave {key} empty"
        return [ConfigError(f"{quantizer.name} weights are no 8-bit floats", where=key, value=quantizer.compute, remedy=remedy)]
    if quantizer.compute != "fp8" or device.type != "cuda":
        return []
    if plan.context.dtype != torch.bfloat16:
        return [ConfigError("needs mixed_precision bf16 on a GPU", where=key, value="fp8", remedy="set mixed_precision to bf16")]
    if (found := torch.cuda.get_device_capability(device)) < fp8.CAPABILITY:
        wanted, name = ".".join(map(str, fp8.CAPABILITY)), torch.cuda.get_device_name(device)
        problem = f"{name} (compute capability {found[0]}.{found[1]}) does not multiply 8-bit floats; cards from {wanted} on do"
        return [ConfigError(problem, where=key, value="fp8", remedy=f"leave {key} empty; base_model_precision may stay")]
    return []


def memory_problems(plan: Plan) -> list[TunerError]:
    """What the chosen strategies object to, and more than one of them."""
    asked = {part for strategy in plan.memory.strategies for part in strategy.parts()}
    problems: list[TunerError] = []
    for part in sorted(asked):
        strategies = [strategy for strategy in plan.memory.strategies if part in strategy.parts()]
        for strategy in strategies:
            supports = partial(strategy.supports, memory_facts(plan, part))
            problems += listed(f"memory strategy {strategy.name}", "supports", supports, TunerError)
        if len(strategies) > 1:
            names = [strategy.name for strategy in strategies]
            keys = ", ".join(key for strategy in strategies for key in strategy.keys(part))
            problem = f"two memory strategies cannot hold the same blocks ({part})"
            problems.append(ConfigError(problem, where=keys, value=names, remedy="switch one of them off"))
    return problems


def read_datasets(registry: Registry, settings: Settings) -> list[DatasetEntry]:
    """Reads the dataset file; its folders are there. Raises `ConfigError`, `DataError`."""
    return configured_datasets(settings, chosen_family(registry, settings).name)


def find_clips(entries: Sequence[DatasetEntry], model: ModelPlan, report: Report | None, *, remember: bool = True) -> Manifest:
    """Probes every clip."""
    return scan(entries, model.settings.get(DataSettings), model.family.geometry, progress=report, remember=remember)


def _has_length(settings: Settings) -> bool:
    train = settings.get(TrainSettings)
    return bool(train.max_train_steps or train.num_train_epochs)


def _enabled(model: ModelPlan, kind: Kind) -> tuple:  # type: ignore[type-arg]
    """Components of `kind` that their options switch on, built."""
    chosen = []
    for component in model.registry.components(kind):
        options = model.settings.get(component.options)
        if options.enabled():
            # What a component initialises at random must be the same in every run of this seed, whatever was built before it.
            torch.manual_seed(derived_seed(model.context.seed, f"{kind}/{component.name}"))
            chosen.append(component.load()(options, model.context))  # type: ignore[operator]
    return tuple(chosen)
