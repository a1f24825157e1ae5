"""Option models of the core's own components that are neither a run's settings nor a plugin's."""

from __future__ import annotations

from typing import ClassVar

from tuner.config.options import Options, option


class AdamOptions(Options):
    """Read by `adamw`, `adamw_bf16` and `adamw8bit`."""

    title: ClassVar[str] = "Adam"

    adam_beta1: float = option(0.9, ge=0, lt=1, help="Decay of the running mean of gradients.")
    adam_beta2: float = option(0.999, ge=0, lt=1, help="Decay of the running mean of squared gradients.")
    adam_epsilon: float = option(1e-8, gt=0, help="Added to the denominator.")
    adam_weight_decay: float = option(0.01, ge=0, help="Decoupled weight decay, times the learning rate per step.")
