"""From noise to latents: Euler steps along the flow, guided on the predicted clean latents of both streams.

Special here: picture and sound run through one schedule; guidance costs one forward pass over a batch of two, prompt and negative
prompt; the noise is drawn on the CPU in diffusers' order, so that a seed gives the same clip there and here on every device. What is
given - the first frame, the whole sound - is at timestep 0 in every step and comes out bit for bit as it went in.

Dimensions: S tokens of one stream, C latent channels, T text tokens, D channels.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from diffusers.pipelines.ltx2.utils import DISTILLED_SIGMA_VALUES
from torch import Tensor
from torch.nn import functional

from tuner.errors import ConfigError
from tuner.interfaces.encoders import AudioClip, LatentEncoder, Record, VideoClip
from tuner.interfaces.family import (
    Batch,
    Generated,
    Geometry,
    Noise,
    Prediction,
    SampleRequest,
    StreamBatch,
    StreamNoise,
    TokenShift,
)
from tuner_ltxvideo2.audio_latents import AudioDecoder
from tuner_ltxvideo2.geometry import AUDIO_CHANNELS, audio_length, pack_video, unpack_video, video_grid
from tuner_ltxvideo2.video_latents import VideoDecoder

VIDEO_CHANNELS = 128
MEL_BINS = 16
"""Latent mel bins: packed sound has 8 channels of them."""
TERMINAL_SIGMA = 0.1
"""The dev schedule's last step starts here."""

Grid = tuple[int, int, int]
Predict = Callable[[Batch, Noise], Prediction]


@dataclass(frozen=True)
class Prompt:
    """Encoded captions per stream, (1, T, D) each; `negative` None: no guidance."""

    positive: Mapping[str, Tensor]
    negative: Mapping[str, Tensor] | None = None


def check_request(request: SampleRequest, geometry: Geometry) -> None:
    """Raises `ConfigError` for a size or length that the latents cannot have, naming the nearest that they can."""
    for name, value in (("width", request.width), ("height", request.height)):
        smallest = 2 * geometry.size_step  # the decoder reflects at the border, which a single latent cannot
        nearest = max(smallest, geometry.snap_size(value))
        if nearest != value:
            raise ConfigError(
                f"{name} must be a multiple of {geometry.size_step} pixels and at least {smallest}", where="validation_resolution",
                value=value, remedy=f"use {nearest}",
            )
    if geometry.snap_frames(request.frames) != request.frames:
        raise ConfigError(
            f"must be 1 + a multiple of {geometry.frame_step}", where="validation_num_video_frames", value=request.frames,
            remedy=f"use {geometry.snap_frames(request.frames)}",
        )
    if request.first_frame is not None and request.frames == 1:
        raise ConfigError(
            "a clip of one frame whose first frame is given has nothing left to generate", where="validation_num_video_frames",
            value=request.frames, remedy=f"use {1 + geometry.frame_step} or more",
        )  # fmt: skip
    if request.given_sound is not None and not request.sound:
        raise ConfigError("sound is given, and none is wanted", where="sound", value=request.sound)


def grids_for(request: SampleRequest, streams: Sequence[str]) -> dict[str, Grid]:
    """Latent grids of the streams that the request generates; sound only where it is wanted or is all there is."""
    grids: dict[str, Grid] = {}
    if "video" in streams:
        grids["video"] = video_grid(request.frames, request.height, request.width)
    if "audio" in streams and (request.sound or not grids):
        grids["audio"] = (audio_length(request.frames, request.frame_rate), 1, 1)
    return grids


def given_tokens(request: SampleRequest, streams: Sequence[str]) -> dict[str, Tensor]:
    """Stream -> (1, K, C) fp32 clean tokens, the first K of the stream's: those of the first frame, and all of the sound.

    Raises `ConfigError` for a stream that is not generated, and for records of another size.
    """
    grids, found = grids_for(request, streams), {}
    if request.first_frame is not None:
        latents, (_, height, width) = _latents(request.first_frame, "first_frame", "video", grids), grids["video"]
        if latents.ndim != 4 or latents.shape[-2:] != (height, width):
            raise ConfigError(
                "the first frame is of another size than the clip", where="first_frame", value=tuple(latents.shape),
                remedy=f"encode it at {request.width}x{request.height}",
            )  # fmt: skip
        found["video"] = pack_video(latents[None, :, :1]).float().contiguous()
    if request.given_sound is not None:
        latents, length = _latents(request.given_sound, "given_sound", "audio", grids), grids["audio"][0]
        if list(grids) == ["audio"]:
            raise ConfigError("the sound is all that would be generated, and it is given", where="given_sound", value=sorted(grids))
        if latents.shape[0] < length:
            raise ConfigError(
                f"the sound is shorter than the clip, which takes {length} latents of it", where="given_sound", value=latents.shape[0],
                remedy="ask for fewer frames",
            )  # fmt: skip
        found["audio"] = latents[None, :length].float()
    return found


def _latents(record: Record, name: str, stream: str, grids: Mapping[str, Grid]) -> Tensor:
    if stream not in grids:
        raise ConfigError(f"{stream} is not generated, so none of it can be given", where=name, value=sorted(grids))
    if "latents" not in record.tensors:
        raise ConfigError(f"is no record of this family's encoder of {stream}", where=name, value=sorted(record.tensors))
    return record.tensors["latents"]


@dataclass(frozen=True)
class Start:
    """Where a clip begins: pure noise, and what is given."""

    grids: Mapping[str, Grid]
    noise: Mapping[str, Tensor]
    """Stream -> (1, S, C) fp32 on the CPU."""
    given: Mapping[str, Tensor]
    """Stream -> (1, K, C) fp32: its first K tokens, clean."""

    @staticmethod
    def of(request: SampleRequest, streams: Sequence[str], given: Mapping[str, Tensor]) -> Start:
        """What is given takes the place of its noise; the rest of the noise is as without it."""
        grids = grids_for(request, streams)
        return Start(grids, initial_noise(request.seed, grids), given)

    def whole(self, stream: str) -> bool:
        """Whether the stream is given from beginning to end."""
        return stream in self.given and self.given[stream].shape[1] == self.noise[stream].shape[1]


def schedule(steps: int, tokens: int, shift: TokenShift, *, distilled: bool = False) -> Tensor:
    """Sigmas (steps + 1,) fp32 on the CPU, from 1 to 0: even steps, shifted by exp(mu(tokens)), stretched to end at 0.1 before 0.

    A distilled model's 8 steps are those that it was made for, whatever the number of tokens.
    """
    if distilled and steps == len(DISTILLED_SIGMA_VALUES):
        return torch.tensor([*DISTILLED_SIGMA_VALUES, 0.0])
    if steps == 1:  # stretching one sigma of 1 would divide by 0
        return torch.tensor([1.0, 0.0])
    scheduler = FlowMatchEulerDiscreteScheduler(
        use_dynamic_shifting=True, time_shift_type="exponential", shift_terminal=TERMINAL_SIGMA
    )
    scheduler.set_timesteps(sigmas=np.linspace(1.0, 1.0 / steps, steps).tolist(), mu=shift.mu(tokens))
    sigmas: Tensor = scheduler.sigmas
    return sigmas


def initial_noise(seed: int, grids: Mapping[str, Grid]) -> dict[str, Tensor]:
    """Stream -> (1, S, C) fp32 on the CPU. Video is drawn first, both in the shape of unpacked latents."""
    generator = torch.Generator().manual_seed(seed)
    noise: dict[str, Tensor] = {}
    if "video" in grids:
        noise["video"] = pack_video(torch.randn((1, VIDEO_CHANNELS, *grids["video"]), generator=generator)).contiguous()
    if "audio" in grids:
        channels = AUDIO_CHANNELS // MEL_BINS
        drawn = torch.randn((1, channels, grids["audio"][0], MEL_BINS), generator=generator)
        noise["audio"] = drawn.transpose(1, 2).flatten(2)
    return noise


def encode_prompts(make_encoder: Callable[[], LatentEncoder], requests: Sequence[SampleRequest], device: torch.device) -> list[Prompt]:
    """The prompts of all requests. Text that the requests do not bring is encoded, each once; the encoder is gone from `device` afterwards.

    Where they bring all of it, no encoder is made.
    """
    encoded = {text: record.tensors for request in requests for text, record in request.text.items()}
    missing = [text for text in dict.fromkeys(text for request in requests for text in request.texts) if text not in encoded]
    if missing:
        encoder = make_encoder()
        try:
            encoder.load(device)
            encoded |= {text: encoder.encode([text])[0].tensors for text in missing}
        finally:
            encoder.unload()
    batched = {text: {name: tensor[None] for name, tensor in tensors.items()} for text, tensors in encoded.items()}
    return [Prompt(*(batched[text] for text in request.texts)) for request in requests]


@torch.no_grad()
def denoise(
    predict: Predict,
    request: SampleRequest,
    prompt: Prompt,
    start: Start,
    shift: TokenShift,
    device: torch.device,
    *,
    distilled: bool = False,
) -> dict[str, Tensor]:
    """Stream -> (1, S, C) normalised latents, fp32 on `device`.

    `predict` is one forward pass over a batch of one, or of two (prompt, negative prompt) with guidance.
    """
    given = {name: tokens.to(device) for name, tokens in start.given.items()}
    latents = {name: _with_given(values.to(device), given.get(name)) for name, values in start.noise.items()}
    leading = next(iter(latents.values()))
    sigmas = schedule(request.steps, leading.shape[1], shift, distilled=distilled).tolist()
    sides = [prompt.positive] if prompt.negative is None else [prompt.positive, prompt.negative]
    text = {name: torch.cat([side[name] for side in sides]).to(device) for name in latents}
    scales = {"video": request.guidance, "audio": request.audio_guidance or request.guidance}
    for sigma, following in pairwise(sigmas):
        velocity = predict(*_inputs(latents, text, sigma, start, request.frame_rate, len(sides))).streams
        for name, values in latents.items():
            clean = _guided(values - sigma * velocity[name].float(), scales[name])
            latents[name] = _with_given(values + (following - sigma) * (values - clean) / sigma, given.get(name))
    return latents


def _with_given(values: Tensor, given: Tensor | None) -> Tensor:
    """(1, S, C) with the first K tokens as they are given."""
    return values if given is None else torch.cat([given, values[:, given.shape[1] :]], dim=1)


def _inputs(
    latents: Mapping[str, Tensor], text: Mapping[str, Tensor], sigma: float, start: Start, rate: float, count: int
) -> tuple[Batch, Noise]:
    """The same latents `count` times, with as many prompts. There is no target to learn: target and noise are the latents."""
    streams: dict[str, StreamBatch] = {}
    noises: dict[str, StreamNoise] = {}
    for name, values in latents.items():
        repeated = values.expand(count, *values.shape[1:])
        whole, conditioned = start.whole(name), None
        if name in start.given and not whole:
            conditioned = (torch.arange(values.shape[1], device=values.device) < start.given[name].shape[1]).expand(count, -1)
        streams[name] = StreamBatch(repeated, start.grids[name], conditioned=conditioned, clean=whole)
        level = torch.full((count,), 0.0 if whole else sigma, device=values.device)
        noises[name] = StreamNoise(level, repeated, target=repeated, noise=repeated)
    return Batch((), streams, text, (rate,) * count), Noise(noises)


def _guided(clean: Tensor, scale: float) -> Tensor:
    """Classifier-free guidance on predicted clean latents (Ho & Salimans 2022): c + (g - 1) · (c - u). (1 or 2, S, C) -> (1, S, C)."""
    if clean.shape[0] == 1:
        return clean
    positive, negative = clean.chunk(2)
    return positive + (scale - 1) * (positive - negative)


# --- from latents to a clip --------------------------------------------------------------------------------------
def decode(
    requests: Sequence[SampleRequest],
    latents: Sequence[Mapping[str, Tensor]],
    video: VideoDecoder,
    audio: AudioDecoder,
    device: torch.device,
) -> list[Generated]:
    """Pictures of all clips, then their sound, so that one decoder at a time is in memory. A stream without latents gives None."""
    pictures: list[VideoClip | None] = [None] * len(requests)
    sounds: list[AudioClip | None] = [None] * len(requests)
    if any("video" in given for given in latents):
        try:
            video.load(device)
            for index, (request, given) in enumerate(zip(requests, latents, strict=True)):
                if "video" in given:
                    grid = video_grid(request.frames, request.height, request.width)
                    pictures[index] = video.decode(unpack_video(given["video"], grid), request.frame_rate)
        finally:
            video.unload()
    if any("audio" in given for given in latents):
        try:
            audio.load(device)
            for index, (request, given) in enumerate(zip(requests, latents, strict=True)):
                if "audio" in given:
                    sounds[index] = fit_sound(audio.decode(given["audio"]), request.frames / request.frame_rate)
        finally:
            audio.unload()
    kept = [{name: tensor.cpu() for name, tensor in given.items()} for given in latents]
    return [Generated(*parts) for parts in zip(pictures, sounds, kept, strict=True)]


def fit_sound(clip: AudioClip, seconds: float) -> AudioClip:
    """Exactly as long as the picture: cut, or padded with silence (the causal audio VAE gives 30 ms less than its latents span)."""
    wanted = round(seconds * clip.sample_rate)
    missing = wanted - clip.samples.shape[-1]
    samples = functional.pad(clip.samples, (0, missing)) if missing > 0 else clip.samples[:, :wanted]
    return AudioClip(samples, clip.sample_rate, min(clip.valid_samples, wanted))
