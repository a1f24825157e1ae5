"""Reading weights: exact values, every key accounted for, nothing read that was not asked for."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from tuner.errors import CheckpointError
from tuner.interfaces.family import Variant
from tuner.interfaces.services import WeightSource
from tuner.model.stored import read_header
from tuner_ltxvideo2 import hub
from tuner_ltxvideo2.keys import join_original, to_original
from tuner_ltxvideo2.loading import CombinedFile, DiffusersFolder, build_part
from tuner_ltxvideo2.text import TextEncoder
from tuner_ltxvideo2.tiny import TinyPaths
from tuner_ltxvideo2.variants import variant_of

CPU = torch.device("cpu")
Edit = Callable[[dict[str, Tensor]], None]


def build(source: WeightSource, part: str, dtype: torch.dtype = torch.float32, **options: object) -> torch.nn.Module:
    return build_part(source, part, variant_of(source), dtype=dtype, device=CPU, **options)  # type: ignore[arg-type]


def edited(tiny: TinyPaths, path: Path, edit: Edit) -> Path:
    """A copy of the checkpoint with other tensors."""
    tensors = load_file(tiny.checkpoint)
    edit(tensors)
    with safe_open(tiny.checkpoint, framework="pt") as opened:
        save_file(tensors, path, metadata=opened.metadata())
    return path


Parts = Mapping[str, torch.nn.Module]


@pytest.fixture(scope="module")
def built(tiny_source: WeightSource) -> Parts:
    """Every part, built once; tests only look at them."""
    return {part: build(tiny_source, part) for part in tiny_source.parts()}


def as_folder(parts: Parts, folder: Path, shard: str = "") -> Path:
    """The same weights as diffusers saves a pipeline; the part `shard` in two files with an index."""
    for part, module in parts.items():
        size = 200_000 if part == shard else 10**10
        module.save_pretrained(folder / part, max_shard_size=size)  # type: ignore[operator]
    return folder


# --- values ------------------------------------------------------------------------------------------------------
def test_every_stored_value_arrives(tiny: TinyPaths, built: Parts) -> None:
    stored = load_file(tiny.checkpoint)
    seen = set()
    for part, module in built.items():
        for name, value in module.state_dict().items():
            key = join_original(part, to_original(part, name))
            assert torch.equal(value, stored[key].float()), key
            seen.add(key)
    assert seen == set(stored)


def test_nothing_stays_without_storage(built: Parts) -> None:
    for part, module in built.items():
        assert not any(tensor.is_meta for tensor in [*module.parameters(), *module.buffers()]), part
        assert not any(parameter.requires_grad for parameter in module.parameters())
        assert not module.training


def test_the_vocoders_resampling_filter_is_the_one_its_class_makes(built: Parts, tiny_variant: Variant) -> None:
    vocoder = built["vocoder"]
    own = type(vocoder)(**tiny_variant.config["vocoder"])
    unstored = {name: buffer for name, buffer in own.named_buffers() if name not in own.state_dict()}
    assert list(unstored) == ([] if tiny_variant.name == "2.0" else ["resampler.filter"])
    for name, buffer in unstored.items():
        assert torch.equal(vocoder.get_buffer(name), buffer)


def test_weights_take_the_dtype_and_statistics_keep_theirs(source20: WeightSource) -> None:
    vae = build(source20, "vae", torch.bfloat16)
    assert {p.dtype for p in vae.parameters()} == {torch.bfloat16}
    assert vae.get_buffer("latents_mean").dtype == torch.float32


def test_skipped_parameters_are_not_read(source20: WeightSource, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    tensors = source20.tensors

    def watched(part: str, names: list[str] | None = None):  # type: ignore[no-untyped-def]
        asked.extend(names or [])
        return tensors(part, names)

    monkeypatch.setattr(source20, "tensors", watched)
    model = build(source20, "transformer", skip=lambda name: "audio" in name)
    assert not any("audio" in name for name in asked)
    assert {p.is_meta for n, p in model.named_parameters() if "audio" in n} == {True}
    assert {p.is_meta for n, p in model.named_parameters() if "audio" not in n} == {False}


def test_tensors_can_be_asked_for_by_name(source20: WeightSource) -> None:
    names = ["proj_out.bias", "proj_in.weight"]
    assert [name for name, _ in source20.tensors("transformer", names)] == names


def test_folder_and_file_give_the_same_model(built: Parts, tiny_variant: Variant, tmp_path: Path) -> None:
    folder = as_folder(built, tmp_path / "pipeline", shard="transformer")
    assert (folder / "transformer" / "diffusion_pytorch_model.safetensors.index.json").is_file()
    assert DiffusersFolder().accepts(folder)
    assert not CombinedFile().accepts(folder)
    opened = DiffusersFolder().open(folder, "pipeline")
    variant = variant_of(opened)
    assert variant.name == tiny_variant.name
    for part, module in built.items():
        expected = module.state_dict()
        found = build(opened, part).state_dict()
        assert expected.keys() == found.keys()
        assert all(torch.equal(expected[name], found[name]) for name in expected), part
        assert {k: v for k, v in dict(opened.metadata()[part]).items() if k[0] != "_"} == dict(variant.config[part])  # type: ignore[call-overload]


# --- accounting --------------------------------------------------------------------------------------------------
def rejected(tiny: TinyPaths, path: Path, edit: Edit) -> str:
    with pytest.raises(CheckpointError) as caught:
        CombinedFile().open(edited(tiny, path, edit), "edited")
    return str(caught.value)


def test_missing_keys_are_named_and_counted(tiny20: TinyPaths, tmp_path: Path) -> None:
    def remove(tensors: dict[str, Tensor]) -> None:
        for key in [key for key in tensors if ".transformer_blocks.1.attn1." in key]:
            del tensors[key]

    text = rejected(tiny20, tmp_path / "a.safetensors", remove)
    assert "10 missing" in text
    assert "transformer_blocks.1.attn1.norm_k.weight" in text
    assert "and 2 more" in text


def test_unknown_keys_are_named(tiny20: TinyPaths, tmp_path: Path) -> None:
    def add(tensors: dict[str, Tensor]) -> None:
        tensors["model.diffusion_model.surprise.weight"] = torch.zeros(2)

    assert "1 unknown: surprise.weight" in rejected(tiny20, tmp_path / "a.safetensors", add)

    def foreign(tensors: dict[str, Tensor]) -> None:
        tensors["latent_upsampler.conv.weight"] = torch.zeros(2)

    assert "1 unknown: latent_upsampler.conv.weight" in rejected(tiny20, tmp_path / "b.safetensors", foreign)


def test_misshapen_tensors_are_named(tiny20: TinyPaths, tmp_path: Path) -> None:
    def cut(tensors: dict[str, Tensor]) -> None:
        tensors["model.diffusion_model.proj_out.bias"] = torch.zeros(5)

    assert "proj_out.bias is [5], not [128]" in rejected(tiny20, tmp_path / "a.safetensors", cut)


def test_doubled_keys_are_named(tiny20: TinyPaths, tmp_path: Path) -> None:
    def double(tensors: dict[str, Tensor]) -> None:
        tensors["model.diffusion_model.proj_in.weight"] = tensors["model.diffusion_model.patchify_proj.weight"].clone()

    assert "1 doubled" in rejected(tiny20, tmp_path / "a.safetensors", double)


def test_unread_statistics_are_no_error(tiny20: TinyPaths, tmp_path: Path) -> None:
    def add(tensors: dict[str, Tensor]) -> None:
        for part in ("vae", "audio_vae"):
            tensors[f"{part}.per_channel_statistics.mean-of-stds"] = torch.zeros(128)
            tensors[f"{part}.per_channel_statistics.channel"] = torch.zeros(128)

    path = edited(tiny20, tmp_path / "a.safetensors", add)
    assert CombinedFile().open(path, "a").parts() == ("transformer", "connectors", "vae", "audio_vae", "vocoder")


def test_a_part_that_is_not_there_is_named_when_asked_for(tiny20: TinyPaths, tmp_path: Path) -> None:
    def strip(tensors: dict[str, Tensor]) -> None:
        for key in [key for key in tensors if key.startswith("vae.")]:
            del tensors[key]

    source = CombinedFile().open(edited(tiny20, tmp_path / "a.safetensors", strip), "without a VAE")
    with pytest.raises(CheckpointError, match="holds no vae"):
        source.headers("vae")


@pytest.mark.parametrize("keep", [4, 1000, -100])
def test_a_file_cut_short_is_named(tiny20: TinyPaths, tmp_path: Path, keep: int) -> None:
    path = tmp_path / "cut.safetensors"
    path.write_bytes(tiny20.checkpoint.read_bytes()[:keep])
    with pytest.raises(CheckpointError, match="cut"):
        read_header(path)


def test_headers_agree_with_the_library(tiny20: TinyPaths) -> None:
    stored = read_header(tiny20.checkpoint)
    with safe_open(tiny20.checkpoint, framework="pt") as opened:
        assert opened.metadata() == stored.metadata
        assert set(opened.keys()) == set(stored.tensors)
        for key, tensor in stored.tensors.items():
            view = opened.get_slice(key)
            assert (tuple(view.get_shape()), view.get_dtype()) == (tensor.header.shape, tensor.header.dtype)


# --- identity ----------------------------------------------------------------------------------------------------
def test_fingerprints_tell_weights_apart_and_nothing_else(tiny20: TinyPaths, source20: WeightSource, tmp_path: Path) -> None:
    def change(tensors: dict[str, Tensor]) -> None:
        for key in tensors:
            if key.startswith("vae.") and key.endswith("weight"):
                tensors[key] = tensors[key] + 0.01

    copied = CombinedFile().open(edited(tiny20, tmp_path / "renamed.safetensors", lambda tensors: None), "copy")
    changed = CombinedFile().open(edited(tiny20, tmp_path / "changed.safetensors", change), "changed")
    for part in source20.parts():
        assert copied.fingerprint(part) == source20.fingerprint(part)
        assert (changed.fingerprint(part) == source20.fingerprint(part)) == (part != "vae")
    assert len({source20.fingerprint(part) for part in source20.parts()}) == 5


# --- where files lie ---------------------------------------------------------------------------------------------
def test_a_folder_with_one_file_and_with_two(tiny20: TinyPaths, tmp_path: Path) -> None:
    folder = tiny20.checkpoint.parent
    assert CombinedFile().accepts(folder)
    assert CombinedFile().open(folder, "folder").location == tiny20.checkpoint
    assert not CombinedFile().accepts(tmp_path)
    for name in ("a.safetensors", "b.safetensors"):
        (tmp_path / name).symlink_to(tiny20.checkpoint)
    with pytest.raises(CheckpointError, match="exactly one"):
        CombinedFile().open(tmp_path, "two")


def test_an_adapter_file_is_no_checkpoint(tmp_path: Path) -> None:
    path = tmp_path / "adapter.safetensors"
    save_file({"model.diffusion_model.transformer_blocks.0.attn1.to_q.lora_A.weight": torch.zeros(2, 2)}, path)
    assert not CombinedFile().accepts(path)


def test_text_encoder_beside_the_checkpoint(tiny20: TinyPaths, source20: WeightSource) -> None:
    assert source20.folder("text_encoder") == tiny20.text_encoder
    assert source20.folder("tokenizer") == tiny20.text_encoder
    assert source20.folder("transformer") is None


def test_a_text_encoder_of_another_size_or_kind_is_refused(source20: WeightSource, tiny20: TinyPaths, tmp_path: Path) -> None:
    config = json.loads((tiny20.text_encoder / "config.json").read_text())
    (tmp_path / "tokenizer.json").write_text((tiny20.text_encoder / "tokenizer.json").read_text())
    for change, found in (({"hidden_size": 48}, "2 layers of width 48"), ({"model_type": "gemma2"}, "model_type gemma2")):
        (tmp_path / "config.json").write_text(json.dumps(config | change))
        with pytest.raises(CheckpointError, match=found) as caught:
            TextEncoder(source20, variant_of(source20), torch.float32, tmp_path)
        assert "2 layers of width 32" in str(caught.value)


def test_a_missing_text_encoder_is_named(tiny20: TinyPaths, tmp_path: Path) -> None:
    source = CombinedFile().open(edited(tiny20, tmp_path / "alone.safetensors", lambda tensors: None), "alone")
    with pytest.raises(CheckpointError, match="text_encoder_path"):
        TextEncoder(source, variant_of(source), torch.float32)


# --- resolving ---------------------------------------------------------------------------------------------------
def test_an_existing_path_is_taken_and_a_missing_one_named(tiny20: TinyPaths, tmp_path: Path) -> None:
    assert hub.resolve_location(str(tiny20.checkpoint)) == tiny20.checkpoint
    with pytest.raises(CheckpointError, match="no such file"):
        hub.resolve_location(str(tmp_path / "nothing.safetensors"))
    with pytest.raises(CheckpointError, match="no such folder"):
        hub.resolve_text_encoder(str(tmp_path / "nothing"))
