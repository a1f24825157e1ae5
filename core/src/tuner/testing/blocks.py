"""A small two-stream model with the seam's contract: blocks of attention-free mixing whose tokens influence each other.

It is real arithmetic at toy size: per-token modulation, a rotary-like table, shared text, cross-stream exchange.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tuner.interfaces.blocks import Aligned, BlockSet, BlockState, TokenStream


class MixingBlock(nn.Module):
    """video <- video, text, audio; audio <- audio, video; softmax attention with one head. `sound`: whether it has a layer for audio."""

    def __init__(self, width: int, dropout: float = 0.0, *, sound: bool = True) -> None:
        super().__init__()
        self.to_q = nn.Linear(width, width)
        self.to_k = nn.Linear(width, width)
        self.to_v = nn.Linear(width, width)
        self.audio = nn.Linear(width, width) if sound else None
        self.drop = nn.Dropout(dropout)

    def forward(
        self, video: Tensor, audio: Tensor | None, text: Tensor, scale: Tensor, table: Tensor, heard: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """`heard` (B, L) bool: audio tokens that the picture may look at; None: all."""
        keys = torch.cat([video * table, text] + ([audio] if audio is not None else []), 1)
        scores = self.to_q(video * table) @ self.to_k(keys).transpose(1, 2) / video.shape[-1] ** 0.5
        if heard is not None:
            seen = torch.cat([torch.ones_like(heard[:, :1]).expand(-1, keys.shape[1] - heard.shape[1]), heard], 1)
            scores = scores.masked_fill(~seen[:, None], -torch.inf)
        video = video + self.drop(torch.softmax(scores, -1) @ self.to_v(keys)) * scale
        if audio is not None and self.audio is not None:
            audio = audio + torch.tanh(self.audio(audio) + video.mean(1, keepdim=True))
        return video, audio


class MixingModel(nn.Module):
    """`depth` blocks between an input and an output layer."""

    def __init__(self, depth: int = 4, width: int = 8, channels: int = 6, dropout: float = 0.0, *, sound: bool = True) -> None:
        super().__init__()
        self.proj_in = nn.Linear(channels, width)
        self.text_in = nn.Linear(channels, width)
        self.time = nn.Linear(1, width)
        self.blocks = nn.ModuleList(MixingBlock(width, dropout, sound=sound) for _ in range(depth))
        self.proj_out = nn.Linear(width, channels)

    def block_set(self) -> BlockSet:
        """All blocks."""
        return BlockSet.of(self, list(self.blocks), dict.fromkeys(("video", "audio"), self.proj_in.out_features))

    def enter(
        self, video: Tensor, audio: Tensor | None, text: Tensor, sigma: Tensor, *,
        audio_sigma: Tensor | None = None, heard: Tensor | None = None,
    ) -> BlockState:  # fmt: skip
        """video (B, S, C), audio (B, L, C), text (B, T, C), sigma (B, S), audio_sigma (B,); heard (B, L) bool: see `MixingBlock`."""
        count = video.shape[1]
        table = torch.cos(torch.arange(count, dtype=video.dtype, device=video.device))[None, :, None]
        aligned = {"scale": Aligned(self.time(sigma[..., None]), (1,)), "table": Aligned(table, (1,))}
        streams = {"video": TokenStream(self.proj_in(video), aligned, (1, 1, count))}
        if audio is not None:
            hidden = self.proj_in(audio)
            if audio_sigma is not None:
                hidden = hidden + self.time(audio_sigma[:, None, None].to(hidden.dtype))
            masks = {"heard": Aligned(heard, (1,))} if heard is not None else {}
            streams["audio"] = TokenStream(hidden, masks, (audio.shape[1], 1, 1))
        return BlockState(streams, {"text": self.text_in(text)})

    def exit(self, state: BlockState) -> dict[str, Tensor]:
        """Stream -> (B, S, C)."""
        return {name: self.proj_out(stream.hidden) for name, stream in state.streams.items()}


def call_mixing_block(block: nn.Module, state: BlockState) -> BlockState:
    """The seam's `call_block` for `MixingModel`."""
    video = state.streams["video"]
    sound = state.streams.get("audio")
    audio = None if sound is None else sound.hidden
    heard = sound.aligned["heard"].tensor if sound is not None and "heard" in sound.aligned else None
    scale, table = video.aligned["scale"].tensor, video.aligned["table"].tensor
    new_video, new_audio = block(video.hidden, audio, state.shared["text"], scale, table, heard)
    return state.with_hidden({"video": new_video} | ({"audio": new_audio} if new_audio is not None else {}))
