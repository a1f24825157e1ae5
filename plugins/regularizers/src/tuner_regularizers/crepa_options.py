"""The keys of CREPA."""

from __future__ import annotations

from typing import ClassVar, Literal

from tuner.config.options import Options, option


class CrepaOptions(Options):
    """Alignment of hidden tokens with an image encoder's features across frames (arXiv 2506.09229)."""

    title: ClassVar[str] = "CREPA"

    crepa_enabled: bool = option(
        False, help="Align hidden tokens of the video with a frozen image encoder's features, across frames.",
        ask="Align the model's hidden tokens with an image encoder (CREPA)?", effect="Meant to keep what is shown "
        "alike from frame to frame. The encoder is fetched, and its features of your clips are kept in the cache.",
    )  # fmt: skip
    crepa_block_index: int = option(8, help="After which block tokens are taken; negative: counted from the end.")
    crepa_lambda: float = option(
        0.5, help="Weight of the term.", ge=0, ask="How much does that weigh beside the loss?",
        effect="More pulls harder towards the encoder's features.",
    )  # fmt: skip
    crepa_adjacent_distance: int = option(1, help="How far away a neighbouring frame is; 0: each frame alone.", unit="latent frames", ge=0)
    crepa_adjacent_tau: float = option(
        1.0, help="A neighbour at distance d weighs exp(-d / tau) beside the frame's own 1.", unit="latent frames", gt=0
    )
    crepa_cumulative_neighbors: bool = option(False, help="All frames up to that distance are neighbours, not only those exactly there.")
    crepa_normalize_by_frames: bool = option(True, help="Divide the sum over frames by their number.")
    crepa_normalize_neighbour_sum: bool = option(
        False, help="Divide a frame's sum by the weights in it (1 and its neighbours'), so that it stays within -1 and 1."
    )
    crepa_encoder: str = option(
        "dinov2_vitg14",
        help="The image encoder: a DINOv2 by name, a hub repository (OWNER/NAME[@REVISION]), a folder, or `tiny` for trying out.",
        examples=["dinov2_vitb14", "dinov2_vitg14_reg", "facebook/dinov2-large"],
    )
    crepa_encoder_image_size: int = option(
        518, help="Side of the encoder's input; a picture that is not square gets the same area. A multiple of its patches' 14 pixels.",
        unit="pixels", ge=1, le=4096,
    )  # fmt: skip
    crepa_encoder_frames_batch_size: int = option(-1, help="Frames encoded at once; below 1: all.", unit="frames", ge=-1)
    crepa_drop_vae_encoder: bool = option(
        False, help="Keep the VAE out of memory during training. That is so in any case: accepted for configurations that say it."
    )
    crepa_scheduler: Literal["constant", "linear", "cosine", "polynomial"] = option(
        "constant", help="How the weight goes from `crepa_lambda` to `crepa_lambda_end` after the warm-up; constant: not at all."
    )
    crepa_warmup_steps: int = option(0, help="Steps over which the weight rises from 0.", unit="steps", ge=0)
    crepa_decay_steps: int = option(0, help="Steps over which the weight falls after that; 0: the rest of the run.", unit="steps", ge=0)
    crepa_power: float = option(1.0, help="Power of the polynomial decay.", gt=0)
    crepa_lambda_end: float = option(0.0, help="Weight after the decay.", ge=0)
    crepa_cutoff_step: int = option(0, help="After so many steps the term is left out; 0: never.", unit="steps", ge=0)
    crepa_similarity_threshold: float | None = option(
        None, help="The term is left out once the smoothed similarity reaches this; none: never.", ge=-1, le=1
    )
    crepa_similarity_ema_decay: float = option(0.99, help="How much of the smoothed similarity a step keeps.", ge=0, lt=1)
    crepa_threshold_mode: Literal["permanent", "recoverable"] = option(
        "permanent", help="Whether that is for good, or until the similarity falls below the threshold again."
    )

    def enabled(self) -> bool:
        return self.crepa_enabled

    def follows_length(self) -> bool:
        return self.crepa_enabled and self.crepa_scheduler != "constant" and self.crepa_decay_steps == 0
