"""On a GPU, whole commands: resumed is uninterrupted, and what validates between replayed steps changes no bit of what is trained."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from integration.gpu_runs import CREPA, CUT, GROUPS, HAS_GPU, RAMTORCH, SWAP, TREAD, Bench, Keys, graphs, lenient, needs_gpu
from integration.project import Project
from tuner_offload.ramtorch import RamTorch

pytestmark = [lenient, needs_gpu]
BASE: Keys = {"mixed_precision": "bf16", "checkpoint_step_interval": 0}
WAYS = {"resident": {}, "groups": GROUPS, "swapped": SWAP, "layers": RAMTORCH}
SAMPLED: Keys = {
    "validation_disable": False, "validation_prompt": "a pattern", "validation_resolution": "64x64", "validation_num_video_frames": 9,
    "validation_num_inference_steps": 2, "validation_step_interval": 5,
}  # fmt: skip


@pytest.fixture
def there(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> Project:
    monkeypatch.chdir(bench.project.folder)
    monkeypatch.setattr(RamTorch, "smallest", 0)
    return bench.project


def train(project: Project, out: str, **keys: object) -> Path:
    given = {**BASE, **graphs(), "data": "mixed", **keys}
    assert project.train("--output_dir", out, **given) == 0
    return project.folder / out


def assert_same(one: Path, other: Path) -> None:
    found, expected = load_file(one / "lora.safetensors"), load_file(other / "lora.safetensors")
    assert found.keys() == expected.keys() and all(torch.equal(found[key], expected[key]) for key in expected)
    assert losses(one) == losses(other) != []


def losses(out: Path) -> list[dict[str, float]]:
    """The rows of training."""
    return [row for row in map(json.loads, (out / "metrics.jsonl").read_text().splitlines()) if "loss" in row]


@pytest.mark.parametrize("name", ["resident", "groups"])
def test_resumed_is_uninterrupted(name: str, there: Project) -> None:
    """A resumed run begins with plain steps where the other replays."""
    keys = {**WAYS[name], **TREAD, **CUT, "max_train_steps": 14 if HAS_GPU else 4}
    whole = train(there, f"whole-{name}", **keys)
    train(there, f"parts-{name}", **{**keys, "max_train_steps": 9 if HAS_GPU else 2})
    assert_same(train(there, f"parts-{name}", **keys, resume_from_checkpoint="latest"), whole)


@pytest.mark.parametrize("name", WAYS)
def test_validation_between_replayed_steps_changes_no_bit(name: str, there: Project) -> None:
    """Samples, and held-out losses of a clip of another shape, before the first step, between captured ones and after the last."""
    if not Path("exam").exists():
        Path("exam").mkdir()
        for suffix in (".mp4", ".txt"):
            Path("exam", f"kite{suffix}").write_bytes(Path("same", f"elder{suffix}").read_bytes())
    entries = [{"id": "mixed", "instance_data_dir": "mixed", "resolution": 64}]
    held = [*entries, {"id": "exam", "dataset_type": "eval", "instance_data_dir": "exam", "resolution": 80, "minimum_image_size": 0}]
    Path("with.json").write_text(json.dumps(held))
    Path("without.json").write_text(json.dumps(entries))
    keys = {**WAYS[name], **TREAD, **CREPA, "data": None, "max_train_steps": 16}
    plain = train(there, f"unwatched-{name}", **keys, data_backend_config="without.json")
    watched = train(there, f"watched-{name}", **{**keys, **SAMPLED}, data_backend_config="with.json")
    events = [event["kind"] for event in map(json.loads, (watched / "events.jsonl").read_text().splitlines())]
    assert events.count("sample") >= 2 and events.count("heldout") >= 2 and "sample_failed" not in events and "heldout_failed" not in events
    assert_same(watched, plain)
