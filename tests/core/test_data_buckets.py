"""Frame sizes: multiples of the family's step, within the area, nearest in aspect ratio."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from core.encoders import GEOMETRY
from tuner.data.buckets import choose_size, sizes_of_area

sides = st.integers(16, 5000)


@given(sides, sides, st.integers(32, 1400), st.sampled_from(["pixel", "pixel_area"]))
def test_sizes_are_valid(width: int, height: int, resolution: int, kind: str) -> None:
    size = choose_size(width, height, resolution, kind, GEOMETRY)  # type: ignore[arg-type]
    assert size.width % 32 == size.height % 32 == 0 and min(size.width, size.height) >= 32
    if kind == "pixel_area":
        assert size.width * size.height <= max(resolution**2, 32 * 32)
        assert size.asked is None
        best = min(abs(math.log(w / h) - math.log(width / height)) for w, h in sizes_of_area(resolution**2, GEOMETRY))
        assert abs(math.log(size.width / size.height) - math.log(width / height)) == pytest.approx(best)
    turned = choose_size(height, width, resolution, kind, GEOMETRY)  # type: ignore[arg-type]
    if width != height and kind == "pixel":
        assert (turned.height, turned.width) == (size.width, size.height)


def test_buckets_of_an_area() -> None:
    """512 squared, written out: shorter sides from 256 to 512, longer ones 262144 / shorter, rounded down to 32."""
    longer = {s: 262144 // s // 32 * 32 for s in range(256, 513, 32)}
    assert sizes_of_area(512**2, GEOMETRY) == sorted({(w, h) for h, w in longer.items()} | set(longer.items()))
    assert choose_size(1920, 1080, 512, "pixel_area", GEOMETRY)[:2] == (672, 384)
    assert choose_size(1920, 1080, 0.262144, "area", GEOMETRY)[:2] == (672, 384)
    assert choose_size(100, 100, 512, "pixel_area", GEOMETRY)[:2] == (512, 512)


def test_shorter_side_and_what_was_asked() -> None:
    assert choose_size(854, 480, 480, "pixel", GEOMETRY) == (832, 480, (854, 480))
    assert choose_size(1080, 1920, 480, "pixel", GEOMETRY) == (480, 832, (480, 853))
    assert choose_size(640, 480, 480, "pixel", GEOMETRY) == (640, 480, None)
    assert choose_size(4000, 100, 64, "pixel", GEOMETRY) == (256, 64, None)  # 4:1 at most
