"""The core's own plugin, registered like any other: optimizers and the adapter format of peft."""

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
        Component("adamw8bit", "AdamW with state in 8 bits", AdamOptions, "tuner.builtins.optimizers:AdamW8bit", PAPER),
    ]


@hookimpl
def tuner_register_checkpoint_formats() -> list[Component]:
    """The layout that peft reads."""
    return [Component("peft", "adapter file as peft reads it", Options, "tuner.builtins.formats:PeftFormat")]
