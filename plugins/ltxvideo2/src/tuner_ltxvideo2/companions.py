"""Records of the files that accompany a clip: the reference it is to follow, and the mask of what is learned.

Dimensions: F H W latent frames, rows, columns, of clips of 8(F - 1) + 1 frames, 32H x 32W pixels.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar, Final, Literal

import torch
from torch import Tensor
from torch.nn import functional

from tuner.errors import DataError
from tuner.interfaces.encoders import LatentEncoder, Record, Source, VideoClip
from tuner.interfaces.family import ClipShape
from tuner_ltxvideo2.geometry import SPATIAL_STEP, TEMPORAL_STEP
from tuner_ltxvideo2.video_latents import VideoLatentEncoder, check_clip

LUMINANCE: Final = (0.2126, 0.7152, 0.0722)
"""Of red, green and blue (ITU-R BT.709)."""
DOWNSCALE_KEY: Final = "reference_downscale_factor"
"""Under which other programs look, in an adapter's metadata, for how much smaller than the result a reference clip is to be."""


class ReferenceEncoder(VideoLatentEncoder):
    """The VAE over the reference clip."""

    name: ClassVar[str] = "reference"
    of: ClassVar[str] = "reference"


class MaskEncoder(LatentEncoder):
    """A mask as large as its clip -> {"mask": (F, H, W) float32 in [0, 1]}: mean luminance of the pixels of each latent. No weights."""

    name: ClassVar[str] = "mask"
    reads: ClassVar[Literal["video", "audio", "text"]] = "video"
    of: ClassVar[str] = "mask"
    version: ClassVar[int] = 1

    def settings(self) -> Mapping[str, str | int | float | bool]:
        return {"version": self.version}

    def load(self, device: torch.device) -> None:
        pass

    def unload(self) -> None:
        pass

    def encode(self, sources: Sequence[Source]) -> list[Record]:
        """Raises `DataError` for a mask that leaves nothing to learn, so that its clip is left out and named."""
        clips = [source for source in sources if isinstance(source, VideoClip)]
        assert len(clips) == len(sources), "this encoder reads pictures"
        records = []
        for clip in clips:
            check_clip(clip)
            mask = latent_mask(clip.frames)
            if not (mask > 0.5).any():
                raise DataError("its mask leaves nothing to learn: no latent's part of it is more than half white")
            records.append(Record({"mask": mask}))
        return records


def latent_mask(frames: Tensor) -> Tensor:
    """uint8 (frames, rows, columns, 3) -> (F, H, W): the first frame alone, then eight each; 32 x 32 pixels."""
    grey = (frames.float() / 255) @ torch.tensor(LUMINANCE)
    spatial = functional.avg_pool2d(grey[:, None], SPATIAL_STEP)[:, 0]
    later = spatial[1:].reshape(-1, TEMPORAL_STEP, *spatial.shape[1:])
    return torch.cat([spatial[:1], later.mean(dim=1)])


def file_facts(companions: Mapping[str, Sequence[tuple[ClipShape, ClipShape]]]) -> dict[str, str]:
    """How much smaller the reference clips are than their clips; nothing where there are none, or of several kinds."""
    factors = {clip.width // reference.width for clip, reference in companions.get("reference", ())}
    return {DOWNSCALE_KEY: str(factors.pop())} if len(factors) == 1 else {}
