"""`tuner cache`: encodes clips and captions, and stops before training."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tuner.cli.common import ConfiguredCommand
from tuner.cli.train import Terminal
from tuner.config.resolve import Settings
from tuner.plugins.registry import Registry


def run(registry: Registry, settings: Settings, arguments: Mapping[str, Any]) -> int:
    """Plans, then fills the cache."""
    from tuner.train.session import cache  # torch

    terminal = Terminal(settings)
    try:
        cache(registry, settings, terminal)
    finally:
        terminal.close()
    return 0


command = ConfiguredCommand("cache", "Encode clips and captions into the cache, so that training can start at once.", run)
