"""LTX-2.5 in one file per network: the same model as the combined file, and each missing file named."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from tuner.errors import CheckpointError
from tuner.interfaces.services import WeightSource
from tuner_ltxvideo2.hub import locate_model
from tuner_ltxvideo2.keys import PARTS
from tuner_ltxvideo2.loading import CombinedFile, build_part
from tuner_ltxvideo2.split import SplitFiles
from tuner_ltxvideo2.text import TextEncoder
from tuner_ltxvideo2.tiny import TinyPaths, write_tiny
from tuner_ltxvideo2.variants import check_decoder, variant_of

CPU = torch.device("cpu")
TRANSFORMER = "diffusion_models/ltx-2.5-22b-dev-transformer-bf16.safetensors"
VIDEO = "vae/ltx-2.5-video-vae-conv-bf16.safetensors"
DIFFUSION = "vae/ltx-2.5-video-vae-bf16.safetensors"
SOUND = "vae/ltx-2.5-audio-vae-bf16.safetensors"
TEXT = "text_encoders/gemma4-12b-with-proj-ltx-2.5-bf16.safetensors"


@pytest.fixture(scope="module")
def tiny25(tiny_root: Path) -> TinyPaths:
    return write_tiny(tiny_root / "2.5", variant="2.5")


@pytest.fixture(scope="module")
def combined(tiny25: TinyPaths) -> WeightSource:
    return CombinedFile().open(tiny25.checkpoint, "combined")


@pytest.fixture(scope="module")
def published(tiny25: TinyPaths, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model as the repository lays it out: five files, of which two hold the video VAE's encoder."""
    root = tmp_path_factory.mktemp("published")
    tensors = load_file(tiny25.checkpoint)
    with safe_open(tiny25.checkpoint, framework="pt") as opened:
        told = dict(opened.metadata())
    config = json.loads(told["config"])

    def write(name: str, kept: dict[str, Tensor], parts: tuple[str, ...], **more: str) -> None:
        (root / name).parent.mkdir(exist_ok=True)
        own = {part: config[part] if part in parts else None for part in config}
        save_file(kept, root / name, metadata={"model_version": told["model_version"], "config": json.dumps(own), **more})

    def heads(*starts: str) -> dict[str, Tensor]:
        return {key: tensor for key, tensor in tensors.items() if key.startswith(starts)}

    write(TRANSFORMER, heads("model.diffusion_model."), ("transformer",))
    write(VIDEO, heads("vae."), ("vae",))
    # named without the part, and with a decoder of which only the encoder's side is known
    encoder = {key.removeprefix("vae."): tensor for key, tensor in heads("vae.encoder.", "vae.per_channel_statistics.").items()}
    write(DIFFUSION, encoder | {"decoder.t_embedder.mlp.0.weight": torch.zeros(4, 4), "decoder.stages.0.w": torch.zeros(2)}, ("vae",))
    write(SOUND, heads("audio_vae.", "vocoder."), ("audio_vae", "vocoder"))
    language = {f"model.{key}": tensor for key, tensor in load_file(tiny25.text_encoder / "model.safetensors").items()}
    tokenizer = torch.frombuffer(bytearray((tiny25.text_encoder / "tokenizer.json").read_bytes()), dtype=torch.uint8)
    text = heads("text_embedding_projection.") | language | {"tokenizer_json": tokenizer, "vision_model.patch.weight": torch.zeros(2)}
    write(TEXT, text, (), gemma_config=(tiny25.text_encoder / "config.json").read_text())
    return root


def linked(published: Path, folder: Path, *names: str) -> Path:
    """A folder with some of the files, side by side."""
    folder.mkdir()
    for name in names:
        (folder / Path(name).name).symlink_to(published / name)
    return folder


@pytest.fixture(scope="module")
def split(published: Path) -> WeightSource:
    location = published / TRANSFORMER
    assert SplitFiles().accepts(location)
    assert not CombinedFile().accepts(location)
    return SplitFiles().open(location, "split")


def test_the_same_model_as_the_combined_file(split: WeightSource, combined: WeightSource) -> None:
    assert split.parts() == PARTS
    assert variant_of(split) == variant_of(combined)
    for part in PARTS:
        assert split.fingerprint(part) == combined.fingerprint(part)
    for part in ("connectors", "vae"):  # those whose keys come from two files, or from one of two
        models = [build_part(source, part, variant_of(source), dtype=torch.float32, device=CPU) for source in (split, combined)]
        found, expected = (model.state_dict() for model in models)
        assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


def test_the_text_encoder_in_one_file_gives_the_same_records(split: WeightSource, combined: WeightSource) -> None:
    records = []
    for source in (split, combined):
        encoder = TextEncoder(source, variant_of(source), torch.float32)
        encoder.load(CPU)
        records.append(encoder.encode(["two birds sing"])[0])
        encoder.unload()
    assert records[0].facts == records[1].facts
    assert all(torch.equal(records[0].tensors[stream], records[1].tensors[stream]) for stream in ("video", "audio"))
    assert TextEncoder(split, variant_of(split), torch.float32).settings()["tokenizer"]


@pytest.mark.parametrize(("absent", "said"), [(VIDEO, "video VAE"), (SOUND, "audio VAE and vocoder"), (TEXT, "text projection")])
def test_a_missing_file_is_named(absent: str, said: str, published: Path, tmp_path: Path) -> None:
    folder = linked(published, tmp_path / "some", *({TRANSFORMER, VIDEO, SOUND, TEXT} - {absent}))
    with pytest.raises(CheckpointError, match=said) as caught:
        SplitFiles().open(folder, "some")
    assert Path(absent).name in str(caught.value)


def test_one_folder_and_several_paths_do_as_well(published: Path, tmp_path: Path) -> None:
    folder = linked(published, tmp_path / "flat", TRANSFORMER, VIDEO, SOUND, TEXT)
    assert SplitFiles().open(folder, "flat").parts() == PARTS
    files = [str(published / name) for name in (TRANSFORMER, VIDEO, SOUND)]
    found = locate_model(", ".join(files), "", "", str(published / TEXT), tmp_path / "cache")
    assert found.description == " + ".join(Path(file).name for file in files)
    assert SplitFiles().open(found.weights, found.description).parts() == PARTS


def test_several_transformers_have_to_be_told_apart(published: Path, tmp_path: Path) -> None:
    folder = linked(published, tmp_path / "two", TRANSFORMER, VIDEO, SOUND, TEXT)
    (folder / "other.safetensors").symlink_to(published / TRANSFORMER)
    with pytest.raises(CheckpointError, match="several transformers"):
        SplitFiles().open(folder, "two")


def test_a_diffusion_decoder_encodes_and_refuses_to_decode(published: Path, combined: WeightSource, tmp_path: Path) -> None:
    source = SplitFiles().open(linked(published, tmp_path / "some", TRANSFORMER, DIFFUSION, SOUND, TEXT), "some")
    variant = variant_of(source)
    clip = torch.rand(1, 3, 9, 64, 64, generator=torch.Generator().manual_seed(1)) * 2 - 1
    latents = []
    for opened, its_variant in ((source, variant), (combined, variant_of(combined))):
        vae: Any = build_part(opened, "vae", its_variant, dtype=torch.float32, device=CPU)
        with torch.no_grad():
            latents.append(vae.encode(clip).latent_dist.mode())
    assert torch.equal(*latents)
    check_decoder(variant_of(combined))
    with pytest.raises(CheckpointError, match="diffusion decoder") as caught:
        check_decoder(variant)
    assert "video-vae-conv" in str(caught.value)


def test_the_wrong_gemma_is_named(combined: WeightSource, source20: WeightSource, tiny20: TinyPaths, tiny25: TinyPaths) -> None:
    for source, folder, needed, seen in (
        (combined, tiny20.text_encoder, "LTX-2.5 needs a Gemma 4", "gemma3_text"),
        (source20, tiny25.text_encoder, "LTX-2.0 needs a Gemma 3", "gemma4_unified_text"),
    ):
        with pytest.raises(CheckpointError, match=needed) as caught:
            TextEncoder(source, variant_of(source), torch.float32, folder)
        assert seen in str(caught.value)
