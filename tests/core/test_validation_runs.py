"""Validation in whole runs of the tiny family: what is made when, that training does not notice, failures, interruptions, mistakes."""

from __future__ import annotations

import json
import signal
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tuner.data.media import probe
from tuner.errors import ConfigError, OutOfMemoryError
from tuner.interfaces.family import Generated
from tuner.testing.clips import write_clip
from tuner.testing.family import TinyFamily
from tuner.testing.project import TinyProject
from tuner.train.execute import PlainExecution
from tuner.train.run import RunFolder
from tuner.train.samples import validation
from tuner.train.session import Outcome, Silence
from tuner.train.session import train as session_train
from tuner_offload import plugin as offload

torch.set_num_threads(1)
SMALL: Mapping[str, object] = {
    "validation_disable": False, "validation_resolution": "64x64", "validation_num_video_frames": 9, "validation_num_inference_steps": 1,
    "validation_guidance": 2, "validation_prompt": "waves",
}  # fmt: skip


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> TinyProject:
    """Clips, and a dataset file that holds out a clip with sound and one without."""
    made = TinyProject.make(tmp_path_factory.mktemp("validation"), offload)
    write_clip(made.folder / "exam", "elm", frames=9)
    write_clip(made.folder / "exam", "fir", frames=13, sound=False)
    entries = [{"id": "clips", "instance_data_dir": str(made.folder / "clips")},
               {"id": "exam", "dataset_type": "eval", "instance_data_dir": str(made.folder / "exam")}]  # fmt: skip
    (made.folder / "data.json").write_text(json.dumps(entries))
    return made


def held_out(project: TinyProject) -> dict[str, object]:
    return {"data": None, "data_backend_config": str(project.folder / "data.json")}


def events(project: TinyProject, *kinds: str, out: str = "out") -> list[dict[str, object]]:
    lines = (project.folder / out / "events.jsonl").read_text().splitlines()
    return [event for event in map(json.loads, lines) if event["kind"] in kinds]


def losses(project: TinyProject, out: str) -> list[Mapping[str, float]]:
    """The rows of training."""
    return [row for row in project.metrics(out) if "loss" in row]


# --- what is made when -------------------------------------------------------------------------------------------
def test_samples_before_the_first_step_at_the_interval_and_at_the_end(project: TinyProject) -> None:
    (project.folder / "library.json").write_text(json.dumps({"calm sea": "a calm sea", "storm!": "a storm"}))
    outcome = project.train(
        **SMALL, **held_out(project), output_dir="when", max_train_steps=5, validation_steps=2, validation_using_datasets=True,
        validation_prompt_library=str(project.folder / "library.json"), validation_disable_unconditional=False,
    )  # fmt: skip
    made = events(project, "sample", out="when")
    labels = {"sample": "t2v", "calm-sea": "t2v", "storm": "t2v", "unconditional": "t2v", "exam-elm-i2v": "i2v", "exam-elm-s2v": "s2v",
              "exam-fir-i2v": "i2v"}  # fmt: skip
    assert [(row["step"], row["label"], row["mode"]) for row in made] == [(step, *pair) for step in (0, 2, 4, 5) for pair in labels.items()]
    assert {row["label"]: row["prompt"] for row in made} == {
        "sample": "waves", "calm-sea": "a calm sea", "storm": "a storm", "unconditional": "", "exam-elm-i2v": "drifting waves called elm",
        "exam-elm-s2v": "drifting waves called elm", "exam-fir-i2v": "drifting waves called fir",
    }  # fmt: skip
    for row in made:
        assert row["path"] == f"validation/step_{row['step']}/{row['label']}.mp4" and float(str(row["seconds"])) >= 0
        facts = probe(project.folder / "when" / str(row["path"]))
        assert (facts.width, facts.height, facts.frames, facts.has_audio) == (64, 64, 9, True)
    assert outcome.sample == project.folder / "when" / "validation/step_5/sample.mp4"
    assert [row["step"] for row in events(project, "heldout", out="when")] == [0, 2, 4, 5]
    published = [path.name for path in (project.folder / "when" / "outbox").glob("*/samples/*")]
    assert published == ["sample.mp4"], "clips from held-out files show them, and bear their names"


def test_the_benchmark_and_all_of_it_can_be_left_out(project: TinyProject) -> None:
    project.train(**SMALL, output_dir="later", max_train_steps=2, disable_benchmark=True)
    assert [row["step"] for row in events(project, "sample", out="later")] == [2]
    project.train(**{**SMALL, "validation_disable": True}, **held_out(project), output_dir="never", max_train_steps=1)
    assert not (project.folder / "never" / "validation").exists() and events(project, "heldout", out="never") == []
    assert events(project, "cached", out="never")[0]["found"] == 4, "held-out files are not even encoded"


def test_what_files_can_give_and_how_many_are_chosen(project: TinyProject) -> None:
    def labels(**keys: object) -> list[str]:
        plan = project.plan(**{**SMALL, "validation_prompt": ""}, **held_out(project), validation_using_datasets=True, **keys)
        return [job.label for job in plan.validation.jobs]

    assert labels() == ["exam-elm-i2v", "exam-elm-s2v", "exam-fir-i2v"]
    assert labels(validation_given="sound") == ["exam-elm-s2v"]
    assert labels(validation_given="picture", validation_num_dataset_samples=1) == ["exam-elm-i2v"]
    (job,) = project.plan(
        **{**SMALL, "validation_prompt": "", "validation_num_video_frames": 81}, **held_out(project), validation_using_datasets=True,
        validation_given="sound",
    ).validation.jobs  # fmt: skip
    assert job.request.frames == 9, "no longer than the sound"


# --- training does not notice ------------------------------------------------------------------------------------
@pytest.mark.parametrize("memory", [{}, {"musubi_blocks_to_swap": 2}, {"ramtorch": True}], ids=["resident", "swapped", "streamed"])
def test_the_loss_curve_is_the_same_to_the_last_bit(project: TinyProject, memory: dict[str, object]) -> None:
    keys = {**held_out(project), **memory, "max_train_steps": 4, "lora_dropout": 0.3, "caption_dropout_probability": 0.5}
    name = next(iter(memory), "resident")
    project.train(**keys, output_dir=f"{name}-off")
    project.train(
        **{**SMALL, **keys}, output_dir=f"{name}-on", validation_step_interval=1, validation_using_datasets=True, eval_timesteps=1
    )
    assert len(events(project, "sample", out=f"{name}-on")) == 5 * 4
    assert not events(project, "sample_failed", "heldout_failed", out=f"{name}-on")
    assert losses(project, f"{name}-on") == losses(project, f"{name}-off")
    first, second = (load_file(project.folder / f"{name}-{way}" / "pytorch_lora_weights.safetensors") for way in ("on", "off"))
    assert first.keys() == second.keys() and all(torch.equal(tensor, second[key]) for key, tensor in first.items())


def test_samples_are_those_of_the_model_as_it_is_at_that_step(project: TinyProject) -> None:
    """The first sample is the base model's, whatever is trained; the same seed gives the same clip in every run."""
    project.train(**SMALL, output_dir="slow", max_train_steps=1, learning_rate=1e-9)
    project.train(**SMALL, output_dir="fast", max_train_steps=1, learning_rate=1e-1, lora_rank=4, seed=7)
    found = [(project.folder / out).glob("validation/*/sample.mp4") for out in ("slow", "fast")]
    slow, fast = ({path.parent.name: path.read_bytes() for path in paths} for paths in found)
    assert slow["step_0"] == fast["step_0"]
    assert slow["step_1"] != fast["step_1"]


def test_the_heartbeat_tells_when_training_goes_on(project: TinyProject, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not only with the next numbers, which on a GPU come after ten steps."""
    beats: list[tuple[int, str]] = []

    def heard(self: RunFolder, step: int, total: int, state: str, facts: Mapping[str, object] | None = None) -> None:
        beats.append((step, state))

    monkeypatch.setattr(RunFolder, "heartbeat", heard)
    project.train(**SMALL, output_dir="beating", max_train_steps=2, checkpoint_step_interval=1)
    for state, steps in (("validating", [0]), ("saving", [1, 2])):
        places = [index for index, beat in enumerate(beats) if beat[1] == state and beat[0] in steps]
        assert [beats[place + 1] for place in places[: len(steps)]] == [(step, "training") for step in steps]


# --- failures ----------------------------------------------------------------------------------------------------
def test_a_sample_that_fails_is_reported_and_training_goes_on(project: TinyProject, monkeypatch: pytest.MonkeyPatch) -> None:
    plain, count = TinyFamily._generate, iter(range(100))

    def unsteady(self: TinyFamily, *arguments: object) -> Generated:
        turn = next(count)
        if turn == 0:
            raise torch.OutOfMemoryError("no room for the decoder")
        made = plain(self, *arguments)  # type: ignore[arg-type]
        if turn == 1:
            made.latents["video"].fill_(float("nan"))  # type: ignore[attr-defined]
        return made

    monkeypatch.setattr(TinyFamily, "_generate", unsteady)
    project.train(**SMALL, output_dir="unsteady", max_train_steps=2, validation_step_interval=1, musubi_blocks_to_swap=2)
    failed = events(project, "sample_failed", out="unsteady")
    assert [(row["step"], row["label"]) for row in failed] == [(0, "sample"), (1, "sample")]
    assert "no room for the decoder" in str(failed[0]["reason"]) and "not finite" in str(failed[1]["reason"])
    assert [row["step"] for row in events(project, "sample", out="unsteady")] == [2]
    project.train(output_dir="steady", max_train_steps=2, musubi_blocks_to_swap=2)
    assert losses(project, "unsteady") == losses(project, "steady")


def test_a_sample_that_does_not_fit_beside_graphs_is_made_without_them(project: TinyProject, monkeypatch: pytest.MonkeyPatch) -> None:
    plain, count, released = TinyFamily._generate, iter(range(100)), [False, True]

    def full_once(self: TinyFamily, *arguments: object) -> Generated:
        if next(count) in (0, 1):
            raise torch.OutOfMemoryError("no room")
        return plain(self, *arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(TinyFamily, "_generate", full_once)
    monkeypatch.setattr(PlainExecution, "release", lambda self: released.pop(0))  # graphs themselves need a GPU
    project.train(**SMALL, output_dir="beside", max_train_steps=1, musubi_blocks_to_swap=2)
    assert [row["step"] for row in events(project, "sample_failed", out="beside")] == [0], "nothing was held there"
    assert [row["step"] for row in events(project, "sample", out="beside")] == [1] and released == []


def test_held_out_losses_that_fail_are_reported(project: TinyProject, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object, **__: object) -> None:
        raise OutOfMemoryError("the device is full")

    monkeypatch.setattr(validation, "held_out_losses", broken)
    project.train(**SMALL, **held_out(project), output_dir="unmeasured", max_train_steps=1)
    assert [row["step"] for row in events(project, "heldout_failed", out="unmeasured")] == [0, 1]
    assert len(events(project, "sample", out="unmeasured")) == 2 and len(losses(project, "unmeasured")) == 1


# --- interruptions -----------------------------------------------------------------------------------------------
class Stopping(Silence):
    """Asks for the end when a text is said for the given time."""

    def __init__(self, text: str, times: int = 1) -> None:
        self.text, self.left, self.said = text, times, list[str]()

    def note(self, text: str) -> None:
        self.said.append(text)
        if self.text in text:
            self.left -= 1
            if self.left == 0:
                signal.raise_signal(signal.SIGTERM)


def run(project: TinyProject, interface: Silence, **keys: object) -> Outcome:
    return session_train(project.registry, project.settings(**keys), interface)


def test_a_stop_is_honoured_after_the_sample_under_way_and_a_resumed_run_repeats_none(project: TinyProject) -> None:
    keys = {**SMALL, **held_out(project), "output_dir": "stopped", "max_train_steps": 4, "validation_step_interval": 2,
            "validation_using_datasets": True}  # fmt: skip
    outcome = run(project, Stopping("step 2: sampled exam-elm-i2v.mp4"), **keys)
    assert outcome.exit_code == 143 and outcome.step == 2
    labels = ["sample", "exam-elm-i2v", "exam-elm-s2v", "exam-fir-i2v"]
    made = [(r["step"], r["label"]) for r in events(project, "sample", out="stopped")]
    assert made == [*((0, name) for name in labels), (2, "sample"), (2, "exam-elm-i2v")]
    assert run(project, Silence(), **keys, resume_from_checkpoint="latest").exit_code == 0
    made = [(r["step"], r["label"]) for r in events(project, "sample", out="stopped")]
    assert made == [(step, name) for step in (0, 2, 4) for name in labels], "the rest of step 2 is made up for, nothing is made twice"
    assert [row["step"] for row in events(project, "heldout", out="stopped")] == [0, 2, 4]
    project.train(**{**keys, "output_dir": "whole"})
    assert project.metrics("stopped") == project.metrics("whole")
    assert run(project, Silence(), **keys, resume_from_checkpoint="latest").sample is not None
    assert len(events(project, "sample", out="stopped")) == len(made)


def test_steps_that_are_run_again_after_a_crash_are_not_sampled_again(project: TinyProject, monkeypatch: pytest.MonkeyPatch) -> None:
    """It dies in step 4 after the samples of step 3; the last checkpoint is of step 2."""
    keys = {**SMALL, **held_out(project), "output_dir": "crashed", "max_train_steps": 4, "validation_step_interval": 3,
            "checkpoint_step_interval": 2}  # fmt: skip
    with pytest.raises(KeyboardInterrupt):
        run(project, Dying("step 3: sampled"), **keys)
    before = events(project, "sample", "heldout", out="crashed")
    assert run(project, Silence(), **keys, resume_from_checkpoint="latest").exit_code == 0
    after = events(project, "sample", "heldout", out="crashed")
    assert after[: len(before)] == before and [row["step"] for row in after[len(before) :]] == [4, 4]
    project.train(**{**keys, "output_dir": "calm"})
    assert project.metrics("crashed") == project.metrics("calm"), "with the held-out loss of step 3, which was not computed again"


class Dying(Silence):
    """Ends the process, as far as a test can, when a text is said."""

    def __init__(self, text: str) -> None:
        self.text = text

    def note(self, text: str) -> None:
        if self.text in text:
            raise KeyboardInterrupt


def test_a_changed_prompt_is_sampled_at_a_step_that_was_sampled_with_another(project: TinyProject) -> None:
    keys = {**SMALL, "output_dir": "changed", "max_train_steps": 2}
    project.train(**keys)
    project.train(**{**keys, "validation_prompt": "other waves", "resume_from_checkpoint": "latest"})
    assert [(r["step"], r["prompt"]) for r in events(project, "sample", out="changed")] == [(0, "waves"), (2, "waves"), (2, "other waves")]


# --- mistakes and notices ----------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"eval_dataset_id": "exams"}, ["eval_dataset_id", "exams", "did you mean exam?"]),
        ({"eval_dataset_id": "clips"}, ["eval_dataset_id", "'clips' is an entry of dataset_type `video`", "eval"]),
        ({"validation_prompt_library": "nowhere.json"}, ["validation_prompt_library", "nowhere.json", "no such file"]),
        ({"validation_prompt_library": True}, ["validation_prompt_library", "config/user_prompt_library.json"]),
        ({"validation_adapter_path": "nowhere.safetensors"}, ["validation_adapter_path", "nowhere.safetensors", "owner/name:file"]),
        ({"validation_adapter_config": "nowhere.json"}, ["validation_adapter_config", "nowhere.json"]),
        ({"validation_resolution": "wide"}, ["validation_resolution", "wide"]),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_mistakes_are_named_while_planning(project: TinyProject, keys: dict[str, object], words: list[str]) -> None:
    with pytest.raises(ConfigError) as raised:
        project.plan(**{**SMALL, **held_out(project), "validation_using_datasets": True, **keys})
    assert [word for word in words if word not in str(raised.value)] == [] and raised.value.exit_code == 2


def test_datasets_that_are_not_there_are_named(project: TinyProject) -> None:
    with pytest.raises(ConfigError, match="validation_using_datasets: there is no held-out dataset"):
        project.plan(**SMALL, validation_using_datasets=True)
    with pytest.raises(ConfigError, match=r"eval_dataset_id.*no such entry.*\n.*add an entry of dataset_type `eval`"):
        project.plan(**SMALL, eval_dataset_id="exam")
    with pytest.raises(ConfigError, match="no held-out file can give a sound"):
        silent = [{"id": "clips", "instance_data_dir": str(project.folder / "clips")},
                  {"id": "exam", "dataset_type": "eval", "instance_data_dir": str(project.folder / "exam"), "audio": {"auto_split": False}}]
        (project.folder / "silent.json").write_text(json.dumps(silent))
        project.plan(
            **SMALL, data=None, data_backend_config=str(project.folder / "silent.json"), validation_using_datasets=True,
            validation_given="sound",
        )  # fmt: skip


def test_an_interval_without_anything_to_do_is_a_notice(project: TinyProject) -> None:
    nothing = {**SMALL, "validation_prompt": "", "validation_step_interval": 2}
    assert [n for n in project.plan(**nothing).notices if n.startswith("validation_step_interval: there is nothing to sample")]
    assert not project.plan(**nothing, **held_out(project)).notices, "there are losses to compute"
    assert not project.plan(**{**nothing, "validation_prompt": "x"}).notices


def test_the_plan_says_what_will_be_made(project: TinyProject) -> None:
    plan = project.plan(**SMALL, **held_out(project), validation_step_interval=10)
    assert plan.validation.describe() == [(
        "validation",
        "1 sample: sample; loss of 2 held-out files at 4 noise levels; before the first step, every 10 steps, at the end",
    )]  # fmt: skip
    assert [step for step in range(26) if plan.validation.due(step, 25)] == [0, 10, 20, 25]


def test_a_held_out_file_that_cannot_be_decoded_is_counted_and_left_out(project: TinyProject, tmp_path: Path) -> None:
    exam = tmp_path / "exam"
    for name in ("good", "bad"):
        write_clip(exam, name, frames=9)
    content = bytearray((exam / "bad.mp4").read_bytes())
    end = content.index(b"moov") - 4
    content[end - 60 : end] = bytes(60)
    (exam / "bad.mp4").write_bytes(content)
    entries = [{"id": "clips", "instance_data_dir": str(project.folder / "clips")},
               {"id": "exam", "dataset_type": "eval", "instance_data_dir": str(exam)}]  # fmt: skip
    (tmp_path / "data.json").write_text(json.dumps(entries))
    project.train(
        **{**SMALL, "validation_prompt": ""}, data=None, data_backend_config=str(tmp_path / "data.json"), output_dir="half",
        max_train_steps=1, validation_using_datasets=True, validation_given="picture",
    )  # fmt: skip
    (cached,) = events(project, "cached", out="half")
    assert (cached["found"], cached["failed"]) == (6, 1) and "bad.mp4" in str(cached["failures"])
    assert {row["label"] for row in events(project, "sample", out="half")} == {"exam-good-i2v"}
    assert {row["items"] for row in events(project, "heldout", out="half")} == {1}


def test_events_of_an_interrupted_run_are_read_as_far_as_they_are_whole(tmp_path: Path) -> None:
    (tmp_path / "validation/step_2").mkdir(parents=True)
    (tmp_path / "validation/step_2/sample.mp4").write_bytes(b"clip")
    sample = {"kind": "sample", "step": 2, "label": "sample", "prompt": "x", "path": "validation/step_2/sample.mp4"}
    rows = [
        {"kind": "training", "from_step": 0}, {**sample, "label": "old"}, {"kind": "training", "from_step": 0}, sample,
        {**sample, "label": "lost", "path": "validation/step_2/lost.mp4"},
        {"kind": "heldout", "step": 2, "grid": "g", "losses": {"video": 0.5}},
    ]  # fmt: skip
    (tmp_path / "events.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"kind": "sam')
    earlier = validation.Earlier.of(tmp_path)
    assert dict(earlier.samples) == {(2, "sample", "x"): tmp_path / "validation/step_2/sample.mp4"}
    assert earlier.losses == {(2, "g"): {"video": 0.5}}
    assert validation.Earlier.of(tmp_path / "elsewhere").samples == {}
