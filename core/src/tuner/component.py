"""What a plugin offers, as a record: the registration hooks return lists of these and do nothing else."""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, requires, version

from packaging.requirements import Requirement

from tuner.config.options import Options
from tuner.errors import PluginError, TunerError


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
    plugin: str = ""
    """The plugin that offers it, and the distribution of that plugin (empty where it has none): filled in when the plugin is loaded."""
    distribution: str = ""

    def load(self) -> object:
        """Imports the factory; raises `PluginError` with the reason and what installs a missing library when that fails."""
        module_name, _, attribute = self.factory.partition(":")
        try:
            return getattr(importlib.import_module(module_name), attribute)
        except (Exception, SystemExit) as error:
            if isinstance(error, (TunerError, MemoryError)):  # these say by themselves what is wrong
                raise
            kind = "" if isinstance(error, (ImportError, AttributeError)) else f"{type(error).__name__}: "
            reason = " ".join(f"{kind}{error}".split())
            owner = f" of plugin {self.plugin}" if self.plugin else ""
            message = f"component {self.name!r}{owner} cannot be imported from {self.factory}: {reason}"
            raise PluginError(message, remedy=self._remedy(error)) from error

    def _remedy(self, error: BaseException) -> str:
        """What to do about an import that failed: pip's line where a requirement is not met, else who can mend it."""
        owner, own = self.distribution or self.plugin or self.name, self.factory.partition(":")[0].partition(".")[0]
        missing = error.name or "" if isinstance(error, ModuleNotFoundError) else ""
        foreign = missing.partition(".")[0] != own
        if isinstance(error, ImportError) and foreign and (line := pip_line(self.distribution, self.extra)):
            return line
        if missing and foreign and "." not in missing:  # else the package is there, in a version without that module
            return f"install the package that has the module {missing}, which {owner} needs"
        return f"mend {owner}, or install another version of it; --debug shows where"


def pip_line(distribution: str, extra: str = "") -> str:
    """What installs the requirements of a distribution and its `extra` that are not met here; empty where all are, or none are known."""
    try:
        declared = [Requirement(line) for line in requires(distribution) or []] if distribution else []
    except PackageNotFoundError:
        return ""
    unmet = [item for item in declared if (item.marker is None or item.marker.evaluate({"extra": extra})) and not _met(item)]
    if any(item.marker is not None and not item.marker.evaluate({"extra": ""}) for item in unmet):
        return f'pip install "{distribution}[{extra}]"'
    return " ".join(["pip install", *(f'"{str(item).partition(";")[0].strip()}"' for item in unmet)]) if unmet else ""


def _met(requirement: Requirement) -> bool:
    try:
        return requirement.specifier.contains(version(requirement.name), prereleases=True)
    except PackageNotFoundError:
        return False
