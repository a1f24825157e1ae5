"""The keys of the tiny family and of what else is here to test against. Importing this costs no torch."""

from __future__ import annotations

from typing import ClassVar

from tuner.config.options import Options, option


class TinyOptions(Options):
    """Size of the model, and its sound."""

    title: ClassVar[str] = "Tiny mixing model"

    tiny_blocks: int = option(4, ge=1, le=64, help="Blocks of the model.", unit="blocks")
    tiny_width: int = option(16, ge=1, le=512, help="Channels of a token inside the blocks.")
    tiny_audio: bool = option(True, help="Train the audio stream where clips have sound; off leaves its layers out.")


class SimulatedOptions(Options):
    """A memory strategy for tests."""

    title: ClassVar[str] = "Simulated streaming"
    changes_numbers: ClassVar[bool] = False

    simulated_streaming: bool = option(False, help="Frozen weights of a block are there while it runs, and not a number in between.")

    def enabled(self) -> bool:
        return self.simulated_streaming
