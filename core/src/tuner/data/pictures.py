"""Still pictures, through Pillow: upright, with square pixels, in sRGB, transparency over white. Runs in worker processes: no torch.

Dimensions: H W pixels.
"""

from __future__ import annotations

import io
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageCms, ImageOps

from tuner.data.facts import MediaFacts, RefusedMedia, TruncatedMedia, UnreadableMedia

FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "TIFF")
"""What Pillow may open, under its own names. Moving pictures in these formats show their first one; gif is decoded as a clip."""
MAGIC = (b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff", b"BM", b"II*\x00", b"MM\x00*")
LARGEST = 2**27
"""Pixels. The largest sensors give about 100 million; a file that announces more than 134 million is refused before it is read."""


def is_picture(path: Path) -> bool:
    """Whether the file begins like a still picture; its name does not matter. False where it cannot be read."""
    try:
        with path.open("rb") as file:
            head = file.read(16)
    except OSError:
        return False
    return head.startswith(MAGIC) or (head[:4] == b"RIFF" and head[8:12] == b"WEBP")


def probe_picture(path: Path) -> MediaFacts:
    """What the picture at `path` holds. Decodes it once, a jpeg at an eighth of its size. Raises `MediaError`."""
    with _opened(path) as image:
        width, height = displayed_size(image)
        image.draft(None, (1, 1))
        image.load()
        return MediaFacts(0.0, width, height, 1, 0.0, 0.0, (image.format or "").lower(), has_audio=False)


def decode_picture(path: Path, size: tuple[int, int] | None = None) -> NDArray[np.uint8]:
    """(H, W, 3) RGB. `size` (width, height): scaled to cover it, keeping the aspect, and cropped around the centre; None: its own.

    Transparent pixels show white, the paper that most transparent pictures were made for. Raises `MediaError`.
    """
    with _opened(path) as image:
        width, height = displayed_size(image)
        upright = _in_srgb(ImageOps.exif_transpose(image))
    target = size or (width, height)
    scale = max(target[0] / width, target[1] / height)
    scaled = max(target[0], round(width * scale)), max(target[1], round(height * scale))
    # Pillow's bicubic filter widens with the reduction, so that a large picture does not alias.
    resized = upright if upright.size == scaled else upright.resize(scaled, Image.Resampling.BICUBIC)
    left, top = (scaled[0] - target[0]) // 2, (scaled[1] - target[1]) // 2
    return np.asarray(resized.crop((left, top, left + target[0], top + target[1])), np.uint8).copy()


def displayed_size(image: Image.Image) -> tuple[int, int]:
    """(width, height) in square pixels, after the rotation that the camera noted."""
    width, height = max(1, round(image.width * _pixel_aspect(image))), image.height
    return (height, width) if image.getexif().get(0x0112, 1) in (5, 6, 7, 8) else (width, height)


def _pixel_aspect(image: Image.Image) -> float:
    """Width of a pixel over its height, from the densities that the file states; beyond 1:3 they are taken for nonsense."""
    density = image.info.get("aspect") or image.info.get("dpi") or image.info.get("jfif_density") or (1, 1)
    across, down = float(density[0]), float(density[1])
    aspect = down / across if across > 0 and down > 0 else 1.0
    return aspect if 1 / 3 <= aspect <= 3 else 1.0


@contextmanager
def _opened(path: Path) -> Iterator[Image.Image]:
    """Opens a picture; what goes wrong inside the block becomes a `MediaError`."""
    # Pillow's own limit on pixels is a warning at 89 million; the check below is the one that counts.
    limit, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
    try:
        with warnings.catch_warnings(action="ignore"), Image.open(path, formats=FORMATS) as image:
            if image.width * image.height > LARGEST:
                raise RefusedMedia("is unreasonably large", where=str(path), value=f"{image.width}x{image.height}")
            yield image
    except (OSError, SyntaxError, ValueError) as error:
        if "truncated" in str(error).lower():
            raise TruncatedMedia("the picture ends early", where=str(path)) from error
        raise UnreadableMedia(f"cannot be decoded: {error}", where=str(path)) from error
    finally:
        Image.MAX_IMAGE_PIXELS = limit


def _in_srgb(image: Image.Image) -> Image.Image:
    """An RGB picture. 16 bits become 8, colours of another profile are converted, what is transparent becomes white."""
    if image.mode.startswith("I"):
        # Pillow clips 16 bits at 255 instead of scaling them.
        image = Image.fromarray((np.asarray(image, np.int64).clip(0, 65535) / 257).round().astype(np.uint8))
    if not image.has_transparency_data:
        return _converted(image)
    image = image.convert("RGBA")
    paper = Image.new("RGB", image.size, (255, 255, 255))
    paper.paste(_converted(image), mask=image.getchannel("A"))
    return paper


def _converted(image: Image.Image) -> Image.Image:
    """To sRGB by the embedded profile, such as a phone's Display P3; a profile that cannot be used is passed over, as browsers do."""
    profile = image.info.get("icc_profile")
    if profile and image.mode in ("RGB", "RGBA", "CMYK"):
        try:
            source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
            picture = image.convert("RGB") if image.mode == "RGBA" else image
            converted = ImageCms.profileToProfile(picture, source, ImageCms.createProfile("sRGB"), outputMode="RGB")
        except (ImageCms.PyCMSError, OSError):
            converted = None
        if converted is not None:
            return converted
    return image.convert("RGB")
