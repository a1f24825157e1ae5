"""What is known about one plugin, and its hooks."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal, get_args

import pluggy

from tuner.component import Component
from tuner.config.options import Options
from tuner.errors import TunerError

CORE = "core"
"""Owner of the keys in `tuner.config.settings`."""
BUILTINS = "builtins"
"""The core's own plugin: always loaded, first."""

Kind = Literal[
    "family", "loader", "latent_encoder", "loss_term", "regularizer", "memory_strategy", "quantizer", "optimizer", "tracker",
    "checkpoint_format",
]
KINDS: tuple[Kind, ...] = get_args(Kind)
IRREGULAR = {"family": "families", "memory_strategy": "memory_strategies"}


def registration_hook(kind: Kind) -> str:
    """The hook that registers components of `kind`."""
    return f"tuner_register_{IRREGULAR.get(kind, kind + 's')}"


@dataclass(frozen=True, slots=True)
class PluginRecord:
    """One plugin as `tuner plugins` shows it."""

    name: str
    distribution: str
    """The installed distribution it came from; empty for modules given directly."""
    version: str
    status: Literal["loaded", "failed", "disabled"]
    reason: str = ""
    """Why it is not loaded."""
    components: Mapping[Kind, tuple[Component, ...]] = field(default_factory=dict)
    option_types: tuple[type[Options], ...] = ()
    """Its own option models and its components', without repeats."""
    claimed: tuple[str, ...] = ()
    """Of a failed plugin: the component names it would have offered, as far as known."""
    notes: tuple[str, ...] = ()
    """Oddities that do no harm but that its author should know."""


@dataclass(frozen=True, slots=True)
class LoadedPlugin:
    """A record with the plugin's hooks; a plugin that is not loaded has none."""

    record: PluginRecord
    manager: pluggy.PluginManager | None = None

    def call(self, hook: str, **arguments: object) -> list[object]:
        """Calls the plugin's implementation: one result, or none where it has no such hook. Raises what the plugin raises."""
        if self.manager is None:
            return []
        results: list[object] = getattr(self.manager.hook, hook)(**arguments)
        return results


def reason_of(error: BaseException) -> str:
    """An exception in one line."""
    if isinstance(error, TunerError):
        return " ".join(str(error).split())
    return " ".join(f"{type(error).__name__}: {error}".split())
