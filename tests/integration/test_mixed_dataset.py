"""One run over clips, pictures and sounds, with linked sound, references and masks: each kind trains what it has."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from PIL import Image

from core.clips import tone, write_sound
from integration.project import Project, add_clip


def write_files() -> None:
    for name, pitch in (("cat", 1), ("dog", 2)):
        for folder in ("films", "before"):
            add_clip(Path(folder), name, frames=9, sound=False)
        for folder, shade in (("photos", 90 * pitch), ("where", 255)):
            Path(folder).mkdir(exist_ok=True)
            Image.fromarray(np.full((64, 96, 3), shade, np.uint8)).save(Path(folder, f"{name}.png"))
        Path("voices").mkdir(exist_ok=True)
        write_sound(Path("voices", f"{name}.wav"), tone(0.6, 16000, 1, [(0, 0.2 * pitch)]), 16000, "pcm_s16le")
        for folder in ("photos", "voices"):
            Path(folder, f"{name}.txt").write_text(f"{folder} of a {name}")


def test_every_kind_in_one_run(project: Project) -> None:
    write_files()
    kinds: dict[str, dict[str, object]] = {
        "films": {"video": {"num_frames": 9}, "s2v_datasets": "voices", "conditioning_data": ["before", "where"], "resolution": 64},
        "photos": {"dataset_type": "image", "repeats": 1, "probability": 0.5},
        "voices": {"dataset_type": "audio", "audio": {"audio_only": True, "duration_interval": 0.5}},
        "before": {"dataset_type": "conditioning", "conditioning_type": "reference"},
        "where": {"dataset_type": "conditioning", "conditioning_type": "mask"},
    }
    Path("d.json").write_text(json.dumps([{"id": name, "instance_data_dir": name, **keys} for name, keys in kinds.items()]))
    assert project.train(data=None, data_backend_config="d.json", train_batch_size=1, max_train_steps=0, num_train_epochs=1) == 0
    # An epoch in single samples: two films with sound, two of the four turns of the photos, two sounds. The mask of the films is white.
    streams = [frozenset(key for key in row if key in ("loss/video", "loss/audio")) for row in project.metrics()]
    assert sorted(map(len, streams)) == [1, 1, 1, 1, 2, 2]
    assert streams.count(frozenset({"loss/video"})) == streams.count(frozenset({"loss/audio"})) == 2
    assert all(row["grad_norm"] > 0 for row in project.metrics())
