"""The loop closes: a model trained on one clip with sound gives that clip when it is sampled from noise with the clip's caption.

Cache, noise, loss, optimizer, the file of full weights, text encoder and sampler all have a part in it; a wrong sign, scale, order of
tokens or normalisation in any of them leaves it open.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional

from integration.project import Project, add_clip
from tuner.config.resolve import Settings, resolve
from tuner.data.dataset import TrainingSet
from tuner.data.media import probe
from tuner.model.licence import UNKNOWN_LICENCE
from tuner.plugins.loader import load_plugins
from tuner.plugins.registry import Registry
from tuner.train.planning import make_plan
from tuner.train.samples.sample import Trained, generate
from tuner_ltxvideo2.tiny import TinyPaths

CAPTION = "a red ball rolls slowly over green grass while birds sing"
CLOSED = 0.9
"""Cosine similarity with the clip's latents. A model that has learned the clip but not the noise ends at noise + clip: at 0.74 for the
picture, 0.84 for the sound. Noise alone is at 0."""
SETTINGS: Mapping[str, object] = {
    "model_type": "full", "data": None, "data_backend_config": "data.json", "train_batch_size": 8, "max_train_steps": 180,
    "learning_rate": 2e-3, "adam_beta2": 0.95, "sigma_pairing": "shared", "sigma_sampler": "logit_normal", "flow_schedule_shift": 6,
    "gradient_checkpointing": False, "checkpoint_step_interval": 0, "validation_resolution": "64x64", "validation_num_video_frames": 9,
    "validation_num_inference_steps": 25, "validation_guidance": 1,
}  # fmt: skip


def one_clip(folder: Path, tiny: TinyPaths) -> Project:
    """A project whose dataset is one clip, seen 512 times an epoch: batches of nothing else, with a noise of their own each."""
    add_clip(folder / "clips", "ball", frames=9, size=(64, 64), caption=CAPTION)
    entries = [
        {"id": "one", "type": "local", "dataset_type": "video", "instance_data_dir": str(folder / "clips"), "resolution": 64,
         "resolution_type": "pixel", "repeats": 511, "cache_dir": str(folder / "cache")},
        {"id": "text", "type": "local", "dataset_type": "text_embeds", "default": True, "cache_dir": str(folder / "cache")},
    ]  # fmt: skip
    (folder / "data.json").write_text(json.dumps(entries))
    return Project(folder, tiny)


def settings_of(project: Project) -> tuple[Registry, Settings]:
    registry = load_plugins()
    config = project.folder / "config.json"
    return registry, resolve(registry.option_types, config_file=config, flags={}, environ={}, hint=registry.hint())


def cached_latents(registry: Registry, settings: Settings) -> dict[str, Tensor]:
    """Stream -> (1, S, C) normalised tokens, from the cache."""
    plan = make_plan(registry, settings, torch.device("cpu"))
    dataset = TrainingSet(plan.manifest, plan.encoders, 1, seed=0)
    batch = plan.family.collate(dataset.load(0, dataset.epoch_plan(0)[0]), plan.streams)
    return {name: stream.latents for name, stream in batch.streams.items()}


def cosines(generated: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> dict[str, float]:
    assert {name: tensor.shape for name, tensor in generated.items()} == {name: tensor.shape for name, tensor in wanted.items()}
    return {name: float(functional.cosine_similarity(generated[name].flatten(), wanted[name].flatten(), dim=0)) for name in wanted}


def test_a_clip_comes_back_from_noise(tmp_path: Path, tiny: TinyPaths, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    project = one_clip(tmp_path, tiny)
    assert project.train(**SETTINGS) == 0
    registry, settings = settings_of(project)
    wanted = cached_latents(registry, settings)
    before = cosines(generate(registry, settings, CAPTION, Trained()).latents, wanted)
    after = cosines(generate(registry, settings, CAPTION, Trained(weights=tmp_path / "out")).latents, wanted)
    assert set(after) == {"video", "audio"}
    assert max(before.values()) < 0.3, f"without training: {before}"
    assert min(after.values()) > CLOSED, f"cosine similarity with the clip: {after}; at the last step {project.metrics()[-1]}"


# --- the file of full weights ------------------------------------------------------------------------------------
@pytest.fixture
def full(project: Project) -> Project:
    """A short full fine-tuning, with sound."""
    assert project.train(model_type="full", max_train_steps=1, checkpoint_step_interval=0) == 0
    return project


def sample(project: Project, *arguments: object) -> int:
    small = ("--validation_resolution", "64x64", "--validation_num_video_frames", 9, "--validation_num_inference_steps", 1)
    config = project.folder / "config.json"
    return project.tuner("sample", "--config", config, "--prompt", "a pattern", "--validation_guidance", 1, *small, *arguments)


def test_sample_takes_the_run_folder_and_the_file(full: Project) -> None:
    with safe_open(full.tiny.checkpoint, framework="pt") as file:
        published = {key.removeprefix("model.diffusion_model.") for key in file.keys()}  # noqa: SIM118 - not a mapping
    assert set(load_file("out/transformer.safetensors")) <= published, "original names"
    assert Path("out/outbox/out/transformer.safetensors").samefile("out/transformer.safetensors")
    card = Path("out/outbox/out/README.md").read_text(encoding="utf-8")
    assert UNKNOWN_LICENCE in card and "| Trained | all weights" in card and "base_model:" not in card
    assert sample(full, "--weights", "out", "-o", "folder.mp4") == 0
    assert sample(full, "--weights", "out/transformer.safetensors", "--no-sound", "-o", "silent.mp4") == 0
    assert sample(full, "-o", "base.mp4") == 0
    assert probe(Path("folder.mp4")).has_audio and not probe(Path("silent.mp4")).has_audio
    assert Path("folder.mp4").read_bytes() != Path("base.mp4").read_bytes()


def test_weights_that_do_not_fit_are_refused_by_name(full: Project, capsys: pytest.CaptureFixture[str]) -> None:
    stored = load_file("out/transformer.safetensors")
    gone = "transformer_blocks.2.attn1.to_q.weight"
    save_file({key: tensor for key, tensor in stored.items() if key != gone}, "gone.safetensors")
    save_file(stored | {"surprise.weight": torch.zeros(2)}, "more.safetensors")
    save_file(stored | {"proj_out.bias": torch.zeros(5)}, "shape.safetensors")
    Path("text.safetensors").write_text("no tensors")
    for name, words in (
        ("gone.safetensors", [gone, "not in the file"]),
        ("more.safetensors", ["surprise.weight", "no such weight"]),
        ("shape.safetensors", ["proj_out.bias", "[5]", "[128]"]),
        ("text.safetensors", ["text.safetensors", "safetensors file"]),
        ("clips", ["clips", "no full weights"]),
    ):
        assert sample(full, "--weights", name) == 6
        error = capsys.readouterr().err
        assert all(word in error for word in words) and "Traceback" not in error, error
    assert not Path("sample.mp4").exists()
