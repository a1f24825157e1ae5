"""What a batch can be, through whole runs: sound alone, a given stream, a reference clip with a mask."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from integration.project import Project, add_clip, moving_picture, tone
from tuner.data.media import probe, write_mp4, write_wav
from tuner.interfaces.encoders import VideoClip

SHORT = {"max_train_steps": 2, "checkpoint_step_interval": 0}


def dataset(*entries: dict[str, object]) -> str:
    texts = {"id": "text", "type": "local", "dataset_type": "text_embeds", "default": True, "cache_dir": "cache"}
    common = {"type": "local", "cache_dir": "cache", "resolution": 64, "resolution_type": "pixel"}
    Path("data.json").write_text(json.dumps([*({**common, **entry} for entry in entries), texts]))
    return "data.json"


def adapter(out: str = "out") -> tuple[list[str], dict[str, str]]:
    """Names of the adapted modules, and the file's metadata."""
    with safe_open(Path(out) / "lora.safetensors", framework="pt") as file:
        return sorted({key.rsplit(".", 2)[0] for key in file.keys()}), file.metadata()  # noqa: SIM118


def test_sound_alone_is_trained_and_sampled(project: Project, capsys: pytest.CaptureFixture[str]) -> None:
    Path("songs").mkdir()
    for name, seconds in (("high", 0.5), ("low", 0.46)):
        write_wav(Path("songs") / f"{name}.wav", tone(seconds, 440.0))
        (Path("songs") / f"{name}.txt").write_text(f"a {name} tone")
    songs = {"id": "songs", "dataset_type": "audio", "instance_data_dir": "songs", "audio": {"audio_only": True}}
    code = project.train(
        data=None, data_backend_config=dataset(songs), validation_disable=False, validation_prompt="a tone",
        validation_resolution="64x64", validation_num_video_frames=9, validation_num_inference_steps=1, validation_guidance=1, **SHORT,
    )  # fmt: skip
    assert code == 0, capsys.readouterr()
    assert all("loss/audio" in row and "loss/video" not in row for row in project.metrics())
    modules, _ = adapter()
    assert modules and all("audio" in name and "video" not in name for name in modules)
    (sample,) = Path("out/validation/step_2").iterdir()
    assert sample.suffix == ".wav" and probe(sample).has_audio


def test_given_sound_is_followed_and_silent_clips_are_trained_beside(project: Project, capsys: pytest.CaptureFixture[str]) -> None:
    """Four clips, one of them silent; with the picture given instead that one teaches nothing and is named."""
    assert project.train("--dry-run", given_stream="video") == 4
    said = capsys.readouterr()
    assert "nothing but audio is learned" in said.err + said.out and "dusk.mp4" in said.err + said.out
    assert project.train(given_stream="audio", prefix_conditioning_probability=1, prefix_conditioning_frames=3, **SHORT) == 0
    assert "prefix_conditioning_frames: 3 -> 1" in capsys.readouterr().out
    assert all("loss/video" in row and "loss/audio" not in row for row in project.metrics())
    modules, _ = adapter()
    assert {name.split(".")[3] for name in modules} == {"attn1", "attn2", "audio_to_video_attn"}


def test_references_and_masks_are_trained_on_and_the_file_says_so(project: Project, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("elm", "fir"):
        add_clip(Path("pairs/clips"), name, frames=9, size=(64, 128))
        write_mp4(Path(f"pairs/references/{name}.mp4"), VideoClip(moving_picture(9, 64, 128, 0.5), 25.0))
        half = torch.zeros(9, 128, 64, 3, dtype=torch.uint8)
        half[:, 64:] = 255
        write_mp4(Path(f"pairs/masks/{name}.mp4"), VideoClip(half, 25.0))
    kept = {"id": "clips", "dataset_type": "video", "instance_data_dir": "pairs/clips", "conditioning_data": ["refs", "masks"]}
    given = {"dataset_type": "conditioning"}
    code = project.train(
        data=None, checkpoint_step_interval=0, max_train_steps=1, data_backend_config=dataset(
            {**kept, "video": {"num_frames": 9}},
            {**given, "id": "refs", "instance_data_dir": "pairs/references", "conditioning_type": "reference", "reference_downscale": 2},
            {**given, "id": "masks", "instance_data_dir": "pairs/masks", "conditioning_type": "mask"},
        ),
    )  # fmt: skip
    assert code == 0, capsys.readouterr()
    _, metadata = adapter()
    assert metadata["reference_downscale_factor"] == "2"
    assert len(project.metrics()) == 1 and project.metrics()[0]["loss/video"] > 0
