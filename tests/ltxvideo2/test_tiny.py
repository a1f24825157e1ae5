"""The tiny model: reproducible, small, and sane in its numbers."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoTokenizer

from ltxvideo2.ltx2_flavour import FlavourWritten
from tuner.errors import ConfigError, DiskError
from tuner.interfaces.encoders import AudioClip, VideoClip
from tuner.interfaces.family import Variant
from tuner.interfaces.services import WeightSource
from tuner.model.stored import read_header
from tuner_ltxvideo2.audio_latents import AudioLatentEncoder
from tuner_ltxvideo2.tiny import TinyPaths, write_tiny
from tuner_ltxvideo2.video_latents import VideoLatentEncoder

CPU = torch.device("cpu")


def test_a_place_where_it_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("a file, no folder")
    with pytest.raises(DiskError, match="the tiny model cannot be written") as error:
        write_tiny(tmp_path / "notes.txt" / "models")
    assert "cache_dir" in error.value.remedy


def test_the_flavour_writes_it_and_the_same_seed_gives_the_same_weights(tiny20: TinyPaths, flavour_written: FlavourWritten) -> None:
    files, again = flavour_written.files, flavour_written.paths
    assert (files.text_encoder, files.description) == (None, files.weights.name)
    assert again != tiny20
    assert flavour_written.draws_untouched
    weights, before_weights = load_file(again.checkpoint), load_file(tiny20.checkpoint)
    assert weights.keys() == before_weights.keys()
    assert all(torch.equal(weights[key], before_weights[key]) for key in weights)
    assert read_header(again.checkpoint).metadata == read_header(tiny20.checkpoint).metadata
    for name in ("config.json", "model.safetensors", "tokenizer.json"):
        assert (again.text_encoder / name).read_bytes() == (tiny20.text_encoder / name).read_bytes()


def test_a_complete_one_is_left_alone(tiny20: TinyPaths) -> None:
    before = tiny20.checkpoint.stat()
    assert write_tiny(tiny20.checkpoint.parent) == tiny20
    assert tiny20.checkpoint.stat().st_mtime_ns == before.st_mtime_ns


def test_it_is_small(tiny: TinyPaths) -> None:
    assert tiny.checkpoint.stat().st_size < 25_000_000  # 2.0: 19 MB; 2.3 has more gates, wider connectors, a second vocoder
    assert sum(file.stat().st_size for file in tiny.text_encoder.iterdir()) < 1_000_000


def test_another_variant_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError):
        write_tiny(tmp_path, variant="1.0")


def test_the_tokenizer_loads_without_network_or_code(tiny20: TinyPaths, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("the network was used")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    tokenizer = AutoTokenizer.from_pretrained(tiny20.text_encoder)
    ids = tokenizer("two birds, über!").input_ids
    assert ids[0] == tokenizer.bos_token_id
    assert tokenizer.decode(ids, skip_special_tokens=True) == "two birds, über!"
    assert tokenizer.model_max_length == 64
    assert not list(tiny20.text_encoder.glob("*.py"))


def test_typical_latents_have_about_unit_variance(tiny_source: WeightSource, tiny_variant: Variant) -> None:
    y, x = torch.meshgrid(torch.linspace(0, 1, 96), torch.linspace(0, 1, 128), indexing="ij")
    time = torch.arange(9)[:, None, None] / 9
    pictures = torch.stack([torch.sin(5 * (x * a + y * b) + 6 * time) for a, b in ((1, 0), (0, 1), (1, 1))], -1) * 0.5 + 0.5
    video = VideoLatentEncoder(tiny_source, tiny_variant, torch.float32)
    video.load(CPU)
    latents = video.encode([VideoClip((pictures * 255).to(torch.uint8), 25.0)])[0].tensors["latents"]
    assert latents.shape == (128, 2, 3, 4)
    assert 0.5 < float(latents.std()) < 2
    sound = AudioLatentEncoder(tiny_source, tiny_variant, torch.float32)
    sound.load(CPU)
    wave = 0.3 * torch.sin(2 * torch.pi * 330 * torch.arange(16000) / 16000)
    features = sound.encode([AudioClip(wave.expand(2, -1).contiguous(), 16000, 16000)])[0].tensors["latents"]
    assert features.shape == (25, 128)
    assert 0.4 < float(features.std()) < 2.5
