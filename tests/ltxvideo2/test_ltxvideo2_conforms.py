"""The family's tiny flavour, its encoders and its adapter file keep to what every such component promises."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import ClassVar

import torch

import tuner_ltxvideo2.plugin
from tuner.interfaces.encoders import LatentEncoder
from tuner.testing import EncoderConformance, FamilyConformance, FormatConformance, TinyProject
from tuner.testing.conformance import project_of
from tuner.train.plan import Plan

OPTIONS: Mapping[str, object] = {"model_flavour": "tiny", "resolution": 64}


class TestFamilyConforms(FamilyConformance):
    plugin = tuner_ltxvideo2.plugin
    component = "ltxvideo2"
    options: ClassVar[Mapping[str, object]] = OPTIONS
    captions_of_full_length = False
    """The tiny text encoder reads 64 tokens."""


class TestUniversalFormatConforms(FormatConformance):
    plugin = tuner_ltxvideo2.plugin
    component = "universal"
    modules = ("transformer_blocks.0.attn1.to_q", "transformer_blocks.3.audio_ff.net.2", "audio_proj_in")


@functools.cache
def planned() -> Plan:
    project: TinyProject = project_of(tuner_ltxvideo2.plugin)
    return project.plan(model_family="ltxvideo2", **OPTIONS)


class OfTheFamily(EncoderConformance):
    """float32 convolutions and products add up in another order for another number of clips."""

    name: ClassVar[str]
    tolerance = 1e-5

    def encoder(self) -> LatentEncoder:
        plan = planned()
        found = plan.family.encoders(plan.source, plan.streams)
        return next(encoder for encoder in found if encoder.name == self.name)


class TestVideoEncoderConforms(OfTheFamily):
    name = "video"


class TestAudioEncoderConforms(OfTheFamily):
    name = "audio"


class TestTextEncoderConforms(OfTheFamily):
    name = "text"


def test_records_are_of_the_runs_dtype() -> None:
    """What the tolerance above is a few units of."""
    assert planned().context.dtype == torch.float32
