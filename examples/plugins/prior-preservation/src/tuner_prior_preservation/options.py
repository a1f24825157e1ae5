"""The keys. Importing this costs no torch."""

from __future__ import annotations

from typing import ClassVar

from tuner.config.options import Options, option


class PriorPreservationOptions(Options):
    """What shall stay as it is."""

    title: ClassVar[str] = "Prior preservation"

    prior_dataset: str = option("", help="Id of the dataset on which the base model's predictions are kept; none when empty.", metavar="ID")
    prior_weight: float = option(1.0, gt=0, help="Weight of the term on that dataset.")

    def enabled(self) -> bool:
        return bool(self.prior_dataset)
