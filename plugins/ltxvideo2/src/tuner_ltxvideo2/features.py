"""From Gemma's hidden states to the text of both streams, in pieces: the arithmetic of diffusers' `LTX2TextConnectors`.

Special here: a layer's states are normalised as they arrive and written straight into the layout that the projection reads, feature =
channel · (N + 1) + layer. So 188,160 channels a token exist once (385 MB a caption in bfloat16), not in the five copies that stacking and
normalising them together makes. Each layer is normalised over its own values alone, so this changes no result beyond the order
of a sum: in bfloat16 none was seen to differ, in float32 the last bit.

Dimensions: B captions, T tokens, E Gemma's width, N layers, D width of a stream's text.
"""

from __future__ import annotations

import math
from typing import Any, Final

import torch
from diffusers.pipelines.ltx2.connectors import per_layer_masked_mean_norm, per_token_rms_norm
from torch import Tensor, nn

PIECE_BYTES: Final = 64 * 2**20
"""Of a projection's weight that is brought to the device at a time; whole it has 1.4 GB (2.0), or 1.5 and 0.8 GB (2.3)."""


class HiddenStates:
    """Collects the N + 1 hidden states of a batch of captions, normalised for `connectors` (an `LTX2TextConnectors`)."""

    def __init__(self, connectors: Any, mask: Tensor, dtype: torch.dtype, device: torch.device) -> None:
        """`mask`: (B, T), 1 for tokens, 0 for the padding on their left."""
        self._config = connectors.config
        self.mask = mask.to(device)
        """(B, T)."""
        count, width = self._config.text_proj_in_factor, self._config.caption_channels
        self.packed = torch.empty((*mask.shape, width, count), dtype=dtype, device=device)
        """(B, T, E, N + 1)."""

    def add(self, index: int, hidden: Tensor) -> None:
        """Takes hidden (B, T, E) of layer `index`."""
        states = hidden.to(self.packed.dtype)[..., None]
        if self._config.per_modality_projections:
            normed = per_token_rms_norm(states)[..., 0]
            normed = torch.where(self.mask.bool()[..., None], normed, torch.zeros_like(normed))
        else:
            normed = per_layer_masked_mean_norm(states, self.mask.sum(dim=-1), self.packed.device, padding_side="left")
        self.packed[..., index] = normed


def connect(connectors: Any, states: HiddenStates) -> tuple[Tensor, Tensor]:
    """Text of both streams, (B, T, D) each."""
    config, mask, packed = connectors.config, states.mask, states.packed.flatten(2)
    if config.per_modality_projections:
        widths = {"video": config.video_hidden_dim, "audio": config.audio_hidden_dim}
        video, audio = (
            getattr(connectors, f"{stream}_text_proj_in")(packed * math.sqrt(width / config.caption_channels))
            for stream, width in widths.items()
        )
    else:
        video = audio = connectors.text_proj_in(packed)
    additive = (mask.to(torch.int64) - 1).to(video.dtype)[:, None, None, :] * torch.finfo(video.dtype).max
    video, left = connectors.video_connector(video, additive)
    audio, _ = connectors.audio_connector(audio, additive)
    valid = (left < 1e-6).to(torch.int64).reshape(video.shape[0], video.shape[1], 1)
    return video * valid, audio


class SplitLinear(nn.Module):
    """A linear layer by rows of its weight: the same result, in layers small enough to be streamed."""

    def __init__(self, whole: nn.Linear, piece_bytes: int = PIECE_BYTES) -> None:
        super().__init__()
        rows = max(1, piece_bytes // (whole.in_features * whole.weight.element_size()))
        starts = range(0, whole.out_features, rows)
        self.pieces = nn.ModuleList(_rows(whole, start, min(start + rows, whole.out_features)) for start in starts)

    def forward(self, features: Tensor) -> Tensor:
        """(..., in) -> (..., out)."""
        return torch.cat([piece(features) for piece in self.pieces], dim=-1)


def _rows(whole: nn.Linear, start: int, end: int) -> nn.Linear:
    piece = nn.Linear(whole.in_features, end - start, bias=whole.bias is not None, device="meta")
    piece.weight = nn.Parameter(whole.weight[start:end], requires_grad=False)
    if whole.bias is not None:
        piece.bias = nn.Parameter(whole.bias[start:end], requires_grad=False)
    return piece


def split_projections(connectors: nn.Module, piece_bytes: int = PIECE_BYTES) -> None:
    """Replaces the projections of all layers' states by `SplitLinear`, in place."""
    for name in ("text_proj_in", "video_text_proj_in", "audio_text_proj_in"):
        whole = getattr(connectors, name, None)
        if isinstance(whole, nn.Linear):
            setattr(connectors, name, SplitLinear(whole, piece_bytes))
