"""The universal LoRA file: what diffusers makes of it, and what is read back from every spelling."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, LTX2Pipeline
from diffusers.models.transformers import LTX2VideoTransformer3DModel
from peft import LoraConfig, inject_adapter_in_model
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from ltxvideo2.ltx2_models import GRID, LENGTH, batch_and_noise, normal, transformer
from tuner.errors import CheckpointError, DiskError
from tuner.interfaces.services import AdapterState
from tuner_ltxvideo2.family import target_names
from tuner_ltxvideo2.lora import UniversalFormat

torch.set_num_threads(1)
RANK, ALPHA = 4, 10.0


def adapted(model: LTX2VideoTransformer3DModel) -> AdapterState:
    """Trains nothing: injects a LoRA of random A and B on every default target of `model`, in place."""
    targets = target_names([name for name, _ in model.named_parameters()], ("video", "audio"))
    inject_adapter_in_model(LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=targets), model)
    weights: dict[str, tuple[Tensor, Tensor]] = {}
    for index, name in enumerate(targets):
        layer = model.get_submodule(name)
        down, up = layer.lora_A["default"].weight, layer.lora_B["default"].weight
        with torch.no_grad():
            down.copy_(normal(*down.shape, seed=2 * index) * 0.2)
            up.copy_(normal(*up.shape, seed=2 * index + 1) * 0.2)
        weights[name] = (down.detach(), up.detach())
    return AdapterState(weights, RANK, ALPHA, tuple(targets))


def output(model: LTX2VideoTransformer3DModel) -> tuple[Tensor, Tensor]:
    batch, noise = batch_and_noise(model, {"video": (0.7, 0.7), "audio": (0.7, 0.7)})
    with torch.no_grad():
        return model(
            noise.streams["video"].noisy, noise.streams["audio"].noisy, batch.text["video"], batch.text["audio"],
            timestep=torch.full((2,), 700.0), sigma=torch.full((2,), 700.0),
            num_frames=GRID[0], height=GRID[1], width=GRID[2], audio_num_frames=LENGTH, return_dict=False,
        )


@pytest.mark.parametrize("generation", ["2.0", "2.3"])
def test_diffusers_loads_the_file_and_computes_what_training_computed(generation: str, tmp_path: Path) -> None:
    trained = transformer(generation, layers=1)
    plain = copy.deepcopy(trained)
    adapter = adapted(trained)
    path = tmp_path / "lora.safetensors"
    UniversalFormat().write(path, adapter, {"base_model": "some/model", "trigger_words": "sks"})

    pipeline = LTX2Pipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(), vae=None, audio_vae=None, text_encoder=None, tokenizer=None,
        connectors=None, transformer=plain, vocoder=None,
    )
    before = output(plain)
    pipeline.load_lora_weights(str(tmp_path), weight_name=path.name)
    for got, expected, without in zip(output(plain), output(trained), before, strict=True):
        torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)
        assert (got - without).abs().max() > 0.05, "the adapter must matter, else this test shows nothing"


def test_file_holds_original_names_and_facts(tmp_path: Path) -> None:
    adapter = adapted(transformer("2.0", layers=1))
    path = tmp_path / "new" / "lora.safetensors"
    UniversalFormat().write(path, adapter, {"base_model": "some/model@abc", "trigger_words": "sks"})
    with safe_open(path, framework="pt") as file:
        names, metadata = set(file.keys()), file.metadata()
    assert "diffusion_model.transformer_blocks.0.audio_to_video_attn.to_out.0.lora_B.weight" in names
    assert "diffusion_model.audio_patchify_proj.lora_A.weight" in names
    assert len(names) == 2 * len(adapter.weights)
    assert all(name.endswith((".lora_A.weight", ".lora_B.weight")) for name in names)
    assert metadata["rank"] == "4"
    assert metadata["alpha"] == "10"
    assert metadata["trigger_words"] == "sks"
    assert json.loads(metadata["targets"]) == sorted(adapter.targets)
    assert [p.name for p in path.parent.iterdir()] == ["lora.safetensors"], "no partial file is left"


def as_written(adapter: AdapterState) -> dict[str, tuple[Tensor, Tensor]]:
    return {name: (a, b * adapter.alpha / adapter.rank) for name, (a, b) in adapter.weights.items()}


def test_reads_every_spelling(tmp_path: Path) -> None:
    adapter = adapted(transformer("2.0", layers=1))
    ours = tmp_path / "ours.safetensors"
    UniversalFormat().write(ours, adapter, {})
    stored = load_file(ours)

    comfy: dict[str, Tensor] = {}
    for key, value in stored.items():
        renamed = key.replace("lora_A", "lora_down").replace("lora_B", "lora_up")
        comfy[renamed] = value * RANK / ALPHA if "lora_B" in key else value
        comfy[key.split(".lora_")[0] + ".alpha"] = torch.tensor(ALPHA)
    save_file(comfy, tmp_path / "comfy.safetensors")

    diffusers = {f"transformer.{n}.lora_{x}.weight": t for n, pair in adapter.weights.items() for x, t in zip("AB", pair, strict=True)}
    noted = json.dumps({"transformer.r": RANK, "transformer.lora_alpha": ALPHA})
    save_file(diffusers, tmp_path / "diffusers.safetensors", metadata={"lora_adapter_metadata": noted})

    expected = as_written(adapter)
    for name in ("ours", "comfy", "diffusers"):
        path = tmp_path / f"{name}.safetensors"
        assert UniversalFormat().accepts(path)
        read = UniversalFormat().read(path)
        assert (read.rank, read.alpha) == (RANK, RANK)
        assert read.weights.keys() == expected.keys()
        for module, (down, up) in expected.items():
            assert torch.equal(read.weights[module][0], down)
            torch.testing.assert_close(read.weights[module][1], up)


@pytest.mark.parametrize("head", ["text_embedding_projection.aggregate_embed", "diffusion_model.video_embeddings_connector.x.to_q"])
def test_layers_of_the_text_connectors_are_left_out_and_that_is_said(head: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    pair = {"lora_A.weight": normal(RANK, 8, seed=1), "lora_B.weight": normal(6, RANK, seed=2)}
    key = "diffusion_model.transformer_blocks.0.attn1.to_q"
    save_file({f"{module}.{end}": tensor.clone() for module in (key, head) for end, tensor in pair.items()}, tmp_path / "both.safetensors")
    assert UniversalFormat().accepts(tmp_path / "both.safetensors")
    assert UniversalFormat().read(tmp_path / "both.safetensors").targets == ("transformer_blocks.0.attn1.to_q",)
    assert "both.safetensors also adapts the text connectors; these 2 tensors are left out" in caplog.text
    save_file({f"{head}.{end}": tensor for end, tensor in pair.items()}, tmp_path / "connectors.safetensors")
    assert not UniversalFormat().accepts(tmp_path / "connectors.safetensors")


def test_mixed_ranks_are_read_at_the_largest(tmp_path: Path) -> None:
    path = tmp_path / "mixed.safetensors"
    pairs = {"proj_in": (normal(2, 6, seed=1), normal(5, 2, seed=2)), "proj_out": (normal(4, 6, seed=3), normal(5, 4, seed=4))}
    save_file({f"transformer.{n}.lora_{x}.weight": t for n, pair in pairs.items() for x, t in zip("AB", pair, strict=True)}, path)
    read = UniversalFormat().read(path)
    assert read.rank == read.alpha == 4
    for name, (down, up) in pairs.items():
        assert read.weights[name][0].shape[0] == 4
        torch.testing.assert_close(read.weights[name][1] @ read.weights[name][0], up @ down)


def test_other_files_are_declined_with_the_key_that_does_not_fit(tmp_path: Path) -> None:
    half = tmp_path / "half.safetensors"
    save_file({"diffusion_model.transformer_blocks.0.attn1.to_q.lora_A.weight": torch.zeros(4, 8)}, half)
    with pytest.raises(CheckpointError, match=r"transformer_blocks\.0\.attn1\.to_q: A or B is missing"):
        UniversalFormat().read(half)
    other = tmp_path / "other.safetensors"
    save_file({"lora_unet_x.lora_up.weight": torch.zeros(4, 8)}, other)
    assert not UniversalFormat().accepts(other)
    with pytest.raises(CheckpointError, match="lora_unet_x"):
        UniversalFormat().read(other)
    text = tmp_path / "text.safetensors"
    text.write_text("no tensors")
    assert not UniversalFormat().accepts(text)
    with pytest.raises(CheckpointError, match="safetensors"):
        UniversalFormat().read(text)
    patterned = tmp_path / "patterned.safetensors"
    pair = {f"transformer.x.lora_{x}.weight": torch.zeros(2, 2) for x in "AB"}
    noted = json.dumps({"transformer.r": 2, "transformer.lora_alpha": 2, "transformer.alpha_pattern": {"x": 1}})
    save_file(pair, patterned, metadata={"lora_adapter_metadata": noted})
    with pytest.raises(CheckpointError, match="alpha_pattern"):
        UniversalFormat().read(patterned)


def test_write_refuses_what_is_no_adapter(tmp_path: Path) -> None:
    path = tmp_path / "lora.safetensors"
    with pytest.raises(CheckpointError, match="no pair of rank 4"):
        UniversalFormat().write(path, AdapterState({"proj_in": (torch.zeros(4, 8), torch.zeros(8, 3))}, 4, 4.0, ()), {})
    with pytest.raises(CheckpointError, match="no adapted layer"):
        UniversalFormat().write(path, AdapterState({}, 4, 4.0, ()), {})
    blocked = tmp_path / "file"
    blocked.write_text("")
    with pytest.raises(DiskError, match="cannot be written"):
        UniversalFormat().write(
            blocked / "lora.safetensors", AdapterState({"proj_in": (torch.zeros(4, 8), torch.zeros(8, 4))}, 4, 4.0, ()), {}
        )
    assert not path.exists()
