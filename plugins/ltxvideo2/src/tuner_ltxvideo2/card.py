"""What the model card of an LTX-2 result says: which of diffusers' pipelines takes it, and from where that loads the base model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from tuner.config.settings import ModelSettings
from tuner.interfaces.services import CardFacts
from tuner_ltxvideo2.options import LTX2Options
from tuner_ltxvideo2.variants import DEFAULT_FLAVOUR, FLAVOURS

# Named by diffusers' own documentation (0.42). Flavours that are missing here are published in a layout of their own only.
REPOSITORIES: Final[Mapping[str, str]] = {
    "dev": "Lightricks/LTX-2", "dev-fp8": "Lightricks/LTX-2", "dev-fp4": "Lightricks/LTX-2",
    "2.3-dev": "diffusers/LTX-2.3-Diffusers", "2.3-distilled": "diffusers/LTX-2.3-Distilled-Diffusers",
    "2.5-distilled": "Lightricks/LTX-2.5-Diffusers",
}  # fmt: skip
"""Flavour -> hub repository with the same weights in diffusers' layout."""


def card_facts(settings: ModelSettings, options: LTX2Options, given: frozenset[str]) -> CardFacts:
    """`given`: what clips are trained with: "first_frame", "reference", "mask"."""
    flavour = settings.model_flavour or DEFAULT_FLAVOUR
    published = settings.pretrained_model_name_or_path in ("", FLAVOURS[flavour].repository)
    repository = REPOSITORIES.get(flavour, "") if published else ""
    if "reference" in given:
        return CardFacts("video-to-video", "LTX2InContextPipeline", repository)
    if "first_frame" in given or options.i2v_conditioning_probability > 0:
        return CardFacts("image-to-video", "LTX2ImageToVideoPipeline", repository)
    return CardFacts(pipeline="LTX2Pipeline", repository=repository)
