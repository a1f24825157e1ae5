"""Registers LayerSync."""

from __future__ import annotations

from tuner.component import Component
from tuner.hookspecs import hookimpl
from tuner_layersync.options import LayerSyncOptions

TUNER_HOOKSPEC_VERSION = 1


@hookimpl
def tuner_register_regularizers() -> list[Component]:
    """One component, switched on by `layersync_weight`."""
    return [
        Component(
            "layersync", "aligns the tokens of an early block with those of a later one", LayerSyncOptions,
            "tuner_layersync.layersync:LayerSync", "Haghighi et al. 2025, arXiv:2510.12581",
        )
    ]  # fmt: skip
