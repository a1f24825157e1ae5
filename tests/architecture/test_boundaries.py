"""Who may know whom: the core names no technique, plugins do not know each other, and imports have one direction."""

from __future__ import annotations

import ast
import re

import pytest

from architecture.source_files import ROOT, Source, plugin_packages, python_files

CORE = "core/src/tuner"
TECHNIQUES = re.compile(r"ltx|gemma|tread|crepa|musubi|ramtorch", re.IGNORECASE)
EVERYDAY = re.compile(r"threads?|threading|spread\w*|stread\w*", re.IGNORECASE)
EXEMPT = ("core/src/tuner/testing/", "core/src/tuner/templates/")

LAYERS = [
    "foundation", "interfaces", "config", "model", "data", "plugins", "builtins", "html", "watch", "inspect", "doctor", "train", "testing",
    "cli",
]  # fmt: skip
ALLOWED = {
    "foundation": {"foundation", "config"},
    "config": {"foundation", "config"},
    "interfaces": {"foundation", "config", "interfaces"},
    "plugins": {"foundation", "config", "interfaces", "plugins"},
    "data": {"foundation", "config", "interfaces", "data"},
    "model": {"foundation", "config", "interfaces", "data", "model"},
    "builtins": {"foundation", "config", "interfaces", "model", "data", "builtins"},
    "html": {"html"},
    "watch": {"foundation", "config", "html", "watch"},
    "inspect": {"foundation", "config", "interfaces", "plugins", "data", "html", "inspect"},
    "doctor": {"foundation", "config", "interfaces", "plugins", "data", "model", "doctor"},
    "train": {"foundation", "config", "interfaces", "plugins", "data", "model", "builtins", "html", "watch", "inspect", "train"},
    "testing": set(LAYERS) - {"cli"},
    "cli": set(LAYERS),
}
"""Layer of the core -> the layers it may import. `foundation` is what lies in the package itself: errors, component, hookspecs."""

PUBLIC_FOR_PLUGINS = {"foundation", "config", "interfaces", "data", "model", "testing"}


def layer(module: str) -> str:
    parts = module.split(".")
    return parts[1] if len(parts) > 1 and parts[1] in ALLOWED else "foundation"


def layer_of(source: Source) -> str:
    parts = source.path.relative_to(ROOT / CORE).parts
    return parts[0] if len(parts) > 1 else "foundation"


def core_imports(source: Source) -> list[tuple[str, int]]:
    return [(module, line) for module, line, typing in source.imports() if not typing and module.split(".")[0] == "tuner"]


def test_the_core_names_no_family_and_no_technique():
    sources = [source for source in python_files(CORE) if not source.name.startswith(EXEMPT)]
    lines = [(source.name, line.strip()) for source in sources for line in source.text.splitlines()]
    assert not [(name, line) for name, line in lines if TECHNIQUES.search(EVERYDAY.sub("", line))]


def test_every_folder_of_the_core_is_a_known_layer():
    assert {layer_of(source) for source in python_files(CORE)} <= {*ALLOWED, "templates"}, "say in ALLOWED what a new layer may import"


@pytest.mark.parametrize("own", ALLOWED)
def test_imports_have_one_direction(own):
    wrong = [
        (source.name, module, line)
        for source in python_files(CORE)
        if layer_of(source) == own
        for module, line in core_imports(source)
        if layer(module) not in ALLOWED[own]
    ]
    assert not wrong


@pytest.mark.parametrize("package", plugin_packages())
def test_plugins_know_neither_each_other_nor_the_command_line(package):
    sources = [source for source in python_files("plugins") if package in source.path.parts]
    assert sources
    others = set(plugin_packages()) - {package}
    for source in sources:
        modules = [(module, line) for module, line, _ in source.imports()]
        strangers = [(module, line) for module, line in modules if module.split(".")[0] in others]
        assert not strangers, f"{source.name} imports another plugin: {strangers}"
        private = [(m, line) for m, line in modules if m.startswith("tuner.") and layer(m) not in PUBLIC_FOR_PLUGINS]
        assert not private, f"{source.name} imports what is the core's own: {private}"


def test_the_core_imports_no_plugin():
    modules = [(source.name, module) for source in python_files(CORE) for module, _, _ in source.imports()]
    assert not [(name, module) for name, module in modules if module.split(".")[0] in plugin_packages()]


@pytest.mark.parametrize("folder", ["core", "plugins", "tests", "benchmarks"])
def test_no_relative_imports(folder):
    assert not [(source.name, line) for source in python_files(folder) for module, line, _ in source.imports() if module.startswith(".")]


@pytest.mark.parametrize("path", ["cli/main.py", "cli/plugins.py", "cli/options.py", "hookspecs.py", "component.py", "config", "plugins"])
def test_the_command_line_path_imports_no_heavy_library_at_the_top(path):
    heavy = {"torch", "diffusers", "transformers", "peft", "accelerate", "safetensors", "numpy", "av"}
    found = [
        (source.name, module)
        for source in python_files(CORE)
        if source.name.removeprefix(CORE + "/").startswith(path)
        for module, _, typing in source.imports()
        if not typing and module.split(".")[0] in heavy
    ]
    assert not found


def test_broad_excepts_stand_only_where_plugins_load_and_events_are_dispatched():
    """And where a plugin's answer is asked for; at the outermost border of the command line, which shows a bug in full; where a thread
    hands its error to another; around the page about a run."""
    names = (
        "plugins/loader.py", "plugins/registry.py", "plugins/report.py", "plugins/guard.py", "cli/main.py", "data/prefetch.py",
        "train/trackers.py", "doctor/findings.py", "train/recorder.py",
    )  # fmt: skip
    allowed = {f"{CORE}/{name}" for name in names}
    sources = [*python_files("core"), *python_files("plugins")]
    found = {source.name for source in sources for node in source.nodes if isinstance(node, ast.ExceptHandler) and swallows(node)}
    assert found <= allowed, f"except Exception in {sorted(found - allowed)}"


def swallows(handler: ast.ExceptHandler) -> bool:
    """Whether a handler catches everything and does not raise it again."""
    caught = handler.type.elts if isinstance(handler.type, ast.Tuple) else [handler.type]
    broad = any(item is None or (isinstance(item, ast.Name) and item.id in ("Exception", "BaseException")) for item in caught)
    return broad and not any(isinstance(node, ast.Raise) and node.exc is None for node in ast.walk(handler))
