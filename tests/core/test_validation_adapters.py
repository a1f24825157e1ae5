"""Adapters beside the trained one: what the keys mean, where files are found, what a sample is made with, and that nothing stays behind."""

from __future__ import annotations

import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from huggingface_hub.errors import RepositoryNotFoundError
from huggingface_hub.utils import validate_repo_id
from safetensors.torch import save_file

from core.hub_stub import refusal
from tuner.builtins.formats import PeftFormat
from tuner.config.validation_settings import ValidationSettings
from tuner.errors import ConfigError, HubError
from tuner.interfaces.services import AdapterState
from tuner.model import hub
from tuner.model.adapters import ADAPTER, adapted_layers
from tuner.testing.project import TinyProject
from tuner.train.samples import adapters as sample_adapters
from tuner.train.samples.adapters import adapter_runs, added, locate_adapter
from tuner.train.samples.wanted import AdapterRun, AdapterUse

torch.set_num_threads(1)
CPU = torch.device("cpu")
SMALL: dict[str, Any] = {
    "validation_disable": False, "validation_resolution": "64x64", "validation_num_video_frames": 9, "validation_num_inference_steps": 1,
    "validation_guidance": 1, "validation_prompt": "waves", "max_train_steps": 1, "disable_benchmark": True,
}  # fmt: skip


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> TinyProject:
    made = TinyProject.make(tmp_path_factory.mktemp("adapters"))
    for seed, name in enumerate(("soft", "hard")):
        PeftFormat().write(made.folder / f"{name}.safetensors", adapter(made, seed), {})
    return made


def adapter(project: TinyProject, seed: int, rank: int = 3) -> AdapterState:
    """Random A and B for two layers of the tiny model."""
    draws = torch.Generator().manual_seed(seed)
    layers = {name: project_layer(project, name) for name in ("blocks.0.to_q", "blocks.2.to_v")}
    weights = {
        name: (torch.randn(rank, shape[1], generator=draws), torch.randn(shape[0], rank, generator=draws)) for name, shape in layers.items()
    }
    return AdapterState(weights, rank, 6.0, tuple(weights))


def project_layer(project: TinyProject, name: str) -> tuple[int, ...]:
    return project.plan().source.headers("transformer")[f"{name}.weight"].shape


def runs(**keys: object) -> tuple[AdapterRun, ...]:
    return adapter_runs(ValidationSettings.model_validate(keys))


# --- what the keys mean ------------------------------------------------------------------------------------------
def test_one_adapter_with_its_strength() -> None:
    assert runs() == ()
    assert runs(validation_adapter_path="owner/name:sub/soft.safetensors", validation_adapter_strength=0.5) == (
        AdapterRun("soft", (AdapterUse("owner/name:sub/soft.safetensors", 0.5),)),
    )
    assert [run.name for run in runs(validation_adapter_path="owner/some-lora")] == ["some-lora"]


@pytest.mark.parametrize(
    "config",
    [
        {"soft": "a.safetensors", "both": [{"path": "a.safetensors", "strength": 0.5}, "b.safetensors"]},
        {"soft": {"path": "a.safetensors"}, "both": {"adapters": [{"path": "a.safetensors", "strength": 0.5}, "b.safetensors"]}},
        [{"label": "soft", "path": "a.safetensors"},
         {"name": "both", "adapters": [{"path": "a.safetensors", "strength": 0.5}, "b.safetensors"]}],
        {"runs": [{"label": "soft", "path": "a.safetensors", "strength": 1},
                  {"label": "both", "adapters": [{"path": "a.safetensors", "strength": 0.5}, {"path": "b.safetensors"}]}]},
    ],
)  # fmt: skip
def test_layouts_of_a_list_that_mean_the_same(config: object, tmp_path: Path) -> None:
    expected = [("soft", [("a.safetensors", 1.0)]), ("both", [("a.safetensors", 0.5), ("b.safetensors", 1.0)])]
    (tmp_path / "runs.json").write_text(json.dumps(config))
    for given in (config, str(tmp_path / "runs.json")):
        found = runs(validation_adapter_config=given)
        assert [(run.name, [(use.path, use.strength) for use in run.uses]) for run in found] == expected


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"soft": 3}, ["validation_adapter_config.soft", "path", "3"]),
        ({"soft": {"path": "a", "strenght": 1}}, ["validation_adapter_config.soft", "strenght", "strength"]),
        ({"soft": {"path": "a", "strength": math.nan}}, ["validation_adapter_config.soft.strength", "finite"]),
        ({"soft": {"path": "a", "strength": 10**400}}, ["validation_adapter_config.soft.strength", "finite"]),
        ({"soft": {"strength": 1}}, ["validation_adapter_config.soft", "`path` or `adapters`"]),
        ({"soft": {"path": "a", "strength": "much"}}, ["validation_adapter_config.soft.strength", "much"]),
        ({"soft": {"path": ""}}, ["validation_adapter_config.soft.path"]),
        ({"soft": {"adapters": ["a"], "strength": 1}}, ["validation_adapter_config.soft", "`strength` belongs to each"]),
    ],
)
def test_mistakes_in_a_list_are_named(config: object, words: list[str]) -> None:
    with pytest.raises(ConfigError) as raised:
        runs(validation_adapter_config=config)
    assert [word for word in words if word not in str(raised.value)] == []


def test_a_file_that_holds_no_list(tmp_path: Path) -> None:
    (tmp_path / "number.json").write_text("3")
    with pytest.raises(ConfigError, match=r"validation_adapter_config: must be an object or a list"):
        runs(validation_adapter_config=str(tmp_path / "number.json"))


# --- where it is -------------------------------------------------------------------------------------------------
def test_files_and_folders_on_this_disk(project: TinyProject) -> None:
    folder = project.folder
    assert locate_adapter(str(folder / "soft.safetensors"), "key") == folder / "soft.safetensors"
    assert locate_adapter(f"{folder}:hard.safetensors", "key") == folder / "hard.safetensors"
    with pytest.raises(ConfigError, match=r"(?s)key: there is no such file in that folder.*hard.safetensors, soft.safetensors"):
        locate_adapter(f"{folder}:softer.safetensors", "key")
    with pytest.raises(ConfigError, match=r"key: there is no such file or folder.*soft.safetensors"):
        locate_adapter("elsewhere/soft.safetensors", "key")


class Hub:
    """In place of the hub's client: one repository with one adapter, one with two."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.asked: list[str] = []
        self.downloaded: list[str] = []

    def model_info(self, name: str, **_: object) -> SimpleNamespace:
        validate_repo_id(name)
        self.asked.append(name)
        if name == "ann/gone":
            raise refusal(404, RepositoryNotFoundError)
        files = ["README.md", "soft.safetensors"] + (["x/hard.safetensors"] if name == "ann/two" else [])
        return SimpleNamespace(sha="c0ffee", gated=False, siblings=[SimpleNamespace(rfilename=file, size=9) for file in files])

    def download(self, repository: str, file: str, revision: str) -> str:
        assert revision == "c0ffee"
        self.downloaded.append(f"{repository}:{file}")
        return str(self.folder / file)


@pytest.fixture
def remote(project: TinyProject, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Hub:
    found = Hub(project.folder)
    monkeypatch.setattr(hub, "HfApi", lambda: found)
    monkeypatch.setattr(hub, "hf_hub_download", found.download)
    monkeypatch.setattr(hub, "try_to_load_from_cache", lambda *_, **__: None)
    monkeypatch.setattr(hub.constants, "HF_HUB_CACHE", str(tmp_path))
    return found


def test_files_of_the_hub(project: TinyProject, remote: Hub) -> None:
    assert locate_adapter("ann/two:x/hard.safetensors", "key") == project.folder / "x" / "hard.safetensors"
    assert locate_adapter("ann/one", "key") == project.folder / "soft.safetensors"
    assert remote.downloaded == ["ann/two:x/hard.safetensors", "ann/one:soft.safetensors"]
    assert locate_adapter("ann/two:soft.safetensors", "key", preview=True) is None and len(remote.downloaded) == 2
    with pytest.raises(ConfigError, match=r"(?s)2 .safetensors files.*ann/two:FILE with one of: soft.safetensors, x/hard.safetensors"):
        locate_adapter("ann/two", "key")
    with pytest.raises(HubError, match=r"(?s)key: ann/one: the repository has no such file.*gone.safetensors.*one of: soft.safetensors"):
        locate_adapter("ann/one:gone.safetensors", "key")
    with pytest.raises(HubError, match="key: ann/gone: there is no such repository"):
        locate_adapter("ann/gone:a.safetensors", "key")
    with pytest.raises(HubError, match=r"key: ann/\.\.a: is no name of a repository"):
        locate_adapter("ann/..a:a.safetensors", "key")


def test_without_a_network_the_cache_answers(project: TinyProject, remote: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    def unreachable(*_: object, **__: object) -> None:
        raise ConnectionError("no network")

    monkeypatch.setattr(remote, "model_info", unreachable)
    with pytest.raises(HubError, match="key: ann/one: the hub cannot be reached"):
        locate_adapter("ann/one", "key")
    known = hub.Repository("ann/one", "c0ffee", {"soft.safetensors": 9}, snapshot=project.folder)
    monkeypatch.setattr(hub, "_cached", lambda *_: known)
    assert locate_adapter("ann/one", "key") == project.folder / "soft.safetensors" and not remote.downloaded
    with pytest.raises(HubError, match=r"(?s)the hub cannot be reached, and the file is not in its cache.*gone.safetensors"):
        locate_adapter("ann/one:gone.safetensors", "key")


def test_a_plan_that_is_only_looked_at_names_the_download(project: TinyProject, remote: Hub) -> None:
    plan = project.plan(**SMALL)
    checked = sample_adapters.check_runs(plan, runs(validation_adapter_path="ann/two:soft.safetensors"), preview=True)
    assert checked.problems == () and checked.downloads == ("adapter ann/two:soft.safetensors",) and not remote.downloaded


def test_the_hub_is_asked_while_planning_and_not_for_each_sample(project: TinyProject, remote: Hub) -> None:
    run = project.trial(peft_lora_target_modules=["to_q"])
    (checked,) = sample_adapters.check_runs(project.plan(), runs(validation_adapter_path="ann/one"), preview=False).runs
    with sample_adapters.beside(run.assembly.training.model, project.registry, checked, CPU):
        pass
    assert remote.asked == ["ann/one"] and checked.uses[0].place == project.folder / "soft.safetensors"


# --- what it does ------------------------------------------------------------------------------------------------
def test_a_layer_gives_the_adapters_share_too_and_only_inside(project: TinyProject) -> None:
    """y = W·x + trained + strength · alpha / rank · B·A·x, for a layer that is trained and for one that is not."""
    run = project.trial(peft_lora_target_modules=["to_q"])
    model, extra = run.assembly.training.model.eval(), adapter(project, 0)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for name in ("blocks.0.to_q", "blocks.2.to_v"):
        layer = model.get_submodule(name)
        assert (name in adapted_layers(model)) == (name == "blocks.0.to_q")
        x = torch.randn(2, 5, layer.in_features, generator=torch.Generator().manual_seed(1))
        plain, (down, up) = layer(x), extra.weights[name]
        with added(model, extra, 0.5, CPU):
            torch.testing.assert_close(layer(x), plain + 0.5 * 6.0 / 3 * (x @ down.T @ up.T))
        assert torch.equal(layer(x), plain)
    after = model.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(tensor, after[name]) for name, tensor in before.items())
    assert ADAPTER in adapted_layers(model)["blocks.0.to_q"].lora_A


def test_samples_with_each_adapter_and_without(project: TinyProject) -> None:
    """Equal adapters of strength 0 give the plain clip, bit for bit; the weights of the run are those of one without adapters."""
    config = {"off": {"path": str(project.folder / "soft.safetensors"), "strength": 0}, "soft": str(project.folder / "soft.safetensors"),
              "both": [str(project.folder / "soft.safetensors"), str(project.folder / "hard.safetensors")]}  # fmt: skip
    project.train(**SMALL, output_dir="with", validation_adapter_config=config, validation_adapter_mode="comparison")
    clips = {path.stem: path.read_bytes() for path in (project.folder / "with/validation/step_1").iterdir()}
    assert sorted(clips) == ["sample", "sample-with-both", "sample-with-off", "sample-with-soft"]
    assert clips["sample"] == clips["sample-with-off"]
    assert len({clips[name] for name in ("sample", "sample-with-soft", "sample-with-both")}) == 3
    project.train(**SMALL, output_dir="without")
    assert (project.folder / "without/validation/step_1/sample.mp4").read_bytes() == clips["sample"]
    trained, plain = ((project.folder / out / "checkpoint-1" / "weights.safetensors").read_bytes() for out in ("with", "without"))
    assert trained == plain
    project.train(**SMALL, output_dir="only", validation_adapter_path=str(project.folder / "soft.safetensors"))
    (clip,) = (project.folder / "only/validation/step_1").iterdir()
    assert clip.name == "sample-with-soft.mp4" and clip.read_bytes() == clips["sample-with-soft"]


def test_an_adapter_that_does_not_fit_is_named_before_training(project: TinyProject, tmp_path: Path) -> None:
    pair = {"lora_A.weight": torch.zeros(2, 5), "lora_B.weight": torch.zeros(4, 2)}
    for name, layer in (("shape", "blocks.0.to_q"), ("layer", "blocks.99.to_q")):
        save_file({f"transformer.{layer}.{end}": tensor.clone() for end, tensor in pair.items()}, tmp_path / f"{name}.safetensors")
    (tmp_path / "text.safetensors").write_text("no tensors")
    expected = {
        "shape": "adapter 4x5, model", "layer": "blocks.99.to_q: the model has no such layer", "text": "is damaged, or no safetensors file",
    }  # fmt: skip
    for name, words in expected.items():
        with pytest.raises(ConfigError) as raised:
            project.plan(**SMALL, validation_adapter_path=str(tmp_path / f"{name}.safetensors"))
        assert words in str(raised.value) and raised.value.exit_code == 6


def test_adapters_without_samples_are_a_notice(project: TinyProject) -> None:
    plan = project.plan(**{**SMALL, "validation_prompt": ""}, validation_adapter_path=str(project.folder / "soft.safetensors"))
    assert [notice for notice in plan.notices if "no samples are made that an adapter could be put to" in notice]
