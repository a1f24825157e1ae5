"""What a run trains on, in numbers and small pictures, for its report. Made once, when the cache is full.

Only files that were decoded in full before, in a process of their own, are opened here.
"""

from __future__ import annotations

import base64
import io
import time
from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from tuner.data.decode import decode_frames, decode_sound
from tuner.data.items import Item
from tuner.data.manifest import Manifest
from tuner.errors import DataError

SHOWN = 48
"""Clips with a picture; of a larger dataset they are spread evenly over it."""
SECONDS = 10.0
"""After which no more pictures are made: clips on a slow disk are listed without."""
AREA = 160 * 106
"""Pixels of a picture."""
CAPTION = 300
"""Characters of a caption that are kept."""
QUALITY = 75
RATE, LISTENED, COLUMNS = 8000, 10.0, 96
"""Hz and seconds of a sound that is drawn, and columns of the drawing."""


def describe_dataset(
    manifest: Manifest, batch_size: int, seed: int, seconds: float = SECONDS, clock: Callable[[], float] = time.monotonic
) -> dict[str, object]:
    """The content of dataset.json: sums that add up, the audio ledger, buckets, and up to `SHOWN` clips. Names of files, no folders.

    `seconds`: how long pictures may take.
    """
    items = (*manifest.items, *manifest.held_out)
    chosen = spread(items, SHOWN)
    end = clock() + seconds
    held_out = frozenset(id(item) for item in manifest.held_out)
    return {
        "digest": manifest.digest(),
        "summary": manifest.describe(),
        "sound": manifest.describe_sound(batch_size, seed),
        "counts": {status: manifest.count(status) for status in ("used", "skipped", "failed", "held out")},  # type: ignore[arg-type]
        "left_out": [{"status": status, "reason": why, "files": files} for (status, why), files in manifest.reasons().items()],
        "buckets": [{"bucket": str(bucket), "items": count} for bucket, count in manifest.bucket_counts().items()],
        "items": len(items),
        "clips": [describe_clip(item, id(item) in held_out, picture=clock() < end) for item in chosen],
    }


def spread(items: Sequence[Item], most: int) -> list[Item]:
    """At most `most` of them, evenly over the whole, in their order."""
    count = min(most, len(items))
    return [items[index * len(items) // count] for index in range(count)]


def describe_clip(item: Item, held_out: bool, *, picture: bool) -> dict[str, object]:
    """One clip as the report shows it. What cannot be decoded any more has neither picture nor wave."""
    alone = item.kind == "audio"
    return {
        "dataset": item.dataset, "name": item.path.name, "kind": item.kind, "bucket": str(item.bucket), "seconds": round(item.seconds, 3),
        "sound": "alone" if alone else "silence" if item.silence else "yes" if item.has_audio else "no", "held_out": held_out,
        "repeats": item.repeats,
        "caption": item.caption if len(item.caption) <= CAPTION else item.caption[:CAPTION] + "...",
        "picture": thumbnail(item) if picture and not alone else "", "wave": wave(item) if picture and alone else [],
    }  # fmt: skip


def thumbnail(item: Item) -> str:
    """The first frame that is trained, as it is cropped: a JPEG in base64; empty where it cannot be decoded."""
    width, height = item.bucket.width, item.bucket.height
    scale = min(1.0, (AREA / (width * height)) ** 0.5)
    size = max(2, round(width * scale)), max(2, round(height * scale))
    try:
        return encoded(decode_frames(item.path, 1, item.frame_rate, size, item.start)[0])
    except DataError:
        return ""


def encoded(pixels: NDArray[np.uint8]) -> str:
    """(H, W, 3) RGB as a JPEG in base64."""
    target = io.BytesIO()
    Image.fromarray(pixels).save(target, "JPEG", quality=QUALITY)
    return base64.b64encode(target.getvalue()).decode("ascii")


def wave(item: Item) -> list[tuple[float, float]]:
    """(lowest, highest) in [-1, 1] of each of `COLUMNS` columns of the sound that is trained; empty where it cannot be decoded."""
    try:
        decoded = decode_sound(item.path, min(item.seconds, LISTENED), RATE, 1, item.start, mono=True, alone=True)
    except DataError:
        return []
    if decoded is None or decoded[0].shape[1] < COLUMNS:
        return []
    pieces = np.array_split(decoded[0][0], COLUMNS)
    return [(round(float(piece.min()), 3), round(float(piece.max()), 3)) for piece in pieces]
