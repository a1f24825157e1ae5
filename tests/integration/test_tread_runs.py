"""TREAD through whole commands: resumed is uninterrupted, a ratio of 0 changes no bit, and what cannot be routed is refused at planning."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from integration.project import Project, add_clip, tone
from tuner.data.media import write_wav
from tuner_ltxvideo2.tiny import TinyPaths

FIRST = {"selection_ratio": 0.5, "start_layer_idx": 0, "end_layer_idx": 1}
SECOND = {"selection_ratio": 0.25, "start_layer_idx": 2, "end_layer_idx": -1}
ONE, TWO = {"routes": [{**FIRST, "start_layer_idx": 1, "end_layer_idx": -2}]}, {"routes": [FIRST, SECOND]}
MODES = {"i2v_conditioning_probability": 0.3, "crop_conditioning_probability": 0.4, "caption_dropout_probability": 0.2}
"""The number of tokens that may leave changes from batch to batch."""


@pytest.fixture(scope="module")
def there(tmp_path_factory: pytest.TempPathFactory, tiny: TinyPaths) -> Project:
    """Clips of two lengths, one without sound; a sound alone in a dataset of its own; a cache for all runs."""
    folder = tmp_path_factory.mktemp("tread")
    for name, frames in (("amber", 17), ("birch", 17), ("cedar", 33)):
        add_clip(folder / "clips", name, frames=frames)
    add_clip(folder / "clips", "dusk", frames=17, sound=False)
    (folder / "voices").mkdir()
    write_wav(folder / "voices" / "voice.wav", tone(1.2, 300.0))
    (folder / "voices" / "voice.txt").write_text("a tone")
    audio = {"audio_only": True, "min_duration_seconds": 1, "duration_interval": 1}
    entry = {"id": "my-voices", "type": "local", "dataset_type": "audio", "instance_data_dir": "voices", "caption_strategy": "textfile"}
    (folder / "voices.json").write_text(json.dumps([{**entry, "audio": audio}]))
    return Project(folder, tiny)


def train(project: Project, out: str, **changes: object) -> Path:
    folder = project.folder / out
    assert project.train("--output_dir", folder, **{**MODES, "train_batch_size": 1, "max_train_steps": 6, **changes}) == 0
    return folder


def assert_same(one: Path, other: Path) -> None:
    found, expected = load_file(one / "lora.safetensors"), load_file(other / "lora.safetensors")
    assert found.keys() == expected.keys() and all(torch.equal(found[key], expected[key]) for key in expected)
    assert (one / "metrics.jsonl").read_text() == (other / "metrics.jsonl").read_text()


def test_resumed_is_uninterrupted(there: Project) -> None:
    """With all that draws beside it: modes, dropped captions, rollouts, and gradients added up over two batches."""
    keys = {
        "tread_config": TWO, "gradient_accumulation_steps": 2, "scheduled_sampling_max_step_offset": 2,
        "scheduled_sampling_probability": 0.5, "max_train_steps": 4,
    }  # fmt: skip
    whole = train(there, "whole", **keys)
    train(there, "parts", **{**keys, "max_train_steps": 2})
    assert_same(train(there, "parts", **keys, resume_from_checkpoint="latest"), whole)
    rows = there.metrics("whole")
    assert all(math.isfinite(row["loss"]) for row in rows)


def test_a_ratio_of_zero_changes_no_bit_and_another_one_does(there: Project) -> None:
    plain = train(there, "plain")
    assert_same(train(there, "zero", tread_config={"routes": [{**FIRST, "selection_ratio": 0}]}), plain)
    routed = train(there, "routed", tread_config=json.dumps(ONE))
    assert (routed / "metrics.jsonl").read_text() != (plain / "metrics.jsonl").read_text()
    resolved = json.loads((routed / "config.resolved.json").read_text())
    assert resolved["tread_config"]["value"] == ONE
    assert not [key for key in load_file(routed / "lora.safetensors") if "tread" in key]


REFUSED: Mapping[str, tuple[dict[str, object], list[str]]] = {
    "another word": ({"tread_config": {"routs": []}}, ["tread_config: has no field 'routs'; did you mean routes?"]),
    "no file": ({"tread_config": "config/none.json"}, ["tread_config: config/none.json: there is no such file"]),
    "a block too far": (
        {"tread_config": {"routes": [{**FIRST, "end_layer_idx": 4}]}},
        ["tread_config.routes[0].end_layer_idx: is no block of this model (got 4)", "0 to 3, or -4 to -1"],
    ),
    "overlap": ({"tread_config": {"routes": [FIRST, FIRST]}}, ["tread_config.routes[0], tread_config.routes[1]: both hold blocks 0 to 1"]),
    "all": ({"tread_config": {"routes": [{**FIRST, "selection_ratio": 1}]}}, ["routes[0].selection_ratio: must be less than 1"]),
    "sound alone": (
        {"tread_config": ONE, "data": None, "data_backend_config": "voices.json"},
        ["tread_config, data_backend_config: routes tokens of the picture", "'my-voices'"],
    ),
    "a given picture": ({"tread_config": ONE, "given_stream": "video", **dict.fromkeys(MODES, 0)}, ["the whole picture is given clean"]),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_routed_is_refused_at_planning(
    name: str, there: Project, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(there.folder)
    keys, words = REFUSED[name]
    assert there.train("--output_dir", "refused", **{**MODES, **keys}) == 2
    error = " ".join(capsys.readouterr().err.split())
    assert "Traceback" not in error and not Path("refused").exists()
    assert [word for word in words if word not in error] == [], error
