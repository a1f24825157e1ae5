"""Prompts of samples and the names of their files."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tuner.config.validation_settings import ValidationSettings
from tuner.errors import ConfigError
from tuner.train.samples.prompts import label, library_path, prompts, unused


def settings(**keys: object) -> ValidationSettings:
    return ValidationSettings.model_validate(keys)


def test_prompts_in_their_order(tmp_path: Path) -> None:
    library = tmp_path / "library.json"
    library.write_text(json.dumps({"a b": "one", "a-b": "two", "Sample": "three"}))
    found = prompts(settings(validation_prompt="own", validation_prompt_library=str(library), validation_disable_unconditional=False))
    assert list(found.items()) == [("sample", "own"), ("a-b", "one"), ("a-b-2", "two"), ("Sample-2", "three"), ("unconditional", "")]
    assert prompts(settings()) == {}


def test_a_list_is_numbered(tmp_path: Path) -> None:
    (tmp_path / "list.json").write_text('["one", "two"]')
    assert prompts(settings(user_prompt_library=str(tmp_path / "list.json"))) == {"prompt-1": "one", "prompt-2": "two"}


@pytest.mark.parametrize(
    ("keys", "path"),
    [
        ({}, None),
        ({"validation_prompt_library": False}, None),
        ({"validation_prompt_library": "false"}, None),
        ({"validation_prompt_library": True}, "config/user_prompt_library.json"),
        ({"validation_prompt_library": "true"}, "config/user_prompt_library.json"),
        ({"validation_prompt_library": True, "user_prompt_library": "own.json"}, "own.json"),
        ({"user_prompt_library": "own.json"}, "own.json"),
        ({"validation_prompt_library": "other.json", "user_prompt_library": "own.json"}, "other.json"),
    ],
)
def test_which_file_is_meant(keys: dict[str, object], path: str | None) -> None:
    assert library_path(settings(**keys)) == (None if path is None else Path(path))


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("{", ["line 1", "not valid JSON"]), ("3", ["an object or a list"]), ("{}", ["holds no prompt"]), ("[]", ["holds no prompt"]),
        ('{"a": 3}', ["validation_prompt_library.a", "must be text", "3"]), ('["x", " "]', ["validation_prompt_library.prompt-2"]),
        (b"\xff\xfe\x00", ["is not written in UTF-8"]), ('{"a": "x", "a": "y"}', ["holds a twice"]),
    ],
)  # fmt: skip
def test_libraries_that_cannot_be_used(content: str | bytes, words: list[str], tmp_path: Path) -> None:
    path = tmp_path / "library.json"
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    with pytest.raises(ConfigError) as raised:
        prompts(settings(validation_prompt_library=str(path)))
    assert [word for word in ["validation_prompt_library", *words] if word not in str(raised.value)] == []


def test_names_that_every_file_system_takes() -> None:
    assert label(" a cat / dog: 50%? ") == "a-cat-dog-50"
    assert label("../../etc") == "etc" and label("...") == "prompt" and len(label("x" * 300)) == 80
    assert unused("a", ["b"]) == "a" and unused("a", ["A", "a-2"]) == "a-3"
