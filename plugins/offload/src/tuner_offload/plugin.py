"""Memory strategies: frozen weights wait in host memory or on disk and are streamed to the device. Importing this costs no torch."""

from __future__ import annotations

from tuner.component import Component
from tuner.config.options import Options
from tuner.hookspecs import hookimpl
from tuner_offload.options import BlockSwapOptions, GroupOffloadOptions, RamTorchOptions, StartupOptions

TUNER_HOOKSPEC_VERSION = 1


@hookimpl
def tuner_register_options() -> list[type[Options]]:
    """Keys that belong to no strategy."""
    return [StartupOptions]


@hookimpl
def tuner_register_memory_strategies() -> list[Component]:
    """Group offload, Musubi block swap, RamTorch."""
    return [
        Component(
            "group_offload", "groups of blocks, or layers, brought to the device in turn", GroupOffloadOptions,
            "tuner_offload.group:GroupOffload", source="https://huggingface.co/docs/diffusers/optimization/memory",
        ),
        Component(
            "block_swap", "Musubi block swap: a number of blocks streamed, the rest resident", BlockSwapOptions,
            "tuner_offload.block_swap:BlockSwap", source="https://github.com/kohya-ss/musubi-tuner",
        ),
        Component(
            "ramtorch", "RamTorch: linear layers streamed one by one", RamTorchOptions,
            "tuner_offload.ramtorch:RamTorch", source="https://github.com/lodestone-rock/RamTorch",
        ),
    ]  # fmt: skip
