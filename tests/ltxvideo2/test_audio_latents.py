"""Sound: the transform against a DFT written out here, lengths, masks, and the way through VAE and vocoder."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from diffusers import LTX2Pipeline
from hypothesis import given
from hypothesis import strategies as st

from tuner.errors import DataError
from tuner.interfaces.encoders import AudioClip, Record
from tuner.interfaces.family import Variant
from tuner.interfaces.services import WeightSource
from tuner_ltxvideo2.audio_latents import AudioDecoder, AudioLatentEncoder, latent_length, log_mel, pack, sound_mask, stereo, unpack
from tuner_ltxvideo2.loading import build_part
from tuner_ltxvideo2.variants import variant_of

CPU = torch.device("cpu")


def sound(count: int, channels: int = 2, valid: int | None = None, seed: int = 0) -> AudioClip:
    samples = 0.2 * torch.randn(channels, count, generator=torch.Generator().manual_seed(seed))
    return AudioClip(samples, 16000, count if valid is None else valid)


def encode(encoder: AudioLatentEncoder, *clips: AudioClip) -> list[Record]:
    encoder.load(CPU)
    try:
        return encoder.encode(clips)
    finally:
        encoder.unload()


# --- the transform, independently --------------------------------------------------------------------------------
def slaney(frequency: np.ndarray) -> np.ndarray:
    """Hz to slaney mels: linear below 1 kHz (200/3 Hz a mel), 27 mels for a factor of 6.4 above (Auditory Toolbox, 1998)."""
    return np.where(frequency < 1000, 3 * frequency / 200, 15 + 27 * np.log(np.maximum(frequency, 1) / 1000) / math.log(6.4))


def slaney_inverse(mels: np.ndarray) -> np.ndarray:
    return np.where(mels < 15, 200 * mels / 3, 1000 * np.exp(math.log(6.4) * (mels - 15) / 27))


def reference_log_mel(wave: np.ndarray) -> np.ndarray:
    """(N,) -> (M, 64), all in float64: reflect, frame, window, DFT as a matrix product, triangles of unit area in Hz, logarithm."""
    padded = np.concatenate([wave[1:513][::-1], wave, wave[-513:-1][::-1]])
    window = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(1024) / 1024)
    frames = np.stack([padded[160 * m : 160 * m + 1024] * window for m in range(1 + len(wave) // 160)])
    dft = np.exp(-2j * np.pi * np.outer(np.arange(1024), np.arange(513)) / 1024)
    magnitude = np.abs(frames @ dft)
    edges = slaney_inverse(np.linspace(slaney(np.array(0.0)), slaney(np.array(8000.0)), 66))
    bins = np.arange(513) * 16000 / 1024
    filters = np.zeros((513, 64))
    for k in range(64):
        low, peak, high = edges[k : k + 3]
        triangle = np.minimum((bins - low) / (peak - low), (high - bins) / (high - peak))
        filters[:, k] = np.maximum(0, triangle) * 2 / (high - low)
    return np.log(np.maximum(magnitude @ filters, 1e-5))


@pytest.mark.parametrize("count", [4800, 5003])
def test_the_transform_equals_a_dft_written_out(count: int) -> None:
    time = np.arange(count) / 16000
    wave = 0.5 * np.sin(2 * np.pi * 440 * time) + 0.1 * np.sin(2 * np.pi * 5000 * time * time) + 0.01 * np.cos(900 * time)
    found = log_mel(torch.tensor(np.stack([wave, 0.3 * wave]), dtype=torch.float32)[None])[0].numpy()
    assert found.shape == (2, 1 + count // 160, 64)
    # float32 magnitudes near the floor carry 1e-6 of noise, which the logarithm of 1e-5 magnifies
    np.testing.assert_allclose(found[0], reference_log_mel(wave), atol=2e-2)
    loud = found[0] > -6
    np.testing.assert_allclose(found[0][loud], reference_log_mel(wave)[loud], atol=1e-3)
    np.testing.assert_allclose(found[1], reference_log_mel(0.3 * wave), atol=5e-2)


def test_silence_lies_on_the_floor() -> None:
    assert torch.equal(log_mel(torch.zeros(1, 2, 1600)), torch.full((1, 2, 11, 64), math.log(1e-5)))


@pytest.mark.parametrize("count", [1, 160, 512, 513])
def test_sounds_shorter_than_half_a_window(count: int) -> None:
    mel = log_mel(torch.ones(1, 2, count))
    assert mel.shape == (1, 2, 1 + count // 160, 64)
    assert bool(mel.isfinite().all())


# --- lengths -----------------------------------------------------------------------------------------------------
@given(st.integers(min_value=1, max_value=30 * 16000))
def test_there_are_always_enough_mel_frames(count: int) -> None:
    length = latent_length(count)
    assert length == max(1, round(25 * count / 16000))
    assert 4 * length - 3 <= 1 + count // 160


@pytest.mark.parametrize(("count", "length"), [(77440, 121), (16000, 25), (320, 1), (1, 1), (36480, 57), (960, 2)])
def test_length_of_the_record(count: int, length: int, source20: WeightSource) -> None:
    record = encode(AudioLatentEncoder(source20, variant_of(source20), torch.float32), sound(count))[0]
    assert record.tensors["latents"].shape == (length, 128)
    assert torch.equal(record.tensors["mask"], torch.ones(length))


def test_cutting_the_mel_equals_cutting_the_latents(tiny_source: WeightSource, tiny_variant: Variant) -> None:
    given_sound = sound(16640)  # 105 mel frames would give 27 latents; its 1.04 seconds have 26
    found = encode(AudioLatentEncoder(tiny_source, tiny_variant, torch.float32), given_sound)[0].tensors["latents"]
    vae = build_part(tiny_source, "audio_vae", tiny_variant, dtype=torch.float32, device=CPU)
    with torch.no_grad():
        whole = vae.encode(log_mel(given_sound.samples[None])).latent_dist.mode()
    assert whole.shape[2] == 27
    mean, deviation = vae.get_buffer("latents_mean"), vae.get_buffer("latents_std")
    expected = LTX2Pipeline._normalize_audio_latents(LTX2Pipeline._pack_audio_latents(whole), mean, deviation)[0, :26]
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def test_packing() -> None:
    latents = torch.randn(2, 8, 5, 16)
    packed = pack(latents)
    assert packed.shape == (2, 5, 128)
    assert packed[1, 3, 6 * 16 + 11] == latents[1, 6, 3, 11]
    assert torch.equal(unpack(packed, 16), latents)


def test_normalisation_is_per_packed_feature(source20: WeightSource) -> None:
    variant = variant_of(source20)
    clip = sound(8000)
    found = encode(AudioLatentEncoder(source20, variant, torch.float32), clip)[0].tensors["latents"]
    vae = build_part(source20, "audio_vae", variant, dtype=torch.float32, device=CPU)
    stored = dict(source20.tensors("audio_vae", ["latents_mean", "latents_std"]))
    with torch.no_grad():
        raw = vae.encode(log_mel(clip.samples[None])[:, :, :45]).latent_dist.mode()[0]
    for channel, mel in ((0, 0), (3, 7), (7, 15)):
        feature = channel * 16 + mel
        by_hand = (raw[channel, :, mel] - stored["latents_mean"][feature]) / stored["latents_std"][feature]
        torch.testing.assert_close(found[:, feature], by_hand)


# --- channels, padding -------------------------------------------------------------------------------------------
def test_mono_is_doubled_and_many_channels_are_mixed() -> None:
    mono, many = sound(100, 1), sound(100, 6)
    assert torch.equal(stereo(mono), mono.samples.repeat(2, 1))
    assert torch.equal(stereo(many), many.samples.mean(0).repeat(2, 1))
    both = sound(100, 2)
    assert torch.equal(stereo(both), both.samples)


def test_padding_is_masked(source20: WeightSource) -> None:
    encoder = AudioLatentEncoder(source20, variant_of(source20), torch.float32)
    mask = encode(encoder, sound(16000, valid=9600))[0].tensors["mask"]
    assert torch.equal(mask, torch.tensor([1.0] * 15 + [0.0] * 10))
    assert torch.equal(sound_mask(sound(16000, valid=0), 25), torch.zeros(25))
    assert sound_mask(sound(16000, valid=5), 25).sum() == 1


def test_what_comes_after_the_sound_does_not_change_it(source20: WeightSource) -> None:
    clip = sound(16000)
    changed = clip.samples.clone()
    changed[:, 12000:] = 0.9
    encoder = AudioLatentEncoder(source20, variant_of(source20), torch.float32)
    a, b = (encode(encoder, AudioClip(samples, 16000, 16000))[0].tensors["latents"] for samples in (clip.samples, changed))
    first = (12000 - 512) // 640  # a mel frame looks half a window ahead; a latent ends with mel frame 4l
    assert torch.equal(a[:first], b[:first])
    assert not torch.equal(a[first + 3 :], b[first + 3 :])


@pytest.mark.parametrize("clip", [AudioClip(torch.zeros(2, 100), 44100, 100), AudioClip(torch.zeros(2, 0), 16000, 0)])
def test_what_cannot_be_encoded_is_an_error(clip: AudioClip) -> None:
    with pytest.raises(DataError):
        stereo(clip)


def test_several_at_once_equal_one_by_one(source20: WeightSource) -> None:
    encoder = AudioLatentEncoder(source20, variant_of(source20), torch.bfloat16)
    together = encode(encoder, sound(8000), sound(8000, seed=1))
    assert together[1].tensors["latents"].dtype == torch.bfloat16
    alone = encode(encoder, sound(8000, seed=1))[0]
    torch.testing.assert_close(together[1].tensors["latents"], alone.tensors["latents"], atol=0.1, rtol=0.05)  # bfloat16


# --- back --------------------------------------------------------------------------------------------------------
def test_decoding(tiny_source: WeightSource, tiny_variant: Variant) -> None:
    latents = torch.randn(1, 25, 128, generator=torch.Generator().manual_seed(1))
    decoder = AudioDecoder(tiny_source, tiny_variant, torch.float32)
    decoder.load(CPU)
    heard = decoder.decode(latents)
    decoder.unload()
    rate = 24000 if tiny_variant.name == "2.0" else 48000
    assert heard.sample_rate == rate
    assert heard.samples.shape == (2, 97 * rate // 100)
    assert float(heard.samples.abs().max()) <= 1
    vae = build_part(tiny_source, "audio_vae", tiny_variant, dtype=torch.float32, device=CPU)
    vocoder = build_part(tiny_source, "vocoder", tiny_variant, dtype=torch.float32, device=CPU)
    mean, deviation = vae.get_buffer("latents_mean"), vae.get_buffer("latents_std")
    raw = LTX2Pipeline._unpack_audio_latents(LTX2Pipeline._denormalize_audio_latents(latents, mean, deviation), 25, num_mel_bins=16)
    with torch.no_grad():
        expected = vocoder(vae.decode(raw, return_dict=False)[0])[0]
    torch.testing.assert_close(heard.samples, expected.clamp(-1, 1))
