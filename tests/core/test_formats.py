"""The peft adapter file: round trip, and diffusers computing the same with it."""

from __future__ import annotations

import json
import os
import stat
from pathlib import Path

import pytest
import torch
from diffusers.models import SanaTransformer2DModel
from safetensors import safe_open
from safetensors.torch import save_file

from tuner.builtins.formats import FILE_NAME, METADATA_KEY, PeftFormat
from tuner.config.settings import AdapterSettings
from tuner.errors import CheckpointError, DiskError
from tuner.interfaces.services import AdapterState
from tuner.model.adapters import adapter_state, add_adapters, resolve_targets
from tuner.tensor_files import write_tensors


def state() -> AdapterState:
    draws = torch.Generator().manual_seed(0)
    names = ("blocks.0.to_q", "blocks.1.to_q")
    weights = {name: (torch.randn(4, 8, generator=draws), torch.randn(6, 4, generator=draws)) for name in names}
    return AdapterState(weights, rank=4, alpha=2.5, targets=tuple(weights))


def rewritten(path: Path, tensors: dict[str, torch.Tensor], metadata: dict[str, str] | None = None) -> Path:
    save_file(tensors, path, metadata=metadata)
    return path


def tensors_of(adapter: AdapterState) -> dict[str, torch.Tensor]:
    return {
        f"transformer.{name}.lora_{letter}.weight": tensor
        for name, pair in adapter.weights.items() for letter, tensor in zip("AB", pair, strict=True)
    }


def test_round_trip(tmp_path: Path) -> None:
    path = tmp_path / "deep" / FILE_NAME
    written = state()
    PeftFormat().write(path, written, {"base_model": "some/model"})
    assert PeftFormat().accepts(path)
    read = PeftFormat().read(path)
    assert (read.rank, read.alpha, read.targets) == (written.rank, written.alpha, written.targets)
    assert set(read.weights) == set(written.weights)
    for name, pair in written.weights.items():
        assert all(torch.equal(one, other) for one, other in zip(pair, read.weights[name], strict=True))
    with safe_open(path, framework="pt") as file:
        assert set(file.keys()) == set(tensors_of(written))
        assert file.metadata()["base_model"] == "some/model"
        assert json.loads(file.metadata()[METADATA_KEY])["transformer.lora_alpha"] == 2.5
    assert [entry.name for entry in path.parent.iterdir()] == [FILE_NAME]


def tiny_transformer() -> SanaTransformer2DModel:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return SanaTransformer2DModel(
            sample_size=4, in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=4, num_layers=2,
            num_cross_attention_heads=2, cross_attention_head_dim=4, cross_attention_dim=8, caption_channels=8,
        ).eval()


@torch.no_grad()
def output(model: SanaTransformer2DModel) -> torch.Tensor:
    draws = torch.Generator().manual_seed(1)
    latents, text = torch.randn(1, 4, 4, 4, generator=draws), torch.randn(1, 3, 8, generator=draws)
    sample: torch.Tensor = model(latents, encoder_hidden_states=text, timestep=torch.tensor([500.0])).sample
    return sample


def test_diffusers_computes_the_same_with_the_file(tmp_path: Path) -> None:
    trained = tiny_transformer()
    base = output(trained)
    add_adapters(trained, resolve_targets(trained, "to_q,to_out.0,proj_out", []), AdapterSettings(lora_rank=4, lora_alpha=6.0), seed=1)
    with torch.no_grad():
        for parameter in trained.parameters():
            if parameter.requires_grad:
                parameter.copy_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(2)))
    PeftFormat().write(tmp_path / FILE_NAME, adapter_state(trained, 4, 6.0), {})
    loaded = tiny_transformer()
    loaded.load_lora_adapter(tmp_path, weight_name=FILE_NAME, use_safetensors=True, local_files_only=True)
    assert not torch.allclose(output(trained), base)
    torch.testing.assert_close(output(loaded), output(trained), rtol=1e-6, atol=1e-6)


def test_without_metadata_alpha_is_the_rank(tmp_path: Path) -> None:
    read = PeftFormat().read(rewritten(tmp_path / "a.safetensors", tensors_of(state())))
    assert (read.rank, read.alpha, set(read.targets)) == (4, 4.0, set(state().weights))


def test_other_files_are_not_accepted(tmp_path: Path) -> None:
    (tmp_path / "text.safetensors").write_text("no header")
    assert not PeftFormat().accepts(tmp_path / "text.safetensors")
    assert not PeftFormat().accepts(tmp_path / "absent.safetensors")
    other = {key.replace("transformer.", "diffusion_model."): tensor for key, tensor in tensors_of(state()).items()}
    path = rewritten(tmp_path / "other.safetensors", other)
    assert not PeftFormat().accepts(path)
    with pytest.raises(CheckpointError, match="4 of 4 tensors do not belong"):
        PeftFormat().read(path)
    with pytest.raises(CheckpointError, match="cannot be read as a safetensors file"):
        PeftFormat().read(tmp_path / "text.safetensors")


def test_damaged_files_are_named(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    tensors = tensors_of(state())
    missing = {key: tensor for key, tensor in tensors.items() if key != "transformer.blocks.1.to_q.lora_B.weight"}
    with pytest.raises(CheckpointError, match=r"transformer\.blocks\.1\.to_q\.lora_B\.weight is missing"):
        PeftFormat().read(rewritten(path, missing))
    with pytest.raises(CheckpointError, match="not all of one rank"):
        PeftFormat().read(rewritten(path, {**tensors, "transformer.blocks.0.to_q.lora_A.weight": torch.zeros(3, 8)}))
    for described, message in {
        "{": "is not JSON", "[]": "is not a JSON object", '{"transformer.lora_alpha": 0}': "not a positive number",
        '{"transformer.r": 8}': "the metadata's rank", '{"transformer.alpha_pattern": {"a": 1}}': "differ between modules",
    }.items():
        with pytest.raises(CheckpointError, match=message):
            PeftFormat().read(rewritten(path, tensors, {METADATA_KEY: described}))


def test_a_folder_that_cannot_be_written_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(DiskError, match="cannot be written"):
        PeftFormat().write(tmp_path / "file" / FILE_NAME, state(), {})


def test_a_written_file_can_be_read_by_those_whom_the_umask_allows(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        write_tensors(tmp_path / "deep" / "a.safetensors", {"x": torch.ones(2)}, {"k": "v"}, what="the file")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "deep" / "a.safetensors").stat().st_mode) == 0o640
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["a.safetensors"]


def test_a_file_that_cannot_be_written_leaves_the_old_one(tmp_path: Path) -> None:
    target = tmp_path / "a.safetensors"
    write_tensors(target, {"x": torch.ones(2)}, {}, what="the file")
    whole = target.read_bytes()
    (tmp_path / "a.safetensors.part").mkdir()
    with pytest.raises(DiskError, match="the file cannot be written"):
        write_tensors(target, {"x": torch.zeros(2)}, {}, what="the file")
    assert target.read_bytes() == whole
