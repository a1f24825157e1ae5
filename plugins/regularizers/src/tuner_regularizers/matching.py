"""CREPA's arithmetic: projected tokens of a frame beside the teacher's features of that frame and its neighbours (arXiv 2506.09229, eq. 6).

Special here: neighbours are summed up on the teacher's side, so that each token is compared once, whatever their number. Cosines
are linear in the normalised features: sim(y_f, p) + sum_k w_k sim(y_k, p) = <p / |p|, y_f / |y_f| + sum_k w_k y_k / |y_k|>.

Dimensions: B samples, F latent frames, h w rows and columns of a frame, N = h·w places of a frame, K tokens, E the teacher's width.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

EPSILON = 1e-6
"""Least norm that a vector is divided by."""


@dataclass(frozen=True)
class Neighbours:
    """Which other frames a frame is compared with, and how much they weigh."""

    distance: int
    tau: float
    cumulative: bool = False
    """All frames up to `distance`; else those exactly there."""
    normalised: bool = False
    """Divide by the sum of the weights that a frame has, its own included."""

    def weights(self) -> dict[int, float]:
        """Offset in frames -> exp(-|offset| / tau)."""
        nearest = 1 if self.cumulative else max(1, self.distance)
        return {sign * d: math.exp(-d / self.tau) for d in range(nearest, self.distance + 1) for sign in (-1, 1)}


@dataclass(frozen=True)
class Alignment:
    """Of a batch."""

    score: Tensor
    """(B,) what is maximised: over the frames, the mean (or sum) of own and weighted neighbouring similarities."""
    similarity: Tensor
    """(B,) mean cosine with the own frame's features, without a graph."""
    counted: Tensor
    """(B,) bool: samples with a token that counts."""


def resized(maps: Tensor, height: int, width: int) -> Tensor:
    """(M, E, h, w) -> (M, E, height, width): bilinear between centres, averaging where it gets smaller."""
    if maps.shape[-2:] == (height, width):
        return maps
    return functional.interpolate(maps, (height, width), mode="bilinear", align_corners=False, antialias=True)


def on_grid(features: Tensor, grid: tuple[int, int, int]) -> Tensor:
    """(B, F, h, w, E) features -> (B, F, N, E) of the places of `grid`. Raises `ValueError` for another number of frames."""
    batch, frames, _, _, width = features.shape
    if frames != grid[0]:
        raise ValueError(f"features of {frames} frames for {grid[0]} frames of tokens")
    if features.shape[2:4] != grid[1:]:
        maps = resized(features.flatten(0, 1).movedim(-1, 1), *grid[1:])
        features = maps.movedim(1, -1).reshape(batch, frames, *grid[1:], width)
    return features.reshape(batch, frames, grid[1] * grid[2], width)


def align(
    projected: Tensor, features: Tensor, weights: Tensor, places: Tensor | None, neighbours: Neighbours, *, by_frames: bool
) -> Alignment:
    """projected (B, K, E), features (B, F, N, E), weights (B, K) of the tokens in their frame's mean, 0: left out.

    `places` (B, K): of the tokens, in 0..F·N - 1; None: all, in order. `by_frames`: divide by the number of frames that have a token.
    A frame without one contributes nothing.
    """
    frames, count = features.shape[1:3]
    own = functional.normalize(features, dim=-1, eps=EPSILON)
    wanted = _with_neighbours(own, neighbours).flatten(1, 2)
    own = own.flatten(1, 2)
    if places is not None:
        index = places[..., None].expand(-1, -1, own.shape[-1])
        own, wanted = own.gather(1, index), wanted.gather(1, index)
    direction = functional.normalize(projected, dim=-1, eps=EPSILON)
    at = torch.arange(frames * count, device=features.device)[None] if places is None else places
    member = (at[..., None] // count == torch.arange(frames, device=features.device)) * weights[..., None]
    totals = member.sum(1)
    seen = totals > 0
    shares = member / torch.where(seen, totals, 1.0)[:, None]
    score = ((direction * wanted).sum(-1, keepdim=True) * shares).sum((1, 2))
    similarity = ((direction.detach() * own).sum(-1, keepdim=True) * shares).sum((1, 2))
    present = seen.sum(1).clamp(min=1)
    return Alignment(score / present if by_frames else score, similarity / present, seen.any(1))


def _with_neighbours(own: Tensor, neighbours: Neighbours) -> Tensor:
    """(B, F, N, E) unit vectors -> what a token's direction is multiplied with: its frame's, plus weighted those of the neighbours."""
    frames = own.shape[1]
    total, weight = own.clone(), own.new_ones(frames, 1, 1)
    for offset, share in neighbours.weights().items():
        first, last = max(0, -offset), min(frames, frames - offset)
        if first < last:
            total[:, first:last] += share * own[:, first + offset : last + offset]
            weight[first:last] += share
    return total / weight if neighbours.normalised else total
