"""What `tuner doctor` finds of Python, libraries, plugins, and of what a configuration asks for.

Versions are those that the installed distributions require of each other: no second list.
"""

from __future__ import annotations

import platform
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, metadata, requires, version
from pathlib import Path

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

from tuner.component import Component
from tuner.config.resolve import Settings
from tuner.config.settings import DataSettings, ModelSettings, OptimizerSettings, RunSettings, TrainSettings
from tuner.doctor.findings import Row, problem_of
from tuner.errors import TunerError
from tuner.plugins.record import Kind, PluginRecord
from tuner.plugins.registry import Registry

CORE_DISTRIBUTION = "tuner-framework"
NO_CHANGE = "no_change"
SWITCHED: tuple[Kind, ...] = ("memory_strategy", "regularizer", "loss_term", "latent_encoder")
"""Kinds of components that their options switch on."""


@dataclass(frozen=True)
class Need:
    """A library that a distribution requires."""

    requirement: Requirement
    installed: str
    """Its version; empty: it is missing."""

    @property
    def met(self) -> bool:
        """Whether it is there, in a version that is taken."""
        return bool(self.installed) and self.requirement.specifier.contains(self.installed, prereleases=True)

    @property
    def words(self) -> str:
        """`torch 2.5.1, and >=2.11 is needed`."""
        wanted = str(self.requirement.specifier)
        if not self.installed:
            return f"{self.requirement.name} is not installed"
        return f"{self.requirement.name} {self.installed}" + ("" if self.met else f", and {wanted} is needed")

    @property
    def pip(self) -> str:
        """What installs it."""
        extras = f"[{','.join(sorted(self.requirement.extras))}]" if self.requirement.extras else ""
        return f'pip install "{self.requirement.name}{extras}{self.requirement.specifier}"'


def needs(distribution: str, extra: str = "") -> list[Need]:
    """What an installed distribution requires here, or what its `extra` adds. Raises PackageNotFoundError."""
    found: list[Need] = []
    for requirement in map(Requirement, requires(distribution) or []):
        plain = requirement.marker is None or requirement.marker.evaluate({"extra": ""})
        added = bool(extra) and not plain and requirement.marker is not None and requirement.marker.evaluate({"extra": extra})
        if not (added if extra else plain):
            continue
        if canonicalize_name(requirement.name) == canonicalize_name(distribution):  # an extra made of others
            found += [need for inner in sorted(requirement.extras) for need in needs(distribution, inner)]
        else:
            found.append(Need(requirement, installed_version(requirement.name)))
    return found


def installed_version(distribution: str) -> str:
    """Empty where it is not installed."""
    try:
        return version(distribution)
    except PackageNotFoundError:
        return ""


def extras_of(distribution: str) -> list[str]:
    """The names of the extras that it declares."""
    return list(metadata(distribution).get_all("Provides-Extra") or [])


# --- Python, libraries, plugins ----------------------------------------------------------------------------------
def python_rows() -> Iterator[Row]:
    """The interpreter."""
    wanted, here = metadata(CORE_DISTRIBUTION)["Requires-Python"] or "", platform.python_version()
    found = f"{here} ({platform.system()} {platform.machine()})"
    if SpecifierSet(wanted).contains(here, prereleases=True):
        yield Row("python", "python", "ok", found)
    else:
        yield Row("python", "python", "problem", f"{found}, and {wanted} is needed", f"make an environment with Python {wanted}")


def library_rows(distribution: str) -> Iterator[Row]:
    """What an installed distribution of tuner requires: one row for all that is as it should be, one for each other."""
    found = needs(distribution)
    met = [f"{need.requirement.name} {need.installed}" for need in found if need.met]
    title = f"{distribution} {installed_version(distribution)}"
    if len(met) == len(found):
        yield Row("libraries", title, "ok", ", ".join(met) or "needs nothing")
    for need in (need for need in found if not need.met):
        yield Row("libraries", title, "problem", need.words, need.pip)


def distributions(registry: Registry) -> list[str]:
    """The core's, then those of installed plugins, each once."""
    found = [CORE_DISTRIBUTION, *(record.distribution for record in registry.plugins if record.status != "disabled")]
    return list(dict.fromkeys(name for name in found if name))


def plugin_rows(registry: Registry) -> Iterator[Row]:
    """Every plugin. One that does not load is a note: training without it works."""
    for record in registry.plugins:
        if record.status == "loaded":
            yield Row("plugins", record.name, "ok", "; ".join([_offered(record), *record.notes]))
        else:
            remedy = "mend or remove it; `tuner plugins check` says more" if record.status == "failed" else ""
            yield Row("plugins", record.name, "note", f"{record.status}: {record.reason}", remedy)
    if not registry.components("family"):
        yield Row("plugins", "families", "problem", "no plugin offers a model family", "install one, or mend the one that failed")


def _offered(record: PluginRecord) -> str:
    return "; ".join(f"{kind} {', '.join(c.name for c in group)}" for kind, group in record.components.items()) or "keys only"


def extra_rows(registry: Registry, distribution: str) -> Iterator[Row]:
    """Libraries that only some features of a distribution need."""
    for extra in extras_of(distribution):
        features = ", ".join(dict.fromkeys(_features(registry, distribution, extra)))
        found, purpose = needs(distribution, extra), f" (for {features})" if features else ""
        words = ", ".join(need.words for need in found) + purpose
        if all(need.met for need in found):
            yield Row("libraries", f"{distribution}[{extra}]", "ok", words)
        else:
            yield Row("libraries", f"{distribution}[{extra}]", "note", words, pip_extra(distribution, extra))


def _features(registry: Registry, distribution: str, extra: str) -> Iterator[str]:
    for record in registry.plugins:
        for kind, group in record.components.items():
            names = [component.name for component in group if component.extra == extra]
            if record.distribution == distribution and names:
                yield f"{kind.replace('_', ' ')} {', '.join(names)}"


def lacking(registry: Registry, kind: Kind, component: Component) -> tuple[str, str]:
    """What a component's extra lacks here, in words, and what installs it; empty where nothing does."""
    distribution = next((r.distribution for r in registry.plugins if component in r.components.get(kind, ())), "")
    words = ", ".join(need.words for need in _extra_needs(distribution, component.extra) if not need.met)
    return (words, pip_extra(distribution, component.extra)) if words else ("", "")


def pip_extra(distribution: str, extra: str) -> str:
    """What installs an extra."""
    return f'pip install "{distribution}[{extra}]"'


# --- what a configuration asks for -------------------------------------------------------------------------------
def configuration_rows(registry: Registry, settings: Settings, origin: str) -> Iterator[Row]:
    """Everything that the keys name: whether it is installed, and can be imported."""
    yield Row("configuration", "file", "ok", origin)
    for notice in settings.notices:
        yield Row("configuration", "file", "note", notice)
    if not settings.get(ModelSettings).model_family:
        names = ", ".join(component.name for component in registry.components("family"))
        yield Row("configuration", "model_family", "note", "is not set", f"set it, or give --family with one of: {names}")
    for key, kind, name in named_components(settings):
        try:
            component = registry.component(kind, name)
        except TunerError as error:
            yield problem_of("configuration", key, error)
            continue
        yield component_row(registry, key, kind, component)
    for kind in SWITCHED:
        for component in registry.components(kind):
            if settings.get(component.options).enabled():
                yield component_row(registry, kind.replace("_", " "), kind, component)
    yield from _length_rows(settings)
    yield from _hub_rows(settings)


def named_components(settings: Settings) -> Iterator[tuple[str, Kind, str]]:
    """(key, kind, name) of what is chosen by name."""
    model = settings.get(ModelSettings)
    if model.model_family:
        yield "model_family", "family", model.model_family
    yield "optimizer", "optimizer", settings.get(OptimizerSettings).optimizer
    for key in ("base_model_precision", "text_encoder_1_precision"):
        if (name := str(settings.value(key))) != NO_CHANGE:
            yield key, "quantizer", name
    for name in dict.fromkeys(word.strip() for word in settings.get(RunSettings).report_to.split(",")):
        if name and name != "none":
            yield "report_to", "tracker", name


def component_row(registry: Registry, key: str, kind: Kind, component: Component) -> Row:
    """Whether a component's libraries are there and its module can be imported."""
    subject = f"{kind.replace('_', ' ')} {component.name}"
    distribution = next((r.distribution for r in registry.plugins if component in r.components.get(kind, ())), "")
    words, pip = lacking(registry, kind, component)
    if words:
        return Row("configuration", key, "problem", f"{subject}: {words}", pip)
    try:
        component.load()
    except TunerError as error:
        return problem_of("configuration", key, error)
    versions = ", ".join(need.words for need in _extra_needs(distribution, component.extra))
    return Row("configuration", key, "ok", f"{subject}{f' ({versions})' if versions else ''}")


def _extra_needs(distribution: str, extra: str) -> Sequence[Need]:
    return needs(distribution, extra) if distribution and extra else ()


def _hub_rows(settings: Settings) -> Iterator[Row]:
    if settings.get(RunSettings).push_to_hub:
        from huggingface_hub import get_token

        if not get_token():
            remedy = "run `hf auth login` with a token that may write, or set push_to_hub to false"
            yield Row("configuration", "push_to_hub", "problem", "there is no token of the model hub", remedy, 8)


def _length_rows(settings: Settings) -> Iterator[Row]:
    """A run without a length does not start; a flag may still give it."""
    train = settings.get(TrainSettings)
    if not train.max_train_steps and not train.num_train_epochs:
        remedy = "set max_train_steps or num_train_epochs"
        yield Row("configuration", "max_train_steps", "note", "the length of the run is not given", remedy)


def folders_of(settings: Settings | None) -> dict[str, Path]:
    """Key -> folder that a run writes to."""
    run, data = (settings.get(RunSettings), settings.get(DataSettings)) if settings else (RunSettings(), DataSettings())
    return {"output_dir": Path(run.output_dir).expanduser(), "cache_dir": Path(data.cache_dir.partition("{")[0] or ".").expanduser()}
