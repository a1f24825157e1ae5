"""`tuner configure`: typed into a real terminal, given as flags, over existing files; what it writes is trained."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from integration.project import add_clip
from integration.typed import TypedCommand
from tuner.cli.interview import as_json
from tuner.cli.main import run
from tuner.config.entry_edit import suggestions, with_answers
from tuner.config.options import Options, option
from tuner.config.questions import DatasetAnswers, limits, questions_of
from tuner.config.settings import AdapterSettings, TrainSettings
from tuner.config.vocabulary import keys_of
from tuner.data.survey import look_at
from tuner.doctor import machine as health_machine
from tuner.errors import ConfigError, DataError
from tuner.plugins.loader import load_plugins

Capture = pytest.CaptureFixture[str]
CONFIG, DATASET = Path("config/config.json"), Path("config/dataset.json")
SMALL = ("--model_flavour", "tiny", "--resolution", "64", "--max_train_steps", "2", "--optimizer", "adamw")


@pytest.fixture(autouse=True)
def clips(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two clips with sound and one without, no GPU, and no network."""
    add_clip(tmp_path / "clips", "amber", frames=17)
    add_clip(tmp_path / "clips", "birch", frames=9)
    add_clip(tmp_path / "clips", "dusk", frames=17, sound=False)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(health_machine, "driver_cards", lambda: [])


def content(path: Path) -> Any:
    return json.loads(path.read_text())


def files() -> list[str]:
    return sorted(str(path) for path in Path().rglob("*") if "clips" not in path.parts)


class Script:
    """A terminal in this process, where torch is loaded already: (part of a question, answer) in their order."""

    def __init__(self, patch: pytest.MonkeyPatch, *answers: tuple[str, str]) -> None:
        self._answers = list(answers)
        patch.setattr("builtins.input", self._type)
        patch.setenv("COLUMNS", "200")
        for stream in ("stdin", "stdout"):
            patch.setattr(f"sys.{stream}.isatty", lambda: True, raising=False)

    def _type(self, prompt: str) -> str:
        expected, answer = self._answers.pop(0)
        assert expected in prompt, f"{prompt!r} was asked in place of {expected!r}"
        print(prompt)
        return answer

    @property
    def done(self) -> bool:
        """Whether everything was asked."""
        return not self._answers


def typing(*arguments: str) -> TypedCommand:
    """On a terminal; without a GPU, whatever this machine has."""
    return TypedCommand("configure", *arguments, folder=Path.cwd(), environment={"PATH": "/nowhere", "CI": "1"})


# --- on a terminal -----------------------------------------------------------------------------------------------------
def test_a_conversation_gives_files_that_are_trained(capsys: Capture) -> None:
    with typing("--optimizer", "adamw") as terminal:
        terminal.answer("Enter for none ", "24 parsecs")
        terminal.wait_for("is no size of memory")
        terminal.answer("Enter for none ", "")
        shown = terminal.answer(r"Which family of models\? \[ltxvideo2\] ", "")
        assert "1  ltxvideo2" in shown
        shown = terminal.answer(r"Which checkpoint of it\? \[dev\] ", "?")
        assert "10  tiny" in shown
        assert "fetched from the model hub" in terminal.answer(r"\[dev\] ", "tyny")
        assert "did you mean tiny" in terminal.answer(r"\[dev\] ", "10")
        terminal.answer(r"every weight\? \(lora, full\) \[lora\] ", "")
        terminal.answer("Weights of your own", "")
        terminal.answer(r"fp32\? \(no, bf16\) \[(no|bf16)\] ", "no")
        terminal.answer(r"Folder with your clips\? ", "")
        terminal.wait_for("an answer is needed")
        terminal.answer(r"Folder with your clips\? ", "clups")
        terminal.wait_for(r"there is no such folder \(got 'clups'\)")
        terminal.answer(r"Folder with your clips\? ", "clips")
        found = terminal.answer(r"A name for these clips\? \[clips\] ", "waves")
        assert "3 clips, 3 with a caption beside them, 2 with sound, 0.4 to 0.7 s, 64 pixels on the shorter side" in found
        terminal.answer(r"\(textfile, filename, instanceprompt\) \[textfile\] ", "")
        terminal.answer("A trigger word", "tunerwave")
        terminal.answer("How many frames", "0")
        terminal.wait_for(r"must be at least 1 \(got '0'\)")
        terminal.answer("How many frames", "17")
        terminal.answer("Some clips are shorter", "9")
        terminal.answer(r"no sound. Train them with silence\? \[no\] ", "maybe")
        terminal.wait_for("must be true or false")
        terminal.answer(r"silence\? \[no\] ", "y")
        terminal.answer(r"Resolution.* \[512\] ", "64")
        terminal.answer(r"Train the sound too\? \[yes\] ", "")
        assert "(integer, at least 1, flag --lora_rank)" in (terminal.answer(r"Rank.* \[16\] ", "?"), terminal.answer(r"\[16\] ", "4"))[1]
        terminal.answer(r"in a batch\? \[1\] ", "")
        terminal.answer(r"How many steps\? \[2000\] ", "2")
        terminal.answer(r"Learning rate\? \[0.0001\] ", "1e-3")
        terminal.answer(r"the result\? \[output/waves\] ", "")
        terminal.answer("A checkpoint every", "")
        terminal.answer("Prompt of a sample", "")
        terminal.answer("tokens that skip blocks", "[1]")
        terminal.wait_for("there is no such file")
        terminal.answer("tokens that skip blocks", "")
        terminal.answer(r"\(CREPA\)\? \[no\] ", "")
        terminal.wait_for("wrote config/dataset.json: 1 entry")
        terminal.wait_for(r"tuner train\n")
        assert terminal.end() == 0
    assert content(DATASET) == [{
        "id": "waves", "type": "local", "dataset_type": "video", "instance_data_dir": "clips", "caption_strategy": "textfile",
        "instance_prompt": "tunerwave", "prepend_instance_prompt": True, "video": {"num_frames": 17, "min_frames": 9},
        "audio": {"allow_zero_audio": True},
    }]  # fmt: skip
    written = content(CONFIG)
    assert {key: written[key] for key in ("model_family", "model_flavour", "lora_rank", "learning_rate", "resolution")} == {
        "model_family": "ltxvideo2", "model_flavour": "tiny", "lora_rank": 4, "learning_rate": 0.001, "resolution": 64,
    }  # fmt: skip
    assert written["data_backend_config"] == str(DATASET) and "data" not in written and "gpu_memory" not in written
    assert "enable_group_offload" not in written, "what a plugin offers and nobody wants stays out"
    assert run(["train", "--dry-run"]) == 0
    assert "found 3 = used 3" in capsys.readouterr().out
    assert run(["train"]) == 0
    assert (Path("output/waves/lora.safetensors")).is_file()


@pytest.mark.parametrize("key", ["\x03", "\x04"])
def test_leaving_in_between_leaves_nothing_behind(key: str) -> None:
    before = files()
    with typing() as terminal:
        terminal.answer("Enter for none ", "")
        terminal.wait_for("Which family")
        time.sleep(0.5)  # between prompt and reading the key would be heard by nobody
        terminal.type(key)
        terminal.wait_for("nothing was written")
        assert terminal.end() == 130
    assert files() == before


def test_an_existing_file_is_asked_about_and_its_values_are_offered() -> None:
    assert run(["configure", "--data", "clips", "--dataset_id", "old", "--lora_rank", "7", *SMALL]) == 0
    before = content(CONFIG)
    with typing() as terminal:
        terminal.answer(r"config/config.json and config/dataset.json exist. .*\nChange it\? \[no\] ", "")
        terminal.wait_for("nothing was changed")
        assert terminal.end() == 0
    assert content(CONFIG) == before
    with typing("--force", "--learning_rate", "5e-4") as terminal:
        terminal.answer("Enter for none ", "")
        for question in (r"\[ltxvideo2\]", r"\[tiny\]", r"\[lora\]", "Weights of your own", "fp32", r"clips\? \[clips\]", r"\[old\]",
                         r"\[textfile\]", "trigger word", "How many frames", "silence", r"\[64\]", "sound too", r"adapters\? \[7\]",
                         "in a batch", r"steps\? \[2\]", r"result\? \[output/old\]", "A checkpoint", "Prompt of a sample", "TREAD",
                         "CREPA"):  # fmt: skip
            terminal.answer(question, "")
        terminal.wait_for(r"wrote config/config.json: learning_rate: 0.0001 -> 0.0005\n")
        assert terminal.end() == 0
    assert content(CONFIG) == {**before, "learning_rate": 0.0005}


def test_a_gpu_is_planned_for_and_a_row_chosen(monkeypatch: pytest.MonkeyPatch, capsys: Capture) -> None:
    given = ("--data", "clips", *SMALL, "--train_batch_size", "1", "--learning_rate", "1e-3", "--gpu_memory", "24GiB")
    asked = ("[ltxvideo2]", "[lora]", "Weights", "[bf16]", "[clips]", "[textfile]", "trigger", "How many frames", "silence", "sound too",
             "Rank", "result", "A checkpoint", "Prompt", "TREAD", "CREPA")  # fmt: skip
    script = Script(monkeypatch, *((part, "") for part in asked), ("Which of these? [1]", "9"), ("Which of these? [1]", "2"))
    assert run(["configure", *given]) == 0
    shown = capsys.readouterr().out
    assert script.done and "a number from 1 to 5" in shown
    row = next(line for line in shown.splitlines() if line.startswith("   2  ") and "of 24.0 GiB" in line)
    written = content(CONFIG)
    planned = [key for key in ("gradient_checkpointing", "enable_group_offload", "musubi_blocks_to_swap", "ramtorch") if key in written]
    assert planned and all(f"{key} {json.dumps(written[key])}" in row for key in planned)


def test_where_planning_is_impossible_the_plugins_questions_are_asked(monkeypatch: pytest.MonkeyPatch, capsys: Capture) -> None:
    """The dev checkpoint is on the hub, and there is no network."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)  # the variable is read when the client is imported
    given = ("--data", "clips", "--gpu_memory", "24GiB")
    assert run(["configure", *given]) == 8
    assert not Path("config").exists()
    asked = ("[ltxvideo2]", "[dev]", "[lora]", "Weights", "[bf16]", "[clips]", "[textfile]", "trigger", "How many frames", "silence",
             "[512]", "sound too", "Rank", "batch", "steps", "Learning", "result", "A checkpoint", "Prompt", "TREAD", "CREPA")  # fmt: skip
    script = Script(
        monkeypatch, *((part, "") for part in asked), ("frozen weights? [no_change]", "3"), ("group by group? [no]", "yes"),
        ("while the present one is computed? [yes]", ""),
    )  # fmt: skip
    assert run(["configure", *given]) == 0
    shown = capsys.readouterr().out
    assert script.done and "what fits cannot be planned now" in shown and " 3  int8-torchao" in shown
    written = content(CONFIG)
    assert written["base_model_precision"] == "int8-torchao"
    assert written["enable_group_offload"] is written["group_offload_use_stream"] is True  # and no second strategy was asked about


# --- without a terminal ------------------------------------------------------------------------------------------------
def test_flags_alone_are_enough(capsys: Capture) -> None:
    prompt = ("--instance_prompt", "a wave", "--caption_strategy", "instanceprompt")
    further = ("--num_frames", "9", "--seed", "7", "--config", "own/run.json", "--check")
    assert run(["configure", "--data", "clips", *SMALL, *prompt, *further]) == 0
    shown = capsys.readouterr().out
    assert "tuner train --config own/run.json" in shown and "Plan" in shown and "64x64@9 (3)" in shown
    written, (entry,) = content(Path("own/run.json")), content(Path("own/dataset.json"))
    assert (written["mixed_precision"], written["seed"], written["optimizer"]) == ("no", 7, "adamw")
    assert (entry["instance_prompt"], entry["video"]) == ("a wave", {"num_frames": 9}) and "prepend_instance_prompt" not in entry


@pytest.mark.parametrize(
    ("flags", "code", "words"),
    [([], 2, "these have no default: data\n  -> give --data"), (["--data", "none"], 4, "data: there is no such folder"),
     (["--data", "empty"], 4, "data: holds no clips"),
     (["--data", "clips", "--lora_rank", "0"], 2, "lora_rank: must be at least 1 (got '0')"),
     (["--data", "clips", "--num_frames", "many"], 2, "num_frames: must be a whole number"),
     (["--data", "clips", "--model_flavour", "tinny"], 2, "model_flavour: there is no such checkpoint (got 'tinny')"),
     (["--data", "clips", "--model_family", "ltx"], 2, "model_family: no family has this name"),
     (["--data", "clips", "--optimizer", "sgdd"], 2, "optimizer: no optimizer has this name"),
     (["--data", "clips", "--report_to", "pigeon"], 2, "report_to: no tracker has this name"),
     (["--data", "clips", "--gpu_memory", "lots"], 2, "gpu_memory: is no size of memory"),
     (["--data", "clips", "--caption_strategy", "instanceprompt"], 2, "instance_prompt: is the caption of every clip"),
     (["--data", "clips", "--config", "clips"], 2, "clips: cannot be read"), (["--no-such"], 2, "No such option")],
)  # fmt: skip
def test_bad_input_ends_before_anything_is_written(flags: list[str], code: int, words: str, capsys: Capture) -> None:
    Path("empty").mkdir()
    before = files()
    assert run(["configure", *flags]) == code
    assert words in capsys.readouterr().err
    assert files() == before


def test_without_a_family_that_is_named_too() -> None:
    command = [sys.executable, "-m", "tuner.cli.main", "configure"]
    variables = {**os.environ, "TUNER_DISABLE_PLUGINS": "ltxvideo2"}
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, env=variables, check=False)
    assert done.returncode == 2
    assert "these have no default: model_family, data\n  -> give --model_family, --data" in done.stderr


def test_existing_files_are_changed_only_when_asked_for(capsys: Capture) -> None:
    CONFIG.parent.mkdir()
    held = {"--model-family": "ltxvideo2", "model_flavour": "tiny", "data": "clips", "lora_rank": "16", "adam_beta1": 0.8}
    CONFIG.write_text(json.dumps(held))
    DATASET.write_text(json.dumps([
        {"id": "a", "instance_data_dir": "clips", "repeats": 3, "video": {"num_frames": 17, "bucket_strategy": "aspect_ratio"}},
        {"id": "texts", "dataset_type": "text_embeds", "default": True},
    ]))  # fmt: skip
    before = CONFIG.read_text(), DATASET.read_text()
    assert run(["configure", "--yes"]) == 2
    assert "config/config.json and config/dataset.json exist already" in capsys.readouterr().err
    assert (CONFIG.read_text(), DATASET.read_text()) == before
    CONFIG.chmod(0o640)
    assert run(["configure", "--yes", "--force", "--num_frames", "9", "--max_train_steps", "2"]) == 0
    assert "data: removed, the dataset file takes its place" in capsys.readouterr().out
    written = content(CONFIG)
    assert list(written)[:4] == ["--model-family", "model_flavour", "lora_rank", "adam_beta1"] and written["lora_rank"] == "16"
    assert written["data_backend_config"] == str(DATASET) and written["max_train_steps"] == 2
    assert CONFIG.stat().st_mode & 0o777 == 0o640
    entry, texts = content(DATASET)
    assert entry["repeats"] == 3 and entry["video"] == {"num_frames": 9, "bucket_strategy": "aspect_ratio"} and texts["id"] == "texts"
    assert run(["configure", "--force", "--dataset_id", "b", "--data", "clips"]) == 0
    assert [item["id"] for item in content(DATASET)] == ["a", "texts", "b"]


def test_a_variable_that_would_overrule_the_file_is_an_error(monkeypatch: pytest.MonkeyPatch, capsys: Capture) -> None:
    monkeypatch.setenv("TUNER_LORA_RANK", "9")
    assert run(["configure", "--data", "clips", "--lora_rank", "4"]) == 2
    assert "lora_rank: is to become 4, but a variable sets it and wins over" in capsys.readouterr().err
    monkeypatch.delenv("TUNER_LORA_RANK")
    monkeypatch.setenv("TUNER_DATA", "clips")
    assert run(["configure", "--yes"]) == 2
    assert "data: a variable or the file names a folder" in capsys.readouterr().err
    assert not Path("config").exists()


def test_a_folder_that_cannot_be_written(capsys: Capture) -> None:
    Path("taken").write_text("")
    assert run(["configure", "--data", "clips", *SMALL, "--config", "taken/config.json"]) == 9
    assert "cannot be written" in capsys.readouterr().err


# --- parts -----------------------------------------------------------------------------------------------------------
class SwitchOptions(Options):
    """A plugin's keys."""

    glow: bool = option(False, help="Glow.", ask="Glow?")
    glow_strength: float = option(0.5, ge=0, le=1, help="How much.", ask="How strongly?", effect="More is brighter.")
    glow_colour: str = option("", help="Which.", ask="Which colour?", ask_if={"glow_strength": 0.5})
    glow_hidden: int = option(3, help="Not asked.")

    def enabled(self) -> bool:
        return self.glow


def test_questions_are_declared_beside_keys() -> None:
    glow, strength, colour = questions_of(SwitchOptions)
    assert (glow.text, strength.effect, limits(strength.key)) == ("Glow?", "More is brighter.", ["at least 0", "at most 1"])
    assert [glow.parse(text) for text in ("y", "no", "true", "0")] == [True, False, True, False]
    with pytest.raises(ConfigError, match=r"glow_strength: must be at most 1 \(got '2'\)"):
        strength.parse("2")
    assert colour.parse("-") == "" and colour.parse("red") == "red"
    assert colour.applies({"glow_strength": 0.5}.__getitem__) and not colour.applies({"glow_strength": 1.0}.__getitem__)
    assert strength.explain(()) == "How much.\nMore is brighter.\n(number, at least 0, at most 1, flag --glow_strength)"
    assert as_json(SwitchOptions, "glow_strength", 1.0) == 1


def test_every_question_ends_like_one_and_depends_on_keys_that_exist() -> None:
    registry = load_plugins()
    every = [question for options in (*registry.option_types, DatasetAnswers) for question in questions_of(options)]
    known = {key.name for options in registry.option_types for key in keys_of(options)}
    assert {question.name for question in every} >= {"model_family", "data", "resolution", "train_audio", "enable_group_offload"}
    assert all("?" in question.text and question.effect for question in every)
    assert all(set(question.ask_if) <= known for question in every)
    names: Mapping[str, object] = {question.name: question.suggest for question in every if question.suggest is not None}
    assert names["max_train_steps"] == 2000 and TrainSettings(max_train_steps=2000).max_train_steps == 2000
    assert next(q for q in questions_of(AdapterSettings)).ask_if == {"model_type": "lora"}


def test_answers_and_entries_are_each_others_inverse() -> None:
    answers = {"dataset_id": "x", "caption_strategy": "filename", "instance_prompt": "w", "num_frames": 25, "min_frames": 9}
    answers["allow_zero_audio"] = True
    (entry,) = with_answers([], "folder", "video", answers)
    assert suggestions([entry]) == {**answers, "data": "folder"}
    cleared = {**answers, "instance_prompt": "", "num_frames": None, "min_frames": None, "allow_zero_audio": False}
    (entry,) = with_answers([entry], "folder", "video", cleared)
    assert entry == {"id": "x", "type": "local", "dataset_type": "video", "instance_data_dir": "folder", "caption_strategy": "filename"}
    assert suggestions([entry], "other") == {}


def test_a_survey_tells_what_a_folder_holds(tmp_path: Path) -> None:
    mixed = tmp_path / "mixed"
    add_clip(mixed / "deep", "one", frames=5)
    (mixed / "deep" / "one.txt").unlink()
    (mixed / "broken.mp4").write_bytes(b"nothing")
    (mixed / "still.png").write_bytes(b"\x89PNG")
    (mixed / ".hidden.mp4").write_bytes(b"")
    found = look_at(mixed)
    assert (found.kind, found.files, found.captioned, found.shorter(6), found.silent) == ("video", 2, 0, 1, 0)
    assert found.describe() == (
        "2 clips, 0 with a caption beside them, 1 of 1 looked at with sound, 0.2 s, 64 pixels on the shorter side, "
        "cannot be opened: broken.mp4; files for other entries: 1 image"
    )
    with pytest.raises(DataError, match="holds no file for dataset_type audio"):
        look_at(mixed, "audio")
    with pytest.raises(DataError, match="is a file, no folder"):
        look_at(mixed / "still.png")
