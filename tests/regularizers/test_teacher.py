"""The teacher's records: transformers' own features of the same pixels, one map for each latent frame, on the grid of the tokens."""

from __future__ import annotations

import gc
import json
import weakref
from pathlib import Path

import pytest
import torch
from torch.nn import functional
from transformers import AutoModel, BitImageProcessorPil

from integration.project import moving_picture
from tuner.interfaces.encoders import VideoClip
from tuner.interfaces.family import Geometry
from tuner_regularizers.teacher import DEVIATION, MEAN, TeacherEncoder, patch_features, patch_grid, prepared
from tuner_regularizers.teacher_files import TinyTeacher, find_teacher, tiny_model, write_tiny_teacher

CPU = torch.device("cpu")
GEOMETRY = Geometry(8, 32, 16000, 2, 25.0)


def encoder(size: int = 56, at_once: int = -1, geometry: Geometry = GEOMETRY) -> TeacherEncoder:
    made = TeacherEncoder(TinyTeacher(), size, geometry, at_once)
    made.load(CPU)
    return made


def clip(frames: int = 17, width: int = 96, height: int = 64, phase: float = 0.3) -> VideoClip:
    return VideoClip(moving_picture(frames, width, height, phase), 25.0)


@pytest.mark.parametrize("registers", [0, 4])
def test_features_are_those_of_transformers_on_the_same_pixels(registers: int, tmp_path: Path) -> None:
    """Loaded by somebody else, prepared by somebody else: patches after the final norm, without class and register tokens."""
    folder = write_tiny_teacher(tmp_path / "teacher", registers=registers)
    frames = moving_picture(2, 56, 56, 0.4)
    processor = BitImageProcessorPil(do_resize=False, do_center_crop=False, do_convert_rgb=False, image_mean=MEAN, image_std=DEVIATION)
    pixels = processor(list(frames.numpy()), return_tensors="pt")["pixel_values"]
    own = prepared(frames, 56, 56)
    torch.testing.assert_close(own, pixels, rtol=1e-5, atol=1e-5)  # its products are made in another order
    with torch.no_grad():
        expected = AutoModel.from_pretrained(folder)(own).last_hidden_state[:, 1 + registers :]
        found = patch_features(find_teacher(str(folder)).open(), own)
    assert found.shape == (2, 32, 4, 4) and torch.equal(found.flatten(2).mT, expected)
    record = TeacherEncoder(find_teacher(str(folder)), 56, Geometry(1, 14, 16000, 2, 25.0))
    record.load(CPU)
    assert torch.equal(record.encode([VideoClip(frames, 25.0)])[0].tensors["features"].flatten(1, 2), expected.half())


def test_a_frame_for_each_latent_frame_on_the_grid_of_the_tokens() -> None:
    given = clip(25)
    features = encoder().encode([given])[0].tensors["features"]
    assert features.shape == (4, 2, 3, 32) and features.dtype == torch.float16
    rows, columns = patch_grid(64, 96, 56, 14)
    with torch.no_grad():
        pixels = functional.interpolate(given.frames[[0, 8, 16, 24]].movedim(-1, 1).float() / 255, (rows * 14, columns * 14),
                                        mode="bicubic", antialias=True).clamp(0, 1)  # fmt: skip
        maps = patch_features(tiny_model(), (pixels - torch.tensor(MEAN)[:, None, None]) / torch.tensor(DEVIATION)[:, None, None])
    expected = functional.interpolate(maps, (2, 3), mode="bilinear", antialias=True).movedim(1, -1)
    torch.testing.assert_close(features, expected.half(), rtol=1e-3, atol=1e-3)  # one unit of float16
    assert encoder().encode([clip(1)])[0].tensors["features"].shape == (1, 2, 3, 32)


def test_the_input_keeps_the_aspect_and_about_the_area() -> None:
    assert patch_grid(512, 512, 518, 14) == (37, 37)
    assert patch_grid(512, 768, 518, 14) == (30, 45) and patch_grid(768, 512, 518, 14) == (45, 30)
    for height, width in ((416, 608), (544, 960), (2048, 256)):
        rows, columns = patch_grid(height, width, 518, 14)
        assert rows * columns == pytest.approx(37 * 37, rel=0.04) and columns / rows == pytest.approx(width / height, rel=0.05)


def test_records_do_not_depend_on_what_is_encoded_together() -> None:
    clips = [clip(phase=0.1), clip(phase=0.9)]
    together, singly = encoder().encode(clips), encoder(at_once=1)
    apart = [singly.encode([one])[0] for one in clips]
    for one, other in zip(together, apart, strict=True):
        assert not torch.equal(one.tensors["features"][0], one.tensors["features"][2])
        torch.testing.assert_close(one.tensors["features"], other.tensors["features"], rtol=2e-3, atol=2e-3)
    assert not torch.equal(together[0].tensors["features"], together[1].tensors["features"])


def test_less_memory_means_fewer_frames_at_once_and_the_same_settings() -> None:
    work = encoder()
    before = dict(work.settings())
    expected = work.encode([clip(25)])[0].tensors["features"]
    said = []
    while (text := work.reduce_memory()) is not None:
        said.append(text)
        found = work.encode([clip(25)])[0].tensors["features"]
        torch.testing.assert_close(found, expected, rtol=2e-3, atol=2e-3)
    assert said == ["crepa_encoder_frames_batch_size is lowered to 2", "crepa_encoder_frames_batch_size is lowered to 1"]
    assert dict(work.settings()) == before


def test_settings_hold_what_decides_a_record_and_no_path(tmp_path: Path) -> None:
    one, same, other = (write_tiny_teacher(tmp_path / name, seed=seed) for name, seed in (("a", 0), ("b", 0), ("c", 1)))
    config = json.loads((same / "config.json").read_text())
    (same / "config.json").write_text(json.dumps({**config, "transformers_version": "5.0", "_name_or_path": "/elsewhere"}))
    settings = lambda name, size=56, geometry=GEOMETRY: dict(TeacherEncoder(find_teacher(str(name)), size, geometry).settings())
    base = settings(one)
    assert base == settings(same) and json.dumps(base) and str(tmp_path) not in json.dumps(base)
    changed = [settings(other), settings(one, 70), settings(one, geometry=Geometry(4, 32, 16000, 2, 25.0)),
               settings(one, geometry=Geometry(8, 16, 16000, 2, 25.0)), settings("tiny")]  # fmt: skip
    assert all(found != base for found in changed)
    (same / "config.json").write_text(json.dumps({**config, "layer_norm_eps": 1e-3}))
    assert settings(same) != base
    assert settings("tiny") == settings("tiny")


def test_weights_come_with_load_and_go_with_unload() -> None:
    work = encoder()
    held = weakref.ref(work._model)
    work.unload()
    gc.collect()
    assert held() is None
    work.load(CPU)
    assert torch.equal(work.encode([clip(1)])[0].tensors["features"], encoder().encode([clip(1)])[0].tensors["features"])
