"""Validation of the real architecture at toy size: each mode, each layout of adapter files, held-out losses of two runs."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from integration.project import Project, add_clip, moving_picture, tone
from tuner.data.media import probe, write_wav
from tuner.interfaces.family import Generated
from tuner.train.samples import validation
from tuner.train.samples.validate import write_sample
from tuner_ltxvideo2.text import TextEncoder
from tuner_ltxvideo2.tiny import TinyPaths

SMALL = {
    "validation_disable": False, "validation_resolution": "64x64", "validation_num_video_frames": 9, "validation_num_inference_steps": 1,
    "validation_guidance": 1, "max_train_steps": 1, "checkpoint_step_interval": 0, "train_batch_size": 1,
}  # fmt: skip


def write_data() -> str:
    """Two clips to train on; a held-out clip with sound, a picture, and a sound alone."""
    for name in ("amber", "birch"):
        add_clip(Path("clips"), name, frames=9, size=(64, 64))
    add_clip(Path("exam"), "kite", frames=17, size=(96, 64))
    Image.fromarray(moving_picture(1, 96, 64, 0.7)[0].numpy()).save("exam/bird.png")
    Path("exam/bird.txt").write_text("a bird")
    Path("voices").mkdir()
    write_wav(Path("voices/low.wav"), tone(0.8, 200.0))
    Path("voices/low.txt").write_text("a low voice")
    entries = [
        {"id": "clips", "instance_data_dir": "clips", "resolution": 64},
        {"id": "exam", "dataset_type": "eval", "instance_data_dir": "exam", "resolution": 80, "minimum_image_size": 0},
        {"id": "voices", "dataset_type": "eval", "instance_data_dir": "voices", "audio": {"audio_only": True}},
    ]
    Path("data.json").write_text(json.dumps(entries))
    return "data.json"


def made(project: Project, out: str = "out") -> dict[str, dict[str, object]]:
    """Label -> event, of the last step."""
    rows = [dict(row) for row in project.events("sample", out)]
    return {str(row["label"]): row for row in rows if row["step"] == rows[-1]["step"]}


def test_clips_from_text_from_first_frames_and_to_sounds(
    project: Project, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    latents_of: dict[str, Mapping[str, Tensor]] = {}

    def watched(generated: Generated, target: Path) -> Path:
        latents_of[target.stem] = generated.latents
        return write_sample(generated, target)

    monkeypatch.setattr(validation, "write_sample", watched)
    code = project.train(
        **SMALL, data=None, data_backend_config=write_data(), validation_prompt="a pattern", validation_using_datasets=True,
        lora_dropout=0.2,
    )  # fmt: skip
    assert code == 0, capsys.readouterr()
    assert not project.events("sample_failed")
    samples = made(project)
    assert {name: row["mode"] for name, row in samples.items()} == {
        "sample": "t2v", "exam-bird-i2v": "i2v", "exam-kite-i2v": "i2v", "exam-kite-s2v": "s2v", "voices-low-s2v": "s2v",
    }  # fmt: skip
    facts = {name: probe(Path("out") / str(row["path"])) for name, row in samples.items()}
    sizes = {(fact.width, fact.height, fact.frames, fact.has_audio, fact.audio_rate) for fact in facts.values()}
    assert sizes == {(64, 64, 9, True, 24000), (96, 64, 9, True, 24000)}
    stored = [load_file(path)["latents"].float() for path in Path("cache").rglob("*.safetensors") if "latents" in load_file(path)]
    (bird,) = [latents for latents in stored if latents.ndim == 4 and latents.shape[1] == 1]
    assert torch.equal(latents_of["exam-bird-i2v"]["video"][0, :6], bird.flatten(1).T), "the picture's own latents, bit for bit"
    sounds = [latents for latents in stored if latents.ndim == 2]
    for name in ("exam-kite-s2v", "voices-low-s2v"):
        assert any(torch.equal(latents_of[name]["audio"][0], latents[:9]) for latents in sounds if len(latents) >= 9)
    assert not any(torch.equal(latents_of["exam-kite-i2v"]["audio"][0], latents[:9]) for latents in sounds if len(latents) >= 9)
    heldout = project.events("heldout")[-1]
    assert heldout["items"] == 3 and set(heldout["losses"]) == {"video", "audio"}  # type: ignore[call-overload]


def test_sound_alone(project: Project, capsys: pytest.CaptureFixture[str]) -> None:
    Path("songs").mkdir()
    write_wav(Path("songs/high.wav"), tone(0.5, 440.0))
    Path("songs/high.txt").write_text("a high tone")
    write_data()
    entries = [{"id": "songs", "dataset_type": "audio", "instance_data_dir": "songs", "audio": {"audio_only": True}},
               {"id": "voices", "dataset_type": "eval", "instance_data_dir": "voices", "audio": {"audio_only": True}}]  # fmt: skip
    Path("songs.json").write_text(json.dumps(entries))
    keys = {**SMALL, "data": None, "data_backend_config": "songs.json", "validation_prompt": "a tone"}
    assert project.train(**keys) == 0, capsys.readouterr()
    (sample,) = made(project).values()
    assert (sample["mode"], sample["path"]) == ("audio", "validation/step_1/sample.wav")
    assert set(project.events("heldout")[-1]["losses"]) == {"audio"}  # type: ignore[call-overload]
    assert project.train(**keys, output_dir="other", validation_using_datasets=True) == 2
    assert "no held-out file can give" in capsys.readouterr().err


def test_adapters_in_every_layout_are_the_same_adapter(project: Project, tiny: TinyPaths, capsys: pytest.CaptureFixture[str]) -> None:
    """The makers' keys, diffusers', and down/up with alpha; a fourth one of another model is named before anything is loaded."""
    keys = {**SMALL, "lora_alpha": 8, "data": "clips", "validation_prompt": "a pattern", "disable_benchmark": True}
    for name in ("amber", "birch"):
        add_clip(Path("clips"), name, frames=9, size=(64, 64))
    assert project.train(**{**keys, "max_train_steps": 2, "learning_rate": 0.05, "output_dir": "first", "validation_disable": True}) == 0
    original = load_file("first/lora.safetensors")
    split = {}
    for key, tensor in original.items():
        module, end = key.rsplit(".", 2)[0], key.rsplit(".", 2)[1]
        split[f"{module}.{ {'lora_A': 'lora_down', 'lora_B': 'lora_up'}[end] }.weight"] = tensor / (2 if end == "lora_B" else 1)
        split[f"{module}.alpha"] = torch.tensor(8.0)  # of rank 4: twice what is stored, as alpha 8 is folded into the makers' layout
    save_file(split, "first/comfy.safetensors")
    with safe_open("first/pytorch_lora_weights.safetensors", framework="pt") as file:
        assert all(key.startswith("transformer.") for key in file.keys())  # noqa: SIM118 - not a mapping
    config = {
        "original": "first/lora.safetensors", "diffusers": "first:pytorch_lora_weights.safetensors", "comfy": "first/comfy.safetensors",
        "half": {"path": "first", "strength": 0.5},
    }  # fmt: skip
    capsys.readouterr()
    code = project.train(**{**keys, "validation_adapter_mode": "comparison"}, validation_adapter_config=config)
    assert code == 0, capsys.readouterr()
    clips = {name: (Path("out") / str(row["path"])).read_bytes() for name, row in made(project).items()}
    assert clips["sample-with-original"] == clips["sample-with-diffusers"] == clips["sample-with-comfy"]
    assert len({clips["sample"], clips["sample-with-original"], clips["sample-with-half"]}) == 3
    assert project.train(**{**keys, "validation_disable": True, "output_dir": "plain"}) == 0
    ours, plain = (load_file(f"{out}/lora.safetensors") for out in ("out", "plain"))
    assert all(torch.equal(tensor, plain[key]) for key, tensor in ours.items())
    foreign = {key.replace("transformer_blocks.0", "transformer_blocks.77"): tensor for key, tensor in original.items()}
    save_file(foreign, "foreign.safetensors")
    assert project.train(**keys, output_dir="none", validation_adapter_path="foreign.safetensors") == 6
    error = capsys.readouterr().err
    assert "validation_adapter_path: foreign.safetensors" in error and "transformer_blocks.77" in error and not Path("none").exists()


def test_held_out_losses_of_the_base_model_are_the_same_in_every_run(project: Project, capsys: pytest.CaptureFixture[str]) -> None:
    keys = {**SMALL, "data": None, "data_backend_config": write_data(), "eval_timesteps": 2}
    assert project.train(**keys) == 0, capsys.readouterr()
    changes = {"seed": 9, "train_batch_size": 2, "lora_rank": 8, "i2v_conditioning_probability": 1.0, "sigma_sampler": "uniform"}
    assert project.train(**{**keys, **changes}, output_dir="other") == 0, capsys.readouterr()
    one, two = (project.events("heldout", out)[0] for out in ("out", "other"))
    assert one["step"] == two["step"] == 0 and one["losses"] == two["losses"] and one["grid"] == two["grid"]
    assert project.events("heldout", "other")[-1]["losses"] != two["losses"]


def test_the_text_encoder_is_not_there_while_training(project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its memory is gone when the transformer is loaded: samples bring their prompts from the cache."""
    keys = {**SMALL, "data": "clips", "validation_prompt": "a pattern", "validation_guidance": 3, "validation_negative_prompt": "grey"}
    assert project.tuner("cache", "--config", project.config(**keys)) == 0
    monkeypatch.setattr(TextEncoder, "load", lambda *_: pytest.fail("the text encoder is loaded"))
    assert project.train(**keys) == 0
    assert len(project.events("sample")) == 2


def test_one_clip_from_a_first_frame_to_a_sound(project: Project, capsys: pytest.CaptureFixture[str]) -> None:
    write_data()
    sizes = ("--validation_resolution", "64x64", "--validation_num_video_frames", 9, "--validation_num_inference_steps", 1)

    def sample(*arguments: object) -> int:
        return project.tuner("sample", "--config", project.config(), "--prompt", "x", "--validation_guidance", 1, *sizes, *arguments)

    assert sample("--first-frame", "exam/bird.png", "--sound", "voices/low.wav", "-o", "given.mp4") == 0, capsys.readouterr()
    assert sample("-o", "free.mp4") == 0
    facts = probe(Path("given.mp4"))
    assert (facts.width, facts.height, facts.frames, facts.has_audio) == (64, 64, 9, True)
    assert Path("given.mp4").read_bytes() != Path("free.mp4").read_bytes()
    for arguments, code, words in (
        (("--first-frame", "nowhere.png"), 2, "--first-frame: there is no such file"),
        (("--sound", "exam/bird.png"), 4, "bird.png: cannot be decoded"),
        (("--sound", "voices/low.wav", "--no-sound"), 2, "--no-sound, --sound: a sound is given, and none is wanted"),
        (("--lora", "nowhere.safetensors"), 2, "--lora: there is no such file or folder"),
    ):
        capsys.readouterr()
        assert sample(*arguments) == code
        assert words in capsys.readouterr().err
