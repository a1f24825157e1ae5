"""The video VAE in chunks of time: the same latents with fewer activations in memory at once.

Special here: nothing is approximated. Along time the encoder is made of causal convolutions, which look at the k - 1 frames before,
and of samplers that put neighbouring frames together; all the rest works on single frames. So a convolution may be computed piece by
piece where it is given its k - 1 frames of context (`patch`), and the whole encoder may be given a clip piece by piece where every
convolution remembers the last k - 1 frames that it was given (`roll`). Sums are formed over other lengths, hence in another order, which
moves the last bits and no more.

The decoder of the released models looks at frames after as well: its convolutions are computed in pieces, but it is not rolled.

Dimensions: B clips, C channels, T frames of one layer, H W rows and columns; k frames of a kernel, s = (time, rows, columns) strides.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from typing import Any, Final

import torch
from diffusers.models.autoencoders.autoencoder_kl_ltx2 import LTX2VideoCausalConv3d, LTX2VideoDownsampler3d, LTX2VideoUpsampler3d
from torch import Tensor, nn

FRAME_STEP: Final = 8
"""Frames per latent after the first, which comes from one."""
PATCH_ELEMENTS: Final = 2**25
"""A convolution takes so many input numbers at once (64 MiB in bfloat16), and at least one frame: enough to keep a GPU busy, small beside
the activations of a clip (at 768x512 and 121 frames the first layers hold 380 million numbers)."""
ROLL_LATENTS: Final = 1
"""Latent frames of a rolled chunk. One already costs nothing twice, and at 512x512 it is a quarter of a million places a layer."""


def patch_convolutions(network: nn.Module, elements: int | None = None) -> None:
    """From now on the convolutions of `network` (an encoder or a decoder) work on at most `elements` numbers at once."""
    _passage(network).elements = PATCH_ELEMENTS if elements is None else elements


def roll_encoder(vae: Any, latents: int | None = None) -> None:
    """From now on `vae.encoder` is given `latents` latent frames' worth of a clip at a time."""
    if not isinstance(vae.encoder, RolledEncoder):
        passage = _passage(vae.encoder)
        vae.encoder = RolledEncoder(vae.encoder, passage, ROLL_LATENTS if latents is None else latents)


class Passage:
    """How a network is passed at the moment; shared by its layers."""

    def __init__(self) -> None:
        self.elements = 0
        """Input numbers that a convolution takes at once; 0: any number."""
        self._rolling = False
        self._seen: dict[nn.Module, Tensor] = {}

    @contextmanager
    def rolling(self) -> Iterator[None]:
        """Within it each layer is given one clip in several calls, and goes on where its last call ended."""
        self._rolling = True
        try:
            yield
        finally:
            self._rolling = False
            self._seen.clear()

    def seen(self, layer: nn.Module) -> Tensor | None:
        """The frames (B, C, k - 1, H, W) that `layer` was given last; None: the clip begins."""
        return self._seen.get(layer)

    def remember(self, layer: nn.Module, context: Sequence[Tensor], frames: int) -> None:
        """Keeps the last `frames` of what `layer` was given, where more is to come."""
        if self._rolling and frames:
            length = sum(part.shape[2] for part in context)
            # A copy: a view would keep the whole chunk alive.
            self._seen[layer] = cut(context, length - frames, length).clone()

    def pieces(self, frames: int, numbers: int, multiple: int = 1) -> list[tuple[int, int]]:
        """Bounds of the pieces of `frames` frames of `numbers` numbers each; each piece is a multiple of `multiple` frames."""
        step = frames if not self.elements else max(1, self.elements // (numbers * multiple)) * multiple
        return list(pairwise([*range(0, frames, step), frames]))


class ChunkedConv(nn.Module):
    """Computes what an `LTX2VideoCausalConv3d` of time stride 1 computes."""

    def __init__(self, layer: LTX2VideoCausalConv3d, passage: Passage) -> None:
        super().__init__()
        self.conv: nn.Conv3d = layer.conv
        self.frames: int = layer.kernel_size[0]
        self._passage = passage

    def forward(self, hidden_states: Tensor, causal: bool = True) -> Tensor:
        """(B, C, T, H, W) -> (B, C', T, H, W). Before the clip its first frame is repeated; without `causal` on both sides."""
        context = self.context(hidden_states, causal)
        batch, channels, frames, height, width = hidden_states.shape
        pieces = self._passage.pieces(frames, batch * channels * height * width)
        reach = self.frames - 1
        if len(pieces) == 1:
            result: Tensor = self.conv(cut(context, 0, frames + reach))
        else:
            result = hidden_states.new_empty(batch, self.conv.out_channels, frames, height, width)
            for start, stop in pieces:
                result[:, :, start:stop] = self.conv(cut(context, start, stop + reach))
        if causal:
            self._passage.remember(self, context, reach)
        return result

    def context(self, given: Tensor, causal: bool) -> list[Tensor]:
        """What the frames of `given` are looked at with, in order: before it, itself, and without `causal` after it."""
        if not causal:
            half = (self.frames - 1) // 2
            return [repeated(given[:, :, :1], half), given, repeated(given[:, :, -1:], half)]
        seen = self._passage.seen(self)
        return [repeated(given[:, :, :1], self.frames - 1) if seen is None else seen, given]


class ChunkedDownsampler(nn.Module):
    """Computes what a causal `LTX2VideoDownsampler3d` computes.

    Groups of s frames, rows and columns become channels, of the convolved clip and of the clip itself, whose channels are averaged in
    groups; the two are added. Of a clip whose number of frames is odd the first frame is taken twice.
    """

    def __init__(self, layer: LTX2VideoDownsampler3d, conv: ChunkedConv, passage: Passage) -> None:
        super().__init__()
        self.conv = conv
        self.stride: tuple[int, int, int] = layer.stride
        self.group: int = layer.group_size
        self._passage = passage

    def forward(self, hidden_states: Tensor, causal: bool = True) -> Tensor:
        """(B, C, T, H, W) -> (B, C', T', H / s, W / s), T' = (T + 1) / 2 where the time stride is 2 and the clip begins."""
        assert causal, "the encoder is causal"
        batch, channels, frames, height, width = hidden_states.shape
        reach, seen = self.conv.frames - 1, self._passage.seen(self)
        first = hidden_states[:, :, :1]
        if seen is None:
            lead = self.stride[0] - 1
            context = [repeated(first, reach + lead), hidden_states]
        else:
            lead, context = 0, [seen, hidden_states]
        time, rows, columns = self.stride
        channels_after = self.conv.conv.out_channels * time * rows * columns
        result = hidden_states.new_empty(batch, channels_after, (frames + lead) // time, height // rows, width // columns)
        for start, stop in self._passage.pieces(frames + lead, batch * channels * height * width, time):
            result[:, :, start // time : stop // time] = self._down(cut(context, start, stop + reach))
        self._passage.remember(self, context, reach)
        return result

    def _down(self, frames: Tensor) -> Tensor:
        """One piece, after its k - 1 frames of context."""
        kept = gather(frames[:, :, self.conv.frames - 1 :], self.stride)
        batch, channels, *places = kept.shape
        shortcut = kept.reshape(batch, channels // self.group, self.group, *places).mean(dim=2)
        return shortcut.add_(gather(self.conv.conv(frames), self.stride))


class ChunkedUpsampler(nn.Module):
    """Computes what an `LTX2VideoUpsampler3d` computes: s channels become neighbours, and the first s - 1 frames are left out.

    With a shortcut the clip itself is spread out likewise, repeated to as many channels, and added.
    """

    def __init__(self, layer: LTX2VideoUpsampler3d, conv: ChunkedConv, passage: Passage) -> None:
        super().__init__()
        self.conv = conv
        self.stride: tuple[int, int, int] = layer.stride
        self.repeats: int = self.stride[0] * self.stride[1] * self.stride[2] // layer.upscale_factor if layer.residual else 0
        self._passage = passage

    def forward(self, hidden_states: Tensor, causal: bool = True) -> Tensor:
        """(B, C, T, H, W) -> (B, C', s · T - (s - 1), s · H, s · W)."""
        batch, channels, frames, height, width = hidden_states.shape
        time, rows, columns = self.stride
        context = self.conv.context(hidden_states, causal)
        most = max(channels, self.conv.conv.out_channels)
        after = self.conv.conv.out_channels // (time * rows * columns)
        lead = time - 1
        result = hidden_states.new_empty(batch, after, frames * time - lead, height * rows, width * columns)
        for start, stop in self._passage.pieces(frames, batch * most * height * width):
            made = spread(self.conv.conv(cut(context, start, stop + self.conv.frames - 1)), self.stride)
            if self.repeats:
                made += spread(hidden_states[:, :, start:stop], self.stride).repeat(1, self.repeats, 1, 1, 1)
            cropped = made[:, :, lead:] if start == 0 else made
            result[:, :, stop * time - lead - cropped.shape[2] : stop * time - lead] = cropped
        return result


class RolledEncoder(nn.Module):
    """An encoder that is given a clip chunk after chunk."""

    def __init__(self, encoder: nn.Module, passage: Passage, latents: int) -> None:
        super().__init__()
        self.encoder = encoder
        self._passage = passage
        self._latents = latents

    def forward(self, frames: Tensor, causal: bool | None = None) -> Tensor:
        """(B, 3, 8k + 1, H, W) -> (B, 2C, k + 1, H / 32, W / 32)."""
        bounds = chunk_bounds(frames.shape[2], self._latents)
        with self._passage.rolling():
            parts = [self.encoder(frames[:, :, start:stop], causal=causal) for start, stop in bounds]
        return torch.cat(parts, dim=2)


def chunk_bounds(frames: int, latents: int) -> list[tuple[int, int]]:
    """Bounds of chunks of `latents` latent frames each, the last perhaps less, of a clip of 8k + 1 frames."""
    step = FRAME_STEP * latents
    return list(pairwise([0, *range(1 + step - FRAME_STEP, frames, step), frames]))


# --- frames ------------------------------------------------------------------------------------------------------
def repeated(frame: Tensor, times: int) -> Tensor:
    """(B, C, 1, H, W) -> (B, C, times, H, W), without a copy."""
    return frame.expand(-1, -1, times, -1, -1)


def cut(parts: Sequence[Tensor], start: int, stop: int) -> Tensor:
    """Frames `start` to `stop` of the parts put one after another, which are not put together for it."""
    found, offset = [], 0
    for part in parts:
        low, high = max(start - offset, 0), min(stop - offset, part.shape[2])
        if low < high:
            found.append(part[:, :, low:high])
        offset += part.shape[2]
    return found[0] if len(found) == 1 else torch.cat(found, dim=2)


def gather(frames: Tensor, stride: tuple[int, int, int]) -> Tensor:
    """(B, C, T, H, W) -> (B, C · s, T / s, H / s, W / s): neighbours become channels, in the order time, rows, columns."""
    batch, channels, length, height, width = frames.shape
    time, rows, columns = stride
    split = frames.reshape(batch, channels, length // time, time, height // rows, rows, width // columns, columns)
    return split.permute(0, 1, 3, 5, 7, 2, 4, 6).flatten(1, 4)


def spread(frames: Tensor, stride: tuple[int, int, int]) -> Tensor:
    """The inverse of `gather`."""
    batch, channels, length, height, width = frames.shape
    time, rows, columns = stride
    split = frames.reshape(batch, channels // (time * rows * columns), time, rows, columns, length, height, width)
    return split.permute(0, 1, 5, 2, 6, 3, 7, 4).reshape(batch, -1, length * time, height * rows, width * columns)


# --- replacing layers --------------------------------------------------------------------------------------------
def _passage(network: nn.Module) -> Passage:
    """Replaces the layers of `network` that look along time, once; returns what they share."""
    if isinstance(network, RolledEncoder):
        network = network.encoder
    for module in network.modules():
        if isinstance(module, ChunkedConv):
            return module._passage
    passage = Passage()
    _replace(network, passage)
    return passage


def _replace(parent: nn.Module, passage: Passage) -> None:
    for name, child in parent.named_children():
        if isinstance(child, LTX2VideoDownsampler3d):
            setattr(parent, name, ChunkedDownsampler(child, ChunkedConv(child.conv, passage), passage))
        elif isinstance(child, LTX2VideoUpsampler3d):
            setattr(parent, name, ChunkedUpsampler(child, ChunkedConv(child.conv, passage), passage))
        elif isinstance(child, LTX2VideoCausalConv3d):
            setattr(parent, name, ChunkedConv(child, passage))
        else:
            _replace(child, passage)
