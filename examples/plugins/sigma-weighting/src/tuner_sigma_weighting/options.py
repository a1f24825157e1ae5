"""The keys. Importing this costs no torch."""

from __future__ import annotations

from typing import ClassVar, Literal

from tuner.config.options import Options, option


class SigmaWeightingOptions(Options):
    """How much each noise level counts."""

    title: ClassVar[str] = "Weights of noise levels"

    sigma_weighting: Literal["none", "min_snr", "cosmap", "bell"] = option(
        "none", help="Weight of a sample in its streams' losses, by its noise level."
    )
    sigma_weighting_gamma: float = option(5.0, gt=0, help="Of `min_snr`: the signal-to-noise ratio from which on the weight falls.")
    sigma_weighting_width: float = option(0.2, gt=0, help="Of `bell`: the standard deviation of the bell around noise level 0.5.")

    def enabled(self) -> bool:
        return self.sigma_weighting != "none"
