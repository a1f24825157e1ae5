"""The core's own loss keeps to what every loss term promises."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from types import SimpleNamespace
from typing import ClassVar

from tuner.builtins.losses import FlowMatchingLoss
from tuner.component import Component
from tuner.config.options import Options, option
from tuner.hookspecs import hookimpl
from tuner.interfaces.family import BuildContext
from tuner.interfaces.losses import LossTerm, LossValue, StepState
from tuner.testing import LossTermConformance


class AgainOptions(Options):
    """The core's loss once more."""

    again_weight: float = option(0.0, ge=0, help="Weight.")
    again_on: bool = option(False, help="Whether it is there at all.")

    def enabled(self) -> bool:
        return self.again_on


class Again(LossTerm):
    """The loss of a stream under a name of its own, as a plugin's component is built."""

    stream: ClassVar[str]

    def __init__(self, options: AgainOptions, context: BuildContext) -> None:
        self.name = f"again_{self.stream}"
        self.loss = FlowMatchingLoss(self.stream, options.again_weight)

    def __call__(self, state: StepState) -> LossValue:
        return replace(self.loss(state), name=self.name)


class Video(Again):
    stream = "video"


class Audio(Again):
    """The stream that some clips lack."""

    stream = "audio"


COMPONENTS = [
    Component(f"again_{name}", "for a test", AgainOptions, f"core.test_builtins_conform:{name.title()}") for name in ("video", "audio")
]
PLUGIN = SimpleNamespace(tuner_register_loss_terms=hookimpl(lambda: COMPONENTS))


class TestFlowMatchingOfPictures(LossTermConformance):
    plugin = PLUGIN
    component = "again_video"
    options: ClassVar[Mapping[str, object]] = {"again_on": True, "again_weight": 3.0}
    zero: ClassVar[Mapping[str, object]] = {"again_weight": 0.0}


class TestFlowMatchingOfSound(LossTermConformance):
    plugin = PLUGIN
    component = "again_audio"
    options: ClassVar[Mapping[str, object]] = {"again_on": True, "again_weight": 3.0}
    zero: ClassVar[Mapping[str, object]] = {"again_weight": 0.0}
