"""Registers the weighting of noise levels."""

from __future__ import annotations

from tuner.component import Component
from tuner.hookspecs import hookimpl
from tuner_sigma_weighting.options import SigmaWeightingOptions

TUNER_HOOKSPEC_VERSION = 1


@hookimpl
def tuner_register_regularizers() -> list[Component]:
    """One component, switched on by `sigma_weighting`."""
    return [
        Component(
            "sigma_weighting", "weights samples by their noise level", SigmaWeightingOptions,
            "tuner_sigma_weighting.weighting:SigmaWeighting", "Hang et al. 2023, arXiv:2303.09556; Esser et al. 2024, arXiv:2403.03206",
        )
    ]  # fmt: skip
