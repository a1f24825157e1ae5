"""What this plugin offers. Imports no torch: components are named here and imported when a run needs them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

from tuner.component import Component
from tuner.config.options import Options
from tuner.errors import DataError, TunerError
from tuner.hookspecs import hookimpl
from tuner_ltxvideo2.options import LTX2Options
from tuner_ltxvideo2.variants import FLAVOURS

if TYPE_CHECKING:
    from tuner.data.manifest import Manifest
    from tuner.interfaces.family import ModelFamily

_NAME = "ltxvideo2"
_SHOWN = 5
"""Files that an error lists before it only counts."""
_UPSTREAM = "https://huggingface.co/Lightricks/LTX-2"


@hookimpl
def tuner_register_families() -> list[Component]:
    """LTX-2: video and sound in one transformer."""
    return [
        Component(
            name=_NAME,
            summary="LTX-2 (2.0, 2.3 and 2.5): video with sound from one transformer",
            options=LTX2Options,
            factory="tuner_ltxvideo2.family:LTX2Family",
            source=_UPSTREAM,
            flavours=tuple((name, flavour.note) for name, flavour in FLAVOURS.items()),
        )
    ]


@hookimpl
def tuner_register_loaders() -> list[Component]:
    """The layouts in which LTX-2 is published."""
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
        Component(
            name="ltxvideo2-split",
            summary="one .safetensors file per network, as LTX-2.5 is published",
            options=Options,
            factory="tuner_ltxvideo2.split:SplitFiles",
            source="https://huggingface.co/Lightricks/LTX-2.5",
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


class Planned(Protocol):
    """What is looked at of a run's plan."""

    family_name: str
    family: ModelFamily
    streams: tuple[str, ...]
    manifest: Manifest


@hookimpl
def tuner_check_plan(plan: Planned) -> list[TunerError]:
    """Items without the only stream that is learned."""
    learned = plan.family.learned_streams(plan.streams) if plan.family_name == _NAME else ()
    if len(learned) != 1:
        return []
    lacking = [item.path for item in plan.manifest.items if (not item.has_audio if learned == ("audio",) else item.kind == "audio")]
    if not lacking:
        return []
    more = f"\n  and {len(lacking) - _SHOWN} more" if len(lacking) > _SHOWN else ""
    names = "".join(f"\n  {path}" for path in lacking[:_SHOWN])
    return [DataError(f"nothing but {learned[0]} is learned, and these have none:{names}{more}", where="datasets", remedy="leave them out")]
