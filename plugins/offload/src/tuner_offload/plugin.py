"""Memory strategies for tuner. This version recognises their keys and says that weights stay resident."""

from __future__ import annotations

from tuner.config.options import Options
from tuner.hookspecs import hookimpl
from tuner_offload.options import BlockSwapOptions, GroupOffloadOptions, RamTorchOptions, StartupOptions

TUNER_HOOKSPEC_VERSION = 1


@hookimpl
def tuner_register_options() -> list[type[Options]]:
    """The keys of all strategies."""
    return [GroupOffloadOptions, BlockSwapOptions, RamTorchOptions, StartupOptions]
