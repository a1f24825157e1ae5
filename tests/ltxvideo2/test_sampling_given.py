"""Samples from what is given: a first frame, a sound, encoded prompts. What is given comes out bit for bit, at timestep 0 throughout."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tuner.errors import ConfigError
from tuner.interfaces.blocks import BlockState
from tuner.interfaces.encoders import AudioClip, LatentEncoder, Record, VideoClip
from tuner.interfaces.family import Batch, BlockFunction, BuildContext, Noise, Prediction, SampleRequest
from tuner.interfaces.services import WeightSource
from tuner_ltxvideo2 import sampling
from tuner_ltxvideo2.family import LTX2Family
from tuner_ltxvideo2.options import LTX2Options
from tuner_ltxvideo2.tiny import TinyPaths
from tuner_ltxvideo2.variants import variant_of
from tuner_ltxvideo2.video_latents import VideoDecoder, small_stride

torch.set_num_threads(1)
CPU = torch.device("cpu")
BOTH = ("video", "audio")
SMALL = SampleRequest(prompt="a red ball", width=96, height=64, frames=9, steps=2, guidance=1.0, seed=5)


class Spied(BlockFunction):
    """The plain loop; keeps what went into the first block."""

    def __init__(self, family: LTX2Family, model: torch.nn.Module) -> None:
        self.family, self.blocks = family, family.block_set(model).blocks
        self.entered: list[BlockState] = []

    def run(self, state: BlockState) -> BlockState:
        self.entered.append(state)
        for block in self.blocks:
            state = self.family.call_block(block, state)
        return state


@pytest.fixture(scope="module")
def family(tiny20: TinyPaths) -> LTX2Family:
    return LTX2Family(LTX2Options(), BuildContext(CPU, torch.float32, 0, 0, Path()), tiny20.text_encoder)


@pytest.fixture(scope="module")
def model(family: LTX2Family, source20: WeightSource) -> torch.nn.Module:
    return family.load(source20, BOTH, torch.float32, CPU)


@pytest.fixture(scope="module")
def encoders(family: LTX2Family, source20: WeightSource) -> dict[str, LatentEncoder]:
    return {encoder.reads: encoder for encoder in family.encoders(source20, BOTH)}


def record(encoder: LatentEncoder, source: VideoClip | AudioClip | str) -> Record:
    try:
        encoder.load(CPU)
        return encoder.encode([source])[0]
    finally:
        encoder.unload()


def picture(width: int = 96, height: int = 64) -> VideoClip:
    pixels = torch.randint(0, 256, (1, height, width, 3), generator=torch.Generator().manual_seed(3), dtype=torch.uint8)
    return VideoClip(pixels, 25.0)


def sound(seconds: float) -> AudioClip:
    samples = torch.randn(2, round(16000 * seconds), generator=torch.Generator().manual_seed(4)) * 0.1
    return AudioClip(samples, 16000, samples.shape[1])


def test_the_given_first_frame_comes_out_as_it_went_in(
    family: LTX2Family, model: torch.nn.Module, source20: WeightSource, encoders: dict[str, LatentEncoder]
) -> None:
    given, blocks = record(encoders["video"], picture()), Spied(family, model)
    request = dataclasses.replace(SMALL, first_frame=given, guidance=2.0)
    made, free = (
        family.sample(model, source20, [each], blocks, BOTH)[0] for each in (request, dataclasses.replace(request, first_frame=None))
    )
    tokens = given.tensors["latents"].flatten(1).T  # (C, 1, 2, 3) -> (6, C), order f, h, w
    assert torch.equal(made.latents["video"][0, :6], tokens.float())
    assert not torch.equal(made.latents["video"], free.latents["video"])
    first, last = blocks.entered[0].streams["video"], blocks.entered[1].streams["video"]
    for stream in (first, last):
        assert stream.aligned["clean"].tensor[..., 0].tolist() == [[True] * 6 + [False] * 6] * 2
        assert stream.protected is not None and stream.protected.sum() == 12
    assert torch.equal(first.hidden[:, :6], last.hidden[:, :6]) and not torch.equal(first.hidden[:, 6:], last.hidden[:, 6:])
    assert made.video is not None and made.video.frames.shape == (9, 64, 96, 3) and made.sound is not None


def test_a_given_sound_stays_clean_and_is_cut_to_the_clip(
    family: LTX2Family, model: torch.nn.Module, source20: WeightSource, encoders: dict[str, LatentEncoder]
) -> None:
    given, blocks = record(encoders["audio"], sound(0.6)), Spied(family, model)
    assert given.tensors["latents"].shape == (15, 128)
    request = dataclasses.replace(SMALL, given_sound=given)
    made = family.sample(model, source20, [request], blocks, BOTH)[0]
    assert torch.equal(made.latents["audio"][0], given.tensors["latents"][:9].float())
    for state in blocks.entered:
        assert torch.equal(state.shared["audio.time"], blocks.entered[0].shared["audio.time"]), "timestep 0 in every step"
        assert torch.equal(state.streams["audio"].hidden, blocks.entered[0].streams["audio"].hidden)
    assert not torch.equal(blocks.entered[0].shared["video.time"], blocks.entered[1].shared["video.time"])
    shorter = dataclasses.replace(request, given_sound=record(encoders["audio"], sound(0.36)))
    other = family.sample(model, source20, [shorter], blocks, BOTH)[0]
    assert not torch.equal(made.latents["video"], other.latents["video"]), "the picture follows the sound"


def test_both_may_be_given_at_once(
    family: LTX2Family, model: torch.nn.Module, source20: WeightSource, encoders: dict[str, LatentEncoder]
) -> None:
    frame, heard = record(encoders["video"], picture()), record(encoders["audio"], sound(0.36))
    request = dataclasses.replace(SMALL, first_frame=frame, given_sound=heard, steps=1)
    made = family.sample(model, source20, [request], Spied(family, model), BOTH)[0]
    assert torch.equal(made.latents["video"][0, :6], frame.tensors["latents"].flatten(1).T.float())
    assert torch.equal(made.latents["audio"][0], heard.tensors["latents"].float())


def test_encoded_prompts_need_no_text_encoder(
    family: LTX2Family, model: torch.nn.Module, source20: WeightSource, encoders: dict[str, LatentEncoder], monkeypatch: pytest.MonkeyPatch
) -> None:
    request = dataclasses.replace(SMALL, negative_prompt="grey", guidance=3.0, steps=1)
    plain = family.sample(model, source20, [request], Spied(family, model), BOTH)[0]
    brought = {text: record(encoders["text"], text) for text in request.texts}
    assert list(brought) == ["a red ball", "grey"]
    monkeypatch.setattr(type(encoders["text"]), "load", lambda *_: pytest.fail("the text encoder is loaded"))
    again = family.sample(model, source20, [dataclasses.replace(request, text=brought)], Spied(family, model), BOTH)[0]
    assert torch.equal(plain.latents["video"], again.latents["video"]) and torch.equal(plain.latents["audio"], again.latents["audio"])


def test_a_perfect_model_ends_on_its_goal_and_leaves_what_is_given() -> None:
    """Velocity (x - x0) / sigma at every token: the given ones must not move although their velocity is not 0."""
    grids, goal = {"video": (2, 2, 2), "audio": (9, 1, 1)}, 0.25
    given = {"video": torch.full((1, 4, 128), 7.0), "audio": torch.full((1, 9, 128), 5.0)}

    def predict(batch: Batch, noise: Noise) -> Prediction:
        assert batch.streams["audio"].clean and noise.streams["audio"].sigma.tolist() == [0.0]
        assert batch.streams["video"].conditioned is not None
        return Prediction({name: (stream.noisy - goal) / stream.sigma.clamp(min=1e-3) for name, stream in noise.streams.items()})

    start = sampling.Start(grids, sampling.initial_noise(0, grids), given)
    text = {name: torch.zeros(1, 3, 4) for name in grids}
    got = sampling.denoise(predict, dataclasses.replace(SMALL, steps=5), sampling.Prompt(text), start, LTX2Family.token_shift, CPU)
    assert torch.equal(got["video"][:, :4], given["video"]) and torch.equal(got["audio"], given["audio"])
    torch.testing.assert_close(got["video"][:, 4:], torch.full((1, 4, 128), goal), atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("changes", "streams", "words"),
    [
        ({"first_frame": Record({"latents": torch.zeros(128, 1, 2, 2)})}, BOTH, ["first_frame", "another size", "96x64"]),
        ({"given_sound": Record({"latents": torch.zeros(8, 128)})}, BOTH, ["given_sound", "shorter", "9"]),
        ({"given_sound": Record({"latents": torch.zeros(9, 128)})}, ("audio",), ["given_sound", "all that would be generated"]),
        ({"given_sound": Record({"latents": torch.zeros(9, 128)})}, ("video",), ["given_sound", "audio is not generated"]),
        ({"first_frame": Record({"latents": torch.zeros(128, 1, 2, 3)})}, ("audio",), ["first_frame", "video is not generated"]),
        ({"first_frame": Record({"mean": torch.zeros(3)})}, BOTH, ["first_frame", "no record", "mean"]),
    ],
)
def test_what_does_not_fit_is_named(changes: dict[str, Record], streams: Sequence[str], words: list[str]) -> None:
    with pytest.raises(ConfigError) as raised:
        sampling.given_tokens(dataclasses.replace(SMALL, **changes), streams)  # type: ignore[arg-type]
    assert [word for word in words if word not in str(raised.value)] == []


def test_requests_that_leave_nothing_to_generate_are_refused() -> None:
    geometry, empty = LTX2Family.geometry, Record({})
    with pytest.raises(ConfigError, match=r"validation_num_video_frames.*nothing left"):
        sampling.check_request(dataclasses.replace(SMALL, frames=1, first_frame=empty), geometry)
    with pytest.raises(ConfigError, match="sound is given, and none is wanted"):
        sampling.check_request(dataclasses.replace(SMALL, sound=False, given_sound=empty), geometry)


def test_noise_of_what_is_not_given_is_as_without_it() -> None:
    given = {"video": torch.zeros(1, 6, 128)}
    start = sampling.Start.of(SMALL, BOTH, given)
    plain: dict[str, Tensor] = sampling.initial_noise(SMALL.seed, sampling.grids_for(SMALL, BOTH))
    assert torch.equal(start.noise["video"], plain["video"]) and torch.equal(start.noise["audio"], plain["audio"])
    assert not start.whole("video") and not start.whole("audio")


# --- decoding in little memory -----------------------------------------------------------------------------------
def test_a_clip_that_does_not_fit_is_decoded_in_smaller_pieces(
    source20: WeightSource, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The device is full for the first one or two tries: chunked convolutions give the same clip, tiles one of the same size."""
    decoder = VideoDecoder(source20, variant_of(source20), torch.float32)
    latents = torch.randn(1, 128, 2, 2, 9, generator=torch.Generator().manual_seed(1))
    plain, failures = decoder._decoded, [0]

    def full(vae: object, latents: Tensor, frame_rate: float) -> VideoClip:
        if failures[0]:
            failures[0] -= 1
            raise torch.OutOfMemoryError("the device is full")
        return plain(vae, latents, frame_rate)

    monkeypatch.setattr(decoder, "_decoded", full)
    found = []
    for times in (0, 1, 2):
        decoder.load(CPU)
        failures[0] = times
        found.append(decoder.decode(latents).frames)
        decoder.unload()
    assert torch.equal(found[0], found[1])
    assert found[2].shape == found[0].shape == (9, 64, 288, 3) and not torch.equal(found[2], found[0])
    assert "288x64; it is decoded with chunked convolutions" in caplog.text and "by smaller tiles" in caplog.text
    decoder.load(CPU)
    failures[0] = 3
    with pytest.raises(torch.OutOfMemoryError):
        decoder.decode(latents)
    decoder.unload()


@pytest.mark.parametrize("size", range(9, 70))
def test_small_tiles_leave_no_last_tile_of_one(size: int) -> None:
    stride = small_stride(size)
    assert stride < 8 and size % stride != 1
