"""What this plugin offers. Imports no torch: components are named here and imported when a run needs them."""

from __future__ import annotations

from tuner.component import Component
from tuner.config.options import Options
from tuner.hookspecs import hookimpl
from tuner_ltxvideo2.options import LTX2Options

_UPSTREAM = "https://huggingface.co/Lightricks/LTX-2"


@hookimpl
def tuner_register_families() -> list[Component]:
    """LTX-2: video and sound in one transformer."""
    return [
        Component(
            name="ltxvideo2",
            summary="LTX-2 (2.0 and 2.3): video with sound from one transformer",
            options=LTX2Options,
            factory="tuner_ltxvideo2.family:LTX2Family",
            source=_UPSTREAM,
        )
    ]


@hookimpl
def tuner_register_loaders() -> list[Component]:
    """The two layouts in which LTX-2 is published."""
    return [
        Component(
            name="ltxvideo2-combined",
            summary="one .safetensors file with all networks, in the published names",
            options=Options,
            factory="tuner_ltxvideo2.loading:CombinedFile",
            source=_UPSTREAM,
        ),
        Component(
            name="ltxvideo2-diffusers",
            summary="a folder with one subfolder per network, as diffusers saves it",
            options=Options,
            factory="tuner_ltxvideo2.loading:DiffusersFolder",
            source=_UPSTREAM,
        ),
    ]


@hookimpl
def tuner_register_checkpoint_formats() -> list[Component]:
    """The adapter file that other programs load."""
    return [
        Component(
            name="universal",
            summary="LoRA in the published names, alpha folded in: one file for diffusers and ComfyUI",
            options=Options,
            factory="tuner_ltxvideo2.lora:UniversalFormat",
        )
    ]
