"""What `tuner plugins` says: rows, JSON, and a check that imports everything that plugins promise."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Mapping
from dataclasses import dataclass

from tuner.component import Component
from tuner.config.vocabulary import did_you_mean, keys_of, nearest
from tuner.errors import ConfigError
from tuner.plugins.record import Kind, PluginRecord, reason_of
from tuner.plugins.registry import Registry

INTERFACES: Mapping[Kind, str] = {
    "family": "tuner.interfaces.family:ModelFamily",
    "loader": "tuner.interfaces.services:Loader",
    "latent_encoder": "tuner.interfaces.encoders:LatentEncoder",
    "loss_term": "tuner.interfaces.losses:LossTerm",
    "regularizer": "tuner.interfaces.losses:Regularizer",
    "memory_strategy": "tuner.interfaces.memory:MemoryStrategy",
    "quantizer": "tuner.interfaces.memory:Quantizer",
    "tracker": "tuner.interfaces.services:Tracker",
    "checkpoint_format": "tuner.interfaces.services:CheckpointFormat",
}
"""What the factory of a component must be a subclass of; kinds not named here take any callable."""


@dataclass(frozen=True, slots=True)
class Finding:
    """The verdict on one plugin or component."""

    plugin: str
    subject: str
    """`plugin`, or kind and name of a component."""
    ok: bool
    reason: str = ""

    def as_json(self) -> dict[str, object]:
        """For `--json`."""
        return {"plugin": self.plugin, "subject": self.subject, "ok": self.ok, "reason": self.reason}


def rows(registry: Registry) -> list[tuple[str, str, str, str]]:
    """Name, version, status, and what it provides or why it is not loaded; one row per plugin."""
    return [(record.name, record.version, record.status, record.reason or _provides(record)) for record in registry.plugins]


def _provides(record: PluginRecord) -> str:
    offered = [f"{kind} {', '.join(component.name for component in group)}" for kind, group in record.components.items()]
    keys = sum(len(keys_of(options)) for options in record.option_types)
    return "; ".join([*offered, *([f"{keys} keys"] if keys else []), *record.notes])


def facts(record: PluginRecord) -> dict[str, object]:
    """One plugin for `--json`."""
    return {
        "name": record.name,
        "distribution": record.distribution,
        "version": record.version,
        "status": record.status,
        "reason": record.reason,
        "notes": list(record.notes),
        "components": {
            kind: [{"name": c.name, "summary": c.summary, "factory": c.factory, "source": c.source} for c in group]
            for kind, group in record.components.items()
        },
        "keys": [key.name for options in record.option_types for key in keys_of(options)],
    }


def record_named(registry: Registry, name: str) -> PluginRecord:
    """The plugin of this name, or the one that offers a component of this name. Raises `ConfigError` with near names."""
    for record in registry.plugins:
        if record.name == name:
            return record
    for record in registry.plugins:
        if any(component.name == name for group in record.components.values() for component in group):
            return record
    known = [record.name for record in registry.plugins]
    advice = did_you_mean(nearest(name, known)) or f"there is {', '.join(known)}"
    raise ConfigError("no plugin or component has this name", value=name, remedy=advice)


def check(registry: Registry) -> list[Finding]:
    """Imports every factory; one finding per plugin, and one per component of those that are loaded."""
    findings: list[Finding] = []
    for record in registry.plugins:
        findings.append(Finding(record.name, "plugin", record.status != "failed", record.reason or "; ".join(record.notes)))
        for kind, group in record.components.items():
            findings.extend(_check_component(record.name, kind, component) for component in group)
    return findings


def _check_component(plugin: str, kind: Kind, component: Component) -> Finding:
    subject = f"{kind} {component.name}"
    try:
        reason = _misfit(kind, component.load())
    except Exception as error:  # whatever importing a plugin's module raises
        reason = reason_of(error)
    return Finding(plugin, subject, not reason, reason)


def _misfit(kind: Kind, factory: object) -> str:
    """Why `factory` cannot make components of `kind`; empty when it can."""
    if not callable(factory):
        return "its factory cannot be called"
    if kind not in INTERFACES:
        return ""
    module, _, name = INTERFACES[kind].partition(":")
    interface = getattr(importlib.import_module(module), name)
    if not (isinstance(factory, type) and issubclass(factory, interface)):
        return f"its factory is no subclass of {module}.{name}"
    missing = sorted(getattr(factory, "__abstractmethods__", ())) if inspect.isabstract(factory) else []
    return f"its factory does not implement {', '.join(missing)}" if missing else ""
