"""The example plugins in whole runs, alone and together: streamed, kept and recomputed, resumed, refused; and found as installed.

What each computes is tested beside it, in `examples/plugins/*/tests`.
"""

from __future__ import annotations

import importlib
import json
import os
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from architecture.source_files import python_files
from architecture.test_boundaries import PUBLIC_FOR_PLUGINS, layer
from integration.project import Project, add_clip
from offload.simulated import SimulatedLink
from tuner.config.resolve import resolve
from tuner.plugins.loader import load_plugins
from tuner.plugins.registry import Registry
from tuner.train.plan import PlanProblems
from tuner.train.saving.checkpoint import load_checkpoint
from tuner.train.session import Silence, train
from tuner_ltxvideo2.tiny import TinyPaths
from tuner_offload import group

Keys = dict[str, object]

FOLDERS = sorted(path.parent for path in (Path(__file__).parents[2] / "examples" / "plugins").glob("*/pyproject.toml"))
STREAMED: Keys = {"enable_group_offload": True, "group_offload_use_stream": True}
CASES: Mapping[str, Keys] = {
    "sigma-weighting": {"sigma_weighting": "min_snr"},
    "layersync": {"layersync_weight": 0.5},
    "ema-teacher": {"ema_teacher_weight": 0.5, "ema_teacher_decay": 0.5},
    "prior-preservation": {"prior_dataset": "faces"},
}
ALL: Keys = {key: value for case in CASES.values() for key, value in case.items()} | {"gradient_accumulation_steps": 2}
TERMS = {"layersync": "loss/layersync", "ema-teacher": "loss/ema_teacher", "prior-preservation": "loss/prior"}


def entry_point(folder: Path) -> tuple[str, str]:
    """Name and module of the plugin, as its project file says."""
    declared = tomllib.loads((folder / "pyproject.toml").read_text())["project"]["entry-points"]["tuner"]
    ((name, module),) = declared.items()
    return name, module


@dataclass
class Bench:
    """A project with two datasets whose cache all runs share, and the four plugins."""

    project: Project
    registry: Registry
    links: list[SimulatedLink] = field(default_factory=list)
    residents: dict[str, Path] = field(default_factory=dict)

    def train(self, out: str, keys: Keys, *, dry_run: bool = False, registry: Registry | None = None, **changes: object) -> Path:
        """Three steps; returns the folder."""
        folder, chosen = self.project.folder / out, registry or self.registry
        own: Keys = {
            "max_train_steps": 3, "checkpoint_step_interval": 0, "output_dir": str(folder), "data": None,
            "data_backend_config": str(self.project.folder / "datasets.json"),
        }  # fmt: skip
        settings = resolve(chosen.option_types, config_file=self.project.config(**{**own, **keys, **changes}))
        assert train(chosen, settings, Silence(), dry_run=dry_run).exit_code == 0
        return folder

    def resident(self, name: str) -> Path:
        """The run of a case with all weights on the device; with a checkpoint after the second step."""
        if name not in self.residents:
            keys = ALL if name == "all" else CASES.get(name, {})
            self.residents[name] = self.train(f"resident {name}", keys, checkpoint_step_interval=2)
        return self.residents[name]


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory, tiny: TinyPaths) -> Iterator[Bench]:
    folder = tmp_path_factory.mktemp("examples")
    names = {"anna": ("amber", "birch"), "faces": ("cedar", "dusk")}
    for dataset, clips in names.items():
        for clip in clips:
            add_clip(folder / dataset, clip)
    entries = [{"id": dataset, "instance_data_dir": str(folder / dataset)} for dataset in names]
    (folder / "datasets.json").write_text(json.dumps(entries))
    plugins = [entry_point(path) for path in FOLDERS]
    registry = load_plugins({}, extra=[(name, importlib.import_module(module)) for name, module in plugins])
    made = Bench(Project(folder, tiny), registry)

    def link_to(device: torch.device, stream: bool = True) -> SimulatedLink:
        made.links.append(SimulatedLink())
        return made.links[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(group, "link_to", link_to)
        yield made


def assert_same_run(one: Path, other: Path) -> None:
    """Adapter, metrics, and all that a resume starts from, to the last bit."""
    assert (one / "metrics.jsonl").read_text() == (other / "metrics.jsonl").read_text()
    found, expected = (load_checkpoint(folder / "checkpoint-3").parts for folder in (one, other))
    assert found.keys() == expected.keys()
    for part in expected:
        assert found[part].keys() == expected[part].keys()
        assert all(torch.equal(found[part][name], tensor) for name, tensor in expected[part].items()), part


def adapter(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "lora.safetensors")


# --- one after the other -----------------------------------------------------------------------------------------
def test_switched_off_they_change_no_bit(bench: Bench) -> None:
    without = bench.train("without", {}, registry=load_plugins({}))
    assert_same_run(bench.resident("off"), without)


@pytest.mark.parametrize("name", CASES)
def test_each_has_an_effect_and_is_logged(name: str, bench: Bench) -> None:
    plain, found = adapter(bench.resident("off")), adapter(bench.resident(name))
    assert plain.keys() == found.keys()
    assert not all(torch.equal(plain[key], found[key]) for key in plain)
    rows = bench.project.metrics(f"resident {name}")
    assert name not in TERMS or any(TERMS[name] in row for row in rows)
    assert rows[0]["loss/video"] == bench.project.metrics("resident off")[0]["loss/video"]  # what is logged is not weighed


@pytest.mark.parametrize("name", [*CASES, "all"])
def test_streamed_weights_change_no_bit(name: str, bench: Bench) -> None:
    """The forward passes of teachers stream as well: what they leave behind must fit the step."""
    expected, before = bench.resident(name), len(bench.links)
    assert_same_run(bench.train(f"streamed {name}", {**(ALL if name == "all" else CASES[name]), **STREAMED}), expected)
    [link] = bench.links[before:]
    assert link.loads > 0 and not link.slots


# --- together ----------------------------------------------------------------------------------------------------
def test_all_four_are_resumed_exactly(bench: Bench) -> None:
    whole = bench.resident("all")
    folder = bench.project.folder / "resumed"
    shutil.copytree(whole, folder)
    shutil.rmtree(folder / "checkpoint-3")
    bench.train(folder.name, ALL, resume_from_checkpoint="latest")
    assert_same_run(folder, whole)
    assert bench.project.events("training", folder.name)[-1]["from_step"] == 2
    average = load_checkpoint(whole / "checkpoint-2").parts["regularizer-ema_teacher"]
    trained = load_checkpoint(whole / "checkpoint-2").parts["weights"]
    assert average.keys() == trained.keys() and any(not torch.equal(average[name], trained[name]) for name in average)


def test_the_loss_is_what_they_make_of_the_terms(bench: Bench) -> None:
    """With dropped prior samples and weights by noise level, which the logged terms do not show, the sum is another."""
    for row in bench.project.metrics(bench.resident("layersync").name):
        assert row["loss"] == pytest.approx(row["loss/video"] + row["loss/audio"] + 0.5 * row["loss/layersync"], rel=1e-5)
    first = bench.project.metrics(bench.resident("prior-preservation").name)[0]
    assert first.get("loss/prior", 0) == 0  # the adapter starts as nothing
    rows = bench.project.metrics(bench.resident("all").name)
    assert all({"loss/layersync", "loss/ema_teacher", "loss/prior"} <= set(row) for row in rows)


def test_kept_activations_change_no_bit(bench: Bench) -> None:
    """Beside dropped tokens too: one of the compared blocks lies inside the route, the other behind it."""
    assert_same_run(bench.train("kept", ALL, gradient_checkpointing=False), bench.resident("all"))
    routed = {**ALL, "tread_config": {"routes": [{"selection_ratio": 0.5, "start_layer_idx": 1, "end_layer_idx": 1}]}}
    recomputed = bench.train("routed", routed)
    assert_same_run(bench.train("routed and kept", routed, gradient_checkpointing=False), recomputed)
    assert bench.project.metrics("routed")[0]["loss/layersync"] != bench.project.metrics("resident all")[0]["loss/layersync"]


# --- refused -----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("dry_run", [True, False])
def test_all_that_is_wrong_is_said_at_once_while_planning(bench: Bench, dry_run: bool) -> None:
    wrong: Keys = {
        "layersync_weight": 1, "layersync_block": 9, "ema_teacher_weight": 1, "ema_teacher_stream": "sound", "prior_dataset": "face",
    }  # fmt: skip
    with pytest.raises(PlanProblems) as caught:
        bench.train("refused", wrong, dry_run=dry_run)
    assert caught.value.exit_code == 2 and len(caught.value.problems) == 3
    for words in ("layersync_block: ", "0 to 3", "ema_teacher_stream: ", "video, audio", "prior_dataset: ", "did you mean faces?"):
        assert words in str(caught.value)
    assert not (bench.project.folder / "refused").exists()


def test_full_fine_tuning_has_no_prior_but_a_teacher(bench: Bench) -> None:
    with pytest.raises(PlanProblems, match="prior_dataset, model_type: full fine-tuning leaves no base model"):
        bench.train("full", {**CASES["prior-preservation"], "model_type": "full"}, dry_run=True)
    changes: Keys = {"model_type": "full", "learning_rate": 1e-5, "max_train_steps": 1}
    bench.train("full", {**CASES["ema-teacher"], **CASES["layersync"]}, **changes)


# --- as somebody else's plugins ----------------------------------------------------------------------------------
def test_they_import_only_what_is_meant_for_plugins() -> None:
    sources = [source for source in python_files("examples/plugins") if "src" in source.path.parts]
    assert len(sources) >= 4 * len(CASES)
    modules = [(source.name, module) for source in sources for module, _, _ in source.imports() if module.split(".")[0] == "tuner"]
    assert not [(name, module) for name, module in modules if layer(module) not in PUBLIC_FOR_PLUGINS]


def test_installed_they_are_found_by_their_entry_points_without_torch(tmp_path: Path) -> None:
    for folder in FOLDERS:
        project = tomllib.loads((folder / "pyproject.toml").read_text())["project"]
        info = tmp_path / f"{project['name'].replace('-', '_')}-{project['version']}.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {project['name']}\nVersion: {project['version']}\n")
        (info / "entry_points.txt").write_text("[tuner]\n{} = {}\n".format(*entry_point(folder)))
    paths = [str(tmp_path), *(str(folder / "src") for folder in FOLDERS)]
    program = "import sys; from tuner.cli.main import run; sys.exit(run(['plugins', '--json']) or 100 * ('torch' in sys.modules))"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
    found = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True)
    names = {entry_point(folder)[0] for folder in FOLDERS}
    plugins = {plugin["name"]: plugin for plugin in json.loads(found.stdout)["plugins"] if plugin["name"] in names}
    assert plugins.keys() == names and all(plugin["status"] == "loaded" and not plugin["notes"] for plugin in plugins.values())
