"""Training regularizers for tuner. Importing this costs no torch."""

from __future__ import annotations

from tuner.component import Component
from tuner.hookspecs import hookimpl
from tuner_regularizers.crepa_options import CrepaOptions
from tuner_regularizers.tread_options import TreadOptions

TUNER_HOOKSPEC_VERSION = 1


@hookimpl
def tuner_register_regularizers() -> list[Component]:
    """TREAD and CREPA."""
    return [
        Component(
            "tread", "TREAD: a share of the video tokens skips a range of blocks in training", TreadOptions,
            "tuner_regularizers.tread:Tread", source="https://arxiv.org/abs/2501.04765",
        ),
        Component(
            "crepa", "CREPA: hidden tokens are drawn to an image encoder's features of the same and neighbouring frames", CrepaOptions,
            "tuner_regularizers.crepa:Crepa", source="https://arxiv.org/abs/2506.09229",
        ),
    ]  # fmt: skip
