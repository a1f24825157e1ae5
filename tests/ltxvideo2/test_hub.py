"""The hub: pinned commits, the flavour's files and no others, licences told first, broken downloads, no network at all, dry runs."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from huggingface_hub import HfApi, constants
from huggingface_hub.errors import HfHubHTTPError

from ltxvideo2.ltx2_hub import COMMIT, FakeHub, serve
from tuner.config.resolve import Settings, resolve
from tuner.config.settings import ModelSettings
from tuner.errors import CheckpointError, ConfigError, DiskError, HubError
from tuner.interfaces.family import BuildContext
from tuner.plugins.loader import load_plugins
from tuner.train.samples.validate import adjustments, planned_request
from tuner_ltxvideo2 import hub
from tuner_ltxvideo2.family import LTX2Family
from tuner_ltxvideo2.loading import CombinedFile
from tuner_ltxvideo2.options import LTX2Options
from tuner_ltxvideo2.sampling import schedule
from tuner_ltxvideo2.tiny import TinyPaths
from tuner_ltxvideo2.variants import variant_of

DEV = "ltx-2.3-22b-dev.safetensors"


@pytest.fixture
def online(tiny20: TinyPaths, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    """LTX-2 with its text encoder, LTX-2.3 without; an empty cache."""
    with serve() as server:
        text = {f"text_encoder/{name}": tiny20.text_encoder / name for name in ("config.json", "model.safetensors")}
        text["tokenizer/tokenizer.json"] = tiny20.text_encoder / "tokenizer.json"
        readme = tmp_path / "README.md"
        readme.write_text("about")
        server.repositories["Lightricks/LTX-2"] = {"ltx-2-19b-dev.safetensors": tiny20.checkpoint, **text, "README.md": readme}
        server.repositories["Lightricks/LTX-2.3"] = {DEV: tiny20.checkpoint}
        for name in ("distilled", "distilled-1.1", "distilled-lora-384"):
            file = tmp_path / f"ltx-2.3-22b-{name}.safetensors"
            file.write_text(name)
            server.repositories["Lightricks/LTX-2.3"][file.name] = file
        monkeypatch.setattr(constants, "ENDPOINT", server.url)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", server.url + "/{repo_id}/resolve/{revision}/{filename}")
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        yield server


def asked(server: FakeHub) -> set[str]:
    return {path for path, _ in server.asked}


def test_the_flavours_files_at_a_commit_and_no_others(online: FakeHub, tmp_path: Path) -> None:
    found = hub.locate_model("", "v1", "2.3-dev", "", tmp_path)
    assert found.description == f"Lightricks/LTX-2.3@{COMMIT}"
    assert found.weights.name == DEV
    assert COMMIT in found.weights.parts
    assert found.text_encoder is not None
    assert (found.text_encoder / "model.safetensors").is_file()
    assert asked(online) == {DEV, "text_encoder/config.json", "text_encoder/model.safetensors", "tokenizer/tokenizer.json"}
    hub.locate_model("", "", "2.3-distilled", "", tmp_path)
    assert "ltx-2.3-22b-distilled-1.1.safetensors" in asked(online)
    assert "ltx-2.3-22b-distilled.safetensors" not in asked(online)


def test_a_licence_that_was_not_accepted_is_told_before_anything_is_downloaded(online: FakeHub, tmp_path: Path) -> None:
    for gated in ("Lightricks/LTX-2.3", "Lightricks/LTX-2"):  # the weights', and the text encoder's
        online.gated = {gated}
        with pytest.raises(HubError, match="licence") as caught:
            hub.locate_model("", "", "2.3-dev", "", tmp_path)
        assert f"https://huggingface.co/{gated}" in str(caught.value)
        assert "hf auth login" in str(caught.value)
    assert not online.asked


def test_a_download_that_breaks_off_goes_on(online: FakeHub, tiny20: TinyPaths, tmp_path: Path) -> None:
    online.break_after[DEV] = 12_000_000
    found = hub.locate_model("", "", "2.3-dev", "", tmp_path)
    assert found.weights.read_bytes() == tiny20.checkpoint.read_bytes()
    ranges = [wanted for path, wanted in online.asked if path == DEV]
    assert len(ranges) == 2
    assert 0 < int(ranges[1].removeprefix("bytes=").partition("-")[0]) <= 12_000_000


def test_without_a_network_the_cache_does(online: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = hub.locate_model("", "", "2.3-dev", "", tmp_path)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert hub.locate_model("", "", "2.3-dev", "", tmp_path) == first
    with pytest.raises(HubError, match="the cache lacks") as caught:
        hub.locate_model("", "", "2.3-distilled", "", tmp_path)
    assert caught.value.exit_code == 8
    with pytest.raises(HubError, match="cannot be reached"):
        hub.locate_model("somebody/else", "", "", "", tmp_path)


@pytest.mark.parametrize("error", [OSError, HfHubHTTPError.__bases__[0]], ids=["system", "http"])
def test_an_unreachable_hub_is_told_in_words(error: type[Exception], online: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise error("no route")

    monkeypatch.setattr(HfApi, "model_info", fail)
    with pytest.raises(HubError, match="cannot be reached") as caught:
        hub.resolve_location("somebody/model")
    assert caught.value.exit_code == 8


def test_unknown_names_are_told(online: FakeHub, tmp_path: Path) -> None:
    with pytest.raises(HubError, match="no such repository or revision"):
        hub.locate_model("somebody/else", "", "", "", tmp_path)
    with pytest.raises(HubError, match="no such repository or revision"):
        hub.locate_model("", "nowhere", "2.3-dev", "", tmp_path)
    with pytest.raises(ConfigError, match="no such flavour"):
        hub.locate_model("", "", "9.9", "", tmp_path)
    with pytest.raises(CheckpointError, match="exactly one"):
        hub.locate_model("Lightricks/LTX-2.3", "", "dev", "", tmp_path)
    with pytest.raises(CheckpointError, match=r"ltx-2-19b-dev-fp8\.safetensors"):
        hub.locate_model("", "", "dev-fp8", "", tmp_path)


def test_a_disk_that_is_too_small_is_told_before_the_download(
    online: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda place: type("Usage", (), {"free": 1000}))
    with pytest.raises(DiskError, match="would be downloaded"):
        hub.locate_model("", "", "2.3-dev", "", tmp_path)
    assert not online.asked


def test_a_plan_that_is_only_looked_at_reads_headers(online: FakeHub, tiny20: TinyPaths, tmp_path: Path) -> None:
    family = LTX2Family(LTX2Options(), BuildContext(torch.device("cpu"), torch.float32, 0, 0, tmp_path))
    scratch = tmp_path / "scratch"
    found = family.preview(ModelSettings(), scratch)
    assert found.weights.is_relative_to(scratch)
    assert found.weights.stat().st_size > 0.99 * tiny20.checkpoint.stat().st_size
    assert found.weights.stat().st_blocks * 512 < 2_000_000  # a hole
    whole = [path for path, wanted in online.asked if not wanted]
    assert whole == ["text_encoder/config.json"]
    assert all(int(wanted.rpartition("-")[2]) < 1_000_000 for _, wanted in online.asked if wanted)
    assert [text for text in found.downloads if f"Lightricks/LTX-2@{COMMIT}" in text and "GB" in text]
    source = CombinedFile().open(found.weights, found.description)
    assert variant_of(source).name == "2.0"
    assert family.encoders(source, ("video", "audio"))  # the text encoder's configuration fits
    # once all is here nothing is to be downloaded, and nothing is copied
    family.locate(ModelSettings(), tmp_path)
    assert family.preview(ModelSettings(), tmp_path / "again").downloads == ()


def test_the_transformer_of_a_flavour_in_a_folder_of_diffusers(online: FakeHub, tiny20: TinyPaths, tmp_path: Path) -> None:
    empty = tmp_path / "config.json"
    empty.write_text("{}")
    folders = ("transformer", "transformer_full", "connectors", "vae", "text_encoder", "diffusion_decoder")
    online.repositories["Lightricks/LTX-2.5-Diffusers"] = {f"{folder}/config.json": empty for folder in folders}
    full = hub.locate_model("Lightricks/LTX-2.5-Diffusers", "", "2.5-dev", "", tmp_path)
    assert full.weights.name == "transformer_full"
    assert not (full.weights.parent / "transformer").exists()
    distilled = hub.locate_model("Lightricks/LTX-2.5-Diffusers", "", "2.5-distilled", "", tmp_path)
    assert (distilled.weights / "transformer" / "config.json").is_file()
    assert not (distilled.weights / "diffusion_decoder").exists()


def test_what_counts_as_distilled() -> None:
    assert hub.is_distilled("", "2.5-distilled")
    assert not hub.is_distilled("", "")
    assert hub.is_distilled("/models/ltx-2-19b-distilled.safetensors", "")
    assert not hub.is_distilled("/models/ltx-2-19b-distilled.safetensors", "dev")


def test_a_distilled_models_sample_has_its_own_steps_unless_they_are_set(tmp_path: Path) -> None:
    registry = load_plugins()
    family = LTX2Family(LTX2Options(), BuildContext(torch.device("cpu"), torch.float32, 0, 0, tmp_path))

    def settings(**flags: str) -> Settings:
        given = {"model_family": "ltxvideo2", "validation_prompt": "rain", **flags}
        return resolve(registry.option_types, config_file=None, flags=given, environ={}, hint=registry.hint())

    plain, few = settings(), settings(model_flavour="2.3-distilled")
    assert [(r.steps, r.guidance) for r in (planned_request(family, s, sound=True) for s in (plain, few))] == [(40, 5.0), (8, 1.0)]
    said = adjustments(family, few)
    assert [text.split(" (")[0] for text in said if "steps" in text or "guidance" in text] == [
        "validation_num_inference_steps: 40 -> 8", "validation_guidance: 5 -> 1"
    ]  # fmt: skip
    chosen = settings(model_flavour="2.3-distilled", validation_num_inference_steps="40")
    assert planned_request(family, chosen, sound=True).steps == 40
    assert not [text for text in adjustments(family, chosen) if "steps" in text]


def test_a_distilled_models_noise_levels() -> None:
    few = schedule(8, 1000, LTX2Family.token_shift, distilled=True)
    torch.testing.assert_close(few, torch.tensor([1.0, 0.99375, 0.9875, 0.98125, 0.975, 0.909375, 0.725, 0.421875, 0.0]))
    assert torch.equal(schedule(9, 1000, LTX2Family.token_shift, distilled=True), schedule(9, 1000, LTX2Family.token_shift))
