"""What the kit brings keeps to the kit's rules: the tiny family, its encoders, the simulated strategy. The family is a whole one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from safetensors import safe_open

from tuner.errors import ConfigError, NumericError
from tuner.interfaces.encoders import LatentEncoder, Record, VideoClip
from tuner.interfaces.family import SampleRequest
from tuner.plugins.loader import load_plugins
from tuner.testing import EncoderConformance, FamilyConformance, FormatConformance, MemoryStrategyConformance, TinyProject
from tuner.testing.clips import moving_picture, tone
from tuner.testing.conformance import shared_folder
from tuner.testing.encoders import TinySound, TinyText, TinyVideo, decode_sound, decode_video
from tuner.testing.family import tiny_source
from tuner.train.saving.checkpoint import load_checkpoint

CPU = torch.device("cpu")


class TestTinyFamily(FamilyConformance):
    component = "tiny-mixing"


class TestTinyFamilyWithoutSound(FamilyConformance):
    component = "tiny-mixing"
    options: ClassVar[dict[str, object]] = {"tiny_audio": False, "tiny_blocks": 3}


class TestSimulatedStreaming(MemoryStrategyConformance):
    component = "simulated_streaming"
    options: ClassVar[dict[str, object]] = {"simulated_streaming": True}
    refused: ClassVar[list[tuple[dict[str, object], str]]] = [({"model_type": "full"}, "simulated_streaming")]


class TestPeftFormat(FormatConformance):
    component = "peft"


class TestTinyVideoEncoder(EncoderConformance):
    def encoder(self) -> LatentEncoder:
        return TinyVideo()


class TestTinySoundEncoder(EncoderConformance):
    sample_rate = 8000
    channels = 1

    def encoder(self) -> LatentEncoder:
        return TinySound()


class TestTinyTextEncoder(EncoderConformance):
    def encoder(self) -> LatentEncoder:
        return TinyText(tiny_source(shared_folder() / "models"))


# --- the whole way -------------------------------------------------------------------------------------------------
def test_it_caches_trains_saves_resumes_exports_and_samples(tmp_path: Path) -> None:
    project = TinyProject.make(tmp_path)
    sampled = {
        "validation_disable": False,
        "validation_prompt": "waves",
        "validation_resolution": "64x64",
        "validation_num_video_frames": 9,
    }
    keys = {"max_train_steps": 6, "checkpoint_step_interval": 3, "validation_num_inference_steps": 2, **sampled}
    whole = project.train(output_dir="whole", **keys)
    assert whole.exit_code == 0 and whole.sample is not None and whole.sample.suffix == ".mp4"
    assert whole.cache is not None and (whole.cache.encoded, whole.cache.failed) == (4, 0)
    project.train(output_dir="parts", **{**keys, "max_train_steps": 3})
    again = project.train(output_dir="parts", resume_from_checkpoint="latest", **keys)
    assert again.cache is not None and again.cache.cached == 4
    ends = [load_checkpoint(tmp_path / out / "checkpoint-6").parts["weights"] for out in ("whole", "parts")]
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])
    assert project.metrics("whole") == project.metrics("parts")
    with safe_open(whole.files[0], framework="pt") as file:
        names = list(file.keys())
    assert "transformer.blocks.3.to_q.lora_A.weight" in names and len(names) == 2 * 16


def test_it_learns(tmp_path: Path) -> None:
    """Forty steps of full fine-tuning: the loss of picture and sound falls well below where it began."""
    project = TinyProject.make(tmp_path)
    project.train(model_type="full", max_train_steps=40, sigma_sampler="uniform", learning_rate=2e-2)
    losses = [row["loss"] for row in project.metrics()]
    assert sum(losses[-10:]) < 0.9 * sum(losses[:10])


def test_it_is_loaded_only_when_it_is_named() -> None:
    assert "testing" not in [record.name for record in load_plugins({}).plugins]
    named = {record.name: record for record in load_plugins({"TUNER_PLUGINS": "testing,offload"}).plugins}
    assert named["testing"].status == named["offload"].status == "loaded"
    assert [component.name for component in named["testing"].components["family"]] == ["tiny-mixing"]


def test_bad_input_names_the_key(tmp_path: Path) -> None:
    project = TinyProject.make(tmp_path)
    with pytest.raises(ConfigError, match="pretrained_model_name_or_path: is no file"):
        project.plan(pretrained_model_name_or_path="nowhere.safetensors")
    with pytest.raises(ConfigError, match="validation_resolution: tiny-mixing makes clips of at most"):
        project.plan(validation_disable=False, validation_prompt="waves")
    with pytest.raises(ConfigError, match="tiny_blocks"):
        project.plan(tiny_blocks=0)
    (tmp_path / "dataset.json").write_text(json.dumps([]))
    with pytest.raises(ConfigError):
        project.plan(data=None, data_backend_config=str(tmp_path / "dataset.json"))


# --- encoders and decoders -----------------------------------------------------------------------------------------
def test_video_latents_are_mean_colours_and_can_be_undone() -> None:
    clip = VideoClip(moving_picture(9, 64, 32), 25.0)
    latents = TinyVideo().encode([clip])[0].tensors["latents"]
    pixels = clip.frames.float() / 127.5 - 1
    assert latents.shape == (6, 3, 2, 4)
    torch.testing.assert_close(latents[:3, 0, 0, 1], pixels[0, :8, 16:32].mean((0, 1)))
    torch.testing.assert_close(latents[3:, 2, 1, 3], pixels[5:9, 24:32, 48:].mean((0, 1, 2)))
    back = TinyVideo().encode([decode_video(latents, 25.0)])[0].tensors["latents"]
    torch.testing.assert_close(back, latents, atol=1 / 127.5, rtol=0)  # rounded to 8 bits


def test_sound_latents_are_loudness_and_can_be_heard() -> None:
    clip = tone(0.3, 440.0, 8000, 1)
    record = TinySound().encode([clip])[0].tensors
    assert record["latents"].shape == (8, 6) and record["mask"].tolist() == [1.0] * 8
    expected = clip.samples[0, 300:350].square().mean().sqrt() * 2 - 1
    torch.testing.assert_close(record["latents"][1, 0], expected)
    heard = decode_sound(record["latents"], 0.3)
    assert heard.samples.shape == (1, 2400)
    assert heard.samples[0, 2000:].square().mean() > 4 * heard.samples[0, :400].square().mean()


def test_what_a_request_gives_stays_as_it_is(tmp_path: Path) -> None:
    trial = TinyProject.make(tmp_path).trial()
    run, plan = trial.assembly.training, trial.plan
    first = TinyVideo().encode([VideoClip(moving_picture(1, 64, 64), 25.0)])[0]
    sound = TinySound().encode([tone(0.36, 440.0, 8000, 1)])[0]
    request = SampleRequest("waves", width=64, height=64, frames=9, steps=3, guidance=1.0, first_frame=first, given_sound=sound)
    made = plan.family.sample(run.model, plan.source, [request], run.blocks, plan.streams)[0]
    assert torch.equal(made.latents["video"][0, :16].T.reshape(6, 1, 4, 4), first.tensors["latents"])
    assert torch.equal(made.latents["audio"][0], sound.tensors["latents"])
    small = Record({"latents": first.tensors["latents"][..., :2]})
    with pytest.raises(ConfigError, match="another size"):
        plan.family.sample(
            run.model, plan.source, [SampleRequest("", width=64, height=64, frames=9, first_frame=small)], run.blocks, ("video",)
        )


def test_the_simulated_strategy_forgives_nothing(tmp_path: Path) -> None:
    trial = TinyProject.make(tmp_path).trial(simulated_streaming=True)
    block = trial.assembly.training.blocks.blocks.blocks[0]
    frozen = next(p for p in block.parameters() if not p.requires_grad)
    assert frozen.isnan().all()
    trial.steps(1)
    assert frozen.isnan().all()
    with pytest.raises(RuntimeError, match="outside a pass"):
        trial.assembly.session.before_forward(0)
    trial.assembly.session.materialize()
    assert not frozen.isnan().any()
    trial.assembly.session.before_backward = lambda index: None  # type: ignore[method-assign]
    with pytest.raises((NumericError, RuntimeError)):
        trial.steps(1)
