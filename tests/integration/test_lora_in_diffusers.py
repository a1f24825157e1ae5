"""The LoRA of a real run, loaded by diffusers' own pipeline: it computes there what the training model computed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, LTX2Pipeline
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from integration.project import Project, add_clip
from tuner.config.resolve import resolve
from tuner.data.dataset import TrainingSet
from tuner.interfaces.family import Batch, Noise
from tuner.plugins.loader import load_plugins
from tuner.train.assemble import assemble
from tuner.train.planning import make_plan
from tuner.train.saving.checkpoint import load_checkpoint
from tuner_ltxvideo2.loading import CombinedFile, build_part
from tuner_ltxvideo2.tiny import TinyPaths
from tuner_ltxvideo2.variants import variant_of

RANK, ALPHA, STEPS = 4, 10, 4
FILES = ("lora.safetensors", "pytorch_lora_weights.safetensors")
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, tiny: TinyPaths) -> Project:
    """A finished run: alpha is not the rank, and the learning rate is so high that a few steps take B far from zero."""
    folder = tmp_path_factory.mktemp("run")
    for name in ("amber", "birch"):
        add_clip(folder / "clips", name)
    project = Project(folder, tiny)
    code = project.train(
        lora_rank=RANK, lora_alpha=ALPHA, learning_rate=3e-2, max_train_steps=STEPS, checkpoint_step_interval=0, sigma_pairing="shared"
    )
    assert code == 0
    return project


def computed_by_the_run(project: Project) -> tuple[Batch, Noise, dict[str, Tensor]]:
    """One clip, noised with one sigma for both streams, and what the run's model, restored from its checkpoint, makes of it."""
    registry = load_plugins()
    settings = resolve(registry.option_types, config_file=project.folder / "config.json", flags={}, environ={}, hint=registry.hint())
    plan = make_plan(registry, settings, CPU)
    assembly = assemble(plan, CPU)
    assembly.masters.load_state(load_checkpoint(project.folder / "out" / f"checkpoint-{STEPS}").parts["weights"])
    dataset = TrainingSet(plan.manifest, plan.encoders, 1, seed=0)
    batch = plan.family.collate(dataset.load(0, dataset.epoch_plan(0)[0]), plan.streams)
    noise = assembly.noise.sample(batch)
    training = assembly.training
    training.model.eval()
    with torch.no_grad():
        state = training.blocks.run(training.family.enter(training.model, batch, noise))
        prediction = training.family.exit(training.model, state)
    assembly.detach()
    return batch, noise, dict(prediction.streams)


def computed_by_diffusers(model: torch.nn.Module, batch: Batch, noise: Noise) -> dict[str, Tensor]:
    """diffusers' own forward pass."""
    video, audio = noise.streams["video"], noise.streams["audio"]
    assert torch.equal(video.sigma, audio.sigma)
    frames, height, width = batch.streams["video"].grid
    with torch.no_grad():
        outputs = model(
            hidden_states=video.noisy, audio_hidden_states=audio.noisy,
            encoder_hidden_states=batch.text["video"].float(), audio_encoder_hidden_states=batch.text["audio"].float(),
            timestep=video.sigma * 1000, sigma=video.sigma * 1000, num_frames=frames, height=height, width=width,
            fps=batch.frame_rate[0], audio_num_frames=batch.streams["audio"].grid[0], return_dict=False,
        )  # fmt: skip
    return dict(zip(("video", "audio"), outputs, strict=True))


def pipeline_of(tiny: TinyPaths) -> LTX2Pipeline:
    """diffusers' pipeline over the base transformer; the other parts see no adapter."""
    source = CombinedFile().open(tiny.checkpoint, "tiny")
    transformer = build_part(source, "transformer", variant_of(source), dtype=torch.float32, device=CPU)
    return LTX2Pipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(), vae=None, audio_vae=None, text_encoder=None, tokenizer=None,
        connectors=None, transformer=transformer, vocoder=None,
    )  # fmt: skip


@pytest.mark.parametrize("name", FILES)
def test_diffusers_computes_what_the_run_computed(trained: Project, name: str) -> None:
    batch, noise, expected = computed_by_the_run(trained)
    pipeline = pipeline_of(trained.tiny)
    before = computed_by_diffusers(pipeline.transformer, batch, noise)
    pipeline.load_lora_weights(str(trained.folder / "out"), weight_name=name)
    for stream, got in computed_by_diffusers(pipeline.transformer, batch, noise).items():
        torch.testing.assert_close(got, expected[stream], atol=1e-5, rtol=1e-5)
        assert (got - before[stream]).abs().max() > 0.1, "the adapter must matter, else this test shows nothing"


def test_the_file_names_layers_as_the_published_checkpoint_does(trained: Project) -> None:
    stored = load_file(trained.folder / "out" / "lora.safetensors")
    with safe_open(trained.tiny.checkpoint, framework="pt") as file:
        published = set(file.keys())
    layers = {key.rsplit(".lora_", 1)[0] for key in stored}
    assert set(stored) == {f"{layer}.lora_{x}.weight" for layer in layers for x in "AB"}, "nothing else, and no alpha"
    assert {f"model.{layer}.weight" for layer in layers} <= published
    assert "diffusion_model.audio_patchify_proj" in layers
    diffusers = load_file(trained.folder / "out" / "pytorch_lora_weights.safetensors")
    attention = "transformer_blocks.0.attn1.to_q"
    down, up = (diffusers[f"transformer.{attention}.lora_{x}.weight"] for x in "AB")
    assert torch.equal(stored[f"diffusion_model.{attention}.lora_A.weight"], down)
    torch.testing.assert_close(stored[f"diffusion_model.{attention}.lora_B.weight"], up * ALPHA / RANK)
    assert min(tensor.abs().max() for key, tensor in stored.items() if ".lora_B" in key) > 0.01


def test_export_of_the_checkpoint_gives_the_same_file(trained: Project, tmp_path: Path) -> None:
    checkpoint = trained.folder / "out" / f"checkpoint-{STEPS}"
    assert trained.tuner("export", checkpoint, "--config", trained.folder / "config.json", "-o", tmp_path / "again.safetensors") == 0
    first, again = load_file(trained.folder / "out" / "lora.safetensors"), load_file(tmp_path / "again.safetensors")
    assert first.keys() == again.keys()
    assert all(torch.equal(first[key], again[key]) for key in first)


# --- adapters that do not fit ------------------------------------------------------------------------------------
Edit = Callable[[str, Tensor], tuple[str, Tensor]]


def narrower(key: str, tensor: Tensor) -> tuple[str, Tensor]:
    """One layer of an adapter for a model of another width."""
    wrong = key.endswith("transformer_blocks.1.attn1.to_q.lora_A.weight")
    return key, tensor[:, :-8].contiguous() if wrong else tensor


def deeper(key: str, tensor: Tensor) -> tuple[str, Tensor]:
    """A layer of a block that the model does not have."""
    return key.replace("transformer_blocks.1.", "transformer_blocks.17."), tensor


def higher(key: str, tensor: Tensor) -> tuple[str, Tensor]:
    """The same product at twice the rank, which fits."""
    if ".lora_A" in key:
        return key, torch.cat([tensor, tensor])
    return key, torch.cat([tensor, tensor], dim=1) / 2


def edited(project: Project, target: Path, edit: Edit) -> Path:
    tensors = load_file(project.folder / "out" / "lora.safetensors")
    save_file(dict(edit(key, tensor) for key, tensor in tensors.items()), target)
    return target


@pytest.mark.parametrize(
    ("edit", "named"), [(narrower, "transformer_blocks.1.attn1.to_q"), (deeper, "transformer_blocks.17.attn1.to_q")]
)
def test_an_adapter_of_another_model_is_refused_by_name(
    trained: Project, tmp_path: Path, capsys: pytest.CaptureFixture[str], edit: Edit, named: str
) -> None:
    path = edited(trained, tmp_path / "other.safetensors", edit)
    config = trained.folder / "config.json"
    small = ("--validation_resolution", "64x64", "--validation_num_video_frames", 9)
    for command in (
        ("export", path, "-o", tmp_path / "made.safetensors"),
        ("sample", "--lora", path, "--prompt", "a pattern", *small, "-o", tmp_path / "made.mp4"),
    ):
        assert trained.tuner(*command, "--config", config) == 6
        error = capsys.readouterr().err
        assert named in error and "other.safetensors" in error and "Traceback" not in error
    assert [left.name for left in tmp_path.iterdir()] == ["other.safetensors"]


def test_an_adapter_of_another_rank_is_taken(trained: Project, tmp_path: Path) -> None:
    path, made = edited(trained, tmp_path / "higher.safetensors", higher), tmp_path / "made.safetensors"
    assert trained.tuner("export", path, "--config", trained.folder / "config.json", "-o", made) == 0
    assert {tensor.shape[0] for key, tensor in load_file(made).items() if ".lora_A" in key} == {2 * RANK}
