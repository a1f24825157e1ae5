"""The demo's own files: its clips show and sound what they claim, and its configuration is one that tuner accepts.

The footage is made here, so that the cutting is tested without a download: frame i has luma 40 + 2·i, dark on the left half and 40
brighter on the right, and a tone that begins with frame TONE_FRAME.
"""

from __future__ import annotations

import importlib.util
import json
import sys
from fractions import Fraction
from pathlib import Path
from types import ModuleType

import av
import numpy as np
import pytest

from tuner.config.datasets import VideoEntry, load_datasets
from tuner.config.resolve import resolve
from tuner.config.settings import DataSettings, TrainSettings
from tuner.errors import DataError
from tuner.plugins.loader import load_plugins

DEMO = Path(__file__).parents[2] / "examples" / "demo"
FRAMES, TONE_FRAME = 60, 30


def load_prepare() -> ModuleType:
    """examples/demo/prepare.py as a module; it is a program, not a package."""
    spec = importlib.util.spec_from_file_location("demo_prepare", DEMO / "prepare.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses looks the module up by name
    spec.loader.exec_module(module)
    return module


prepare = load_prepare()


@pytest.fixture(scope="module")
def footage(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """60 frames of 1280x720 at 25 frames/s with 5.1 sound, like the real excerpt."""
    path = tmp_path_factory.mktemp("footage") / "made.mp4"
    with av.open(str(path), "w") as container:
        picture = container.add_stream("libx264", rate=25, options={"crf": "12", "preset": "ultrafast"})
        picture.width, picture.height, picture.pix_fmt = 1280, 720, "yuv420p"
        sound = container.add_stream("aac", rate=48_000, layout="5.1")
        for index in range(FRAMES):
            planes = np.full((1080, 1280), 128, dtype=np.uint8)
            planes[:720, :640], planes[:720, 640:] = 40 + 2 * index, 80 + 2 * index
            frame = av.VideoFrame.from_ndarray(planes, format="yuv420p")
            frame.pts, frame.time_base = index, Fraction(1, 25)
            container.mux(picture.encode(frame))
        container.mux(picture.encode(None))
        time = np.arange(FRAMES * 1920) / 48_000
        tone = (0.4 * np.sin(2 * np.pi * 700 * time) * (time >= TONE_FRAME / 25)).astype(np.float32)
        block = av.AudioFrame.from_ndarray(np.ascontiguousarray(np.tile(tone, (6, 1))), format="fltp", layout="5.1")
        block.sample_rate, block.pts, block.time_base = 48_000, 0, Fraction(1, 48_000)
        container.mux(sound.encode(block))
        container.mux(sound.encode(None))
    return path


def luma(path: Path) -> np.ndarray:
    """(F, H, W) of the Y plane."""
    with av.open(str(path)) as container:
        frames = [frame.to_ndarray(format="yuv420p") for frame in container.decode(video=0)]
    return np.stack(frames)[:, : frames[0].shape[0] * 2 // 3].astype(float)


def test_clip_shows_the_frames_it_names_at_their_times(footage: Path, tmp_path: Path) -> None:
    cut = prepare.Cut("middle", 26, "a caption")
    prepare.write_clip(footage, cut, tmp_path / "clip.mp4")
    shown = luma(tmp_path / "clip.mp4")
    assert shown.shape == (25, 144, 256)
    # Two grey levels a frame; H.264 and scaling stay within one.
    assert np.abs(shown[:, 40:100, 20:100].mean(axis=(1, 2)) - (40 + 2 * np.arange(26, 51))).max() < 1
    with av.open(str(tmp_path / "clip.mp4")) as container:
        assert [round(frame.time * 25) for frame in container.decode(video=0)] == list(range(25))


def test_clip_sounds_in_step_with_its_picture(footage: Path, tmp_path: Path) -> None:
    prepare.write_clip(footage, prepare.Cut("middle", 26, "a caption"), tmp_path / "clip.mp4")
    with av.open(str(tmp_path / "clip.mp4")) as container:
        assert container.streams.audio[0].codec_context.layout.name == "stereo"
        frames = list(container.decode(audio=0))
    assert frames[0].time == 0
    sound = np.concatenate([frame.to_ndarray() for frame in frames], axis=1)
    onset = np.argmax(np.abs(sound).max(axis=0) > 0.1) / 48_000
    assert onset == pytest.approx((TONE_FRAME - 26) / 25, abs=0.02)  # half a frame; AAC smears by up to 1,024 samples
    assert np.abs(sound[:, : int(0.1 * 48_000)]).max() < 0.01
    assert sound.shape[1] / 48_000 == pytest.approx(1.0, abs=1024 / 48_000)


def test_cropped_silent_clip_shows_that_part_and_has_no_sound(footage: Path, tmp_path: Path) -> None:
    cut = prepare.Cut("right", 0, "a caption", sound=False, crop=(700, 100, 480, 480), size=(64, 64))
    prepare.write_clip(footage, cut, tmp_path / "clip.mp4")
    shown = luma(tmp_path / "clip.mp4")
    assert shown.shape == (25, 64, 64)
    # The way through RGB costs a level more.
    assert np.abs(shown.mean(axis=(1, 2)) - (80 + 2 * np.arange(25))).max() < 2
    with av.open(str(tmp_path / "clip.mp4")) as container:
        assert not container.streams.audio


def test_clips_are_written_once_and_missing_ones_again(footage: Path, tmp_path: Path) -> None:
    cuts = (prepare.Cut("a", 0, "first", size=(64, 64)), prepare.Cut("b", 30, "second", sound=False, size=(64, 64)))
    assert prepare.write_clips(footage, tmp_path, cuts) == 2
    before = (tmp_path / "a.mp4").stat().st_mtime_ns
    assert prepare.write_clips(footage, tmp_path, cuts) == 0
    (tmp_path / "b.mp4").unlink()
    assert prepare.write_clips(footage, tmp_path, cuts) == 1
    assert (tmp_path / "a.mp4").stat().st_mtime_ns == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.mp4", "a.txt", "b.mp4", "b.txt"]
    assert (tmp_path / "b.txt").read_text() == "second\n"


def test_other_footage_is_refused(footage: Path, tmp_path: Path) -> None:
    (tmp_path / "bigbuckbunny.mp4").write_bytes(footage.read_bytes())
    with pytest.raises(DataError, match=r"bigbuckbunny\.mp4: this is not the footage"):
        prepare.fetch_footage(tmp_path)


def test_cuts_lie_in_the_footage_and_are_captioned() -> None:
    assert len({cut.name for cut in prepare.CUTS}) == len(prepare.CUTS) == 6
    assert sum(cut.sound for cut in prepare.CUTS) >= 4
    # The excerpt has 132 frames.
    assert all(cut.start + prepare.CLIP_FRAMES <= 132 and cut.caption.endswith(".") for cut in prepare.CUTS)
    assert all(size % 2 == 0 for cut in prepare.CUTS for size in cut.size)


def test_tuner_accepts_the_demo_configuration() -> None:
    settings = resolve(load_plugins({}).option_types, config_file=DEMO / "config.json")
    assert settings.get(TrainSettings).max_train_steps == json.loads((DEMO / "config.json").read_text())["max_train_steps"]
    assert settings.get(DataSettings).data_backend_config == "examples/demo/dataset.json"


def test_tuner_accepts_the_demo_dataset(tmp_path: Path) -> None:
    (tmp_path / "clips").mkdir()
    (tmp_path / "dataset.json").write_text(prepare.dataset_file(str(tmp_path / "clips")))
    entries = load_datasets(tmp_path / "dataset.json", None, DataSettings(), {"model_family": "", "output_dir": ""})
    clips = next(entry for entry in entries if isinstance(entry, VideoEntry))
    assert clips.video.num_frames == prepare.CLIP_FRAMES
