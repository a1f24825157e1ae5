"""Buckets: the few frame sizes that clips are brought to, so that clips of like shape share a batch.

For `pixel_area` and `area` the sizes of a run are fixed by the area alone, whatever clips there are: a dataset that grows keeps its
buckets, and with them its cache.
"""

from __future__ import annotations

import math
from typing import NamedTuple

from tuner.config.entries import ResolutionType
from tuner.interfaces.family import Geometry

WIDEST = 4.0
"""Aspect ratios beyond 4:1 and 1:4 are cropped to these."""


class Bucket(NamedTuple):
    """What a clip, picture or sound is brought to; reported as `768x512@49`."""

    width: int
    height: int
    frames: int
    seconds: float = 0.0
    """Of sound alone, which has no picture; 0 where there is one: its frames tell."""

    def __str__(self) -> str:
        return f"{self.seconds:g} s of sound" if self.seconds else f"{self.width}x{self.height}@{self.frames}"


class FrameSize(NamedTuple):
    """A chosen size in pixels, and the one that was asked for where that is not a valid size."""

    width: int
    height: int
    asked: tuple[int, int] | None


def choose_size(width: int, height: int, resolution: float, kind: ResolutionType, geometry: Geometry) -> FrameSize:
    """The size for a picture of `width` x `height` square pixels.

    `pixel`: the shorter side is `resolution`, the longer follows the aspect ratio; both go down to multiples of the family's step.
    `pixel_area`: the area is `resolution` squared; `area`: it is that many megapixels; the bucket of nearest aspect ratio.
    """
    if kind == "pixel":
        return _by_shorter_side(width, height, resolution, geometry)
    area = resolution**2 if kind == "pixel_area" else resolution * 1e6
    target = math.log(width / height)
    # Ties go to the narrower bucket, so that the choice does not hang on the order of a set.
    best = min(sizes_of_area(area, geometry), key=lambda size: (abs(math.log(size[0] / size[1]) - target), size))
    side = math.sqrt(area)
    # Sizes that keep within the area are what was asked for; one step a side may be more.
    return FrameSize(*best, None if side >= geometry.size_step else (round(side), round(side)))


def sizes_of_area(area: float, geometry: Geometry) -> list[tuple[int, int]]:
    """All (width, height) for an area in pixels: each side in steps, the other the longest valid one that keeps within the area."""
    step, side = geometry.size_step, geometry.snap_size(math.sqrt(area))
    shorter = range(geometry.snap_size(math.sqrt(area / WIDEST)), side + 1, step)
    landscape = {(max(s, geometry.snap_size(area / s)), s) for s in shorter}
    return sorted(landscape | {(height, width) for width, height in landscape})


def _by_shorter_side(width: int, height: int, resolution: float, geometry: Geometry) -> FrameSize:
    aspect = min(max(width / height, 1 / WIDEST), WIDEST)
    asked = (round(resolution * max(aspect, 1)), round(resolution / min(aspect, 1)))
    snapped = (geometry.snap_size(asked[0]), geometry.snap_size(asked[1]))
    return FrameSize(*snapped, None if snapped == asked else asked)
