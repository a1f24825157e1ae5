"""CREPA through whole commands: cached once, trained, saved, resumed, cut off, under every way of holding weights, on several ranks."""

from __future__ import annotations

import gc
import json
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest
import torch
from huggingface_hub import constants
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file
from torch import nn

from integration.processes import Launcher
from integration.project import Project, add_clip, moving_picture
from integration.test_ranks import Pair
from offload.simulated import SimulatedLink
from regularizers.teacher_hub import asked, teacher_hub
from tuner.errors import CheckpointError, HubError
from tuner.train.saving.checkpoint import load_checkpoint
from tuner_ltxvideo2.tiny import TinyPaths
from tuner_offload import block_swap, group, ramtorch
from tuner_regularizers.crepa import Crepa
from tuner_regularizers.teacher_files import write_tiny_teacher

Keys = dict[str, object]

ON: Keys = {"crepa_enabled": True, "crepa_encoder": "tiny", "crepa_encoder_image_size": 56, "crepa_block_index": 1}
CUT: Keys = {**ON, "crepa_similarity_threshold": -1.0}
"""Reached at once, and acted upon five steps later."""


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory, tiny: TinyPaths) -> Project:
    """Two clips, and a cache that all runs fill."""
    folder = tmp_path_factory.mktemp("crepa")
    for name in ("amber", "birch"):
        add_clip(folder / "clips", name, frames=17)
    return Project(folder, tiny)


@pytest.fixture
def there(shared: Project, monkeypatch: pytest.MonkeyPatch) -> Project:
    monkeypatch.chdir(shared.folder)
    return shared


def records(project: Project) -> dict[Path, int]:
    return {path: path.stat().st_mtime_ns for path in (project.folder / "cache").rglob("*.safetensors") if len(path.parent.name) == 2}


def weights(out: str, step: int) -> Mapping[str, torch.Tensor]:
    return load_checkpoint(Path(out) / f"checkpoint-{step}").parts["weights"]


def equal(one: Mapping[str, torch.Tensor], other: Mapping[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_it_trains_and_leaves_nothing_in_the_adapter(there: Project) -> None:
    assert there.train(output_dir="plain", crepa_scheduler="linear", **ON) == 0
    for row, weight in zip(there.metrics("plain"), (0.5, 0.375, 0.25, 0.125), strict=True):
        assert row["loss"] == pytest.approx(row["loss/video"] + row["loss/audio"] + weight * row["loss/crepa"], rel=1e-5)
        assert -1 <= row["loss/crepa/similarity"] <= 1
    first, last = weights("plain", 2), weights("plain", 4)
    projector = {name for name in last if name.startswith("crepa.")}
    assert projector == {"crepa.norm.weight", "crepa.norm.bias", "crepa.linear.weight", "crepa.linear.bias"}
    assert all(last[name].dtype == torch.float32 and not torch.equal(last[name], first[name]) for name in projector)
    for name in ("lora.safetensors", "pytorch_lora_weights.safetensors"):
        with safe_open(Path("plain", name), framework="pt") as file:
            assert not any("crepa" in key for key in file.keys())  # noqa: SIM118 - not a mapping


def test_without_weight_the_adapter_is_that_of_a_run_without(there: Project) -> None:
    """In the warm-up's first step the weight is 0, and after it the term is cut off."""
    for out, keys in (("none", {}), ("weightless", {**ON, "crepa_cutoff_step": 1, "crepa_warmup_steps": 9})):
        assert there.train(output_dir=out, max_train_steps=3, max_grad_norm=0, **keys) == 0
    found = {name: tensor for name, tensor in weights("weightless", 3).items() if not name.startswith("crepa.")}
    assert equal(found, weights("none", 3))
    assert ["loss/crepa" in row for row in there.metrics("weightless")] == [True, False, False]


def test_a_resumed_run_is_the_uninterrupted_one_cut_off_included(there: Project) -> None:
    long = {**CUT, "max_train_steps": 7, "checkpoint_step_interval": 4}
    assert there.train(output_dir="whole", **long) == 0
    assert ["loss/crepa" in row for row in there.metrics("whole")] == [True] * 5 + [False] * 2
    assert there.train(output_dir="parts", **{**long, "max_train_steps": 4}) == 0
    assert there.train(output_dir="parts", resume_from_checkpoint="latest", **long) == 0
    assert equal(weights("parts", 7), weights("whole", 7)) and there.metrics("parts") == there.metrics("whole")
    one, other = (load_checkpoint(Path(out, "checkpoint-7")).parts["regularizer-crepa"] for out in ("whole", "parts"))
    assert equal(one, other) and bool(one["cut"]) and one["pending"].shape == (4,)


def test_a_decay_over_the_whole_run_cannot_be_made_longer(there: Project, capsys: pytest.CaptureFixture[str]) -> None:
    decaying = {**ON, "crepa_scheduler": "cosine", "checkpoint_step_interval": 0, "max_train_steps": 1}
    assert there.train(output_dir="short", **decaying) == 0
    longer = {**decaying, "max_train_steps": 2, "resume_from_checkpoint": "latest"}
    assert there.train(output_dir="short", **longer) == CheckpointError.exit_code
    assert "max_train_steps" in capsys.readouterr().err


def test_features_are_cached_once_and_made_anew_for_another_teacher_alone(there: Project, capsys: pytest.CaptureFixture[str]) -> None:
    config = there.config(**ON)
    assert there.tuner("cache", "--config", config) == 0
    before = records(there)
    assert there.tuner("cache", "--config", config) == 0 and records(there) == before
    assert "2 clips = 2 cached + 0 encoded" in capsys.readouterr().out
    other = write_tiny_teacher(there.folder / "teacher", seed=5)
    for change in ({"crepa_encoder": str(other)}, {"crepa_encoder_image_size": 70}):
        known = records(there)
        assert there.tuner("cache", "--config", there.config(**ON | change)) == 0
        after = records(there)
        assert len(after) == len(known) + 2 and known.items() <= after.items()
        features = [load_file(path)["features"] for path in after.keys() - known.keys()]
        assert all(f.shape == (3, 2, 2, 32) and f.dtype == torch.float16 for f in features)
    moved = other.rename(there.folder / "elsewhere")
    known = records(there)
    assert there.tuner("cache", "--config", there.config(**ON | {"crepa_encoder": str(moved)})) == 0 and records(there) == known


def test_a_teacher_of_the_hub_is_downloaded_when_it_is_needed(
    there: Project, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    named = {**ON, "crepa_encoder": "dinov2_vits14"}
    with teacher_hub(write_tiny_teacher(tmp_path / "small", seed=7), tmp_path, monkeypatch) as hub:
        assert there.tuner("train", "--dry-run", "--config", there.config(**named)) == 0
        assert "0.0 GB in 1 files from facebook/dinov2-small@" in " ".join(capsys.readouterr().out.split())
        assert asked(hub) == ["config.json"]
        assert there.tuner("cache", "--config", there.config(**named)) == 0
        assert asked(hub) == ["config.json", "model.safetensors"]
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    known = records(there)
    assert there.tuner("cache", "--config", there.config(**named)) == 0 and records(there) == known
    capsys.readouterr()
    assert there.train("--dry-run", **{**named, "crepa_encoder": "dinov2_vitb14", "output_dir": "never"}) == HubError.exit_code
    assert "crepa_encoder: facebook/dinov2-base: the hub cannot be reached" in capsys.readouterr().err and not Path("never").exists()


def test_neither_teacher_nor_vae_is_in_memory_while_training(there: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[set[str]] = []
    begin = Crepa.begin_step

    def begin_step(self: Crepa, *arguments: object) -> None:
        gc.collect()
        seen.append({type(thing).__name__ for thing in gc.get_objects() if issubclass(type(thing), nn.Module)})
        begin(self, *arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(Crepa, "begin_step", begin_step)
    encoded = {**ON, "crepa_encoder_image_size": 84, "crepa_drop_vae_encoder": True, "max_train_steps": 1}
    assert there.train(output_dir="memory", cache_dir=str(there.folder / "own"), **encoded) == 0
    (names,) = seen
    assert "Projector" in names and not [name for name in names if "Dinov2" in name or "Autoencoder" in name or "Gemma" in name]


def test_pictures_and_clips_of_several_lengths_train_together(project: Project) -> None:
    Path("pictures").mkdir()
    Image.fromarray(moving_picture(1, 96, 64, 0.7)[0].numpy()).save("pictures/still.png")
    Path("pictures/still.txt").write_text("a still")
    add_clip(Path("clips"), "long", frames=33)
    entries = [{"id": "clips", "instance_data_dir": "clips"}, {"id": "stills", "instance_data_dir": "pictures", "dataset_type": "image"}]
    Path("dataset.json").write_text(json.dumps(entries))
    keys = {**ON, "crepa_adjacent_distance": 2, "crepa_cumulative_neighbors": True, "train_batch_size": 1}
    assert project.train(data=None, data_backend_config="dataset.json", max_train_steps=0, num_train_epochs=1, **keys) == 0
    shapes = [load_file(path)["features"].shape[0] for path in records(project) if "features" in load_file(path)]
    assert sorted(shapes) == [1, 2, 2, 2, 2, 5]
    assert len(project.metrics()) == 6 and all("loss/crepa" in row and row["loss"] == row["loss"] for row in project.metrics())


STRATEGIES: Mapping[str, Keys] = {"2 swapped": {"musubi_blocks_to_swap": 2}, "nothing recomputed": {"gradient_checkpointing": False}}
"""`test_memory_strategies.py` tries it with every strategy."""


@pytest.fixture(scope="module")
def resident(shared: Project) -> Iterator[Path]:
    """A run with all weights on the device and every block recomputed; the device of other runs is simulated."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(shared.folder)
        for module in (group, block_swap, ramtorch):
            patch.setattr(module, "link_to", lambda device, stream=True: SimulatedLink())
        assert shared.train(output_dir="resident", max_train_steps=3, **ON) == 0
        yield shared.folder / "resident"


@pytest.mark.parametrize("name", STRATEGIES)
def test_however_weights_are_held_the_run_is_the_same(name: str, resident: Path, there: Project) -> None:
    out = name.replace(" ", "-")
    assert there.train(output_dir=out, max_train_steps=3, **ON, **STRATEGIES[name]) == 0
    assert equal(weights(out, 3), weights(str(resident), 3))
    assert (Path(out) / "metrics.jsonl").read_text() == (resident / "metrics.jsonl").read_text()


def test_inside_a_route_and_with_a_given_first_frame(there: Project) -> None:
    """Routed tokens lose half of their places, those of the first frame are given clean and do not count."""
    route = {"routes": [{"selection_ratio": 0.5, "start_layer_idx": 1, "end_layer_idx": 2}]}
    keys = {**ON, "tread_config": route, "i2v_conditioning_probability": 1, "max_train_steps": 2, "checkpoint_step_interval": 0}
    for out, recomputed in (("routed", True), ("routed-kept", False)):
        assert there.train(output_dir=out, gradient_checkpointing=recomputed, **keys) == 0
    assert equal(weights("routed", 2), weights("routed-kept", 2)) and there.metrics("routed") == there.metrics("routed-kept")
    assert all("loss/crepa" in row for row in there.metrics("routed"))


def test_two_ranks_agree_on_the_similarity(there: Project, launcher: Launcher) -> None:
    """It is smoothed over the means of all ranks' samples, which are logged."""
    keys = {**CUT, "crepa_similarity_ema_decay": 0.5, "train_batch_size": 1, "checkpoint_step_interval": 0, "max_train_steps": 6}
    pair = Pair(launcher, "train", "--config", there.config(output_dir="two", **keys))
    assert pair.wait() == [0, 0], pair.said(0) + pair.said(1)
    found = [row["loss/crepa/similarity"] for row in there.metrics("two") if "loss/crepa" in row]
    assert len(found) == 5  # five steps, then cut off on both
    smoothed = found[0]
    for similarity in found[1:]:
        smoothed = (smoothed + similarity) / 2
    state = load_checkpoint(Path("two/checkpoint-6")).parts["regularizer-crepa"]
    assert state["smoothed"].item() == pytest.approx(smoothed, abs=1e-6)
