"""What all conformance classes have in common: the component under test, in runs of the tiny family, in one folder for the process."""

from __future__ import annotations

import atexit
import functools
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor

from tuner.component import Component
from tuner.config.options import Options
from tuner.interfaces.family import BuildContext
from tuner.plugins.record import Kind
from tuner.testing.project import TinyProject, Trial

RECOMPUTED: Mapping[str, Mapping[str, object]] = {
    "all blocks recomputed": {"gradient_checkpointing": True},
    "every other block recomputed": {"gradient_checkpointing": True, "gradient_checkpointing_interval": 2},
    "no block recomputed": {"gradient_checkpointing": False},
}
"""Every policy of activation checkpointing, as keys."""


def check(fits: bool, message: str) -> None:
    """Raises AssertionError with `message`: what is wrong and why it matters."""
    if not fits:
        raise AssertionError(message)


def same_bits(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> list[str]:
    """Names of tensors that differ in any bit, or that only one of the two has."""
    return sorted(name for name in one.keys() | other.keys() if name not in one or name not in other or not equal(one[name], other[name]))


def equal(one: Tensor, other: Tensor) -> bool:
    """Same shape, dtype and bits; NaN equals NaN."""
    if one.shape != other.shape or one.dtype != other.dtype:
        return False
    return torch.equal(one.contiguous().view(-1).view(torch.uint8), other.contiguous().view(-1).view(torch.uint8))


@functools.cache
def shared_folder() -> Path:
    """For clips, caches and tiny models of this process; gone at its end."""
    folder = Path(tempfile.mkdtemp(prefix="tuner-testing-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


_PROJECTS: list[tuple[object, TinyProject]] = []


def project_of(plugin: object) -> TinyProject:
    """Runs with one plugin (None: with none), over the process's clips."""
    for known, project in _PROJECTS:
        if known is plugin:
            return project
    made = TinyProject.make(shared_folder(), *(() if plugin is None else (plugin,)))
    _PROJECTS.append((plugin, made))
    return made


class Conformance:
    """Base of the conformance classes. A subclass whose name begins with `Test` is collected by pytest."""

    kind: ClassVar[Kind]
    plugin: ClassVar[object] = None
    """Your plugin module, the one that the entry point names; None: the component is one of the core's own."""
    component: ClassVar[str]
    """The name that it registers."""
    options: ClassVar[Mapping[str, object]] = {}
    """Keys of config.json that switch the component on, and any others that runs here need."""

    @property
    def project(self) -> TinyProject:
        """A folder with clips, and runs in it."""
        return project_of(self.plugin)

    def trial(self, **keys: object) -> Trial:
        """A run with the component switched on."""
        return self.project.trial(**{**self.options, **keys})

    def plain_trial(self, **keys: object) -> Trial:
        """The same run without it."""
        own = set(self.record().options.model_fields)
        return self.project.trial(**{key: value for key, value in {**self.options, **keys}.items() if key not in own})

    def record(self) -> Component:
        """The component's registration."""
        found = {component.name: component for component in self.project.registry.components(self.kind)}
        check(self.component in found, f"the plugin registers no {self.kind} {self.component!r}, but {sorted(found)}")
        return found[self.component]

    def own_options(self) -> Options:
        """Its option model with the keys of `options`."""
        return self.project.settings(**self.options).get(self.record().options)

    def context(self) -> BuildContext:
        """What factories are given."""
        return BuildContext(torch.device("cpu"), torch.float32, 0, 0, shared_folder() / "out")

    def build(self) -> object:
        """The component, built as a run builds it."""
        return self.record().load()(self.own_options(), self.context())  # type: ignore[operator]


class SwitchedComponent(Conformance):
    """A component that its own options switch on."""

    def test_it_is_off_unless_its_keys_switch_it_on(self) -> None:
        options = self.record().options
        check(
            not options().enabled(),
            f"{options.__name__}().enabled() is true: with its defaults the component would take part in every run of everybody who has "
            "the plugin installed; give a key a default that means off, and let enabled() ask for it",
        )
        check(self.own_options().enabled(), f"the keys {dict(self.options)} do not switch {self.component!r} on: nothing would be tested")

    def test_its_name_is_the_one_it_is_registered_with(self) -> None:
        name = getattr(self.build(), "name", None)
        check(
            name == self.component,
            f"the object's name is {name!r}, the component's {self.component!r}: losses, checkpoints and errors would call it by another "
            "name than users do",
        )
