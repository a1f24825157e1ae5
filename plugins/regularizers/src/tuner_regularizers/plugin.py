"""Training regularizers for tuner. This version recognises the keys of TREAD and CREPA and declines them with a reason."""

from __future__ import annotations

from tuner.config.options import Options
from tuner.hookspecs import hookimpl
from tuner_regularizers.options import CrepaOptions, TreadOptions

TUNER_HOOKSPEC_VERSION = 1


@hookimpl
def tuner_register_options() -> list[type[Options]]:
    """The keys of both techniques."""
    return [TreadOptions, CrepaOptions]
