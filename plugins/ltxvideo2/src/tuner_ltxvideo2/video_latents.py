"""Clips to video latents and back, through the checkpoint's own VAE.

Special here: the posterior's mode is cached, not a sample, and already normalised per channel; the arithmetic of the normalisation is
float32 whatever the weights are.

Dimensions: B clips, C latent channels (128), F H W frames, rows, columns: of pictures n x 8k + 1, n x 32, n x 32, of latents k + 1, n, n.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Final, Literal

import torch
from torch import Tensor

from tuner.errors import DataError
from tuner.interfaces.encoders import LatentEncoder, Record, Source, VideoClip
from tuner.interfaces.family import Variant
from tuner.interfaces.services import WeightSource
from tuner_ltxvideo2.loading import build_part
from tuner_ltxvideo2.options import LTX2Options

FRAME_STEP: Final = 8
SIZE_STEP: Final = 32
VERSION: Final = 1
_TILE: Final = 16
"""Latent rows or columns (512 pixels) of a tile, diffusers' own size; larger pictures are decoded by tiles."""


class VideoLatentEncoder(LatentEncoder):
    """Clips uint8 (F, H, W, 3) -> {"latents": (C, F, H, W)}, normalised, in `dtype`."""

    name: ClassVar[str] = "video"
    reads: ClassVar[Literal["video", "audio", "text"]] = "video"

    def __init__(self, source: WeightSource, variant: Variant, dtype: torch.dtype, options: LTX2Options | None = None) -> None:
        self._source = source
        self._variant = variant
        self._dtype = dtype
        self._options = options or LTX2Options()
        self._vae: Any = None
        self._device = torch.device("cpu")

    def settings(self) -> Mapping[str, str | int | float | bool]:
        # Slicing changes no value; tiling blends, so its latents are others.
        return {
            "vae": self._source.fingerprint("vae"),
            "dtype": str(self._dtype),
            "tiling": self._options.vae_enable_tiling,
            "version": VERSION,
        }

    def load(self, device: torch.device) -> None:
        self._device = device
        self._vae = build_part(self._source, "vae", self._variant, dtype=self._dtype, device=device)
        if self._options.vae_enable_tiling:
            self._vae.enable_tiling()
        if self._options.vae_enable_slicing:
            self._vae.enable_slicing()

    def unload(self) -> None:
        self._vae = None
        if self._device.type == "cuda":
            torch.cuda.empty_cache()

    @torch.no_grad()
    def encode(self, sources: Sequence[Source]) -> list[Record]:
        clips = [source for source in sources if isinstance(source, VideoClip)]
        assert len(clips) == len(sources), "this encoder reads pictures"
        for clip in clips:
            check_clip(clip)
        pictures = torch.stack([clip.frames for clip in clips]).to(self._device)
        scaled = (pictures.to(torch.float32) / 127.5 - 1.0).permute(0, 4, 1, 2, 3).to(self._dtype)
        latents = self._vae.encode(scaled).latent_dist.mode()
        normalised = normalise(self._vae, latents).to(self._dtype).cpu()
        return [Record({"latents": item.clone()}) for item in normalised]


class VideoDecoder:
    """Normalised latents to pictures; large ones by tiles."""

    def __init__(self, source: WeightSource, variant: Variant, dtype: torch.dtype) -> None:
        self._source = source
        self._variant = variant
        self._dtype = dtype
        self._vae: Any = None
        self._device = torch.device("cpu")

    def load(self, device: torch.device) -> None:
        """Brings the VAE onto `device`; its encoder is not read."""
        self._device = device
        self._vae = build_part(
            self._source, "vae", self._variant, dtype=self._dtype, device=device, skip=lambda name: name.startswith("encoder.")
        )
        del self._vae.encoder

    def unload(self) -> None:
        """Frees it."""
        self._vae = None
        if self._device.type == "cuda":
            torch.cuda.empty_cache()

    @torch.no_grad()
    def decode(self, latents: Tensor, frame_rate: float = 25.0) -> VideoClip:
        """(1, C, F, H, W) normalised -> clip of 8(F - 1) + 1 frames, 32H x 32W pixels, on the CPU."""
        if max(latents.shape[-2:]) > _TILE:
            height, width = (SIZE_STEP * tile_stride(size) for size in latents.shape[-2:])
            self._vae.enable_tiling(tile_sample_stride_height=height, tile_sample_stride_width=width)
        raw = denormalise(self._vae, latents.to(self._device)).to(self._dtype)
        pictures = self._vae.decode(raw, return_dict=False)[0][0].permute(1, 2, 3, 0).float()
        return VideoClip(((pictures.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).cpu(), frame_rate)


def tile_stride(size: int) -> int:
    """Latent places from one tile to the next along a side of `size` places: 14, or 13 where 14 would leave a last tile of one.

    A decoder that pads by reflection needs two.
    """
    return 14 if size % 14 != 1 else 13


def check_clip(clip: VideoClip) -> None:
    """Raises `DataError` for a shape that the VAE cannot encode."""
    frames, height, width = clip.frames.shape[:3]
    if (frames - 1) % FRAME_STEP:
        raise DataError(
            "the number of frames must be 1 more than a multiple of 8",
            value=frames,
            remedy=f"use {1 + (frames - 1) // FRAME_STEP * FRAME_STEP}",
        )
    if height % SIZE_STEP or width % SIZE_STEP:
        raise DataError("height and width must be multiples of 32 pixels", value=f"{width}x{height}", remedy="crop the clip")


def normalise(vae: Any, latents: Tensor) -> Tensor:
    """(B, C, F, H, W) as encoded -> normalised, float32: (z - mean) · scaling factor / deviation, per channel."""
    mean, deviation = (values.view(1, -1, 1, 1, 1) for values in (vae.latents_mean, vae.latents_std))
    normalised: Tensor = (latents.float() - mean) * vae.config.scaling_factor / deviation
    return normalised


def denormalise(vae: Any, latents: Tensor) -> Tensor:
    """The inverse of `normalise`, float32."""
    mean, deviation = (values.view(1, -1, 1, 1, 1) for values in (vae.latents_mean, vae.latents_std))
    raw: Tensor = latents.float() * deviation / vae.config.scaling_factor + mean
    return raw
