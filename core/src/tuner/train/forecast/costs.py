"""What a combination of memory settings costs: bytes on the device when it is fullest, and seconds a step.

Special here: no quantizer and no optimizer is known by name. Each is tried on a small matrix, which shows its error and what it keeps; what
the step itself takes comes from `tuner.train.forecast.footprint`. Time is a bound: in each walk over the blocks the slowest of computing,
memory traffic, launches and copies.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import astuple, dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from tuner.config.settings import ModelSettings, OptimizerSettings
from tuner.interfaces.family import ModelFacts
from tuner.interfaces.memory import MemoryFacts, MemoryPlan, Quantizer
from tuner.model.quantized import pieces, stored_bytes
from tuner.train.forecast.footprint import Footprint, LiveBytes, Work
from tuner.train.forecast.machine import ATTENTION, EIGHT_BITS, PRODUCTS, START, Machine
from tuner.train.forecast.sizes import linear_bytes, transformer_facts
from tuner.train.masters import BUCKET_ELEMENTS

if TYPE_CHECKING:
    from tuner.train.plan import ModelPlan

NO_CHANGE: str = ModelSettings.model_fields["base_model_precision"].default
"""The precision that leaves weights as they are."""
WORKSPACE = 32 << 20
"""What cuBLAS takes on the device for itself."""
CHUNK = 1 << 24
"""Low-precision optimizers update so many weights at once, with eight float32 numbers for each."""
PROBE = 256
"""Rows and columns of the matrix that quantizers and optimizers are tried on."""


@dataclass(frozen=True)
class Precision:
    """A way to hold the blocks' linear layers."""

    name: str
    quantizer: Quantizer | None
    error: float
    """Relative root mean square error of a normal matrix."""
    expanding: float
    """Bytes that live for a moment while a product is computed, per byte of the plain matrix."""


@dataclass(frozen=True)
class OptimizerCost:
    """Bytes for each trained weight."""

    low_precision: bool
    """It steps the model's own weights; else float32 copies of those that are not float32."""
    state: float


@dataclass(frozen=True)
class Job:
    """What is to be trained, whatever the memory settings."""

    model: ModelPlan
    facts: ModelFacts
    footprints: Mapping[bool, Footprint]
    """Whether all blocks are recomputed -> what a batch takes."""
    optimizer: OptimizerCost
    graphs: bool = False
    """Whether steps are replayed as CUDA graphs."""
    world: int = 1
    host: int = 0
    """Bytes of host memory to plan for; 0: what is free."""
    joint: Mapping[bool, Footprint] = field(default_factory=dict)
    """What all batches of a step take together where weights are streamed; empty: they are not taken together."""


def plain() -> Precision:
    """The weights as they are."""
    return Precision(NO_CHANGE, None, 0.0, 0.0)


@torch.no_grad()
def probe(quantizer: Quantizer) -> Precision:
    """Quantizes a normal matrix and multiplies with it."""
    layer = nn.Linear(PROBE, PROBE, bias=False, dtype=torch.bfloat16)
    layer.weight.copy_(torch.randn(PROBE, PROBE, generator=torch.Generator().manual_seed(0)))
    before = layer.weight.float()
    quantizer.quantize(layer)
    identity = torch.eye(PROBE, dtype=torch.bfloat16)
    after = layer(identity).t().float()
    # Here it is carried out in other steps than on a card, of which the meta device knows.
    layer, identity = layer.to("meta"), identity.to("meta")
    with (live := LiveBytes(tensor.untyped_storage() for tensor in (identity, *pieces(layer.weight)))):
        layer(identity)
    expanding = max(0, live.take_peak() - 2 * identity.numel()) / (2 * before.numel())
    return Precision(quantizer.name, quantizer, float((after - before).norm() / before.norm()), expanding)


def memory_facts(job: Job, precision: Precision, checkpointing: str) -> MemoryFacts:
    """What strategies decide on."""
    full = job.model.settings.get(ModelSettings).model_type == "full"
    return transformer_facts(
        job.facts, precision.quantizer, job.model.context.dtype, precision=precision.name, full_finetuning=full,
        checkpointing=checkpointing, world=job.world, host=job.host,
    )  # fmt: skip


# --- checkpointing -----------------------------------------------------------------------------------------------
def current_checkpointing(model: ModelPlan) -> str:
    """Which blocks are recomputed now: "none", "some", "all", or "auto"."""
    settings = model.settings.get(ModelSettings)
    if settings.gradient_checkpointing == "auto":
        return "auto"
    return "none" if not settings.gradient_checkpointing else "all" if settings.gradient_checkpointing_interval == 1 else "some"


def kept_blocks(job: Job, checkpointing: str) -> int:
    """How many blocks keep their activations; "auto" is for the caller to decide."""
    blocks = job.facts.blocks
    return {"none": blocks, "all": 0}.get(checkpointing, blocks // job.model.settings.get(ModelSettings).gradient_checkpointing_interval)


def recomputed(job: Job, kept: int) -> str:
    """In the words of strategies: "none", "some" or "all" blocks."""
    return "all" if not kept else "none" if kept == job.facts.blocks else "some"


def footprint(job: Job, kept: int, *, joint: bool = False) -> Footprint:
    """What a batch takes, or (`joint`) all of a step together, where so many blocks keep their activations."""
    measured = job.joint if joint else job.footprints
    every, none = measured.get(True), measured.get(False)
    if not kept or none is None:
        assert every is not None
        return every
    if kept == job.facts.blocks or every is None:
        return none
    share = kept / job.facts.blocks
    pairs = zip(astuple(none.backward_work), astuple(every.backward_work), strict=True)
    back = Work(*(round(share * of_kept + (1 - share) * of_others) for of_kept, of_others in pairs))
    return replace(every, kept=round(share * none.kept + (1 - share) * every.kept), backward_work=back)


def activations(job: Job, *, joint: bool = False) -> int:
    """Bytes that a block holds more when it keeps its activations, of one batch or (`joint`) of all of a step."""
    measured = job.joint if joint else job.footprints
    return max(1, measured[False].kept - measured[True].kept)


# --- bytes and seconds -------------------------------------------------------------------------------------------
def optimizer_cost(model: ModelPlan) -> OptimizerCost:
    """Of the configured optimizer, from one step on a small matrix."""
    settings = model.settings.get(OptimizerSettings)
    component = model.registry.component("optimizer", settings.optimizer)
    factory: Any = component.load()
    low = bool(getattr(factory, "wants_low_precision", False))
    weight = nn.Parameter(torch.zeros(PROBE, PROBE, dtype=model.context.dtype if low else torch.float32))
    optimizer = factory([weight], settings.learning_rate, model.settings.get(component.options))
    weight.grad = torch.zeros_like(weight)
    optimizer.step()
    states = [value for state in optimizer.state.values() for value in state.values() if isinstance(value, torch.Tensor)]
    return OptimizerCost(low, sum(stored_bytes(value) for value in states if value.numel() > 1) / weight.numel())


def peak_parts(job: Job, step: Footprint, plan: MemoryPlan, precision: Precision, *, joint: bool = False) -> dict[str, int]:
    """What lies on the device when it is fullest. `joint`: `step` is all of an optimizer step's batches."""
    settings, count = job.model.settings.get(OptimizerSettings), step.trained_weights
    masters = not job.optimizer.low_precision and step.width < 4
    full = job.model.settings.get(ModelSettings).model_type == "full"
    trained = (step.trained[1] if full else count) * step.width  # in full the blocks' own are the block weights
    # Of batches that follow each other gradients are added to sums; those of batches taken together are the sums.
    accumulated = (4 * count if masters else step.gradients) if settings.gradient_accumulation_steps > 1 and not joint else 0
    passing = step.peak + accumulated + _made_of_weights(job, plan, precision, joint=joint)
    taking, update = updating(step, masters=masters, low_precision=job.optimizer.low_precision)
    passing = max(passing, step.entered + taking)
    # What a captured graph works in stays reserved for it.
    together = passing + update if job.graphs else max(passing, step.entered + update)
    return {
        "block weights": plan.device_bytes, "other weights": step.outside, "trained weights": trained,
        "optimizer": round(count * (job.optimizer.state + (4 if masters else 0))), "activations and gradients": together,
        "workspace": WORKSPACE,
    }  # fmt: skip


def _made_of_weights(job: Job, plan: MemoryPlan, precision: Precision, *, joint: bool) -> int:
    """Bytes of plain or turned weights beside those of the blocks: of the largest layer, or of a whole block for all its batches."""
    dtype = job.model.context.dtype
    each = linear_bytes(job.facts, None, dtype)
    joint = joint and not plan.inside_blocks
    if joint and precision.quantizer is not None and precision.quantizer.compute:
        return sum(linear_bytes(job.facts, precision.quantizer, dtype))
    return round(precision.expanding * (sum(each) if joint else max(each, default=0)))


def updating(step: Footprint, *, masters: bool, low_precision: bool) -> tuple[int, int]:
    """Bytes while gradients are taken out of the model, and of gradients and temporaries while the optimizer steps.

    They are summed up in float32 bucket by bucket where there are masters; else weights are stepped as they are, perhaps in chunks.
    """
    count, width = step.trained_weights, step.width
    if masters:
        bucket = min(count, BUCKET_ELEMENTS)
        return step.gradients + bucket * (width + 4), 4 * count + bucket * width
    return step.gradients, step.gradients + (32 * min(count, CHUNK) if low_precision else 0)


def seconds(job: Job, step: Footprint, plan: MemoryPlan, precision: Precision, machine: Machine, *, joint: bool = False) -> float:
    """Of an optimizer step: both walks over the blocks, each as long as the slowest of what runs side by side, and the rest.

    `joint`: `step` is all of its batches, for which weights are copied once.
    """
    dtype, settings = job.model.context.dtype, job.model.settings
    plainly, packed = (sum(linear_bytes(job.facts, quantizer, dtype)) for quantizer in (None, precision.quantizer))
    # A block that is recomputed expands its weights twice on the way back; for batches that it takes together it does so once on each way,
    # unless its weights come and go meanwhile.
    products = 2 if step.backward_work.flops > 1.5 * step.forward_work.flops else 1
    batches = settings.get(OptimizerSettings).gradient_accumulation_steps
    once = joint and not plan.inside_blocks
    each = batches if joint and plan.inside_blocks else 1
    there, back = step.forward_work, step.backward_work
    eight_bits = precision.quantizer is not None and bool(precision.quantizer.compute)
    if eight_bits:  # multiplied as they lie, and turned for the gradient; what they are multiplied with is rounded first
        layers = len(job.facts.linear_shapes)
        there, back = there + Work(kernels=layers), back + Work(kernels=(products + 1) * layers, moved=2 * packed)
    elif precision.quantizer:
        expanded = Work(moved=plainly + packed)
        there, back = there + expanded * each, back + expanded * (1 if once else products * each)
    walks = [_computing(work, machine, graphs=job.graphs, eight_bits=eight_bits) * step.blocks for work in (there, back)]
    copies = (plan.forward_bytes / machine.link, (plan.traffic_bytes - plan.forward_bytes) / machine.link)
    took = sum(max(pair) if plan.beside else sum(pair) for pair in zip(walks, copies, strict=True))
    one = took + _computing(step.other_work, machine, graphs=job.graphs)
    return one if joint else one * batches


def _computing(work: Work, machine: Machine, *, graphs: bool, eight_bits: bool = False) -> float:
    products = (work.flops - work.attention) / (machine.flops * (EIGHT_BITS if eight_bits else PRODUCTS))
    there = products + work.attention / (machine.flops * ATTENTION) + work.moved / machine.bandwidth
    # A graph starts kernels one after the other; called plainly they wait for the processor, or it for them.
    return there + work.kernels * START if graphs else max(there, work.kernels * machine.launch)
