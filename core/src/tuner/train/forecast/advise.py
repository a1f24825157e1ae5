"""Which settings fit a machine, before anything is loaded: every combination of residency, precision and checkpointing, with its cost.

Special here: no strategy and no quantizer is known by name. Strategies say which settings are worth trying and what each takes.
"""

from __future__ import annotations

import json
import logging
import traceback
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch

from tuner.builtins.losses import FlowMatchingLoss
from tuner.component import Component
from tuner.config.settings import AdapterSettings, ModelSettings, OptimizerSettings, TrainSettings
from tuner.errors import ConfigError, EnvironmentProblem, OutOfMemoryError, PluginError, TunerError
from tuner.interfaces.family import ClipShape, ModelFacts
from tuner.interfaces.losses import LossTerm
from tuner.interfaces.memory import MemoryPlan, MemoryStrategy, Quantizer
from tuner.plugins.record import Kind
from tuner.train.accumulation import batches_together
from tuner.train.forecast import costs
from tuner.train.forecast.costs import Job, Precision
from tuner.train.forecast.footprint import Footprint, Trained, measure
from tuner.train.forecast.machine import Machine, find_machine
from tuner.train.forecast.row import Predicted, Row, gib
from tuner.train.forecast.sizes import linear_bytes
from tuner.train.step import train_together

if TYPE_CHECKING:
    from tuner.train.plan import ModelPlan, Plan

log = logging.getLogger(__name__)

ALIKE = 1.03
"""Settings whose times differ by less than this factor are as fast as each other: the forecast knows no better."""
MEASURED: dict[tuple[str, bool], Footprint] = {}
"""What was measured in this process: advice for a full device asks for what the forecast asked for, and a measurement takes seconds."""
CHANGING: tuple[Kind, ...] = ("regularizer", "loss_term")
"""Components with which a step is not the same every time."""
STAGES = {train_together.__code__: "forward", torch.autograd.backward.__code__: "backward"}
"""Code that an error came from -> what was going on."""
PLAIN_REMEDY = "lower train_batch_size or resolution, or switch gradient_checkpointing on"
LESS = 0.95
"""Share of what did not fit that advice may take at most."""
NEAR = 0.005
"""Steps in which errors of precisions are told apart: of those in one step the first to be registered is offered."""
UNTOLD = (TunerError, RuntimeError, ValueError, TypeError, LookupError, AttributeError, AssertionError, OSError, StopIteration)
"""What a model, strategy or optimizer of anybody's may raise on the meta device. A forecast is a service: a run goes on without it."""


# --- the table ---------------------------------------------------------------------------------------------------
def rank(rows: Sequence[Row], machine: Machine) -> list[Row]:
    """What fits first, then what is fastest, nearest to the unquantized weights, and moves least. Of the others what lacks least first."""

    fitting = sorted((row for row in rows if row.fits(machine)), key=lambda row: row.seconds)
    starts: list[float] = []
    alike: dict[int, int] = {}
    for row in fitting:  # times within `ALIKE` of the fastest of their class count as equal
        if not starts or row.seconds > starts[-1] * ALIKE:
            starts.append(row.seconds)
        alike[id(row)] = len(starts)
    fitting.sort(key=lambda row: (alike[id(row)], row.error, row.host, row.peak))
    others = [row for row in rows if id(row) not in alike]
    return fitting + sorted(others, key=lambda row: (bool(row.problem), row.needs(), row.error, row.seconds))


def rows(job: Job, machine: Machine) -> Iterator[Row]:
    """Every combination worth trying, once; with the current settings if they are none of these.

    Where a machine takes all blocks recomputed but not all kept, it may take some of them kept.
    """
    full = job.model.settings.get(ModelSettings).model_type == "full"
    precisions = [costs.plain()] if full else worthwhile(job.model, job.facts)
    held = current_strategy(job.model)
    found = []
    for strategy, keys in residencies(job):
        for precision in precisions:
            none, every = (row(job, machine, strategy, keys, precision, checkpointing) for checkpointing in ("none", "all"))
            found += [none, every]
            if every.fits(machine) and not none.fits(machine) and not none.problem:
                some = row(job, machine, strategy, keys, precision, "auto")
                found += [some] if some.kept else []
    marked = [replace(each, current=is_current(job.model, each)) for each in found]
    yield from marked
    if not any(each.current for each in marked):
        yield replace(row(job, machine, held, {}, current_precision(job.model), costs.current_checkpointing(job.model)), current=True)


def row(
    job: Job, machine: Machine, strategy: MemoryStrategy | None, keys: Mapping[str, object], precision: Precision, checkpointing: str
) -> Row:
    """One combination. With "auto" as many blocks keep their activations as fit on the machine."""
    if checkpointing != "auto":
        return _row(job, machine, strategy, keys, precision, costs.kept_blocks(job, checkpointing))
    tried = (_row(job, machine, strategy, keys, precision, kept) for kept in range(job.facts.blocks, -1, -1))
    found = next(each for each in tried if each.fits(machine) or not each.kept)
    return replace(found, keys={**found.keys, "gradient_checkpointing": "auto"})


def _row(
    job: Job, machine: Machine, strategy: MemoryStrategy | None, keys: Mapping[str, object], precision: Precision, kept: int
) -> Row:
    """`kept`: of how many blocks the activations are kept."""
    checkpointing = costs.recomputed(job, kept)
    facts = costs.memory_facts(job, precision, checkpointing)
    problems = list(strategy.supports(facts)) if strategy else []
    plan = strategy.plan(facts) if strategy else MemoryPlan(sum(facts.block_bytes), 0, 0, 0, 0.0, "resident")
    if strategy and not plan.device_bytes and not plan.host_bytes:
        problems = [*problems, ConfigError("it does not say what it will take", where=strategy.name)]
    joint = strategy is not None and bool(job.joint)
    step = costs.footprint(job, kept, joint=joint)
    parts = costs.peak_parts(job, step, plan, precision, joint=joint)
    chosen = {**keys, "base_model_precision": precision.name, **checkpointing_keys(job.model, checkpointing)}
    return Row(
        residency=strategy.name if strategy else "resident", precision=precision.name, checkpointing=checkpointing, keys=chosen,
        peak=sum(parts.values()), parts=parts, pinned=plan.pinned_bytes, host=plan.host_bytes,
        seconds=costs.seconds(job, step, plan, precision, machine, joint=joint), error=precision.error,
        problem=problems[0].message if problems else "", where=problems[0].where if problems else "", kept=kept,
    )  # fmt: skip


def is_current(model: ModelPlan, found: Row) -> bool:
    """Whether the configuration says all that the row says."""
    return all(model.settings.value(key) == value for key, value in found.keys.items())


# --- residency ---------------------------------------------------------------------------------------------------
def residencies(job: Job) -> Iterator[tuple[MemoryStrategy | None, Mapping[str, object]]]:
    """A strategy (None: everything stays) and the keys that ask for it, those of all others switched off."""
    components = job.model.registry.components("memory_strategy")
    tried = [(component, factory, dict(keys)) for component in components if (factory := _factory(component)) is not None
             for keys in factory.candidates(job.facts.blocks)]  # fmt: skip
    switches = [(component.options, built.keys("transformer")) for component, factory, keys in tried
                if (built := _built(job.model, component, factory, keys))]  # fmt: skip
    off = {key: options.model_fields[key].default for options, keys in switches for key in keys}
    off = {key: value for key, value in off.items() if job.model.settings.value(key) != value}
    yield None, off
    for component, factory, keys in tried:
        if strategy := _built(job.model, component, factory, keys):
            yield strategy, {**off, **keys}


def _factory(component: Component) -> Any:
    """The strategy's class; None where what it needs is not installed."""
    try:
        return component.load()
    except PluginError:
        return None


def _built(model: ModelPlan, component: Component, factory: Any, keys: Mapping[str, object]) -> MemoryStrategy | None:
    options = model.settings.get(component.options).model_copy(update=dict(keys))
    try:
        strategy: MemoryStrategy = factory(options, replace(model.context, device=torch.device("cuda")))
    except TunerError:
        return None
    return strategy if "transformer" in strategy.parts() else None


def current_strategy(model: ModelPlan) -> MemoryStrategy | None:
    """The configured one, as it would be on a GPU."""
    for component in model.registry.components("memory_strategy"):
        wanted = model.settings.get(component.options).enabled()
        if wanted and (factory := _factory(component)) and (strategy := _built(model, component, factory, {})):
            return strategy
    return None


# --- precision and checkpointing ---------------------------------------------------------------------------------
def worthwhile(model: ModelPlan, facts: ModelFacts) -> list[Precision]:
    """The installed precisions, best first, each of which is smaller than all before it; and the current one."""
    found = sorted((costs.probe(quantizer) for quantizer in _quantizers(model)), key=lambda precision: round(precision.error / NEAR))
    settings = model.settings.get(ModelSettings)
    kept = [] if settings.base_model_compute else [costs.plain()]
    smallest = float(sum(linear_bytes(facts, None, model.context.dtype)))
    for precision in found:
        size = sum(linear_bytes(facts, precision.quantizer, model.context.dtype))
        if size < 0.95 * smallest:
            kept.append(precision)
            smallest = size
    now = settings.base_model_precision
    return kept + [precision for precision in found if precision.name == now and precision not in kept]


def _quantizers(model: ModelPlan) -> Iterator[Quantizer]:
    for component in model.registry.components("quantizer"):
        try:
            quantizer: Quantizer = component.load()(model.settings.get(component.options), model.context)  # type: ignore[operator]
        except (EnvironmentProblem, PluginError):
            continue
        if (compute := model.settings.get(ModelSettings).base_model_compute) in quantizer.computes:
            quantizer.compute = compute
            yield quantizer


def current_precision(model: ModelPlan) -> Precision:
    """What `base_model_precision` says."""
    quantizer = model.memory.quantizers.get("transformer")
    return costs.probe(quantizer) if quantizer else costs.plain()


def checkpointing_keys(model: ModelPlan, checkpointing: str) -> dict[str, object]:
    """The keys for it; the interval only where it is another one now."""
    interval = model.settings.get(ModelSettings).gradient_checkpointing_interval
    if checkpointing == "all" and interval != 1:
        return {"gradient_checkpointing": True, "gradient_checkpointing_interval": 1}
    return {"gradient_checkpointing": checkpointing != "none"}


# --- the job -----------------------------------------------------------------------------------------------------
def job_for(
    model: ModelPlan, facts: ModelFacts, streams: Sequence[str], shape: ClipShape, *,
    ways: Sequence[bool] = (True, False), world: int = 1, host: int = 0,
) -> Job:  # fmt: skip
    """Measures a step over clips of `shape`; `ways`: with all blocks recomputed, with none.

    Raises `ConfigError` where the family does not allow a forecast.
    """
    settings, family = model.settings, model.family
    train, adapters = settings.get(TrainSettings), settings.get(AdapterSettings)
    full = settings.get(ModelSettings).model_type == "full"
    asked = Trained(tuple(streams), shape, train.train_batch_size, None if full else adapters)
    terms = [FlowMatchingLoss(name, family.stream_weights().get(name, 1.0)) for name in family.learned_streams(streams)]
    footprints = _measured(model, facts, asked, terms, ways)
    regularized = any(settings.get(c.options).enabled() for c in model.registry.components("regularizer"))
    outside = bool(next(iter(footprints.values())).trained[1])
    batches = batches_together(settings.get(OptimizerSettings), streamed=True, outside=outside, regularized=regularized)
    joint = replace(asked, together=batches)
    together = _measured(model, facts, joint, terms, ways) if joint.together > 1 else {}
    return Job(model, facts, footprints, costs.optimizer_cost(model), replays(model), world, host, together)


def _measured(
    model: ModelPlan, facts: ModelFacts, asked: Trained, terms: Sequence[LossTerm], ways: Sequence[bool]
) -> dict[bool, Footprint]:
    """Measures once what has not been measured in this process."""
    chosen = model.settings.get(model.registry.component("family", model.family_name).options)
    key = repr((model.source.fingerprint("transformer"), chosen, facts.blocks, asked, str(model.context.dtype)))
    if missing := [way for way in ways if (key, way) not in MEASURED]:
        found = measure(model.family, model.source, facts, asked, terms, model.context.dtype, missing)
        MEASURED.update({(key, way): footprint for way, footprint in found.items()})
    return {way: MEASURED[key, way] for way in ways}


def replays(model: ModelPlan) -> bool:
    """Whether a GPU will replay steps as graphs, as far as the configuration tells: nothing may draw or change inside a step."""
    switched = [c for kind in CHANGING for c in model.registry.components(kind) if model.settings.get(c.options).enabled()]
    draws = any(not getattr(component.load(), "capturable", False) for component in switched)
    draws = draws or model.settings.get(AdapterSettings).lora_dropout > 0
    return model.settings.get(ModelSettings).cuda_graphs != "off" and not draws


def job_of(plan: Plan, ways: Sequence[bool] = (True, False)) -> Job:
    """A training run's, at its largest bucket."""
    shape = largest(item.shape for item in plan.manifest.items)
    return job_for(plan, plan.facts, plan.streams, shape, ways=ways, world=plan.world)


def largest(shapes: Iterable[ClipShape]) -> ClipShape:
    """The one with most tokens."""
    return max(shapes, key=lambda shape: (shape.width * shape.height * shape.frames, shape.seconds))


def predict(plan: Plan, machine: Machine) -> Predicted:
    """The row of the configuration as it is."""
    now, strategy = costs.current_checkpointing(plan), current_strategy(plan)
    job = job_of(plan, {"all": (True,), "none": (False,)}.get(now, (True, False)))
    found = row(job, machine, strategy, {}, current_precision(plan), now)
    one = costs.activations(job, joint=strategy is not None and bool(job.joint)) if now == "auto" else 0
    return Predicted(replace(found, current=True), machine, one)


def forecast(plan: Plan, machine: Machine | None = None) -> Predicted | None:
    """What a run will take of its device, or of `machine`; None without a device of its own memory, or where that cannot be told."""
    if machine is None and plan.context.device.type != "cuda":
        return None
    try:
        machine = machine or find_machine(plan.context.device)
        return predict(plan, machine)
    except UNTOLD as error:
        log.debug("no forecast: %s", error)
        return None


def full_device(plan: Plan, error: torch.OutOfMemoryError, stage: str) -> OutOfMemoryError:
    """What a run ends with when its device is full: where that was, and which settings should fit."""
    parts = traceback.walk_tb(error.__traceback__)
    place = next((STAGES[frame.f_code] for frame, _ in parts if frame.f_code in STAGES), "")
    advice = remedy(plan) if plan.context.device.type == "cuda" else ""
    return OutOfMemoryError(
        f"the device ran out of memory: {str(error).splitlines()[0]}", where=f"{stage}, {place}" if place else stage,
        remedy=f"{advice}; or {PLAIN_REMEDY}" if advice else PLAIN_REMEDY,
    )  # fmt: skip


def remedy(plan: Plan, machine: Machine | None = None) -> str:
    """Settings that should fit where the present ones did not, in words; empty where none do or that cannot be told."""
    try:
        machine = machine or find_machine(plan.context.device)
        ranked = rank(list(rows(job_of(plan), machine)), machine)
        now = next(found for found in ranked if found.current)
    except UNTOLD as error:
        log.debug("no advice: %s", error)
        return ""
    # What did not fit took more than was forecast: what is to fit must take clearly less.
    better = [found for found in ranked if found.fits(machine) and found.peak < LESS * now.peak]
    return f"this would fit: {describe(better[0], plan, machine)}" if better else ""


# --- in words ----------------------------------------------------------------------------------------------------
def describe(found: Row, model: ModelPlan, machine: Machine) -> str:
    """What to change for a row, and what it costs then."""
    changes = ", ".join(f"{key} {told(value)}" for key, value in lines(found, model).items()) or "the settings as they are"
    return f"{changes} (predicted {gib(found.needs())} of {gib(machine.memory)}, {found.seconds:.2g} s a step)"


def lines(found: Row, model: ModelPlan) -> dict[str, object]:
    """Of the row's keys those that the configuration has otherwise."""
    return {key: value for key, value in found.keys.items() if model.settings.value(key) != value}


def told(value: object) -> str:
    """A value as it stands in config.json, without quotes."""
    return value if isinstance(value, str) else json.dumps(value)
