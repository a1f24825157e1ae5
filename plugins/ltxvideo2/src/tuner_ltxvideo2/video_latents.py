"""Clips to video latents and back, through the checkpoint's own VAE.

Special here: the posterior's mode is cached, not a sample, and already normalised per channel; the arithmetic of the normalisation is
float32 whatever the weights are.

Dimensions: B clips, C latent channels (128), F H W frames, rows, columns: of pictures n x 8k + 1, n x 32, n x 32, of latents k + 1, n, n.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, Final, Literal

import torch
from torch import Tensor

from tuner.errors import DataError
from tuner.interfaces.encoders import LatentEncoder, Record, Source, VideoClip
from tuner.interfaces.family import Variant
from tuner.interfaces.memory import PartMemory
from tuner.interfaces.services import WeightSource
from tuner_ltxvideo2.latents import Networks, without
from tuner_ltxvideo2.options import LTX2Options
from tuner_ltxvideo2.vae_chunks import FRAME_STEP, patch_convolutions, roll_encoder

log = logging.getLogger(__name__)

SIZE_STEP: Final = 32
VERSION: Final = 1
_TILE: Final = 16
"""Latent rows or columns (512 pixels) of a tile, diffusers' own size; larger pictures are decoded by tiles."""
_SMALL_TILE: Final = 8
"""The same where memory is short: a quarter of the area."""
_AT_ONCE: Final = 16
"""Frames that exist as float32 pixels at a time."""
SAVINGS: Final[Mapping[str, Callable[[Any], None]]] = {
    "vae_enable_slicing": lambda vae: vae.enable_slicing(),
    "vae_enable_patch_conv": lambda vae: patch_convolutions(vae.encoder),
    "vae_enable_temporal_roll": roll_encoder,
    "vae_enable_tiling": lambda vae: vae.enable_tiling(),
}
"""Ways to encode in less memory and how a loaded VAE is told, in the order in which they are tried: the last one makes other latents."""


class VideoLatentEncoder(Networks, LatentEncoder):
    """Clips uint8 (F, H, W, 3) -> {"latents": (C, F, H, W)}, normalised, in `dtype`."""

    name: ClassVar[str] = "video"
    reads: ClassVar[Literal["video", "audio", "text"]] = "video"

    def __init__(
        self, source: WeightSource, variant: Variant, dtype: torch.dtype, options: LTX2Options | None = None,
        memory: PartMemory | None = None,
    ) -> None:  # fmt: skip
        super().__init__(source, variant, dtype, memory)
        self._given = (0, 0, 0)
        """Clips, frames and longer side of what was encoded last."""
        self._savings = [key for key in SAVINGS if getattr(options or LTX2Options(), key)]

    def settings(self) -> Mapping[str, str | int | float | bool]:
        # The other savings move the last bits of a value at most; tiling blends, so its latents are others.
        return {
            "vae": self._source.fingerprint("vae"),
            "dtype": str(self._dtype),
            "tiling": "vae_enable_tiling" in self._savings,
            "version": VERSION,
        }

    def load(self, device: torch.device) -> None:
        super().load(device)
        vae = self._open("vae", without("decoder"))
        for key in self._savings:
            SAVINGS[key](vae)

    def reduce_memory(self) -> str | None:
        """The next of `SAVINGS` that helps clips such as those that were given last; tiling, the last, makes `settings` others."""
        key = next((key for key in SAVINGS if key not in self._savings and self._helps(key)), None)
        if key is None:
            return None
        self._savings.append(key)
        if "vae" in self._loaded:
            SAVINGS[key](self._network("vae"))
        return f"{key} is switched on" + (", which makes other latents" if key == "vae_enable_tiling" else "")

    def _helps(self, key: str) -> bool:
        clips, frames, side = self._given
        if key == "vae_enable_slicing":
            return clips > 1
        return side > _TILE * SIZE_STEP if key == "vae_enable_tiling" else frames > 1

    @torch.no_grad()
    def encode(self, sources: Sequence[Source]) -> list[Record]:
        clips = [source for source in sources if isinstance(source, VideoClip)]
        assert len(clips) == len(sources), "this encoder reads pictures"
        for clip in clips:
            check_clip(clip)
        frames, height, width = clips[0].frames.shape[:3]
        self._given = len(clips), frames, max(height, width)
        vae = self._network("vae")
        latents = vae.encode(scaled(clips, self._dtype, self._device)).latent_dist.mode()
        normalised = normalise(vae, latents).to(self._dtype).cpu()
        return [Record({"latents": item.clone()}) for item in normalised]


class VideoDecoder(Networks):
    """Normalised latents to pictures; large ones by tiles."""

    def __init__(
        self, source: WeightSource, variant: Variant, dtype: torch.dtype, options: LTX2Options | None = None,
        memory: PartMemory | None = None,
    ) -> None:  # fmt: skip
        super().__init__(source, variant, dtype, memory)
        self._options = options or LTX2Options()

    def load(self, device: torch.device) -> None:
        super().load(device)
        vae = self._open("vae", without("encoder"))
        if self._options.vae_enable_patch_conv:
            patch_convolutions(vae.decoder)

    @torch.no_grad()
    def decode(self, latents: Tensor, frame_rate: float = 25.0) -> VideoClip:
        """(1, C, F, H, W) normalised -> clip of 8(F - 1) + 1 frames, 32H x 32W pixels, on the CPU.

        Where memory runs out it goes on with chunked convolutions, which give the same clip, then with smaller tiles, and says so.
        """
        vae, height, width = self._network("vae"), *latents.shape[-2:]
        if max(height, width) > _TILE:
            _tile(vae, _TILE, tile_stride(height), tile_stride(width))
        ways: list[tuple[str, Callable[[], None]]] = []
        if not self._options.vae_enable_patch_conv:
            ways.append(("with chunked convolutions", lambda: patch_convolutions(vae.decoder)))
        if max(height, width) > _SMALL_TILE:
            ways.append(("by smaller tiles", lambda: _tile(vae, _SMALL_TILE, small_stride(height), small_stride(width))))
        for said, spare in ways:
            try:
                return self._decoded(vae, latents, frame_rate)
            except torch.OutOfMemoryError:
                log.warning("not enough device memory to decode a clip of %dx%d; it is decoded %s", 32 * width, 32 * height, said)
            # Here the exception is gone, and with it the tensors that its traceback kept alive.
            if self._device.type == "cuda":
                torch.cuda.empty_cache()
            spare()
        return self._decoded(vae, latents, frame_rate)

    def _decoded(self, vae: Any, latents: Tensor, frame_rate: float) -> VideoClip:
        raw = denormalise(vae, latents.to(self._device)).to(self._dtype)
        return VideoClip(shown(vae.decode(raw, return_dict=False)[0][0]), frame_rate)


def scaled(clips: Sequence[VideoClip], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Equally shaped clips, uint8 (F, H, W, 3) on the CPU -> (B, 3, F, H, W) in [-1, 1].

    The float32 that this is computed in exists for a few frames at a time: for a clip it would take more than the first layer does.
    """
    frames, height, width = clips[0].frames.shape[:3]
    result = torch.empty(len(clips), 3, frames, height, width, dtype=dtype, device=device)
    for index, clip in enumerate(clips):
        for start in range(0, frames, _AT_ONCE):
            pixels = clip.frames[start : start + _AT_ONCE].to(device).to(torch.float32)
            result[index, :, start : start + _AT_ONCE] = pixels.div_(127.5).sub_(1.0).permute(3, 0, 1, 2)
    return result


def shown(pictures: Tensor) -> Tensor:
    """(3, F, H, W) in [-1, 1], what lies outside cut -> uint8 (F, H, W, 3) on the CPU; the float32 of it a few frames at a time."""
    result = torch.empty(*pictures.shape[1:], 3, dtype=torch.uint8)
    for start in range(0, len(result), _AT_ONCE):
        pixels = pictures[:, start : start + _AT_ONCE].float().clamp(-1, 1).add_(1).mul_(127.5).round_()
        result[start : start + _AT_ONCE] = pixels.to(torch.uint8).cpu().permute(1, 2, 3, 0)
    return result


def _tile(vae: Any, latents: int, down: int, across: int) -> None:
    """From now on the decoder works on squares of so many latents a side, so many latents apart."""
    side, height, width = (SIZE_STEP * count for count in (latents, down, across))
    vae.enable_tiling(side, side, tile_sample_stride_height=height, tile_sample_stride_width=width)


def small_stride(size: int) -> int:
    """The same as `tile_stride` for `_SMALL_TILE`."""
    return next(stride for stride in (6, 5, 7) if size % stride != 1)


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
