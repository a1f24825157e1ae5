"""How the tiny family goes from noise to latents: Euler steps, guidance, and what is given clean.

Dimensions: B samples, S tokens of one stream, C latent channels, T words.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tuner.errors import ConfigError
from tuner.interfaces.encoders import Record
from tuner.interfaces.family import Batch, Noise, SampleRequest, StreamBatch, StreamNoise
from tuner.interfaces.services import WeightSource
from tuner.testing.encoders import TinyText
from tuner.testing.tokens import Grid, shape_of


def encode_prompts(source: WeightSource, requests: Sequence[SampleRequest], device: torch.device) -> dict[str, Tensor]:
    """Prompt -> (T, C); those that no request brings go through the encoder, which is gone afterwards."""
    found = {text: record.tensors["video"] for request in requests for text, record in request.text.items()}
    missing = list(dict.fromkeys(text for request in requests for text in request.texts if text not in found))
    if missing:
        encoder = TinyText(source)
        try:
            encoder.load(device)
            found |= {text: record.tensors["video"] for text, record in zip(missing, encoder.encode(missing), strict=True)}
        finally:
            encoder.unload()
    return found


def guided(velocity: Tensor, scale: float) -> Tensor:
    """(1 or 2, S, C) -> (1, S, C): u + g · (c - u), classifier-free guidance (Ho & Salimans 2022); with one prompt its own velocity."""
    wanted, *other = velocity.chunk(len(velocity))
    return other[0] + scale * (wanted - other[0]) if other else wanted


@dataclass
class Clip:
    """A clip on its way from noise to latents."""

    grids: Mapping[str, Grid]
    latents: dict[str, Tensor]
    """Stream -> (1, S, C)."""
    given: Mapping[str, Tensor]
    """Stream -> (S,) bool: tokens that are given clean, where there are any."""

    def inputs(self, text: Tensor, sigma: float, frame_rate: float) -> tuple[Batch, Noise]:
        """The same latents once for each prompt; there is no target to learn."""
        count, streams, noises = len(text), {}, {}
        for name, values in self.latents.items():
            repeated, given = values.expand(count, -1, -1), self.given.get(name)
            clean = given is not None and bool(given.all())
            conditioned = given.expand(count, -1) if given is not None and not clean else None
            streams[name] = StreamBatch(repeated, self.grids[name], conditioned=conditioned, clean=clean)
            level = torch.full((count,), 0.0 if clean else sigma, device=values.device)
            noises[name] = StreamNoise(level, repeated, repeated, repeated)
        return Batch((), streams, {"video": text}, (frame_rate,) * count), Noise(noises)

    def advance(self, velocity: Mapping[str, Tensor], step: float) -> None:
        """x + step · v, but for what is given."""
        for name, values in self.latents.items():
            moved = values + step * velocity[name]
            self.latents[name] = torch.where(self.given[name][:, None], values, moved) if name in self.given else moved


def start(request: SampleRequest, grids: Mapping[str, Grid], device: torch.device) -> Clip:
    """Noise from the request's seed, and what the request gives. Raises `ConfigError` for a record that does not fit."""
    draws = torch.Generator().manual_seed(request.seed)
    latents = {name: torch.randn(1, *shape_of(grid), generator=draws) for name, grid in grids.items()}
    given: dict[str, Tensor] = {}
    if request.first_frame is not None:
        first = _latents(request.first_frame)[:, 0].flatten(1).T
        place = grids["video"][1] * grids["video"][2]
        _require(first.shape == latents["video"][0, :place].shape, "the first frame is of another size than the clip")
        latents["video"][0, :place] = first
        given["video"] = torch.arange(latents["video"].shape[1]) < place
    if request.given_sound is not None:
        _require("audio" in grids, "a sound is given and the model has no stream for it")
        sound = _latents(request.given_sound)
        length = latents["audio"].shape[1]
        _require(len(sound) >= length, "the sound is shorter than the clip")
        latents["audio"][0] = sound[:length]
        given["audio"] = torch.ones(length, dtype=torch.bool)
    return Clip(grids, {name: t.to(device) for name, t in latents.items()}, {name: t.to(device) for name, t in given.items()})


def _latents(record: Record) -> Tensor:
    return record.tensors["latents"].float()


def _require(fits: bool, problem: str) -> None:
    if not fits:
        raise ConfigError(problem, where="validation")
