"""Sampling against diffusers' own pipeline on the tiny model, and each of its steps against a formula."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, LTX2Pipeline
from torch import Tensor
from transformers import AutoModel, AutoTokenizer

from tuner.errors import ConfigError
from tuner.interfaces.blocks import BlockState
from tuner.interfaces.encoders import AudioClip
from tuner.interfaces.family import Batch, BlockFunction, BuildContext, Noise, Prediction, SampleRequest, Variant
from tuner.interfaces.services import WeightSource
from tuner_ltxvideo2 import sampling
from tuner_ltxvideo2.family import LTX2Family
from tuner_ltxvideo2.geometry import unpack_video
from tuner_ltxvideo2.loading import build_part
from tuner_ltxvideo2.options import LTX2Options
from tuner_ltxvideo2.tiny import TinyPaths

torch.set_num_threads(1)
CPU = torch.device("cpu")
REQUEST = SampleRequest(prompt="a red ball", negative_prompt="blurry", width=96, height=64, frames=9, steps=3, guidance=1.0, seed=5)


def make_family(text_encoder: Path) -> LTX2Family:
    return LTX2Family(LTX2Options(), BuildContext(CPU, torch.float32, 0, 0, Path()), text_encoder)


class Blocks(BlockFunction):
    """The plain loop."""

    def __init__(self, family: LTX2Family, model: torch.nn.Module) -> None:
        self.family = family
        self.blocks = family.block_set(model).blocks

    def run(self, state: BlockState) -> BlockState:
        assert not torch.is_grad_enabled()
        for block in self.blocks:
            state = self.family.call_block(block, state)
        return state


@pytest.fixture(scope="module")
def pipeline(tiny: TinyPaths, tiny_source: WeightSource, tiny_variant: Variant) -> LTX2Pipeline:
    """diffusers' own, over the same weights."""
    parts = {
        part: build_part(tiny_source, part, tiny_variant, dtype=torch.float32, device=CPU)
        for part in ("transformer", "connectors", "vae", "audio_vae", "vocoder")
    }
    scheduler = FlowMatchEulerDiscreteScheduler(
        use_dynamic_shifting=True, base_shift=0.95, max_shift=2.05, base_image_seq_len=1024, max_image_seq_len=4096, shift_terminal=0.1
    )
    made = LTX2Pipeline(
        scheduler=scheduler, tokenizer=AutoTokenizer.from_pretrained(tiny.text_encoder),
        text_encoder=AutoModel.from_pretrained(tiny.text_encoder, dtype=torch.float32), **parts,
    )
    made.set_progress_bar_config(disable=True)
    return made


def diffusers_latents(pipeline: LTX2Pipeline, request: SampleRequest, use_cross_timestep: bool) -> tuple[Tensor, Tensor]:
    video, audio = pipeline(
        prompt=request.prompt, negative_prompt=request.negative_prompt, width=request.width, height=request.height,
        num_frames=request.frames, frame_rate=request.frame_rate, num_inference_steps=request.steps, guidance_scale=request.guidance,
        stg_scale=0.0, modality_scale=1.0, guidance_rescale=0.0, audio_guidance_scale=request.audio_guidance, audio_stg_scale=0.0,
        audio_modality_scale=1.0, audio_guidance_rescale=0.0, spatio_temporal_guidance_blocks=None,
        generator=torch.Generator().manual_seed(request.seed), use_cross_timestep=use_cross_timestep,
        max_sequence_length=pipeline.tokenizer.model_max_length, output_type="latent", return_dict=False,
    )
    # back to what the transformer works on
    video = (video - pipeline.vae.latents_mean.view(1, -1, 1, 1, 1)) / pipeline.vae.latents_std.view(1, -1, 1, 1, 1)
    audio = (audio.transpose(1, 2).flatten(2) - pipeline.audio_vae.latents_mean) / pipeline.audio_vae.latents_std
    return video, audio


@pytest.mark.parametrize(("guidance", "audio_guidance"), [(1.0, None), (3.0, 5.0)])
def test_clip_equals_diffusers_pipeline_and_has_the_right_length(
    pipeline: LTX2Pipeline, tiny: TinyPaths, tiny_source: WeightSource, guidance: float, audio_guidance: float | None
) -> None:
    request = dataclasses.replace(REQUEST, guidance=guidance, audio_guidance=audio_guidance)
    family = make_family(tiny.text_encoder)
    model = family.load(tiny_source, ("video", "audio"), torch.float32, CPU).train()
    if hasattr(model, "keyframes_abs_pos_embedding"):  # diffusers' plain pipelines leave 2.5's mark of the first frame out
        model.keyframes_abs_pos_embedding.data.zero_()
    made = family.sample(model, tiny_source, [request], Blocks(family, model), ("video", "audio"))[0]
    assert model.training, "the mode is put back"
    video, audio = diffusers_latents(pipeline, request, use_cross_timestep=guidance == 1.0)
    torch.testing.assert_close(unpack_video(made.latents["video"], (2, 2, 3)), video, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(made.latents["audio"], audio, atol=1e-4, rtol=1e-4)

    assert made.video is not None and made.sound is not None
    assert made.video.frames.shape == (9, 64, 96, 3)
    assert made.video.frames.dtype == torch.uint8
    assert made.video.frame_rate == 25.0
    assert made.sound.samples.shape == (2, round(9 / 25 * made.sound.sample_rate))
    assert made.sound.sample_rate in (24000, 48000)


def test_several_requests_and_a_picture_without_sound(tiny20: TinyPaths, source20: WeightSource) -> None:
    family = make_family(tiny20.text_encoder)
    streams = ("video",)
    model = family.load(source20, streams, torch.float32, CPU)
    small = dataclasses.replace(REQUEST, width=64, frames=1, steps=1)
    made = family.sample(model, source20, [small, dataclasses.replace(small, seed=6), small], Blocks(family, model), streams)
    assert [clip.sound for clip in made] == [None, None, None]
    assert torch.equal(made[0].latents["video"], made[2].latents["video"]), "the same request gives the same clip"
    assert not torch.equal(made[0].latents["video"], made[1].latents["video"])


def test_sound_alone(tiny20: TinyPaths, source20: WeightSource) -> None:
    family = make_family(tiny20.text_encoder)
    model = family.load(source20, ("audio",), torch.float32, CPU)
    made = family.sample(model, source20, [dataclasses.replace(REQUEST, steps=2)], Blocks(family, model), ("audio",))[0]
    assert made.video is None
    assert made.sound is not None and made.sound.samples.isfinite().all()


# --- pieces ------------------------------------------------------------------------------------------------------
def test_schedule_by_formula() -> None:
    steps, tokens = 5, 2048
    mu = 0.95 + 1.1 / 3072 * (tokens - 1024)
    even = [1 - i * (1 - 1 / steps) / (steps - 1) for i in range(steps)]
    shifted = [math.exp(mu) / (math.exp(mu) + 1 / s - 1) for s in even]
    stretched = [1 - (1 - s) * (1 - 0.1) / (1 - shifted[-1]) for s in shifted]
    got = sampling.schedule(steps, tokens, LTX2Family.token_shift)
    torch.testing.assert_close(got, torch.tensor([*stretched, 0.0]), atol=1e-6, rtol=0)
    assert got[-2] == pytest.approx(0.1)
    assert sampling.schedule(1, tokens, LTX2Family.token_shift).tolist() == [1.0, 0.0]


def test_a_perfect_model_is_reached_exactly() -> None:
    """With velocity (x - x0) / sigma, whatever the schedule, Euler ends on x0; guidance of equal predictions changes nothing."""
    noise = sampling.initial_noise(0, {"video": (2, 2, 2), "audio": (4, 1, 1)})
    goal = {name: torch.full_like(values, 0.25) for name, values in noise.items()}

    def predict(batch: Batch, given: Noise) -> Prediction:
        assert batch.text["video"].shape[0] == 2
        return Prediction({
            name: (stream.noisy - goal[name]) / stream.sigma[:, None, None] for name, stream in given.streams.items()
        })

    text = {"video": torch.zeros(1, 3, 4), "audio": torch.zeros(1, 3, 4)}
    request = dataclasses.replace(REQUEST, guidance=4.0, steps=7)
    grids = {"video": (2, 2, 2), "audio": (4, 1, 1)}
    start = sampling.Start(grids, noise, {})
    got = sampling.denoise(predict, request, sampling.Prompt(text, text), start, LTX2Family.token_shift, CPU)
    for name, values in goal.items():
        torch.testing.assert_close(got[name], values, atol=1e-5, rtol=0)


def test_noise_depends_on_seed_alone() -> None:
    grids = {"video": (2, 2, 3), "audio": (5, 1, 1)}
    first, again, other = (sampling.initial_noise(seed, grids) for seed in (1, 1, 2))
    assert torch.equal(first["video"], again["video"])
    assert torch.equal(first["audio"], again["audio"])
    assert not torch.equal(first["video"], other["video"])
    assert {name: tuple(values.shape) for name, values in first.items()} == {"video": (1, 12, 128), "audio": (1, 5, 128)}


def test_sound_is_fitted_to_the_picture() -> None:
    clip = AudioClip(torch.ones(2, 100), 100, 100)
    longer, shorter = sampling.fit_sound(clip, 1.2), sampling.fit_sound(clip, 0.5)
    assert longer.samples.shape == (2, 120)
    assert longer.valid_samples == 100
    assert longer.samples[:, 100:].abs().sum() == 0
    assert shorter.samples.shape == (2, 50)
    assert shorter.valid_samples == 50


@pytest.mark.parametrize(
    ("field", "value", "near"), [("width", 100, "use 96"), ("height", 70, "use 64"), ("height", 32, "use 64"), ("frames", 20, "use 17")]
)
def test_impossible_sizes_are_named(field: str, value: int, near: str) -> None:
    key = "validation_num_video_frames" if field == "frames" else f"validation_resolution: {field}"
    with pytest.raises(ConfigError, match=f"{key}.*{value}(?s:.*){near}"):
        sampling.check_request(dataclasses.replace(REQUEST, **{field: value}), LTX2Family.geometry)
    sampling.check_request(REQUEST, LTX2Family.geometry)


def test_guidance_and_streams_of_a_request() -> None:
    assert not REQUEST.guided and REQUEST.texts == ("a red ball",)
    guided = dataclasses.replace(REQUEST, audio_guidance=2.0)
    assert guided.guided and guided.texts == ("a red ball", "blurry")
    assert list(sampling.grids_for(dataclasses.replace(REQUEST, sound=False), ("video", "audio"))) == ["video"]
    assert sampling.grids_for(REQUEST, ("video", "audio")) == {"video": (2, 2, 3), "audio": (9, 1, 1)}
