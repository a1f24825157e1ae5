"""The tiny family as a plugin, with a memory strategy that finds wrong uses of weights.

It is loaded only where `TUNER_PLUGINS` names `testing`, or by `tuner.testing.registry`. Importing this costs no torch.
"""

from __future__ import annotations

from tuner.component import Component
from tuner.config.options import Options
from tuner.hookspecs import hookimpl
from tuner.testing.options import SimulatedOptions, TinyOptions

TUNER_HOOKSPEC_VERSION = 1


@hookimpl
def tuner_register_families() -> list[Component]:
    """Real arithmetic at toy size, made on the spot."""
    return [
        Component("tiny-mixing", "a toy model of video with sound, for tests of plugins", TinyOptions, "tuner.testing.family:TinyFamily")
    ]


@hookimpl
def tuner_register_loaders() -> list[Component]:
    """Its one file layout."""
    return [Component("tiny-mixing", "one .safetensors file", Options, "tuner.testing.weights:TinyFile")]


@hookimpl
def tuner_register_memory_strategies() -> list[Component]:
    """Weights that are there for as long as they are asked for."""
    factory = "tuner.testing.streaming:SimulatedStreaming"
    return [Component("simulated_streaming", "weights are not a number while they are not held", SimulatedOptions, factory)]
