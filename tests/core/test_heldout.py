"""Held-out losses: the same grid in every run, and the same numbers as a plain loop."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest
import torch

from tuner.data.records import RecordPlaces
from tuner.interfaces.family import Noise, StreamNoise
from tuner.testing.clips import write_clip
from tuner.testing.project import TinyProject, Trial
from tuner.train.samples.heldout import SEED, HeldOutLosses, held_out_losses, held_out_sample, levels
from tuner.train.samples.plan import family_encoders

torch.set_num_threads(1)


def with_exam(project: TinyProject) -> TinyProject:
    """Adds a held-out clip with sound, one without, and the dataset file that names them."""
    write_clip(project.folder / "exam", "elm", frames=9)
    write_clip(project.folder / "exam", "fir", frames=13, sound=False)
    entries = [{"id": "clips", "instance_data_dir": str(project.folder / "clips")},
               {"id": "exam", "dataset_type": "eval", "instance_data_dir": str(project.folder / "exam")}]  # fmt: skip
    (project.folder / "data.json").write_text(json.dumps(entries))
    return project


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> TinyProject:
    return with_exam(TinyProject.make(tmp_path_factory.mktemp("heldout")))


def trial(project: TinyProject, **keys: object) -> Trial:
    return project.trial(data=None, data_backend_config=str(project.folder / "data.json"), validation_disable=False, **keys)


def places(run: Trial) -> RecordPlaces:
    encoders = [encoder for encoder in run.plan.encoders if encoder.name in family_encoders(run.plan)]
    return RecordPlaces(encoders, run.plan.manifest.geometry, run.plan.manifest.text_cache)


def measured(run: Trial) -> HeldOutLosses:
    plan, training = run.plan, run.assembly.training
    training.model.eval()
    try:
        found = held_out_losses(
            training, places(run), plan.validation.measured, plan.validation.levels, plan.streams, torch.device("cpu")
        )
    finally:
        training.model.train()
    assert found is not None
    return found


def test_levels_lie_in_the_middles_of_equal_parts() -> None:
    assert levels(1) == [0.5]
    assert levels(4) == [0.125, 0.375, 0.625, 0.875]


def test_losses_are_those_of_a_plain_loop(project: TinyProject) -> None:
    """mean over files and levels of mean((v - (eps - x0))²), x_sigma = (1 - sigma) x0 + sigma eps; a file without sound has none."""
    run = trial(project, eval_timesteps=3)
    run.steps(2)
    found, training, family = measured(run), run.assembly.training, run.plan.family
    expected: dict[str, list[float]] = {"video": [], "audio": []}
    training.model.eval()
    for item in run.plan.manifest.held_out:
        batch = family.collate([held_out_sample(item, places(run).read(item, item.caption))], run.plan.streams)
        for place, sigma in enumerate((1 / 6, 3 / 6, 5 / 6)):
            noises, targets = {}, {}
            for name, stream in batch.streams.items():
                text = "\x1f".join((str(SEED), f"held out/{name}/{item.content}", str(place)))
                seed = int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big")
                eps = torch.randn(stream.latents.shape, generator=torch.Generator().manual_seed(seed))
                noisy = (1 - sigma) * stream.latents + sigma * eps
                noises[name] = StreamNoise(torch.tensor([sigma]), noisy, eps - stream.latents, eps)
                targets[name] = eps - stream.latents
            with torch.no_grad():
                state = family.enter(training.model, batch, Noise(noises))
                for block in family.block_set(training.model).blocks:
                    state = family.call_block(block, state)
                velocity = family.exit(training.model, state).streams
            for name, target in targets.items():
                expected[name].append(float((velocity[name] - target).square().mean()))
    assert len(expected["video"]) == 6 and len(expected["audio"]) == 3, "one of the two clips is silent"
    assert found.items == 2
    assert found.mean == pytest.approx({name: sum(values) / len(values) for name, values in expected.items()}, rel=1e-6)
    video = expected["video"]
    assert found.by_level["video"] == pytest.approx(
        {name: (video[k] + video[3 + k]) / 2 for k, name in enumerate(("0.1667", "0.5", "0.8333"))}, rel=1e-6
    )


def test_neither_seed_nor_batch_size_nor_order_decide(project: TinyProject) -> None:
    first = trial(project, seed=1, train_batch_size=1, eval_timesteps=2)
    other = trial(project, seed=2, train_batch_size=4, eval_timesteps=2, lora_dropout=0.4, caption_dropout_probability=0.5)
    first.steps(2)
    other.assembly.masters.load_state(first.weights())
    assert [item.path.name for item in first.plan.validation.measured] == [item.path.name for item in other.plan.validation.measured]
    one, two = measured(first), measured(other)
    assert one.mean == two.mean and one.by_level == two.by_level, "to the last bit"
    assert measured(first).mean == one.mean


def test_a_trained_model_does_better(project: TinyProject) -> None:
    run = trial(project, learning_rate=3e-2, max_train_steps=40)
    before = measured(run).mean
    run.steps(40)
    after = measured(run).mean
    assert after["video"] < before["video"] and set(after) == {"video", "audio"}


def test_at_most_so_many_files_chosen_by_their_bytes(project: TinyProject) -> None:
    plan = project.plan(
        data=None, data_backend_config=str(project.folder / "data.json"), validation_disable=False, num_eval_images=1
    )
    assert plan.validation.measured == (min(plan.manifest.held_out, key=lambda item: item.content),)
    none = project.plan(
        data=None, data_backend_config=str(project.folder / "data.json"), validation_disable=False, num_eval_images=0
    )
    assert not none.validation.wanted


def test_a_stop_between_two_files_leaves_no_number(project: TinyProject) -> None:
    run = trial(project)
    asked = iter([False, True])
    found = held_out_losses(
        run.assembly.training, places(run), run.plan.validation.measured, 1, run.plan.streams, torch.device("cpu"), lambda: next(asked)
    )
    assert found is None


def test_losses_stand_in_the_log_and_among_the_events(project: TinyProject, tmp_path: Path) -> None:
    project.train(
        data=None, data_backend_config=str(project.folder / "data.json"), validation_disable=False, max_train_steps=4,
        validation_step_interval=2, output_dir="logged",
    )  # fmt: skip
    rows = [row for row in project.metrics("logged") if "heldout/video" in row]
    assert [row["step"] for row in rows] == [0, 2, 4] and all(set(row) == {"step", "heldout/video", "heldout/audio"} for row in rows)
    lines = (project.folder / "logged" / "events.jsonl").read_text().splitlines()
    events = [event for event in map(json.loads, lines) if event["kind"] == "heldout"]
    assert [(event["step"], event["items"], event["losses"]["video"]) for event in events] == [
        (row["step"], 2, row["heldout/video"]) for row in rows
    ]
