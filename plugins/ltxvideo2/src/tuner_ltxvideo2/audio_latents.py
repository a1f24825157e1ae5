"""Sound to audio latents and back: log-mel, the checkpoint's audio VAE, and its vocoder.

Special here: lengths. A clip of s seconds has L = round(25 s) latents (at least 1), whatever comes out of the transform. The VAE is
causal in time: latent l looks at mel frames up to 4l and no further, so the first L latents need exactly the first 4L - 3 frames, and
cutting the mel there equals cutting the latents after encoding. There are always enough: a centred transform of N samples has
1 + floor(N / 160) > 100 s frames, and 4L - 3 <= 100 s - 1 where L is above 1.

Dimensions: B clips, N samples, M mel frames (100 a second), L latents (25 a second), 128 features = 8 channels x 16 mel places.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache
from typing import ClassVar, Final, Literal

import torch
from torch import Tensor
from transformers.audio_utils import mel_filter_bank

from tuner.errors import DataError
from tuner.interfaces.encoders import AudioClip, LatentEncoder, Record, Source
from tuner_ltxvideo2.latents import Networks, without

SAMPLE_RATE: Final = 16000
LATENT_RATE: Final = 25
WINDOW: Final = 1024
HOP: Final = 160
MEL_BINS: Final = 64
FLOOR: Final = 1e-5
VERSION: Final = 1
_MEL_REDUCTION: Final = 4


class AudioLatentEncoder(Networks, LatentEncoder):
    """Sound 16 kHz -> {"latents": (L, 128) normalised in `dtype`, "mask": (L,) float32, 1 where there is sound and 0 on padding}."""

    name: ClassVar[str] = "audio"
    reads: ClassVar[Literal["video", "audio", "text"]] = "audio"

    def settings(self) -> Mapping[str, str | int | float | bool]:
        return {"audio_vae": self._source.fingerprint("audio_vae"), "dtype": str(self._dtype), "version": VERSION}

    def load(self, device: torch.device) -> None:
        super().load(device)
        self._open("audio_vae", without("decoder"))

    @torch.no_grad()
    def encode(self, sources: Sequence[Source]) -> list[Record]:
        clips = [source for source in sources if isinstance(source, AudioClip)]
        assert len(clips) == len(sources), "this encoder reads sound"
        length = latent_length(clips[0].samples.shape[-1])
        waves = torch.stack([stereo(clip) for clip in clips]).to(self._device)
        mel = log_mel(waves)[:, :, : 4 * length - 3]
        vae = self._network("audio_vae")
        latents = vae.encode(mel.to(self._dtype)).latent_dist.mode()
        normalised = ((pack(latents).float() - vae.latents_mean) / vae.latents_std).to(self._dtype).cpu()
        return [Record({"latents": item.clone(), "mask": sound_mask(clip, length)}) for item, clip in zip(normalised, clips, strict=True)]


class AudioDecoder(Networks):
    """Normalised latents to sound, through the audio VAE and the vocoder (24 kHz for 2.0, 48 kHz for 2.3)."""

    def load(self, device: torch.device) -> None:
        super().load(device)
        self._open("audio_vae", without("encoder"))
        self._open("vocoder")

    @torch.no_grad()
    def decode(self, latents: Tensor) -> AudioClip:
        """(1, L, 128) normalised -> stereo sound of (4L - 3) / 100 seconds, on the CPU."""
        vae, vocoder = self._network("audio_vae"), self._network("vocoder")
        raw = latents.to(self._device).float() * vae.latents_std + vae.latents_mean
        mel = vae.decode(unpack(raw, vae.config.mel_bins // _MEL_REDUCTION).to(self._dtype), return_dict=False)[0]
        samples = vocoder(mel)[0].float().clamp(-1, 1).cpu()
        return AudioClip(samples, vocoder.config.output_sampling_rate, samples.shape[-1])


# --- lengths and masks -------------------------------------------------------------------------------------------
def latent_length(samples: int) -> int:
    """L = max(1, round(25 · seconds)), Python's rounding: halves go to the even number."""
    return max(1, round(LATENT_RATE * samples / SAMPLE_RATE))


def sound_mask(clip: AudioClip, length: int) -> Tensor:
    """(L,) float32: 1 for as many latents as the sound itself would have, 0 after; all 0 where nothing is sound."""
    valid = 0 if clip.valid_samples <= 0 else min(length, latent_length(clip.valid_samples))
    return (torch.arange(length) < valid).float()


# --- the transform -----------------------------------------------------------------------------------------------
def stereo(clip: AudioClip) -> Tensor:
    """(2, N) float32: mono twice; of more than two channels their mean, twice. Raises `DataError`."""
    if clip.sample_rate != SAMPLE_RATE:
        raise DataError(f"sound must come at {SAMPLE_RATE} samples a second", value=clip.sample_rate)
    channels, count = clip.samples.shape
    if channels == 0 or count == 0:
        raise DataError("the sound is empty", value=f"{channels} channels of {count} samples")
    samples = clip.samples.float()
    return samples if channels == 2 else samples.mean(dim=0, keepdim=True).expand(2, -1)


def log_mel(waves: Tensor) -> Tensor:
    """(B, 2, N) at 16 kHz -> (B, 2, M, 64) natural logarithm of mel magnitudes, float32, with M = 1 + floor(N / 160).

    Frames of 1,024 under a periodic Hann window every 160 samples, centred, the ends reflected; magnitudes; 64 slaney bins from 0 to
    8 kHz; not below 1e-5.
    """
    batch, channels, count = waves.shape
    flat = waves.reshape(batch * channels, count)
    if count <= WINDOW // 2:  # reflection needs more than half a window
        flat = torch.nn.functional.pad(flat, (0, WINDOW // 2 + 1 - count))
    window = torch.hann_window(WINDOW, periodic=True, device=waves.device)
    spectrum = torch.stft(flat, WINDOW, HOP, WINDOW, window=window, center=True, pad_mode="reflect", return_complex=True).abs()
    mel = torch.log(torch.clamp(_filters().to(waves.device) @ spectrum, min=FLOOR))
    return mel[:, :, : 1 + count // HOP].transpose(1, 2).reshape(batch, channels, -1, MEL_BINS)


@cache
def _filters() -> Tensor:
    """(64, 513) slaney filters, slaney-normalised."""
    bank = mel_filter_bank(
        num_frequency_bins=WINDOW // 2 + 1, num_mel_filters=MEL_BINS, min_frequency=0.0, max_frequency=8000.0,
        sampling_rate=SAMPLE_RATE, norm="slaney", mel_scale="slaney",
    )  # fmt: skip
    return torch.from_numpy(bank).float().T.contiguous()


def pack(latents: Tensor) -> Tensor:
    """(B, 8, L, 16) -> (B, L, 128), feature = channel · 16 + mel."""
    return latents.transpose(1, 2).flatten(2)


def unpack(latents: Tensor, mels: int) -> Tensor:
    """(B, L, 128) -> (B, 8, L, 16): the inverse of `pack`."""
    batch, length, features = latents.shape
    return latents.reshape(batch, length, features // mels, mels).transpose(1, 2)
