"""Every option that decides a record re-encodes exactly the records that it must; every other option re-encodes nothing.

One small dataset of all kinds: two clips (one with sound) with reference and mask, one picture, one sound alone. A row of the table
changes one thing and says how many sources each encoder is then given; what is not named is given none. Afterwards everything that
training asks for must be there, and going back to the first settings must encode nothing.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from PIL import Image

from core.clips import picture, tone, write_clip, write_sound
from core.encoders import GEOMETRY, CountingEncoder, Pictures, Sounds, Words
from tuner.config.datasets import load_datasets
from tuner.config.settings import DataSettings
from tuner.data.dataset import TrainingSet
from tuner.data.manifest import Manifest, scan
from tuner.data.workers import DecodeWorkers
from tuner.train.caching import fill_cache


class References(Pictures):
    """Of the clip that is followed."""

    name = "reference"
    of: ClassVar[str] = "reference"


class Masks(Pictures):
    """Of what is learned."""

    name = "mask"
    of: ClassVar[str] = "mask"


Raw = dict[str, dict[str, object]]
"""Entry -> its keys; "run" holds the run's own."""
ALL = {"video": 3, "audio": 2, "text": 4, "reference": 2, "mask": 2}
CLIPS = {"video": 2, "reference": 2, "mask": 2}
"""What the size or length of clips decides."""


def base() -> Raw:
    return {
        "run": {"resolution": 64, "resolution_type": "pixel"},
        "clips": {"instance_data_dir": "clips", "video": {"num_frames": 17}, "audio": {}, "conditioning_data": ["references", "masks"]},
        "references": {"instance_data_dir": "references", "dataset_type": "conditioning", "conditioning_type": "reference"},
        "masks": {"instance_data_dir": "masks", "dataset_type": "conditioning", "conditioning_type": "mask"},
        "pictures": {"instance_data_dir": "pictures", "dataset_type": "image"},
        "sounds": {"instance_data_dir": "sounds", "dataset_type": "audio", "audio": {"audio_only": True, "duration_interval": 0.5}},
        "text": {"dataset_type": "text_embeds"},
    }


@pytest.fixture(scope="module")
def workers() -> Iterator[DecodeWorkers]:
    with DecodeWorkers(1) as pool:
        yield pool


@pytest.fixture(scope="module")
def filled(tmp_path_factory: pytest.TempPathFactory, workers: DecodeWorkers) -> Path:
    """A folder with the dataset and the records of the first settings."""
    folder = tmp_path_factory.mktemp("filled")
    for number, name in enumerate("ab"):
        sound = tone(1.64, 16000, 1, [(0, 0.3)]) if name == "a" else None
        write_clip(
            folder / "clips" / f"{name}.mp4", frames=41, size=(128, 64), sound=sound, sound_rate=16000, layout="mono", flashes=[number]
        )
        write_clip(folder / "references" / f"{name}.mp4", frames=41, size=(128, 64), flashes=[number + 5])
        (folder / "clips" / f"{name}.txt").write_text(f"clip {name}")
    for name in ("masks", "pictures", "sounds"):
        (folder / name).mkdir()
    for number, name in enumerate("ab"):
        Image.fromarray(picture(20 + number, 128, 64)).save(folder / "masks" / f"{name}.png")
    Image.fromarray(picture(9, 128, 64)).save(folder / "pictures" / "still.png")
    write_sound(folder / "sounds" / "bell.flac", tone(1.3, 16000, 1, [(0.1, 0.2)]), 16000, "flac")
    (folder / "pictures" / "still.txt").write_text("a picture")
    (folder / "sounds" / "bell.txt").write_text("a bell")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert encoded(base(), workers) == ALL
    return folder


@pytest.fixture
def project(filled: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    shutil.copytree(filled, tmp_path / "project")
    monkeypatch.chdir(tmp_path / "project")
    return tmp_path / "project"


def find(raw: Raw, workers: DecodeWorkers) -> Manifest:
    settings = DataSettings(cache_dir="cache", **raw["run"])  # type: ignore[arg-type]
    entries = [{"id": name, **keys} for name, keys in raw.items() if name != "run"]
    Path("datasets.json").write_text(json.dumps(entries))
    placeholders = {"output_dir": "anywhere", "model_family": "any"}
    return scan(load_datasets(Path("datasets.json"), None, settings, placeholders), settings, GEOMETRY, workers=workers)


def encoded(
    raw: Raw, workers: DecodeWorkers, *, scales: Mapping[str, float] | None = None, batch_size: int = 2, seed: int = 0
) -> dict[str, int]:
    """How many sources each encoder was given, those that were given any; all that training reads must be there then."""
    encoders: list[CountingEncoder] = [kind() for kind in (Pictures, Sounds, Words, References, Masks)]
    for encoder in encoders:
        encoder.scale = (scales or {}).get(encoder.name, 1.0)
    manifest = find(raw, workers)
    summary = fill_cache(manifest, encoders, torch.device("cpu"), batch_size=batch_size, workers=workers)
    assert summary.failures == {}
    dataset = TrainingSet(summary.manifest, encoders, 2, seed)
    for draws in dataset.epoch_plan(0):
        for sample in dataset.load(0, draws):
            assert ("video" in sample.records) == (sample.kind != "audio") and "text" in sample.records
    return {encoder.name: sum(encoder.batches) for encoder in encoders if encoder.batches}


def change(where: str, **keys: object) -> Callable[[Raw], None]:
    """Sets keys of an entry; those of `video` and `audio` join what is there."""

    def apply(raw: Raw) -> None:
        for key, value in keys.items():
            old = raw[where].get(key)
            raw[where][key] = {**old, **value} if isinstance(old, dict) and isinstance(value, dict) else value

    return apply


def rename(old: str, new: str) -> Callable[[Raw], None]:
    """Another id."""

    def apply(raw: Raw) -> None:
        raw[new] = raw.pop(old)

    return apply


def without_conditioning(**keys: object) -> Callable[[Raw], None]:
    """The clips alone, with other keys."""

    def apply(raw: Raw) -> None:
        del raw["references"], raw["masks"]
        change("clips", conditioning_data=[], **keys)(raw)

    return apply


def write(path: str, text: str) -> Callable[[Raw], None]:
    """Another text in a file."""
    return lambda raw: Path(path).write_text(text) and None


def move(old: str, new: str) -> Callable[[Raw], None]:
    """Other names for files."""

    def apply(raw: Raw) -> None:
        for path in list(Path(old).parent.glob(f"{Path(old).name}.*")):
            path.rename(f"{new}{path.suffix}")

    return apply


def remake(path: str) -> Callable[[Raw], None]:
    """Another film under the same name."""
    return lambda raw: write_clip(Path(path), frames=41, size=(128, 64), flashes=[30]) and None


ROWS: dict[str, tuple[Callable[[Raw], None], dict[str, int]]] = {
    # what decides pictures
    "resolution of the run": (change("run", resolution=32), CLIPS | {"video": 3}),
    "resolution of an entry": (change("clips", resolution=32), CLIPS),
    "resolution_type": (change("run", resolution_type="pixel_area"), CLIPS | {"video": 3}),
    "crop_aspect": (change("clips", crop=True, crop_aspect="square"), CLIPS),
    "num_frames": (change("clips", video={"num_frames": 9}), CLIPS | {"audio": 1}),
    "frame_rate of the run": (change("run", frame_rate=20.0), CLIPS | {"audio": 1}),
    "frame_rate of an entry": (change("clips", video={"frame_rate": 12.5}), CLIPS | {"audio": 1}),
    "truncation_mode": (without_conditioning(audio={"truncation_mode": "end"}), {"video": 2, "audio": 1}),
    "another reference": (remake("references/a.mp4"), {"reference": 1}),
    "smaller references": (change("references", reference_downscale=2), {"reference": 2}),
    "another clip": (remake("clips/b.mp4"), {"video": 1}),
    # what decides sounds
    "channels": (change("clips", audio={"channels": 1}), {"audio": 1}),
    "channels of sound alone": (change("sounds", audio={"channels": 1}), {"audio": 1}),
    "truncation_mode of sound alone": (change("sounds", audio={"truncation_mode": "end"}), {"audio": 1}),
    "duration_interval": (change("sounds", audio={"duration_interval": 0.4}), {"audio": 1}),
    "allow_zero_audio": (change("clips", audio={"allow_zero_audio": True}), {"audio": 1}),
    # what decides captions
    "caption": (write("clips/a.txt", "another text"), {"text": 1}),
    "the same caption twice": (write("clips/a.txt", "clip b"), {}),
    "caption_strategy filename": (change("clips", caption_strategy="filename"), {"text": 2}),
    "caption_strategy instanceprompt": (change("clips", caption_strategy="instanceprompt", instance_prompt="any"), {"text": 1}),
}
NOTHING: dict[str, Callable[[Raw], None]] = {
    "repeats": change("clips", repeats=3),
    "probability": change("clips", probability=0.5),
    "is_i2v": change("clips", video={"is_i2v": True}),
    "min_frames": change("clips", video={"min_frames": 9}),
    "bucket_strategy": change("clips", video={"bucket_strategy": "resolution_frames"}),
    "auto_split": change("clips", audio={"auto_split": False}),
    "without conditioning": without_conditioning(),
    "entry id": rename("clips", "films"),
    "file name": move("pictures/still", "pictures/other"),
    "a file of another kind": write("clips/unknown.xyz", "ignored"),
}
"""What decides no record."""


@pytest.mark.parametrize("name", ROWS)
def test_a_changed_option_encodes_what_it_decides(project: Path, workers: DecodeWorkers, name: str) -> None:
    apply, expected = ROWS[name]
    kept = {path: path.read_bytes() for folder in ("clips", "references") for path in (project / folder).iterdir()}
    raw = base()
    apply(raw)
    assert encoded(raw, workers) == expected
    for path, content in kept.items():
        path.write_bytes(content)
    assert encoded(base(), workers) == {}


def test_other_options_encode_nothing(project: Path, workers: DecodeWorkers) -> None:
    for name, apply in NOTHING.items():
        raw = base()
        apply(raw)
        assert encoded(raw, workers) == {}, name
    assert encoded(base(), workers, batch_size=5, seed=7) == {}


def test_an_encoders_own_settings_encode_its_own_records(project: Path, workers: DecodeWorkers) -> None:
    for encoder, count in ALL.items():
        assert encoded(base(), workers, scales={encoder: 2.0}) == {encoder: count}


def test_every_record_is_of_its_own_file(project: Path, workers: DecodeWorkers) -> None:
    """Clips flash in frame 0 and 1, their references in frame 5 and 6, a still mask never; the linked voice sounds half of the time."""
    for name in "ab":
        Path("voices").mkdir(exist_ok=True)
        write_sound(Path(f"voices/{name}.wav"), tone(1.64, 16000, 1, [(0, 0.34)]), 16000, "pcm_s16le")
    raw = base()
    change("clips", s2v_datasets=["voices"])(raw)
    raw["voices"] = {"instance_data_dir": "voices", "dataset_type": "audio"}
    assert encoded(raw, workers) == {"audio": 1}  # both voices are the same file
    encoders = [Pictures(), Sounds(), Words(), References(), Masks()]
    dataset = TrainingSet(find(raw, workers), encoders, 1, seed=0)
    samples = {s.caption: s.records for draws in dataset.epoch_plan(0) for s in dataset.load(0, draws)}
    for number, name in enumerate("ab"):
        bright = {kind: samples[f"clip {name}"][kind].tensors["latents"].mean(1) for kind in ("video", "reference", "mask")}
        assert (bright["video"].argmax(), bright["reference"].argmax()) == (number, number + 5)
        assert bright["mask"].shape == (17,) and bright["mask"].unique().numel() == 1
        sound = samples[f"clip {name}"]["audio"].tensors["latents"]
        assert (sound - 0.5 * 2 / torch.pi * 0.34 / 0.68).abs().max() < 0.002  # the mean of |0.5 sin| while it sounds
    assert samples["a picture"].keys() == {"video", "text"} and samples["a picture"]["video"].tensors["latents"].shape == (1, 3)
    assert samples["a bell"].keys() == {"audio", "text"}
