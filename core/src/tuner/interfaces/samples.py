"""A clip to generate, and what becomes of it.

Dimensions: S tokens of one stream, C latent channels; F H W frames, rows, columns of pictures.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor

from tuner.interfaces.encoders import AudioClip, Record, VideoClip


@dataclass(frozen=True)
class SampleRequest:
    """One clip to generate."""

    prompt: str
    negative_prompt: str = ""
    width: int = 768
    height: int = 512
    frames: int = 81
    frame_rate: float = 25.0
    steps: int = 40
    guidance: float = 5.0
    audio_guidance: float | None = None
    """Guidance of the sound where it differs."""
    seed: int = 42
    sound: bool = True
    first_frame: Record | None = None
    """What the family's encoder of pictures made of a clip or picture of this size: its first frame is given clean."""
    given_sound: Record | None = None
    """What the family's encoder of sound made of a sound at least as long as the clip: it is given clean and comes back as it is."""
    text: Mapping[str, Record] = field(default_factory=dict)
    """What the family's encoder of text made of prompts, by prompt. Those that are missing here are encoded, for which it is loaded."""

    @property
    def guided(self) -> bool:
        """Whether any stream is guided, which takes the negative prompt and a second forward pass."""
        return max(self.guidance, self.audio_guidance or 0.0) > 1

    @property
    def texts(self) -> tuple[str, ...]:
        """The prompts that have to be encoded."""
        return (self.prompt, self.negative_prompt) if self.guided else (self.prompt,)


@dataclass(frozen=True)
class Generated:
    """A sampled clip: `video` uint8 (F, H, W, 3), `sound` float32 (channels, samples) or None, and the latents they came from."""

    video: VideoClip | None
    sound: AudioClip | None
    latents: Mapping[str, Tensor]
    """Stream -> (1, S, C) normalised tokens."""
