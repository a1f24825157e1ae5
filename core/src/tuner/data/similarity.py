"""Which clips show nearly the same: difference hashes of a few frames, compared bit by bit. No torch: hashes are made in worker processes.

A hash keeps only whether the picture gets brighter or darker from one place to the next, so scaling, compression and brightness hardly
change it.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

SIDE = 8
"""Steps to the right in each of so many rows, and down in each of so many columns."""
BYTES = 4 * SIDE * SIDE // 8
"""Two bits for each step to the right and down: brighter, darker; neither where the picture is even."""
EVEN = 2.0
"""Of 255: a step that is smaller is noise."""
PLAIN = 16
"""Steps. A picture with fewer has too little structure to compare."""
NEAR = 0.25
"""Share of the bits of either hash in which two frames differ at most. Measured on 120 random textures with the spectrum of photographs:
at most 0.08 after shrinking, dimming and strong compression, 0.2 in the middle after cutting 6 % off, at least 0.45 between two of them."""

Hash = bytes
"""`BYTES` of them; empty: the picture is plain."""


def means(grey: NDArray[np.floating], rows: int, columns: int) -> NDArray[np.float64]:
    """(..., H, W) -> (..., rows, columns): means of areas that differ by one pixel a side at most. At least a pixel for each area."""
    height, width = grey.shape[-2:]
    tops, lefts = np.arange(rows) * height // rows, np.arange(columns) * width // columns
    sums = np.add.reduceat(np.add.reduceat(grey, tops, axis=-2, dtype=np.float64), lefts, axis=-1)
    return sums / np.outer(np.diff(tops, append=height), np.diff(lefts, append=width))


def difference_hash(grey: NDArray[np.floating]) -> Hash:
    """The hash of one picture, (H, W) with 0 to 255, at least `SIDE` + 1 pixels a side."""
    right = np.diff(means(grey, SIDE, SIDE + 1), axis=1)
    down = np.diff(means(grey, SIDE + 1, SIDE), axis=0)
    steps = np.concatenate([right.ravel(), down.ravel()])
    bits = np.concatenate([steps > EVEN, steps < -EVEN])
    return np.packbits(bits).tobytes() if bits.sum() >= PLAIN else b""


def first_similar(seen: Sequence[tuple[Hash, ...]]) -> dict[int, int]:
    """Of clips or pictures, by the hashes of their frames: index -> the first index before it that shows nearly the same in every frame.

    A plain frame is like every plain one; where all are plain nothing is compared.
    """
    found: dict[int, int] = {}
    for count in {len(hashes) for hashes in seen}:
        own = [index for index, hashes in enumerate(seen) if len(hashes) == count and any(hashes)]
        bits = np.zeros((len(own), count, BYTES), np.uint8)
        for row, index in enumerate(own):
            for frame, code in enumerate(seen[index]):
                bits[row, frame] = np.frombuffer(code.ljust(BYTES, b"\0"), np.uint8)
        for row, index in enumerate(own):
            different = np.bitwise_count(bits[:row] ^ bits[row]).sum(axis=2)
            either = np.bitwise_count(bits[:row] | bits[row]).sum(axis=2)
            alike = (different <= NEAR * either).all(axis=1)
            if alike.any():
                found[index] = own[int(alike.argmax())]
    return found
