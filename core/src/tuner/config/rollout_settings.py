"""The keys of scheduled sampling: training on points that the model reached itself."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import ValidationInfo, field_validator

from tuner.config.options import Options, option

SWITCH = "scheduled_sampling_max_step_offset"
SAMPLERS = {"euler": 1}
"""Solvers of a rollout and their order."""


class RolloutSettings(Options):
    """Scheduled sampling. Everything but the switch means something only where that is above 0."""

    title: ClassVar[str] = "Scheduled sampling"

    scheduled_sampling_max_step_offset: int = option(
        0, ge=0, help="Longest rollout: from so many steps of a sampling schedule before, the model itself walks to the noise level that "
        "is trained; 0 is off.", unit="steps",
    )  # fmt: skip
    scheduled_sampling_schedule_steps: int = option(40, ge=1, help="Length of the sampling schedule whose steps are meant.", unit="steps")
    scheduled_sampling_strategy: Literal["uniform", "biased_early", "biased_late"] = option(
        "uniform", help="Distribution of a rollout's length: even, more short ones, or more long ones."
    )
    scheduled_sampling_probability: float = option(0.0, ge=0, le=1, help="Share of samples that are rolled out, where there is no ramp.")
    scheduled_sampling_prob_start: float = option(0.0, ge=0, le=1, help="Share at the beginning of the ramp.")
    scheduled_sampling_prob_end: float = option(0.5, ge=0, le=1, help="Share from the end of the ramp on.")
    scheduled_sampling_ramp_steps: int = option(0, ge=0, help="Length of the ramp; 0: none.", unit="steps")
    scheduled_sampling_ramp_shape: Literal["linear", "cosine"] = option("linear", help="Course of the ramp.")
    scheduled_sampling_start_step: int = option(
        0, ge=0, help="Before this step nothing is rolled out; a ramp begins there.", unit="steps"
    )
    scheduled_sampling_sampler: str = option("euler", help="Solver of a rollout: `euler`.")
    scheduled_sampling_order: int = option(1, ge=1, help="Order of the solver: 1 for `euler`.")
    scheduled_sampling_reflexflow: bool = option(
        False, help="Weigh what a rollout got wrong more, and add a loss of the direction back to the clip (ReflexFlow)."
    )
    scheduled_sampling_reflexflow_alpha: float = option(1.0, ge=0, help="How much more it weighs where the rollout went off further.")
    scheduled_sampling_reflexflow_beta1: float = option(10.0, ge=0, help="Weight of the loss of direction.")
    scheduled_sampling_reflexflow_beta2: float = option(1.0, ge=0, help="Weight of the weighed loss of velocity.")

    def enabled(self) -> bool:
        return self.scheduled_sampling_max_step_offset > 0

    @field_validator("scheduled_sampling_ramp_steps")
    @classmethod
    def _rolls_out(cls, value: int, info: ValidationInfo) -> int:
        shares = ("prob_start", "prob_end") if value else ("probability",)
        if info.data.get(SWITCH) and not any(info.data.get(f"scheduled_sampling_{share}", 1) for share in shares):
            raise ValueError(f"{SWITCH} is on and nothing would ever be rolled out: set scheduled_sampling_probability, or a ramp")
        return value

    @field_validator("scheduled_sampling_sampler")
    @classmethod
    def _known(cls, value: str, info: ValidationInfo) -> str:
        if info.data.get(SWITCH) and value not in SAMPLERS:
            raise ValueError(f"must be {' or '.join(repr(name) for name in SAMPLERS)}")
        return value

    @field_validator("scheduled_sampling_order")
    @classmethod
    def _fits(cls, value: int, info: ValidationInfo) -> int:
        order = SAMPLERS.get(info.data.get("scheduled_sampling_sampler", ""), value)
        if info.data.get(SWITCH) and value != order:
            raise ValueError(f"must be {order} for that sampler")
        return value
