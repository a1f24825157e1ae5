"""The weight's course over a run, and the cut-off by similarity: smoothed, read with a fixed lag, resumed exactly."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pytest
import torch

from tuner_regularizers.crepa_course import LAG, CutOff, weight_at
from tuner_regularizers.crepa_options import CrepaOptions

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("keys", "steps", "expected"),
    [
        ({}, (0, 7, 99), (0.8, 0.8, 0.8)),
        ({"crepa_warmup_steps": 4}, (0, 1, 3, 4, 50), (0, 0.2, 0.6, 0.8, 0.8)),
        ({"crepa_scheduler": "linear"}, (0, 10, 19, 20), (0.8, 0.4, 0.04, 0)),
        ({"crepa_scheduler": "linear", "crepa_warmup_steps": 10}, (5, 10, 15, 20), (0.4, 0.8, 0.4, 0)),
        ({"crepa_scheduler": "linear", "crepa_decay_steps": 4, "crepa_lambda_end": 0.2}, (0, 1, 4, 19), (0.8, 0.65, 0.2, 0.2)),
        ({"crepa_scheduler": "cosine", "crepa_decay_steps": 6}, (0, 2, 3, 6), (0.8, 0.4 * (1 + math.cos(math.pi / 3)), 0.4, 0)),
        ({"crepa_scheduler": "polynomial", "crepa_power": 2, "crepa_decay_steps": 4}, (0, 1, 2, 4), (0.8, 0.8 * 0.5625, 0.2, 0)),
        ({"crepa_scheduler": "linear", "crepa_lambda_end": 1.2}, (0, 10, 20), (0.8, 1.0, 1.2)),
    ],
)
def test_the_weight_by_hand(keys: dict[str, object], steps: Sequence[int], expected: Sequence[float]) -> None:
    options = CrepaOptions(crepa_lambda=0.8, **keys)
    assert [weight_at(options, step, 20) for step in steps] == pytest.approx(list(expected))


def test_only_a_decay_over_the_whole_run_follows_its_length() -> None:
    on = {"crepa_enabled": True}
    assert CrepaOptions(**on, crepa_scheduler="cosine").follows_length()
    assert not CrepaOptions(**on, crepa_scheduler="cosine", crepa_decay_steps=5).follows_length()
    assert not CrepaOptions(**on).follows_length() and not CrepaOptions(crepa_scheduler="cosine").follows_length()


def cutoff(mode: str = "permanent", decay: float = 0.5) -> CutOff:
    return CutOff(0.6, decay, mode == "recoverable", CPU)


def feed(cut: CutOff, values: Sequence[float | None]) -> list[bool]:
    """One batch of two a step, the second sample not counted; None: a step without any. What is decided after each."""
    decided = []
    for value in values:
        cut.add(torch.tensor([value or 0.0, 9.0]), torch.tensor([value is not None, False]))
        cut.end_step()
        decided.append(cut.cut)
    return decided


def smoothed(values: Sequence[float | None], decay: float) -> list[float]:
    now, found = math.nan, []
    for value in values:
        if value is not None:
            now = value if math.isnan(now) else decay * now + (1 - decay) * value
        found.append(now)
    return found


@pytest.mark.parametrize("mode", ["permanent", "recoverable"])
def test_a_decision_rests_on_the_smoothed_value_of_so_many_steps_ago(mode: str) -> None:
    values = [None, 0.0, 0.8, 0.9, None, 0.9, 0.1, 0.1, 0.1, 0.9, *[0.5] * LAG]
    reached = [value >= 0.6 for value in smoothed(values, 0.5)]
    assert reached.index(True) == 3 and False in reached[4:]
    late = [False] * LAG + reached[:-LAG]
    expected = late if mode == "recoverable" else [any(late[: i + 1]) for i in range(len(late))]
    assert feed(cutoff(mode), values) == expected


def test_a_step_is_the_mean_over_all_samples_of_its_batches() -> None:
    one, other = cutoff(), cutoff()
    one.add(torch.tensor([0.1, 0.4]), torch.tensor([True, True]))
    one.add(torch.tensor([0.1, 0.4]), torch.tensor([True, True]))  # the same once more, because it did not fit the first time
    one.next_batch()
    one.add(torch.tensor([0.9]), torch.tensor([True]))
    other.add(torch.tensor([0.1, 0.4, 0.9]), torch.tensor([True, True, True]))
    one.end_step(), other.end_step()
    assert one.state_dict()["smoothed"].item() == pytest.approx(other.state_dict()["smoothed"].item()) == pytest.approx(1.4 / 3)
    one.add(torch.tensor([7.0]), torch.tensor([True]))
    one.clear()  # an evaluation between two steps does not belong to the next one
    one.end_step()
    assert one.state_dict()["smoothed"].item() == pytest.approx(1.4 / 3)


@pytest.mark.parametrize("at", [1, 5, 8])
def test_resumed_it_decides_as_if_uninterrupted(at: int) -> None:
    values = [0.1, 0.5, 0.9, 0.9, 0.2, 0.1, 0.1, 0.95, 0.9, 0.9, 0.1, 0.2, 0.3]
    expected = feed(cutoff("recoverable", 0.3), values)
    assert True in expected and False in expected[expected.index(True) :]
    first, second = cutoff("recoverable", 0.3), cutoff("recoverable", 0.3)
    begun = feed(first, values[:at])
    second.load_state_dict({name: tensor.clone() for name, tensor in first.state_dict().items()})
    assert begun + feed(second, values[at:]) == expected
    assert all(torch.equal(a, b) for a, b in zip(second.state_dict().values(), feed_state(values).values(), strict=True))


def feed_state(values: Sequence[float]) -> dict[str, torch.Tensor]:
    cut = cutoff("recoverable", 0.3)
    feed(cut, values)
    return dict(cut.state_dict())
