"""The core's own loss keeps to what every loss term promises."""

from __future__ import annotations

from collections.abc import Mapping
from types import SimpleNamespace
from typing import ClassVar

from tuner.builtins.losses import FlowMatchingLoss
from tuner.component import Component
from tuner.config.options import Options, option
from tuner.hookspecs import hookimpl
from tuner.interfaces.family import BuildContext
from tuner.testing import LossTermConformance


class AgainOptions(Options):
    """The core's loss once more."""

    again_weight: float = option(0.0, ge=0, help="Weight.")
    again_on: bool = option(False, help="Whether it is there at all.")

    def enabled(self) -> bool:
        return self.again_on


class Video(FlowMatchingLoss):
    """As a plugin's component is built."""

    def __init__(self, options: AgainOptions, context: BuildContext) -> None:
        super().__init__("video", options.again_weight)


class Audio(FlowMatchingLoss):
    """The stream that some clips lack."""

    def __init__(self, options: AgainOptions, context: BuildContext) -> None:
        super().__init__("audio", options.again_weight)


COMPONENTS = [Component(name, "for a test", AgainOptions, f"core.test_builtins_conform:{name.title()}") for name in ("video", "audio")]
PLUGIN = SimpleNamespace(tuner_register_loss_terms=hookimpl(lambda: COMPONENTS))


class TestFlowMatchingOfPictures(LossTermConformance):
    plugin = PLUGIN
    component = "video"
    options: ClassVar[Mapping[str, object]] = {"again_on": True, "again_weight": 3.0}
    zero: ClassVar[Mapping[str, object]] = {"again_weight": 0.0}


class TestFlowMatchingOfSound(LossTermConformance):
    plugin = PLUGIN
    component = "audio"
    options: ClassVar[Mapping[str, object]] = {"again_on": True, "again_weight": 3.0}
    zero: ClassVar[Mapping[str, object]] = {"again_weight": 0.0}
