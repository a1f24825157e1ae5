"""Still pictures of every kind. The oracle is the number in `picture`, and colours written out."""

from __future__ import annotations

import struct
import zlib
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image, ImageCms

from core.clips import picture, read_number
from tuner.data.container import MediaError, RefusedMedia, TooShort, TruncatedMedia, UnreadableMedia, probe
from tuner.data.decode import decode_frames
from tuner.data.pictures import LARGEST, decode_picture

NUMBER = 0b10010111
"""Its blocks tell top from bottom and left from right."""
PLAIN = Image.fromarray(picture(NUMBER, 96, 64))
ORIENTATIONS = {
    1: PLAIN, 2: PLAIN.transpose(Image.Transpose.FLIP_LEFT_RIGHT), 3: PLAIN.transpose(Image.Transpose.ROTATE_180),
    4: PLAIN.transpose(Image.Transpose.FLIP_TOP_BOTTOM), 5: PLAIN.transpose(Image.Transpose.TRANSPOSE),
    6: PLAIN.transpose(Image.Transpose.ROTATE_90), 7: PLAIN.transpose(Image.Transpose.TRANSVERSE),
    8: PLAIN.transpose(Image.Transpose.ROTATE_270),
}  # fmt: skip
"""EXIF value -> how such a camera stores the upright picture (6: turned left, to be turned right again)."""


@pytest.mark.parametrize("suffix", ["png", "jpg", "webp", "bmp", "tif"])
def test_formats(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"a.{suffix}"
    PLAIN.save(path)
    facts = probe(path)
    assert (facts.kind, facts.width, facts.height, facts.frames, facts.seconds, facts.has_audio) == ("image", 96, 64, 1, 0.0, False)
    assert facts.frames_at(25.0) == facts.frames_at(1.0) == 1
    pixels = decode_frames(path, 1, 25.0)
    assert pixels.shape == (1, 64, 96, 3) and pixels.dtype == np.uint8
    assert np.abs(pixels[0].astype(int) - picture(NUMBER, 96, 64)).mean() < (6 if suffix in ("jpg", "webp") else 1e-9)


@pytest.mark.parametrize("orientation", ORIENTATIONS)
@pytest.mark.parametrize("suffix", ["jpg", "png", "webp"])
def test_the_cameras_orientation_is_followed(tmp_path: Path, orientation: int, suffix: str) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = tmp_path / f"a.{suffix}"
    ORIENTATIONS[orientation].save(path, exif=exif)
    assert (probe(path).width, probe(path).height) == (96, 64)
    assert read_number(decode_picture(path)) == NUMBER
    assert read_number(decode_picture(path, (48, 32))) == NUMBER


def test_pixels_that_are_not_square_and_nonsense_densities(tmp_path: Path) -> None:
    path = tmp_path / "fax.jpg"
    PLAIN.save(path, dpi=(204, 102))  # half as wide as high
    assert (probe(path).width, probe(path).height) == (48, 64)
    assert decode_picture(path).shape == (64, 48, 3)
    PLAIN.save(path, dpi=(1, 300))
    assert (probe(path).width, probe(path).height) == (96, 64)


def grey16(value: int) -> Image.Image:
    return Image.fromarray(np.full((8, 8), value, np.uint16))


def see_through(alpha: int, colour: tuple[int, int, int] = (200, 0, 0)) -> Image.Image:
    return Image.new("RGBA", (8, 8), (*colour, alpha))


def palette() -> Image.Image:
    image = Image.new("P", (8, 8), 1)
    image.putpalette([0, 0, 0, 10, 200, 30])
    return image


MODES = {
    "grey.png": (Image.new("L", (8, 8), 77), (77, 77, 77)),
    "bilevel.png": (Image.new("1", (8, 8), 1), (255, 255, 255)),
    "16 bits.png": (grey16(128 * 257), (128, 128, 128)),
    "16 bits.tif": (grey16(65535), (255, 255, 255)),
    "palette.png": (palette(), (10, 200, 30)),
    "cmyk.jpg": (Image.new("CMYK", (8, 8), (0, 255, 255, 0)), (255, 0, 0)),
    "clear.png": (see_through(0), (255, 255, 255)),
    "half clear.webp": (see_through(128, (0, 0, 0)), (127, 127, 127)),
    "grey with alpha.png": (Image.new("LA", (8, 8), (0, 51)), (204, 204, 204)),
    "opaque.png": (see_through(255), (200, 0, 0)),
}


@pytest.mark.parametrize("name", MODES)
def test_every_mode_becomes_rgb_over_white(tmp_path: Path, name: str) -> None:
    image, colour = MODES[name]
    image.save(tmp_path / name, **({"lossless": True, "exact": True} if name.endswith("webp") else {}))
    assert np.abs(decode_picture(tmp_path / name)[4, 4].astype(int) - colour).max() <= 2


def test_colours_of_another_profile_are_converted_and_a_broken_profile_is_passed_over(tmp_path: Path) -> None:
    """L*a*b* as the profile of an RGB picture cannot be used; a profile equal to sRGB changes nothing."""
    image = Image.new("RGB", (8, 8), (200, 100, 50))
    for name, profile in (
        ("srgb", ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()),
        ("lab", ImageCms.ImageCmsProfile(ImageCms.createProfile("LAB")).tobytes()),
        ("rubbish", b"no profile"),
    ):
        image.save(tmp_path / f"{name}.png", icc_profile=profile)
        assert np.abs(decode_picture(tmp_path / f"{name}.png")[0, 0].astype(int) - (200, 100, 50)).max() <= 1, name


def test_moving_pictures_show_their_first_one(tmp_path: Path) -> None:
    frames = [Image.fromarray(picture(n, 64, 48)) for n in (3, 9, 27)]
    for suffix in ("webp", "png", "gif"):
        frames[0].save(tmp_path / f"a.{suffix}", save_all=True, append_images=frames[1:], duration=100)
        assert read_number(decode_frames(tmp_path / f"a.{suffix}", 1, 25.0)[0]) == 3
    moving = probe(tmp_path / "a.gif")
    assert (moving.kind, moving.frames, moving.frames_at(10.0)) == ("video", 3, 3)
    assert [read_number(frame) for frame in decode_frames(tmp_path / "a.gif", 3, 10.0)] == [3, 9, 27]


def test_a_still_picture_is_repeated_only_where_that_is_asked_for(tmp_path: Path) -> None:
    PLAIN.save(tmp_path / "mask.png")
    with pytest.raises(TooShort, match="still picture in place of 9"):
        decode_frames(tmp_path / "mask.png", 9, 25.0)
    held = decode_frames(tmp_path / "mask.png", 9, 25.0, (48, 32), still=True)
    assert held.shape == (9, 32, 48, 3) and all(read_number(frame) == NUMBER for frame in held)


@pytest.mark.parametrize("size", [(64, 64), (32, 96), (160, 32)])
def test_covering_a_size_keeps_aspect_and_centre(tmp_path: Path, size: tuple[int, int]) -> None:
    """On a ramp from 0 to 255 over the width, the columns that were kept can be read off."""
    Image.fromarray(np.repeat(np.repeat(np.arange(256, dtype=np.uint8)[None, ::2, None], 64, 0), 3, 2)).save(tmp_path / "ramp.png")
    row = decode_picture(tmp_path / "ramp.png", size)[size[1] // 2, :, 1].astype(float)
    visible = min(1.0, size[0] / size[1] / 2)  # the source is twice as wide as high
    assert abs(row.mean() - 127) < 2 and abs((row[-2] - row[1]) - 255 * visible * (size[0] - 3) / size[0]) < 6


def test_transparent_pixels_of_clips_show_white_too(tmp_path: Path) -> None:
    path = tmp_path / "a.mov"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("qtrle", rate=25)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "argb"
        pixels = np.zeros((48, 64, 4), np.uint8)
        pixels[:, 32:] = (200, 10, 10, 255)
        for _ in range(2):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgba").reformat(format="argb")))
        container.mux(stream.encode(None))
    frame = decode_frames(path, 1, 25.0)[0]
    assert frame[20, 10].tolist() == [255, 255, 255] and np.abs(frame[20, 50].astype(int) - (200, 10, 10)).max() <= 2


def png_header(width: int, height: int) -> bytes:
    body = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + body + struct.pack(">I", zlib.crc32(body)) + b"\0\0\0\1IDATx\0\0\0\0"


def test_bad_pictures_are_named_failures(tmp_path: Path) -> None:
    PLAIN.resize((400, 400)).save(tmp_path / "whole.jpg")
    PLAIN.save(tmp_path / "whole.png")
    side = int(LARGEST**0.5) + 1
    contents: dict[str, tuple[bytes, type[MediaError]]] = {
        "huge.png": (png_header(side, side), RefusedMedia), "bomb.png": (png_header(2**30, 2**30), RefusedMedia),
        "cut.jpg": ((tmp_path / "whole.jpg").read_bytes()[:-2000], TruncatedMedia),
        "cut.png": ((tmp_path / "whole.png").read_bytes()[:-200], TruncatedMedia),
        "header.jpg": (b"\xff\xd8\xff" + bytes(50), UnreadableMedia), "header.tif": (b"II*\0" + bytes(4), UnreadableMedia),
        "header.bmp": (b"BM" + bytes(60), UnreadableMedia), "header.webp": (b"RIFF\x20\0\0\0WEBPVP8 " + bytes(30), UnreadableMedia),
    }  # fmt: skip
    for name, (content, kind) in contents.items():
        path = tmp_path / name
        path.write_bytes(content)
        for read in (probe, decode_picture):
            with pytest.raises(kind) as caught:
                read(path)
            assert caught.value.where == str(path), name


def test_a_picture_of_a_hundred_megapixels_is_admitted(tmp_path: Path) -> None:
    (tmp_path / "large.png").write_bytes(png_header(10000, 10000))
    with pytest.raises((TruncatedMedia, UnreadableMedia)):  # it is admitted, and then found to be empty
        decode_picture(tmp_path / "large.png")
