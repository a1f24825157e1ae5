"""The tail is guarded: the longest file, the longest function, the largest class; and what no file may contain."""

from __future__ import annotations

import ast
import re
from pathlib import PurePath

import pytest

from architecture.source_files import python_files, text_files

FILE_LINES, FUNCTION_LINES, PUBLIC_METHODS = 420, 70, 15
SHIPPED = [*python_files("core"), *python_files("plugins"), *python_files("examples")]

MACHINE_PATH = re.compile(r"(?<![\w.])/(?:work|home/\w|Users/\w|root/|mnt/\w|scratch)\b|[A-Z]:\\\\Users")
REGISTRY = re.compile(r"(?:index-url|find-links)\s*[= ]\s*\S*(?:https?|file):|https?://[\w.-]*(?:artifactory|nexus|\.internal|\.corp|\.local)\b")
OTHER_PRODUCTS = re.compile("|".join(["simple" + "tuner", "one" + "trainer", "comfy" + "dep" + "loy", "fal" + r"\.ai"]), re.IGNORECASE)
"""Programs whose licence or business must not leak into the code; written in halves so that this file does not name them."""
PLACEHOLDER = re.compile(r"\b(?:TODO|FIXME|XXX|HACK)\b|NotImplementedError")


def test_no_file_and_no_function_grows_too_long() -> None:
    functions = [(s.name, n) for s in SHIPPED for n in s.nodes if isinstance(n, (ast.FunctionDef, ast.AsyncFunctionDef))]
    lengths = [(f"{name}: {node.name}", (node.end_lineno or node.lineno) - node.lineno + 1) for name, node in functions]
    assert not [(source.name, count) for source in SHIPPED if (count := len(source.text.splitlines())) > FILE_LINES]
    assert not [(name, count) for name, count in lengths if count > FUNCTION_LINES]


def test_classes_stay_small_but_for_interfaces() -> None:
    """An interface that plugins implement may name more, since each method is one thing a family or technique knows."""
    large = {
        f"{source.name}: {node.name}": count
        for source in SHIPPED
        for node in source.nodes
        if isinstance(node, ast.ClassDef) and (count := _own_methods(node)) > PUBLIC_METHODS
    }
    implements = {name for name in large if "Family" in name or "/interfaces/" in name}
    assert not set(large) - implements, large


def _own_methods(node: ast.ClassDef) -> int:
    return sum(isinstance(item, ast.FunctionDef) and not item.name.startswith("_") for item in node.body)


def test_modules_say_what_they_are_for() -> None:
    assert not [source.name for source in SHIPPED if source.tree.body and not ast.get_docstring(source.tree)]


def test_nothing_is_left_for_later() -> None:
    assert not [(source.name, found.group()) for source in SHIPPED if (found := PLACEHOLDER.search(source.text))]


def test_no_vague_names() -> None:
    vague = re.compile(r"(?:Manager|Helper|Helpers|Utils|Util|Foundation)$")
    classes = [(s.name, n.name) for s in SHIPPED for n in s.nodes if isinstance(n, ast.ClassDef) and vague.search(n.name)]
    modules = [s.name for s in SHIPPED if re.fullmatch(r"(?:utils?|helpers?|misc|common_utils)", s.path.stem)]
    assert not classes and not modules


@pytest.mark.parametrize("pattern", [MACHINE_PATH, REGISTRY], ids=["machine paths", "registry hosts"])
def test_files_name_no_machine(pattern: re.Pattern[str]) -> None:
    this = PurePath(__file__).name
    found = [(name, hit.group()) for name, text in text_files() if PurePath(name).name != this and (hit := pattern.search(text))]
    assert not found


def test_code_names_no_other_product() -> None:
    code = [(name, text) for name, text in text_files() if name.endswith((".py", ".toml", ".sh"))]
    assert not [(name, hit.group()) for name, text in code if (hit := OTHER_PRODUCTS.search(text))]


def test_names_of_tests_are_unique() -> None:
    names = [source.path.name for source in python_files("tests") if source.path.name not in ("__init__.py", "conftest.py")]
    assert sorted(set(names)) == sorted(names)
