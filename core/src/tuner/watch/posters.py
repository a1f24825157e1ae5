"""A picture of each sample for the report, small enough to stand inside it. Imports the decoder only when one is made."""

from __future__ import annotations

import functools
import io
import itertools
from pathlib import Path

AHEAD = 24
"""Frames decoded at most to get away from the first one, which in image to video is the same in every sample."""
WIDTH, HEIGHT = 192, 144
"""Pixels; a picture keeps its shape inside."""
QUALITY = 72


def poster(path: Path) -> bytes:
    """A JPEG of about the middle of a clip; empty for a sound, and for what cannot be decoded."""
    try:
        found = path.stat()
    except OSError:
        return b""
    return _poster(path, found.st_size, found.st_mtime_ns)


@functools.lru_cache(maxsize=2048)
def _poster(path: Path, size: int, changed: int) -> bytes:
    """Once for each content of a file: a report is written many times."""
    import av
    from PIL import Image

    try:
        with av.open(str(path)) as container:
            if not container.streams.video:
                return b""
            stream = container.streams.video[0]
            wanted = min(AHEAD, (stream.frames or 1) // 2)
            frames = list(itertools.islice(container.decode(stream), wanted + 1))
            if not frames:
                return b""
            picture: Image.Image = frames[-1].to_image()
    except (av.FFmpegError, OSError, ValueError):
        return b""
    picture.thumbnail((WIDTH, HEIGHT))
    target = io.BytesIO()
    picture.save(target, "JPEG", quality=QUALITY)
    return target.getvalue()
