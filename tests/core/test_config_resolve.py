"""Defaults < file < environment < flags, each value with its origin, every mistake in one error."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel, ConfigDict, model_validator

from tuner.config.options import Options, option, unsupported
from tuner.config.resolve import Settings, find_config, resolve
from tuner.config.settings import CORE_OPTIONS, AdapterSettings, ModelSettings, OptimizerSettings, TrainSettings
from tuner.errors import ConfigError


class Inner(BaseModel):
    """An object inside a key."""

    model_config = ConfigDict(extra="forbid")
    ratio: float


class SampleOptions(Options):
    """Every kind of key."""

    title = "Sample"
    amount: int = option(3, ge=1, le=9, help="How many.", unit="pieces", aliases=("count",))
    share: float = option(0.5, gt=0, lt=1, help="Share.")
    wanted: bool = option(False, help="Whether.")
    mode: Literal["slow", "fast"] = option("slow", help="How.")
    label: str = option("", help="What.")
    names: list[str] = option([], help="Names.")
    words: list[str] | str | None = option(None, help="Names, or a pattern.")
    routes: list[Inner] = option([], help="Routes.")
    extra: dict[str, object] = option({}, help="Anything.")
    hub_token: str = option("", help="A secret.")
    idle: float = unsupported(help="Elsewhere.", reason="not here", changes_results=False, default=1.5)
    changing: str = unsupported(help="Elsewhere.", reason="it would differ", changes_results=True, default="standard", aliases=("change",))


def write(folder: Path, content: object) -> Path:
    path = folder / "config.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


class Places(Options):
    """Two keys that take each other's place."""

    title = "Places"
    alternatives = (("folder", "file"),)
    folder: str = option("", help="A folder.")
    file: str = option("", help="A file.")


def test_of_two_keys_that_take_each_others_place_the_nearer_one_counts(tmp_path: Path) -> None:
    path = write(tmp_path, {"file": "data.json"})
    found = resolve([Places], config_file=path, flags={"folder": "clips"})
    assert (found.value("folder"), found.value("file"), found.origin("file")) == ("clips", "", "default")
    assert found.notices == (f"file: left aside ({path}), because folder is given (--folder)",)
    found = resolve([Places], config_file=path, environ={"TUNER_FOLDER": "clips"}, flags={"file": "other.json"})
    assert (found.value("folder"), found.value("file")) == ("", "other.json")
    both = resolve([Places], flags={"folder": "clips", "file": "data.json"})
    assert (both.value("folder"), both.value("file"), both.notices) == ("clips", "data.json", ())  # for whoever reads them to refuse


def settings(**flags: object) -> Settings:
    return resolve([SampleOptions], flags=flags)


def problem(**flags: object) -> str:
    with pytest.raises(ConfigError) as caught:
        settings(**flags)
    assert caught.value.exit_code == 2
    return str(caught.value)


class TestOrder:
    def test_later_sources_win_and_origins_tell(self, tmp_path):
        file = write(tmp_path, {"amount": 4, "share": 0.25, "label": "file", "mode": "fast"})
        environ = {"TUNER_SHARE": "0.125", "TUNER_LABEL": "environment", "TUNER_PLUGINS": "a", "TUNER_DEBUG": "1", "HOME": "x"}
        found = resolve([SampleOptions], config_file=file, environ=environ, flags={"label": "flag"})
        values = [(found.value(key), found.origin(key)) for key in ("amount", "share", "label", "mode", "wanted")]
        assert values == [(4, "file"), (0.125, "environment"), ("flag", "flag"), ("fast", "file"), (False, "default")]
        assert found.explicit() == {"amount", "share", "label", "mode"}
        assert found.get(SampleOptions).amount == 4
        assert found.notices == ()

    def test_empty_means_default_and_undoes_what_lies_below(self, tmp_path):
        file = write(tmp_path, {"amount": None, "share": "", "label": "file"})
        found = resolve([SampleOptions], config_file=file, environ={"TUNER_MODE": ""}, flags={"label": ""})
        assert found.get(SampleOptions) == SampleOptions()
        assert found.explicit() == set()

    def test_an_unknown_variable_is_a_notice(self):
        found = resolve([SampleOptions], environ={"TUNER_AMOUNTS": "1"})
        assert len(found.notices) == 1
        assert found.notices[0].startswith("TUNER_AMOUNTS: names no key and is ignored; did you mean TUNER_AMOUNT")

    def test_models_that_were_not_asked_for_raise(self):
        with pytest.raises(KeyError):
            settings().get(TrainSettings)
        with pytest.raises(KeyError):
            settings().value("lora_rank")


class TestSpelling:
    @pytest.mark.parametrize("spelled", ["amount", "--amount", "count", "--count"])
    def test_names_aliases_and_dashes(self, tmp_path, spelled):
        found = resolve([SampleOptions], config_file=write(tmp_path, {spelled: "7"}))
        assert (found.value("amount"), found.value("count"), found.origin("count")) == (7, 7, "file")

    def test_dashes_inside(self, tmp_path):
        assert resolve([SampleOptions], config_file=write(tmp_path, {"--hub-token": "x"})).value("hub-token") == "x"

    def test_one_key_twice_in_one_source(self, tmp_path):
        with pytest.raises(ConfigError, match=r"amount: given twice with different values .*config.json"):
            resolve([SampleOptions], config_file=write(tmp_path, {"amount": 1, "--count": 2}))
        with pytest.raises(ConfigError, match="twice"):
            resolve([SampleOptions], config_file=write(tmp_path, '{"amount": 1, "amount": 2}'))
        assert resolve([SampleOptions], config_file=write(tmp_path, {"amount": 2, "count": 2})).value("amount") == 2


class TestValues:
    @pytest.mark.parametrize(
        ("key", "text", "value"),
        [("wanted", "true", True), ("wanted", "False", False), ("wanted", "1", True), ("share", "1e-4", 1e-4), ("amount", "4", 4),
         ("amount", "0.5e1", 5), ("amount", 4.0, 4), ("label", 2.3, "2.3"), ("names", "a, b,", ["a", "b"]), ("names", '["a,b"]', ["a,b"]),
         ("words", "to_q", "to_q"), ("words", "to_q,to_k", ["to_q", "to_k"]), ("extra", '{"a": [1]}', {"a": [1]}),
         ("routes", '[{"ratio": "0.5"}]', [Inner(ratio=0.5)])],
    )  # fmt: skip
    def test_strings_mean_what_they_say(self, key, text, value):
        assert settings(**{key: text}).value(key) == value

    @given(st.integers(1, 9), st.floats(1e-6, 0.999), st.booleans(), st.sampled_from(["slow", "fast"]))
    def test_strings_and_json_values_are_the_same(self, amount, share, wanted, mode):
        values = {"amount": amount, "share": share, "wanted": wanted, "mode": mode}
        strings = {name: value if isinstance(value, str) else json.dumps(value) for name, value in values.items()}
        assert settings(**values).get(SampleOptions) == settings(**strings).get(SampleOptions)

    @pytest.mark.parametrize(
        ("key", "value", "text"),
        [("amount", 0, "amount: must be at least 1 (got 0)"), ("amount", 10, "amount: must be at most 9 (got 10)"),
         ("share", 0, "share: must be more than 0 (got 0)"), ("share", "1", "share: must be less than 1 (got '1')"),
         ("amount", "x", "amount: must be a whole number (got 'x')"), ("amount", 1.5, "amount: must be a whole number (got 1.5)"),
         ("amount", True, "amount: must be a number (got True)"), ("share", "nan", "share: must be a finite number (got 'nan')"),
         ("share", "half", "share: must be a number (got 'half')"), ("wanted", "maybe", "wanted: must be true or false (got 'maybe')"),
         ("mode", "quick", "mode: must be 'slow' or 'fast' (got 'quick')"), ("label", [1], "label: must be text (got [1])"),
         ("words", {"a": 1}, "words: must be a list or text (got {'a': 1})"), ("extra", "x", "extra: must be an object (got 'x')"),
         ("extra", "{", "extra: is not valid JSON"), ("extra", '{"a": NaN}', "extra: is not valid JSON"),
         ("routes", [{"ratio": "x"}], "routes[0].ratio: must be a number (got 'x')"),
         ("routes", [{"ratio": 1, "rate": 2}], "routes[0].rate: is not a known key (got 2)"),
         ("routes", [{}], "routes[0].ratio: is missing (got {})")],
    )  # fmt: skip
    def test_messages(self, key, value, text):
        assert problem(**{key: value}).startswith(text)

    def test_the_place_is_named(self, tmp_path):
        assert problem(amount="0").endswith("-> change it (--amount)")
        with pytest.raises(ConfigError, match=r"change it \(TUNER_AMOUNT\)"):
            resolve([SampleOptions], environ={"TUNER_AMOUNT": "0"})
        with pytest.raises(ConfigError, match=r"change it \(.*config\.json\)"):
            resolve([SampleOptions], config_file=write(tmp_path, {"amount": 0}))

    def test_text_stands_for_the_choice_that_is_written_so(self, tmp_path):
        class Chosen(Options):
            """Choices that are no text."""

            title = "Chosen"
            factor: Literal[1, 2] = option(1, help="A number.")
            switch: Literal[True, False, "auto"] = option("auto", help="A switch, or a word.")
            both: Literal[1, "1"] = option(1, help="A number and its text.")
            either: Literal[1] | str = option("", help="A number, or any text.")
            several: list[Literal[1, 2]] = option([], help="Numbers.")

        flags = {"factor": "2", "switch": "true", "both": "1", "either": "1", "several": "1,2"}
        found = resolve([Chosen], flags=flags)
        assert [found.value(key) for key in flags] == [2, True, "1", "1", [1, 2]]
        assert resolve([Chosen], environ={"TUNER_FACTOR": "2", "TUNER_SWITCH": "auto"}).get(Chosen) == Chosen(factor=2)
        assert resolve([Chosen], config_file=write(tmp_path, {"both": 1, "factor": "2"})).get(Chosen) == Chosen(factor=2)
        with pytest.raises(ConfigError, match=r"factor: must be 1 or 2 \(got '3'\)"):
            resolve([Chosen], flags={"factor": "3"})

    def test_rules_across_keys_name_their_group(self):
        class Pair(Options):
            """Two that belong together."""

            title = "Pair"
            low: int = option(1, help="Low.")
            high: int = option(2, help="High.")

            @model_validator(mode="after")
            def _ordered(self):
                if self.low > self.high:
                    raise ValueError("low must not be above high")
                return self

        with pytest.raises(ConfigError, match=r"^Pair: low must not be above high"):
            resolve([Pair], flags={"low": "3"})


class TestAllAtOnce:
    def test_every_problem_of_every_source_is_listed(self, tmp_path):
        file = write(tmp_path, {"amuont": 1, "share": 2, "zzz": 1})
        with pytest.raises(ConfigError) as caught:
            flags = {"mode": "x", "changing": "other"}
            resolve([SampleOptions], config_file=file, flags=flags, environ={"TUNER_WANTED": "?"}, hint="Mind the gap.")
        text = str(caught.value)
        assert text.startswith("6 problems in the configuration:\n")
        for part in ("- amuont: unknown key", "did you mean amount", "? Mind the gap. `tuner options`", "- zzz: unknown key",
                     "- share: must", "- mode: must", "- wanted: must be true or false",
                     "- changing: is not supported: it would differ (got 'other')"):
            assert part in text

    def test_one_problem_keeps_its_parts(self):
        with pytest.raises(ConfigError) as caught:
            settings(amount=0)
        assert (caught.value.where, caught.value.value, caught.value.message) == ("amount", 0, "must be at least 1")


class TestUnsupported:
    @pytest.mark.parametrize("value", ["standard", "", "none", "None", "false", False, None, "null"])
    def test_neutral_values_pass_silently(self, value):
        found = settings(changing=value)
        assert (found.value("changing"), found.notices) == ("standard", ())

    @pytest.mark.parametrize("value", ["lokr", "true", True, 3])
    def test_what_changes_results_is_an_error(self, value):
        assert problem(change=value).startswith("changing: is not supported: it would differ")

    def test_what_does_not_is_a_notice(self):
        found = settings(idle="2.5")
        assert found.notices == ("idle: '2.5' has no effect: not here (--idle)",)
        assert (found.value("idle"), found.origin("idle")) == (2.5, "flag")
        assert settings(idle="1.50").notices == ()

    def test_a_value_of_another_kind_is_a_notice_too(self):
        found = settings(idle="sometimes")
        assert len(found.notices) == 1 and found.value("idle") == 1.5


class TestFile:
    def test_syntax_errors_name_line_and_column(self, tmp_path):
        with pytest.raises(ConfigError, match=r"config.json: line 3, column 1: .*"):
            resolve([SampleOptions], config_file=write(tmp_path, '{\n"amount": 1,\n}'))

    @pytest.mark.parametrize(
        ("content", "remedy"),
        [('{"amount": 1,}', "take out the comma before it"), ('{"words": [1, 2 ,\n ]}', "take out the comma before it"),
         ('{"amount": 1 // one\n}', "take out the comment"), ('{\n# one\n"amount": 1}', "take out the comment"),
         ('{"amount": 1\n"share": 0.5}', "write a comma before it"), ("{'amount': 1}", "write \" for '"),
         ('{"wanted": True}', "write true"), ('{"extra": None}', "write null"),
         (r'{"label": "C:\clips"}', "for each \\"), ("", "the file is empty"), ('{"amount": }', "mend the JSON")],
    )  # fmt: skip
    def test_what_usually_breaks_json_is_named(self, tmp_path, content, remedy):
        with pytest.raises(ConfigError) as caught:
            resolve([SampleOptions], config_file=write(tmp_path, content))
        assert remedy in caught.value.remedy

    @pytest.mark.parametrize("content", ["[1]", "3", '"text"', "null"])
    def test_anything_but_an_object(self, tmp_path, content):
        with pytest.raises(ConfigError, match="must hold a JSON object"):
            resolve([SampleOptions], config_file=write(tmp_path, content))

    @pytest.mark.parametrize("content", ['{"share": NaN}', '{"share": Infinity}'])
    def test_numbers_that_are_none(self, tmp_path, content):
        with pytest.raises(ConfigError, match="is not a number that a setting can have"):
            resolve([SampleOptions], config_file=write(tmp_path, content))

    def test_missing_unreadable_or_not_text(self, tmp_path):
        with pytest.raises(ConfigError, match=r"absent.json: there is no such file"):
            resolve([SampleOptions], config_file=tmp_path / "absent.json")
        with pytest.raises(ConfigError, match="cannot be read"):
            resolve([SampleOptions], config_file=tmp_path)
        (tmp_path / "bytes.json").write_bytes(b"\xff\xfe\x00")
        with pytest.raises(ConfigError, match="is not written in UTF-8"):
            resolve([SampleOptions], config_file=tmp_path / "bytes.json")
        with pytest.raises(ConfigError, match="nested too deeply"):
            resolve([SampleOptions], config_file=write(tmp_path, "[" * 100_000))

    def test_editors_may_leave_a_mark_and_a_schema(self, tmp_path):
        (tmp_path / "marked.json").write_bytes(b'\xef\xbb\xbf{"$schema": "x.json", "amount": 2}')
        assert resolve([SampleOptions], config_file=tmp_path / "marked.json").value("amount") == 2

    def test_find_config(self, tmp_path):
        assert find_config(None, tmp_path) is None
        (tmp_path / "config").mkdir()
        (tmp_path / "config" / "config.json").write_text("{}")
        assert find_config(None, tmp_path) == tmp_path / "config" / "config.json"
        assert find_config(Path("mine.json"), tmp_path) == Path("mine.json")


class TestSecrets:
    def test_they_are_masked_where_values_are_shown(self):
        found = settings(hub_token="hf_abc", extra={"api_key": "abc", "tokens": 3, "list": [{"password": "p"}]})
        dump = found.resolved()
        assert dump["hub_token"] == {"value": "***", "origin": "flag"}
        assert dump["extra"]["value"] == {"api_key": "***", "tokens": 3, "list": [{"password": "***"}]}
        assert found.get(SampleOptions).hub_token == "hf_abc"
        json.dumps(dump)

    def test_empty_secrets_show_that_they_are_empty(self):
        assert settings().resolved()["hub_token"]["value"] == ""

    def test_errors_do_not_repeat_them(self):
        assert "hf_abc" not in problem(hub_token=["hf_abc"])


class TestCoreKeys:
    def test_the_published_configuration_of_a_run_is_understood(self, tmp_path):
        """Keys as people have them, strings and dashes included; what this version lacks becomes a notice."""
        content = {
            "--model_family": "some", "model_type": "lora", "--lora_rank": "32", "train_batch_size": 2, "learning_rate": "6e-05",
            "gradient_checkpointing": "true", "optimizer": "adamw_bf16", "max_train_steps": 200, "num_train_epochs": 0, "dynamo_mode": "",
            "evaluation_type": "none", "disable_benchmark": True, "scheduled_sampling_reflexflow": False, "override_dataset_config": True,
            "lycoris_config": "config/lycoris_config.json", "skip_file_discovery": "", "base_model_precision": "no_change",
            "validation_resolution": "768x512", "validation_guidance": 5, "report_to": "none",
        }  # fmt: skip
        found = resolve(CORE_OPTIONS, config_file=write(tmp_path, content))
        assert found.get(AdapterSettings).lora_rank == 32
        assert found.get(OptimizerSettings).learning_rate == 6e-5
        assert found.get(ModelSettings).model_family == "some"
        assert [notice.partition(":")[0] for notice in found.notices] == ["override_dataset_config", "lycoris_config"]

    def test_defaults_resolve(self):
        found = resolve(CORE_OPTIONS)
        assert found.notices == () and found.explicit() == set()
        assert all(entry["origin"] == "default" for entry in found.resolved().values())
