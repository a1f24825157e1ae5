"""What speaks against a run is said while planning, all of it at once, and nothing is written or loaded before."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from tuner.cli.main import run
from tuner.component import Component
from tuner.config.options import Options, option
from tuner.errors import ConfigError, DataError, TunerError
from tuner.hookspecs import hookimpl
from tuner.interfaces.blocks import BlockSet
from tuner.interfaces.family import BuildContext, ClipShape
from tuner.interfaces.losses import Regularizer, TrainingFacts
from tuner.testing import TinyProject
from tuner.train.plan import PlanProblems
from tuner.train.rules import LONGEST_SIDE

SEEN: list[TrainingFacts] = []
"""What `Picky` was shown; a test clears it."""


class PickyOptions(Options):
    """Keys of a regularizer that objects."""

    picky: bool = option(False, help="Object to the run.")
    picky_twice: bool = option(False, help="Object once more.")

    def enabled(self) -> bool:
        return self.picky


class Picky(Regularizer):
    """Has something against every run."""

    name = "picky"

    def __init__(self, options: PickyOptions, context: BuildContext) -> None:
        self.options = options

    def check(self, facts: TrainingFacts) -> Sequence[TunerError]:
        SEEN.append(facts)
        again = [ConfigError("nor twice", where="picky_twice")] if self.options.picky_twice else []
        return [ConfigError("cannot be pleased", where="picky", remedy="leave it off"), *again]

    def attach(self, blocks: BlockSet, context: BuildContext) -> None:
        raise AssertionError("a run that is objected to is never built")


class Plugin:
    @staticmethod
    @hookimpl
    def tuner_register_regularizers() -> list[Component]:
        return [Component("picky", "objects", PickyOptions, f"{Picky.__module__}:Picky")]


@pytest.fixture(autouse=True)
def seen() -> list[TrainingFacts]:
    SEEN.clear()
    return SEEN


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TinyProject]:
    """Its clips have been examined once; no test changes it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Component, "load", lambda self: Picky if self.name == "picky" else LOAD(self))
        made = TinyProject.make(tmp_path_factory.mktemp("rules"), Plugin())
        made.plan()
        (made.folder / "note.txt").write_text("amber drifts")
        (made.folder / "sets.json").write_text("[]")
        yield made


LOAD = Component.load
TARGETS = "peft_lora_target_modules"


# --- on the command line -----------------------------------------------------------------------------------------
WRONG: dict[str, tuple[list[str], int, list[str]]] = {
    "the run folder is a file": (["--output_dir", "note.txt"], 2, ["output_dir: is a file, no folder", "note.txt", "name a folder"]),
    "a file above the run folder": (["--output_dir", "note.txt/a/b"], 2, ["output_dir: is a file, no folder", "note.txt'"]),
    "a run folder among the clips": (["--output_dir", "clips/run"], 2, ["output_dir: lies inside the dataset folder", "outside"]),
    "graphs on a CPU": (["--cuda_graphs", "on"], 2, ["cuda_graphs: this run trains on cpu", "set it to auto"]),
    "layers that are not there": ([f"--{TARGETS}", "to_z"], 2, [f"{TARGETS}: matches no module", "'to_z'", "near: "]),
    "pictures of another unit": (
        ["--resolution", "100000"], 2, ["resolution: dataset 'data' would be scaled to 1", f"at most {LONGEST_SIDE} pixels", "megapixels"],
    ),
    "megapixels": (["--resolution", "512", "--resolution_type", "area"], 2, ["resolution: ", "would be scaled to", "resolution_type"]),
    "a file for the clips": (["--data", "note.txt"], 4, ["data: is a file, where a folder is needed", "note.txt", "that it lies in"]),
    "a dataset file for the clips": (["--data", "sets.json"], 4, ["data: is a file", "sets.json", "data_backend_config"]),
    "several at once": (
        ["--output_dir", "note.txt", "--cuda_graphs", "on", f"--{TARGETS}", "to_z", "--resolution", "100000"], 2,
        ["error: 4 problems with this run:\n- ", "- output_dir: ", "- cuda_graphs: ", f"- {TARGETS}: ", "- resolution: "],
    ),
}  # fmt: skip


@pytest.mark.parametrize("dry", [True, False], ids=["dry run", "run"])
@pytest.mark.parametrize("name", WRONG)
def test_mistakes_end_with_their_key_and_the_remedy(
    name: str, dry: bool, project: TinyProject, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments, code, words = WRONG[name]
    monkeypatch.chdir(project.folder)
    monkeypatch.setenv("TUNER_PLUGINS", "testing")
    before = sorted(project.folder.rglob("*"))
    defaults = ["--family", "tiny-mixing", "--data", "clips", "--resolution", "64", "--max_train_steps", "1", "--validation_disable"]
    assert run(["train", *defaults, *arguments, *(["--dry-run"] if dry else [])]) == code
    error = capsys.readouterr().err
    assert "Traceback" not in error
    assert all(word in error for word in words), error
    assert sorted(project.folder.rglob("*")) == before and Path("note.txt").read_text() == "amber drifts"


def test_a_folder_of_a_dataset_file_that_is_a_file(project: TinyProject, tmp_path: Path) -> None:
    entry = {"id": "clips", "instance_data_dir": str(project.folder / "clips" / "amber.mp4")}
    (tmp_path / "sets.json").write_text(json.dumps([entry]))
    with pytest.raises(DataError, match=r"sets\.json: is a file, where a folder is needed"):
        project.plan(data=None, data_backend_config=str(tmp_path / "sets.json"))


# --- regularizers ------------------------------------------------------------------------------------------------
def test_regularizers_are_asked_once_and_what_they_say_stands_beside_the_rest(project: TinyProject) -> None:
    with pytest.raises(PlanProblems) as caught:
        project.plan(picky=True, picky_twice=True, cuda_graphs="on")
    assert [problem.where for problem in caught.value.problems] == ["cuda_graphs", "picky", "picky_twice"]
    assert "\n- picky: cannot be pleased\n    -> leave it off\n- picky_twice: nor twice" in str(caught.value)
    assert len(SEEN) == 1 and caught.value.exit_code == 2


def facts(project: TinyProject, **keys: object) -> TrainingFacts:
    with pytest.raises(PlanProblems):
        project.plan(picky=True, **keys)
    return SEEN[-1]


def test_they_are_shown_what_is_trained(project: TinyProject) -> None:
    found = facts(project)
    assert (found.blocks, found.trained_blocks, found.full_finetuning) == (4, (0, 1, 2, 3), False)
    assert found.streams == found.learned_streams == ("video", "audio")
    assert found.datasets == ("data",)
    assert len(found.shapes) == 2 and all(isinstance(shape, ClipShape) for shape in found.shapes)
    assert len({shape.frames for shape in found.shapes}) == 2
    assert facts(project, tiny_audio=False).streams == ("video",)
    assert facts(project, model_type="full").full_finetuning


@pytest.mark.parametrize(
    ("targets", "blocks"),
    [
        (["to_q"], (0, 1, 2, 3)),
        (["blocks.3.to_v", "blocks.1.to_q"], (1, 3)),
        (["proj_in"], ()),
        (["proj_in", "blocks.2.to_k"], (2,)),
        ("all-linear", (0, 1, 2, 3)),
    ],
)
def test_they_are_shown_the_blocks_that_adapters_go_into(targets: object, blocks: tuple[int, ...], project: TinyProject) -> None:
    assert facts(project, **{TARGETS: targets}).trained_blocks == blocks
    assert facts(project, model_type="full", **{TARGETS: targets}).trained_blocks == (0, 1, 2, 3)


def test_keys_of_what_is_off_are_named(project: TinyProject) -> None:
    (notice,) = [notice for notice in project.plan(picky_twice=True).notices if "picky" in notice]
    assert notice == "picky_twice: no effect, since PickyOptions is off (picky)"
    assert not any("picky" in notice for notice in project.plan(picky_twice=False).notices)
    with pytest.raises(ConfigError, match=r"strict is on and .*\n +picky_twice: no effect"):
        project.plan(picky_twice=True, strict=True)


def test_a_run_folder_that_cannot_be_written(project: TinyProject, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # The super-user, as whom tests may run, can write everywhere: the answer of the system is put in.
    monkeypatch.setattr("tuner.train.rules.os.access", lambda path, mode: Path(path) != tmp_path)
    with pytest.raises(PlanProblems, match=r"output_dir .*: cannot be written\n  -> set another output_dir") as caught:
        project.plan(output_dir=str(tmp_path / "runs" / "first"))
    assert caught.value.exit_code == 9


# --- what is done as asked ---------------------------------------------------------------------------------------
def test_a_warm_up_beyond_the_end_is_a_notice(project: TinyProject) -> None:
    plan = project.plan(lr_warmup_steps=16, max_train_steps=8)
    (notice,) = [notice for notice in plan.notices if "lr_warmup_steps" in notice]
    assert "16 is more than the 8 steps" in notice and "ends at 44% of learning_rate" in notice
    trial = project.trial(lr_warmup_steps=16, max_train_steps=8, learning_rate=1.0)
    rates = []
    for _ in range(8):
        rates.append(float(trial.assembly.schedule.get_last_lr()[0]))
        trial.steps(1)
    assert rates[-1] == pytest.approx(7 / 16)
    assert not any("lr_warmup_steps" in notice for notice in project.plan(lr_warmup_steps=8, max_train_steps=8).notices)
    with pytest.raises(ConfigError, match="lr_warmup_steps: 16"):
        project.plan(lr_warmup_steps=16, max_train_steps=8, strict=True)


def test_a_batch_that_no_bucket_fills_is_a_notice(project: TinyProject) -> None:
    clips = len(project.plan().manifest.items)
    (notice,) = [notice for notice in project.plan(train_batch_size=clips + 1).notices if "train_batch_size" in notice]
    assert f"{clips + 1} is more than any bucket" in notice
    assert not any("train_batch_size" in notice for notice in project.plan(train_batch_size=1).notices)
