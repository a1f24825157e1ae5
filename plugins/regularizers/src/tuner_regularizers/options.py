"""The keys of TREAD and CREPA. Neither is part of this version, and both change what is learned: asking for one is an error.

The keys below a main switch mean something only with it, so alone they are a notice.
"""

from __future__ import annotations

from typing import ClassVar

from tuner.config.options import Options, unsupported

TREAD_LATER = "token routing is not part of this version"
CREPA_LATER = "CREPA is not part of this version"
ONLY_WITH_CREPA = "read only with crepa_enabled"


class TreadOptions(Options):
    """Tokens that skip blocks (arXiv 2501.04765)."""

    title: ClassVar[str] = "TREAD"

    tread_config: dict[str, object] | str | None = unsupported(
        help='Routes: {"routes": [{"selection_ratio": 0.5, "start_layer_idx": 2, "end_layer_idx": -2}]}.',
        reason=TREAD_LATER, changes_results=True,
    )


class CrepaOptions(Options):
    """Alignment of hidden tokens with an image encoder's features across frames (arXiv 2506.09229)."""

    title: ClassVar[str] = "CREPA"

    crepa_enabled: bool = unsupported(
        help="Align hidden tokens with a frozen image encoder.", reason=CREPA_LATER, changes_results=True, default=False
    )
    crepa_block_index: int | None = unsupported(
        help="After which block tokens are taken.", reason=ONLY_WITH_CREPA, changes_results=False, default=8
    )
    crepa_lambda: float = unsupported(help="Weight of the term.", reason=ONLY_WITH_CREPA, changes_results=False, default=0.5)
    crepa_adjacent_distance: int = unsupported(
        help="How far away a neighbouring frame may be, in latent frames.", reason=ONLY_WITH_CREPA, changes_results=False, default=1
    )
    crepa_adjacent_tau: float = unsupported(
        help="Decay of a neighbour's weight with its distance.", reason=ONLY_WITH_CREPA, changes_results=False, default=1.0
    )
    crepa_cumulative_neighbors: bool = unsupported(
        help="All frames up to the distance are neighbours.", reason=ONLY_WITH_CREPA, changes_results=False, default=False
    )
    crepa_normalize_by_frames: bool = unsupported(
        help="Divide the term by the number of frames.", reason=ONLY_WITH_CREPA, changes_results=False, default=True
    )
    crepa_normalize_neighbour_sum: bool = unsupported(
        help="Divide by the sum of the neighbours' weights.", reason=ONLY_WITH_CREPA, changes_results=False, default=False
    )
    crepa_encoder: str = unsupported(
        help="The image encoder.", reason=ONLY_WITH_CREPA, changes_results=False, default="dinov2_vitg14"
    )
    crepa_encoder_image_size: int = unsupported(
        help="Side of the encoder's input, in pixels.", reason=ONLY_WITH_CREPA, changes_results=False, default=518
    )
    crepa_encoder_frames_batch_size: int = unsupported(
        help="Frames encoded at once; below 0: all.", reason=ONLY_WITH_CREPA, changes_results=False, default=-1
    )
    crepa_drop_vae_encoder: bool = unsupported(
        help="Free the video encoder during training.", reason=ONLY_WITH_CREPA, changes_results=False, default=False
    )
    crepa_scheduler: str = unsupported(
        help="Course of the weight over the run.", reason=ONLY_WITH_CREPA, changes_results=False, default="constant"
    )
    crepa_warmup_steps: int = unsupported(
        help="Steps over which the weight rises from 0.", reason=ONLY_WITH_CREPA, changes_results=False, default=0
    )
    crepa_decay_steps: int = unsupported(
        help="Steps over which the weight falls; 0: the whole run.", reason=ONLY_WITH_CREPA, changes_results=False, default=0
    )
    crepa_power: float = unsupported(help="Power of a polynomial decay.", reason=ONLY_WITH_CREPA, changes_results=False, default=1.0)
    crepa_lambda_end: float = unsupported(help="Weight after the decay.", reason=ONLY_WITH_CREPA, changes_results=False, default=0.0)
    crepa_cutoff_step: int = unsupported(
        help="Step after which the term is left out; 0: never.", reason=ONLY_WITH_CREPA, changes_results=False, default=0
    )
    crepa_similarity_threshold: float | None = unsupported(
        help="Similarity beyond which the term is left out.", reason=ONLY_WITH_CREPA, changes_results=False
    )
    crepa_similarity_ema_decay: float = unsupported(
        help="Smoothing of that similarity.", reason=ONLY_WITH_CREPA, changes_results=False, default=0.99
    )
    crepa_threshold_mode: str = unsupported(
        help="Whether the cut-off by similarity is final.", reason=ONLY_WITH_CREPA, changes_results=False, default="permanent"
    )
