"""The family's own keys."""

from __future__ import annotations

from typing import ClassVar, Literal

from tuner.config.options import Options, option


class LTX2Options(Options):
    """Streams, conditioning and the VAE's memory."""

    title: ClassVar[str] = "LTX-2"

    train_audio: bool = option(
        True, help="Train the audio stream where clips have sound; off leaves its weights out of memory.", ask="Train the sound too?",
        effect="Without it the model takes a third less memory, and its sound stays as it was.",
    )
    audio_loss_weight: float = option(1.0, ge=0, help="Weight of the audio stream's loss beside the video stream's.")
    given_stream: Literal["none", "audio", "video"] = option(
        "none", help="The stream that is given clean while the other is learned: the sound (for audio to video), or the picture."
    )
    i2v_conditioning_probability: float = option(
        0.0, ge=0, le=1, help="How often a clip is trained with its first frame given clean, as for image to video."
    )
    prefix_conditioning_probability: float = option(
        0.0, ge=0, le=1, help="How often a clip is trained with its beginning given clean, picture and sound: how it goes on is learned."
    )
    prefix_conditioning_frames: int = option(
        25, ge=1, unit="frames", help="Length of that beginning: 1 + a multiple of 8; a shorter clip leaves 8 frames to learn."
    )
    suffix_conditioning_probability: float = option(
        0.0, ge=0, le=1, help="How often a clip is trained with its end given clean, picture and sound: what leads there is learned."
    )
    suffix_conditioning_frames: int = option(
        24, ge=8, unit="frames", help="Length of that end: a multiple of 8; of a shorter clip the first frame is left to learn."
    )
    crop_conditioning_probability: float = option(
        0.0, ge=0, le=1, help="How often a rectangle of the picture is given clean and all around it is learned: outpainting."
    )
    vae_enable_tiling: bool = option(False, help="Encode large pictures by overlapping tiles, which takes less memory; seams are blended.")
    vae_enable_slicing: bool = option(False, help="Encode the clips of a batch one by one, which takes less memory; the same latents.")
    vae_enable_patch_conv: bool = option(
        False, help="Compute the VAE's convolutions over a few frames at a time, which takes less memory; the same latents."
    )
    vae_enable_temporal_roll: bool = option(
        False, help="Encode chunk after chunk of time, each convolution remembering the frames before; least memory, the same latents."
    )
