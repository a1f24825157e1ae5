"""Flags and JSON Schema are the declarations in other words."""

from __future__ import annotations

import json
from typing import Any, Literal

import click
import pytest
from click.testing import CliRunner
from pydantic import BaseModel

from tuner.config.flags import KeyFlag, collect, flags_for
from tuner.config.options import Options, option, unsupported
from tuner.config.resolve import resolve
from tuner.config.schema import json_schema
from tuner.config.settings import CORE_OPTIONS
from tuner.config.vocabulary import Vocabulary, did_you_mean, keys_of


class Route(BaseModel):
    """An object inside a key."""

    ratio: float


class ShownOptions(Options):
    """Every kind of key."""

    title = "Shown"
    step_count: int = option(40, ge=1, le=99, help="Steps of the sample.", unit="steps", aliases=("steps",))
    use_cache: bool = option(True, help="Whether.")
    mode: Literal["slow", "fast"] = option("slow", help="How.")
    scale: float | None = option(None, gt=0, help="Scale.")
    routes: list[Route] = option([], help="Routes.")
    idle: str = unsupported(help="Elsewhere.", reason="not here", changes_results=False, default="")


def given(arguments: list[str]) -> dict[str, object]:
    seen: dict[str, object] = {}

    @click.command()
    @click.argument("rest", nargs=-1)
    def command(rest: tuple[str, ...], **kwargs: object) -> None:
        seen.update(collect(kwargs))

    command.params.extend(flags_for([ShownOptions]))
    result = CliRunner().invoke(command, arguments, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return seen


class TestFlags:
    @pytest.mark.parametrize("spelled", ["--step_count", "--step-count", "--steps"])
    def test_every_spelling_gives_the_declared_name(self, spelled):
        assert given([spelled, "7"]) == {"step_count": "7"}

    @pytest.mark.parametrize(
        ("arguments", "value"),
        [(["--use_cache"], "true"), (["--use_cache", "false"], "false"), (["--use_cache=false"], "false"),
         (["--use_cache", "--mode", "fast"], "true")],
    )  # fmt: skip
    def test_true_and_false(self, arguments, value):
        assert given(arguments)["use_cache"] == value

    def test_only_what_was_typed_is_collected(self):
        assert given([]) == {}
        assert given(["--idle", ""]) == {"idle": ""}

    def test_negative_and_structured_values(self):
        assert given(["--scale", "-1e-4", "--routes", '[{"ratio": 1}]']) == {"scale": "-1e-4", "routes": '[{"ratio": 1}]'}

    def test_flags_resolve_as_the_file_does(self):
        found = resolve([ShownOptions], flags=given(["--steps", "7", "--use_cache", "false", "--routes", '[{"ratio": 1}]']))
        assert found.get(ShownOptions) == ShownOptions(step_count=7, use_cache=False, routes=[Route(ratio=1)])

    def test_help_shows_unit_and_default_and_hides_what_has_no_effect(self):
        command = click.Command("x", params=list(flags_for([ShownOptions])))
        text = CliRunner().invoke(command, ["--help"], terminal_width=100).output
        assert "--step_count NUMBER" in text and "Steps of the sample.  [steps; default: 40]" in text
        assert "--use_cache [true|false]" in text and "[default: true]" in text
        assert "--mode [slow|fast]" in text
        assert "idle" not in text

    def test_choices_complete(self):
        flags = {flag.name: flag for flag in flags_for([ShownOptions])}
        with click.Context(click.Command("x")) as context:
            completed = {name: [item.value for item in flags[name].shell_complete(context, "")] for name in ("mode", "use_cache", "scale")}
            assert [item.value for item in flags["mode"].shell_complete(context, "f")] == ["fast"]
        assert completed == {"mode": ["slow", "fast"], "use_cache": ["true", "false"], "scale": []}

    def test_every_core_key_is_a_flag(self):
        assert [flag.name for flag in flags_for(CORE_OPTIONS)] == list(Vocabulary(CORE_OPTIONS).keys)
        assert all(isinstance(flag, KeyFlag) for flag in flags_for(CORE_OPTIONS))


class TestVocabulary:
    def test_two_owners_of_one_key_are_a_bug(self):
        class Again(Options):
            """The same alias."""

            steps: int = option(1, help="x")

        with pytest.raises(ValueError, match="steps is declared by ShownOptions and Again"):
            Vocabulary([ShownOptions, Again])
        assert Vocabulary([ShownOptions, ShownOptions]).option_types == (ShownOptions,)

    def test_types_in_words(self):
        names = {key.name: key.type_name for key in keys_of(ShownOptions)}
        assert names == {"step_count": "integer", "use_cache": "true/false", "mode": '"slow" or "fast"', "scale": "number",
                         "routes": "list of object", "idle": "text"}  # fmt: skip

    def test_advice(self):
        assert did_you_mean([]) == ""
        assert did_you_mean(["a"]) == "did you mean a?"
        assert did_you_mean(["a", "b", "c"]) == "did you mean a, b or c?"


def accepts(schema: dict[str, Any], value: Any, root: dict[str, Any]) -> bool:
    """The part of JSON Schema that the generated schema uses, written out as an oracle."""
    if "$ref" in schema:
        return accepts(root["$defs"][schema["$ref"].rpartition("/")[2]], value, root)
    if "anyOf" in schema:
        return any(accepts(branch, value, root) for branch in schema["anyOf"])
    kinds = {"string": str, "integer": int, "number": (int, float), "boolean": bool, "array": list, "object": dict, "null": type(None)}
    kind = schema.get("type")
    if kind and (not isinstance(value, kinds[kind]) or (isinstance(value, bool) and kind != "boolean")):
        return False
    if ("enum" in schema and value not in schema["enum"]) or ("const" in schema and value != schema["const"]):
        return False
    if isinstance(value, dict):
        known = schema.get("properties", {})
        if schema.get("additionalProperties") is False and set(value) - set(known):
            return False
        return set(schema.get("required", [])) <= set(value) and all(accepts(known.get(k, {}), v, root) for k, v in value.items())
    if isinstance(value, list):
        return all(accepts(schema.get("items", {}), item, root) for item in value)
    limits = {"minimum": lambda a, b: a >= b, "maximum": lambda a, b: a <= b, "exclusiveMinimum": lambda a, b: a > b}
    return all(test(value, schema[name]) for name, test in limits.items() if name in schema)


class TestSchema:
    @pytest.mark.parametrize(
        ("value", "fits"),
        [({}, True), ({"step_count": 7, "use_cache": False, "mode": "fast", "scale": 0.5, "routes": [{"ratio": 1}]}, True),
         ({"steps": 7}, True), ({"scale": None, "step_count": None, "$schema": "x"}, True), ({"idle": "anything"}, True),
         ({"step_count": 0}, False), ({"steps": 100}, False), ({"mode": "x"}, False), ({"scale": 0}, False), ({"other": 1}, False),
         ({"routes": [{}]}, False), ({"use_cache": 1}, False)],
    )  # fmt: skip
    def test_it_accepts_what_resolve_accepts(self, value, fits, tmp_path):
        schema = json_schema([ShownOptions])
        assert accepts(schema, value, schema) is fits
        if fits:
            file = tmp_path / "config.json"
            file.write_text(json.dumps(value))
            resolve([ShownOptions], config_file=file)

    def test_every_key_is_described(self):
        schema = json_schema(CORE_OPTIONS)
        json.dumps(schema)
        assert schema["$schema"] == "https://json-schema.org/draft/2020-12/schema"
        assert schema["additionalProperties"] is False
        for name, key in Vocabulary(CORE_OPTIONS).keys.items():
            entry = schema["properties"][name]
            assert entry["description"].startswith(key.help)
            assert entry["default"] == key.default
            assert entry.get("unit", "") == key.unit
            assert entry.get("deprecated", False) is bool(key.unsupported)
            assert all(alias in schema["properties"] for alias in key.aliases)
