"""The core's own plugin, registered like any other: optimizers, quantizers, trackers and the adapter format of peft."""

from __future__ import annotations

from tuner.builtins.options import AdamOptions
from tuner.component import Component
from tuner.config.options import Options
from tuner.hookspecs import hookimpl

PAPER = "arXiv 1711.05101"


@hookimpl
def tuner_register_optimizers() -> list[Component]:
    """AdamW in three precisions."""
    return [
        Component("adamw", "AdamW with fp32 state", AdamOptions, "tuner.builtins.optimizers:AdamW", PAPER),
        Component(
            "adamw_bf16", "AdamW whose weights and state stay in bf16, stochastically rounded", AdamOptions,
            "tuner.builtins.optimizers:AdamWBF16", PAPER,
        ),
        Component("adamw8bit", "AdamW with state in 8 bits", AdamOptions, "tuner.builtins.optimizers:AdamW8bit", PAPER, extra="torchao"),
    ]


@hookimpl
def tuner_register_quantizers() -> list[Component]:
    """Without rounding, and in 8 and 4 bits, held by two libraries."""
    torchao, quanto = "torchao (pytorch/ao)", "optimum-quanto (huggingface)"
    return [
        Component(
            "bf16-packed", "the same bf16 numbers, in 12 bits", Options, "tuner.builtins.quantizers:Packed", "exponents: arXiv 2504.11651",
        ),
        _quantizer("int8-torchao", "8-bit integers, a scale for each row", "Int8Torchao", torchao),
        _quantizer("fp8-torchao", "8-bit floats (e4m3), a scale for each row", "Fp8Torchao", torchao),
        _quantizer("int4-torchao", "4-bit integers, a scale and a zero for every 64 weights", "Int4Torchao", torchao),
        _quantizer("int8-quanto", "8-bit integers, a 16-bit scale for each row", "Int8Quanto", quanto),
        _quantizer("fp8-quanto", "8-bit floats (e4m3), a 16-bit scale for each row", "Fp8Quanto", quanto),
        _quantizer("int4-quanto", "4-bit integers, a scale and a shift for every 64 weights", "Int4Quanto", quanto),
    ]


def _quantizer(name: str, summary: str, factory: str, source: str) -> Component:
    return Component(name, summary, Options, f"tuner.builtins.quantizers:{factory}", source, extra=name.rpartition("-")[2])


@hookimpl
def tuner_register_trackers() -> list[Component]:
    """Three that other libraries do."""
    return [
        _tracker("tensorboard", "event files in the run folder, for `tensorboard --logdir`", "TensorBoard"),
        _tracker("wandb", "a run of Weights & Biases, online or offline", "Wandb"),
        _tracker("trackio", "a run of Trackio, on this machine or in a space of the hub", "Trackio"),
    ]


def _tracker(name: str, summary: str, factory: str) -> Component:
    return Component(name, summary, Options, f"tuner.builtins.trackers:{factory}", extra=name)


@hookimpl
def tuner_register_checkpoint_formats() -> list[Component]:
    """The layout that peft reads."""
    return [Component("peft", "adapter file as peft reads it", Options, "tuner.builtins.formats:PeftFormat")]
