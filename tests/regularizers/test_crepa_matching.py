"""CREPA's arithmetic against formulas written out, and against a plain loop over samples, frames, neighbours and tokens."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from tuner_regularizers.matching import Neighbours, align, on_grid, resized

E1, E2, E3 = torch.eye(3, dtype=torch.float64)


def looped(
    projected: Tensor, features: Tensor, weights: Tensor, places: Tensor | None, n: Neighbours, by_frames: bool
) -> tuple[list[float], list[float]]:
    """The paper's equation 6, term by term."""
    scores, similarities = [], []
    frames, count = features.shape[1:3]
    for b in range(len(projected)):
        found: dict[int, list[tuple[float, int, int]]] = {}
        for token in range(projected.shape[1]):
            place = token if places is None else int(places[b, token])
            if weights[b, token] > 0:
                found.setdefault(place // count, []).append((float(weights[b, token]), token, place % count))
        score = similarity = 0.0
        for f, tokens in found.items():

            def sim(k: int, b: int = b, tokens: list[tuple[float, int, int]] = tokens) -> float:
                cosines = [w * float(functional.cosine_similarity(projected[b, t], features[b, k, at], dim=0)) for w, t, at in tokens]
                return sum(cosines) / sum(w for w, _, _ in tokens)

            near = range(1, n.distance + 1) if n.cumulative else [n.distance] if n.distance else []
            others = [(k, math.exp(-d / n.tau)) for d in near for k in (f - d, f + d) if 0 <= k < frames]
            total = sim(f) + sum(w * sim(k) for k, w in others)
            score += total / (1 + sum(w for _, w in others)) if n.normalised else total
            similarity += sim(f)
        scores.append(score / max(1, len(found)) if by_frames else score)
        similarities.append(similarity / max(1, len(found)))
    return scores, similarities


def one_each(*vectors: Tensor) -> tuple[Tensor, Tensor]:
    """Frames of one token: as projected tokens (1, F, E), and as features (1, F, 1, E)."""
    stacked = torch.stack(vectors)
    return stacked[None], stacked[None, :, None]


@pytest.mark.parametrize(
    ("neighbours", "expected"),
    [
        # Every token points to e1, the features of frame 0; those of frames 1 and 2 are orthogonal to it.
        (Neighbours(0, 1.0), 1),  # frame 0 finds itself
        (Neighbours(1, 2.0), 1 + math.exp(-0.5)),  # and frame 1 finds it as its neighbour
        (Neighbours(2, 2.0), 1 + math.exp(-1)),  # exactly two away: frame 2 alone finds it
        (Neighbours(2, 2.0, cumulative=True), 1 + math.exp(-0.5) + math.exp(-1)),
        (Neighbours(3, 1.0), 1),  # no frame is so far away
        (Neighbours(1, 2.0, normalised=True), 1 / (1 + math.exp(-0.5)) + math.exp(-0.5) / (1 + 2 * math.exp(-0.5))),
    ],
)
def test_three_frames_by_hand(neighbours: Neighbours, expected: float) -> None:
    tokens, _ = one_each(E1, E1, E1)
    _, features = one_each(E1, E2, E3)
    weights = torch.ones(1, 3, dtype=torch.float64)
    summed = align(tokens, features, weights, None, neighbours, by_frames=False)
    divided = align(tokens, features, weights, None, neighbours, by_frames=True)
    assert summed.score.item() == pytest.approx(expected, abs=1e-12)
    assert divided.score.item() == pytest.approx(expected / 3, abs=1e-12)
    assert summed.similarity.item() == divided.similarity.item() == pytest.approx(1 / 3, abs=1e-12)


def test_one_and_two_frames_by_hand() -> None:
    weights = torch.ones(1, 2, dtype=torch.float64)
    (_, one), (_, two) = one_each(3 * E1), one_each(E1, E2)
    tokens, _ = one_each(E1 + E2, 5 * E2)
    alone = align(tokens[:, :1], one, weights[:, :1], None, Neighbours(1, 1.0, cumulative=True), by_frames=True)
    assert alone.score.item() == alone.similarity.item() == pytest.approx(math.cos(math.pi / 4))  # a picture has no neighbour
    pair = align(tokens, two, weights, None, Neighbours(1, 1.0), by_frames=True)
    half = math.cos(math.pi / 4)
    assert pair.score.item() == pytest.approx((half + math.exp(-1) * half + 1) / 2)
    assert pair.similarity.item() == pytest.approx((half + 1) / 2)


def drawn(frames: int, count: int, kept: int | None) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Three samples in float64; of the last no token counts, in the first a whole frame is left out."""
    g = torch.Generator().manual_seed(frames * 100 + count)
    draw = lambda *shape: torch.randn(*shape, generator=g, dtype=torch.float64)
    tokens = kept or frames * count
    places = None if kept is None else torch.stack([torch.randperm(frames * count, generator=g)[:kept] for _ in range(3)])
    weights = (torch.rand(3, tokens, generator=g, dtype=torch.float64) * 2).where(torch.rand(3, tokens, generator=g) < 0.7, 0.0)
    at = torch.arange(tokens) if places is None else places[0]
    weights[0, at // count == frames - 1] = 0
    weights[2] = 0
    return draw(3, tokens, 5), draw(3, frames, count, 5), weights, places


@pytest.mark.parametrize(("distance", "cumulative"), [(0, False), (1, False), (2, False), (2, True), (9, True)])
@pytest.mark.parametrize(("normalised", "by_frames"), list(itertools.product((False, True), repeat=2)))
@pytest.mark.parametrize(("frames", "count", "kept"), [(1, 6, None), (4, 3, None), (4, 3, 5), (3, 8, 23)])
def test_it_is_the_plain_loop(
    distance: int, cumulative: bool, normalised: bool, by_frames: bool, frames: int, count: int, kept: int | None
) -> None:
    projected, features, weights, places = drawn(frames, count, kept)
    neighbours = Neighbours(distance, 1.7, cumulative, normalised)
    found = align(projected, features, weights, places, neighbours, by_frames=by_frames)
    scores, similarities = looped(projected, features, weights, places, neighbours, by_frames)
    assert found.score.tolist() == pytest.approx(scores, abs=1e-12)
    assert found.similarity.tolist() == pytest.approx(similarities, abs=1e-12)
    assert found.counted.tolist() == [bool(row.any()) for row in weights > 0] and not found.counted[2]


@pytest.mark.parametrize("kept", [None, 7])
def test_gradients_are_finite_differences(kept: int | None) -> None:
    projected, features, weights, places = drawn(3, 4, kept)
    neighbours = Neighbours(2, 1.3, cumulative=True, normalised=True)
    score = lambda tokens: align(tokens, features, weights, places, neighbours, by_frames=True).score
    assert torch.autograd.gradcheck(score, projected.requires_grad_())


def test_nothing_that_counts_is_zero_and_not_nan() -> None:
    projected, features, weights, _ = drawn(2, 3, None)
    found = align(projected.requires_grad_(), features, torch.zeros_like(weights), None, Neighbours(1, 1.0), by_frames=True)
    found.score.sum().backward()
    assert not found.score.any() and not found.counted.any() and projected.grad is not None and not projected.grad.any()
    zeros = align(torch.zeros(1, 6, 5), torch.zeros(1, 2, 3, 5), torch.ones(1, 6), None, Neighbours(1, 1.0), by_frames=True)
    assert zeros.score.item() == 0 and zeros.counted.all()


def test_features_are_brought_to_the_grid_of_the_tokens_frame_by_frame() -> None:
    features = torch.randn(2, 3, 4, 6, 5, generator=torch.Generator().manual_seed(0))
    assert torch.equal(on_grid(features, (3, 4, 6)), features.reshape(2, 3, 24, 5))
    smaller = on_grid(features, (3, 2, 3))
    expected = functional.interpolate(features[1, 2].movedim(-1, 0)[None], (2, 3), mode="bilinear", antialias=True)[0]
    assert torch.allclose(smaller[1, 2], expected.flatten(1).T, atol=1e-6)
    with pytest.raises(ValueError, match="features of 3 frames for 4 frames of tokens"):
        on_grid(features, (4, 4, 6))


def test_resizing_keeps_every_place_where_it_is() -> None:
    """A linear ramp stays one: each token gets the value at its own place, in rows and columns apart."""
    ramp = torch.arange(12.0)[None, None, None].expand(1, 1, 8, -1)
    assert torch.allclose(resized(ramp, 4, 24)[0, 0, :, 2:-2], torch.linspace(-0.25, 11.25, 24)[2:-2].expand(4, -1), atol=1e-5)
    halved = resized(ramp, 8, 6)[0, 0, 0, 1:-1]
    assert torch.allclose(halved, torch.linspace(0.5, 10.5, 6)[1:-1], atol=1e-5)
    assert resized(ramp, 8, 12) is ramp
