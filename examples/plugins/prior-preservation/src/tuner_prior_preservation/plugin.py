"""Registers prior preservation."""

from __future__ import annotations

from tuner.component import Component
from tuner.hookspecs import hookimpl
from tuner_prior_preservation.options import PriorPreservationOptions

TUNER_HOOKSPEC_VERSION = 1


@hookimpl
def tuner_register_regularizers() -> list[Component]:
    """One component, switched on by `prior_dataset`."""
    return [
        Component(
            "prior", "keeps what the base model predicts for a dataset", PriorPreservationOptions,
            "tuner_prior_preservation.prior:PriorPreservation", "after Ruiz et al. 2022, arXiv:2208.12242",
        )
    ]  # fmt: skip
