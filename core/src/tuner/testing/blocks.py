"""A small two-stream model with the seam's contract: blocks of attention-free mixing whose tokens influence each other.

It is real arithmetic at toy size: per-token modulation, a rotary-like table, shared text, cross-stream exchange.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tuner.interfaces.blocks import Aligned, BlockSet, BlockState, TokenStream


class MixingBlock(nn.Module):
    """video <- video, text, audio; audio <- audio, video; softmax attention with one head."""

    def __init__(self, width: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.to_q = nn.Linear(width, width)
        self.to_k = nn.Linear(width, width)
        self.to_v = nn.Linear(width, width)
        self.audio = nn.Linear(width, width)
        self.drop = nn.Dropout(dropout)

    def forward(self, video: Tensor, audio: Tensor | None, text: Tensor, scale: Tensor, table: Tensor) -> tuple[Tensor, Tensor | None]:
        keys = torch.cat([video * table, text] + ([audio] if audio is not None else []), 1)
        weights = torch.softmax(self.to_q(video * table) @ self.to_k(keys).transpose(1, 2) / video.shape[-1] ** 0.5, -1)
        video = video + self.drop(weights @ self.to_v(keys)) * scale
        if audio is not None:
            audio = audio + torch.tanh(self.audio(audio) + video.mean(1, keepdim=True))
        return video, audio


class MixingModel(nn.Module):
    """`depth` blocks between an input and an output layer."""

    def __init__(self, depth: int = 4, width: int = 8, channels: int = 6, dropout: float = 0.0) -> None:
        super().__init__()
        self.proj_in = nn.Linear(channels, width)
        self.text_in = nn.Linear(channels, width)
        self.time = nn.Linear(1, width)
        self.blocks = nn.ModuleList(MixingBlock(width, dropout) for _ in range(depth))
        self.proj_out = nn.Linear(width, channels)

    def block_set(self) -> BlockSet:
        """All blocks."""
        return BlockSet.of(self, list(self.blocks))

    def enter(self, video: Tensor, audio: Tensor | None, text: Tensor, sigma: Tensor) -> BlockState:
        """video (B, S, C), audio (B, L, C), text (B, T, C), sigma (B, S)."""
        count = video.shape[1]
        table = torch.cos(torch.arange(count, dtype=video.dtype, device=video.device))[None, :, None]
        aligned = {"scale": Aligned(self.time(sigma[..., None]), (1,)), "table": Aligned(table, (1,))}
        streams = {"video": TokenStream(self.proj_in(video), aligned, (1, 1, count))}
        if audio is not None:
            streams["audio"] = TokenStream(self.proj_in(audio), {}, (audio.shape[1], 1, 1))
        return BlockState(streams, {"text": self.text_in(text)})

    def exit(self, state: BlockState) -> dict[str, Tensor]:
        """Stream -> (B, S, C)."""
        return {name: self.proj_out(stream.hidden) for name, stream in state.streams.items()}


def call_mixing_block(block: nn.Module, state: BlockState) -> BlockState:
    """The seam's `call_block` for `MixingModel`."""
    video = state.streams["video"]
    audio = state.streams["audio"].hidden if "audio" in state.streams else None
    new_video, new_audio = block(video.hidden, audio, state.shared["text"], video.aligned["scale"].tensor, video.aligned["table"].tensor)
    return state.with_hidden({"video": new_video} | ({"audio": new_audio} if new_audio is not None else {}))
