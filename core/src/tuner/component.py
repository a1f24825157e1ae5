"""What a plugin offers, as a record: the registration hooks return lists of these and do nothing else."""

from __future__ import annotations

import importlib
from dataclasses import dataclass

from tuner.config.options import Options
from tuner.errors import PluginError


@dataclass(frozen=True, slots=True)
class Component:
    """One thing that a user can name: a family, an encoder, a loss, a regularizer, an optimizer, ..."""

    name: str
    """What users type; unique within its kind."""
    summary: str
    """One line for `tuner plugins`."""
    options: type[Options]
    """The keys it reads. Importing the class imports no torch. Several components may share one class."""
    factory: str
    """`package.module:attribute`, imported only when a run needs it."""
    source: str = ""
    """Paper or upstream project."""
    extra: str = ""
    """The extra of its distribution that installs what it needs; empty: nothing beyond the distribution's own requirements."""
    flavours: tuple[tuple[str, str], ...] = ()
    """Of a family: the values of `model_flavour`, the default first, each with one line for people."""

    def load(self) -> object:
        """Imports the factory; raises `PluginError` with the reason when that fails."""
        module_name, _, attribute = self.factory.partition(":")
        try:
            return getattr(importlib.import_module(module_name), attribute)
        except (ImportError, AttributeError) as error:
            raise PluginError(
                f"component {self.name!r} cannot be imported from {self.factory}: {error}",
                remedy="run `tuner plugins check`",
            ) from error
