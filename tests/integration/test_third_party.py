"""What somebody else's plugin attaches takes part in training, is saved and resumed with it, and leaves nothing behind."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from integration import third_party
from integration.project import Project
from tuner.config.resolve import resolve
from tuner.errors import ConfigError
from tuner.plugins.loader import load_plugins
from tuner.train.saving.checkpoint import load_checkpoint
from tuner.train.session import Outcome, Silence, train

ON = {"brightness_weight": 0.5, "shrink_weight": 0.1, "watch_blocks": True}


@pytest.fixture(autouse=True)
def journal() -> list[str]:
    third_party.JOURNAL.clear()
    return third_party.JOURNAL


def run(project: Project, **changes: object) -> Outcome:
    registry = load_plugins({}, extra=[("third_party", third_party)])
    settings = resolve(registry.option_types, config_file=project.config(**changes))
    return train(registry, settings, Silence())


def weights(out: str, step: int) -> dict[str, torch.Tensor]:
    return load_checkpoint(Path(out) / f"checkpoint-{step}").parts["weights"]


def equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_it_trains_is_saved_and_resumed_exactly(project: Project, journal: list[str]) -> None:
    assert run(project, output_dir="whole", **ON).exit_code == 0
    # The order of assembly: adapters, memory strategy, regularizers.
    assert journal[:4] == ["encoder loaded", "encoder unloaded", "memory attached to adapted blocks", "attached to 4 blocks"]
    step = ["F0", "F1", "F2", "F3", "B3", "B2", "B1", "B0"]
    assert journal[4:-2] == step * 4
    assert journal[-2:] == ["detached after 4 batches", "memory detached"]
    trained = weights("whole", 4)
    assert {"brightness.weight", "brightness.bias"} < set(trained)
    assert not torch.equal(trained["brightness.weight"], weights("whole", 2)["brightness.weight"])
    rows = project.metrics("whole")
    assert all({"loss/video", "loss/brightness", "loss/shrink"} <= set(row) for row in rows)
    total = [row["loss/video"] + row.get("loss/audio", 0) + 0.5 * row["loss/brightness"] + 0.1 * row["loss/shrink"] for row in rows]
    assert total == pytest.approx([row["loss"] for row in rows], rel=1e-5)

    run(project, output_dir="parts", max_train_steps=2, **ON)
    run(project, output_dir="parts", resume_from_checkpoint="latest", **ON)
    assert equal(weights("parts", 4), trained) and project.metrics("parts") == rows
    assert load_checkpoint(Path("parts/checkpoint-4")).parts["regularizer-brightness"]["calls"].item() == 4


def test_nothing_of_it_is_in_the_adapter_file_and_switched_off_it_does_nothing(project: Project, journal: list[str]) -> None:
    run(project, output_dir="on", **ON)
    with safe_open("on/lora.safetensors", framework="pt") as file:
        assert not any("brightness" in key for key in file.keys())  # noqa: SIM118
    journal.clear()
    run(project, output_dir="off")
    assert journal == []
    assert project.tuner("train", "--config", project.config(output_dir="without")) == 0
    assert equal(weights("off", 4), weights("without", 4))
    assert not torch.equal(weights("on", 4)[next(iter(weights("off", 4)))], weights("off", 4)[next(iter(weights("off", 4)))])


def test_an_events_only_strategy_changes_no_bit(project: Project) -> None:
    run(project, output_dir="watched", watch_blocks=True)
    run(project, output_dir="plain")
    assert equal(weights("watched", 4), weights("plain", 4))


def test_a_strategy_that_does_not_support_the_run_stops_it_at_planning(project: Project) -> None:
    with pytest.raises(ConfigError, match="cannot watch every weight"):
        run(project, watch_blocks=True, model_type="full")
    assert not Path("out").exists()


def test_two_strategies_for_the_same_blocks_are_refused_at_planning(project: Project) -> None:
    with pytest.raises(ConfigError, match="watch_blocks, watch_again: two memory strategies"):
        run(project, watch_blocks=True, watch_again=True)
    assert not Path("cache").exists() or not list(Path("cache").rglob("*.safetensors"))


def test_rows_of_metrics_are_as_far_apart_as_asked(project: Project) -> None:
    run(project, output_dir="sparse", log_interval=2)
    assert [row["step"] for row in project.metrics("sparse")] == [2, 4]
