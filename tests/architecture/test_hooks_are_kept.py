"""A hook exists only with a test that names it and a section in the reference that shows its exact signature."""

from __future__ import annotations

import ast
import inspect

import pytest

from architecture.source_files import ROOT, python_files
from tuner import hookspecs
from tuner.cli.reference import hook_functions, signature
from tuner.plugins.record import KINDS, registration_hook

HOOKS = {function.name: function for function in hook_functions()}
PAGE = (ROOT / "docs" / "reference" / "hookspecs.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("name", HOOKS)
def test_every_hook_has_a_test(name):
    """The name stands in a test of another file, or its kind is one of those that one test runs through."""
    named = any(name in source.text for source in python_files("tests") if "architecture" not in source.path.parts)
    assert named or name in {registration_hook(kind) for kind in KINDS}


@pytest.mark.parametrize("name", HOOKS)
def test_every_hook_stands_in_the_reference_with_its_signature(name):
    assert f"## {name}\n\n```python\n{signature(HOOKS[name])}\n```\n\n{ast.get_docstring(HOOKS[name])}" in PAGE


@pytest.mark.parametrize("name", HOOKS)
def test_every_hook_is_typed_documented_and_a_specification(name):
    function = HOOKS[name]
    assert ast.get_docstring(function)
    assert function.returns is not None and all(argument.annotation for argument in function.args.args)
    assert [decorator.id for decorator in function.decorator_list if isinstance(decorator, ast.Name)] == ["hookspec"]
    assert list(inspect.signature(getattr(hookspecs, name)).parameters) == [argument.arg for argument in function.args.args]


def test_every_kind_has_its_hook():
    assert {registration_hook(kind) for kind in KINDS} <= set(HOOKS)
