"""For plugin authors: a tiny complete family, runs in the hands of a test, and conformance tests for each kind of component.

`registry` and `TinyProject` run a plugin without installing it; `TUNER_PLUGINS=testing,yours tuner train --family tiny-mixing` does so on
the command line. The conformance classes are base classes for pytest: subclass one, name your plugin and component, and run pytest.
Nothing here imports pytest.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tuner.testing.conformance import Conformance, check
    from tuner.testing.encoder_conformance import EncoderConformance
    from tuner.testing.family_conformance import FamilyConformance
    from tuner.testing.format_conformance import FormatConformance
    from tuner.testing.loss_conformance import LossTermConformance
    from tuner.testing.memory_conformance import MemoryStrategyConformance
    from tuner.testing.project import TinyProject, Trial, registry
    from tuner.testing.regularizer_conformance import RegularizerConformance

__all__ = [
    "Conformance", "EncoderConformance", "FamilyConformance", "FormatConformance", "LossTermConformance", "MemoryStrategyConformance",
    "RegularizerConformance", "TinyProject", "Trial", "check", "registry",
]  # fmt: skip

_HOMES: Mapping[str, str] = {
    "Conformance": "conformance", "EncoderConformance": "encoder_conformance", "FamilyConformance": "family_conformance",
    "FormatConformance": "format_conformance", "LossTermConformance": "loss_conformance",
    "MemoryStrategyConformance": "memory_conformance", "RegularizerConformance": "regularizer_conformance", "TinyProject": "project",
    "Trial": "project", "check": "conformance", "registry": "project",
}  # fmt: skip


def __getattr__(name: str) -> object:
    """Imported when asked for: the plugin beside these modules is loaded without torch."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
