"""The family's own keys."""

from __future__ import annotations

from typing import ClassVar

from tuner.config.options import Options, option, unsupported

_SAME_LATENTS = "clips are encoded whole; the latents are the same, only the memory that encoding takes is not reduced"


class LTX2Options(Options):
    """Streams, conditioning and the VAE's memory."""

    title: ClassVar[str] = "LTX-2"

    train_audio: bool = option(True, help="Train the audio stream where clips have sound; off leaves its weights out of memory.")
    audio_loss_weight: float = option(1.0, ge=0, help="Weight of the audio stream's loss beside the video stream's.")
    i2v_conditioning_probability: float = option(
        0.0, ge=0, le=1, help="How often a clip is trained with its first frame given clean, as for image to video."
    )
    vae_enable_tiling: bool = option(False, help="Encode large pictures by overlapping tiles, which takes less memory; seams are blended.")
    vae_enable_slicing: bool = option(False, help="Encode the clips of a batch one by one, which takes less memory.")
    vae_enable_patch_conv: bool = unsupported(
        help="Encode by chunks of time inside convolutions.", reason=_SAME_LATENTS, changes_results=False, default=False
    )
    vae_enable_temporal_roll: bool = unsupported(
        help="Encode by small chunks of time.", reason=_SAME_LATENTS, changes_results=False, default=False
    )
