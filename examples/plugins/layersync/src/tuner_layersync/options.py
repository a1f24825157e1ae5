"""The keys. Importing this costs no torch."""

from __future__ import annotations

from typing import ClassVar

from tuner.config.options import Options, option


class LayerSyncOptions(Options):
    """Which blocks are aligned, and how strongly."""

    title: ClassVar[str] = "LayerSync"

    layersync_weight: float = option(0.0, ge=0, help="Weight of the term; 0 switches it off. The usual order is 0.1 to 0.5.")
    layersync_block: int | None = option(
        None, help="The block that learns, from 0; below 0 counted from the end. A third of the depth when empty.", unit="blocks"
    )
    layersync_target_block: int | None = option(
        None, help="The later block that it is aligned with; two thirds of the depth when empty.", unit="blocks"
    )
    layersync_stream: str = option("video", help="Whose tokens are compared.")

    def enabled(self) -> bool:
        return self.layersync_weight > 0
