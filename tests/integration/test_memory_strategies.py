"""Every memory strategy through whole commands: what is trained, resumed, sampled and cached is bit for bit what a resident run gives.

The device is simulated: it copies late, and slots whose weights nobody brought, or that were given back, hold garbage.
"""

from __future__ import annotations

import functools
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from integration import third_party
from integration.project import Project, add_clip
from offload.simulated import SimulatedLink
from tuner.config.resolve import resolve
from tuner.plugins.loader import load_plugins
from tuner.plugins.registry import Registry
from tuner.train.saving.checkpoint import load_checkpoint
from tuner.train.session import Silence, train
from tuner_ltxvideo2.tiny import TinyPaths
from tuner_offload import block_swap, group, ramtorch
from tuner_offload.leaf import LeafSession
from tuner_offload.ramtorch import RamTorch

Keys = dict[str, object]

GROUPS: Keys = {"enable_group_offload": True}
STREAM: Keys = {"group_offload_use_stream": True}
DISK: Keys = {"group_offload_to_disk_path": "DISK"}
LEAVES: Keys = {"group_offload_type": "leaf_level"}
STRATEGIES: Mapping[str, Keys] = {
    "groups with a stream": GROUPS | STREAM,
    "groups in line": GROUPS,
    "groups of 2": {**GROUPS, "group_offload_blocks_per_group": 2},
    "groups on disk": GROUPS | STREAM | DISK,
    "leaves": GROUPS | LEAVES | STREAM,
    "1 swapped": {"musubi_blocks_to_swap": 1},
    "3 swapped": {"musubi_blocks_to_swap": 3},
    "RamTorch": {"ramtorch": True},
    "RamTorch, half": {"ramtorch": True, "ramtorch_transformer_percent": 50},
    "RamTorch, names": {"ramtorch": True, "ramtorch_target_modules": "blocks.2.*, *.ff.*"},
}
ROUTED: Keys = {"tread_config": {"routes": [{"selection_ratio": 0.5, "start_layer_idx": 1, "end_layer_idx": -2}]}}
ALIGNED: Keys = {"crepa_enabled": True, "crepa_encoder": "tiny", "crepa_encoder_image_size": 56, "crepa_block_index": 1}
REGULARIZED: Keys = {"brightness_weight": 0.5, "dim_by": 0.25, "shrink_weight": 0.1, **ROUTED, **ALIGNED}
INT8: Keys = {"base_model_precision": "int8-torchao", **ROUTED}
KEPT: Keys = {**INT8, "gradient_checkpointing": False}
ACCUMULATED: Keys = {**INT8, "gradient_accumulation_steps": 2}
QUANTIZED: Mapping[str, Keys] = {
    "groups with a stream": ACCUMULATED, "groups on disk": KEPT, "leaves": INT8, "3 swapped": KEPT, "RamTorch, half": KEPT,
}  # fmt: skip
"""What strategies are tried with beside regularizers; the others share all that matters here with these."""
PAIRS = [(name, REGULARIZED) for name in STRATEGIES] + list(QUANTIZED.items())


@dataclass
class Bench:
    """A project whose cache all runs share, with everybody's plugins."""

    project: Project
    registry: Registry
    links: list[SimulatedLink] = field(default_factory=list)
    residents: dict[str, Path] = field(default_factory=dict)
    """Runs without a strategy, by their other keys; made when asked for."""

    def train(self, out: str, keys: Keys, **changes: object) -> Path:
        """Three steps; returns the folder. Trained are layers inside blocks, and of what all blocks share."""
        folder = self.project.folder / out
        targets = ["to_q", "to_out.0", "linear_1"]
        own = {"max_train_steps": 3, "checkpoint_step_interval": 0, "peft_lora_target_modules": targets, "output_dir": str(folder)}
        values = {**own, **keys, **changes}
        values = {key: str(self.project.folder / "disk") if value == "DISK" else value for key, value in values.items()}
        settings = resolve(self.registry.option_types, config_file=self.project.config(**values))
        assert train(self.registry, settings, Silence()).exit_code == 0
        return folder

    def resident(self, keys: Keys) -> Path:
        """The run without a strategy; with a checkpoint after the second step."""
        name = str(sorted(keys.items()))
        if name not in self.residents:
            self.residents[name] = self.train(f"resident-{len(self.residents)}", keys, checkpoint_step_interval=2)
        return self.residents[name]


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory, tiny: TinyPaths) -> Iterator[Bench]:
    folder = tmp_path_factory.mktemp("strategies")
    for name in ("amber", "birch"):
        add_clip(folder / "clips", name)
    made = Bench(Project(folder, tiny), load_plugins({}, extra=[("third_party", third_party)]))

    def link_to(device: torch.device, stream: bool = True) -> SimulatedLink:
        made.links.append(SimulatedLink())
        return made.links[-1]

    with pytest.MonkeyPatch.context() as patch:
        for module in (group, block_swap, ramtorch):
            patch.setattr(module, "link_to", link_to)
        yield made


def assert_same_tensors(one: Path, other: Path) -> None:
    """Of two safetensors files."""
    found, expected = load_file(one), load_file(other)
    assert found.keys() == expected.keys() and all(torch.equal(found[key], expected[key]) for key in expected), one


def assert_same_run(one: Path, other: Path) -> None:
    """Adapter, metrics, and all that a resume starts from."""
    assert_same_tensors(one / "lora.safetensors", other / "lora.safetensors")
    assert (one / "metrics.jsonl").read_text() == (other / "metrics.jsonl").read_text()
    assert len((one / "metrics.jsonl").read_text().splitlines()) == 3
    found, expected = (load_checkpoint(folder / "checkpoint-3").parts for folder in (one, other))
    assert found.keys() == expected.keys()
    for part in expected:
        assert found[part].keys() == expected[part].keys()
        assert all(torch.equal(found[part][name], tensor) for name, tensor in expected[part].items()), part


# --- training ----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(("name", "case"), PAIRS, ids=[f"{name}, {next(iter(case))}" for name, case in PAIRS])
def test_three_steps_are_those_of_a_resident_run(name: str, case: Keys, bench: Bench) -> None:
    expected = bench.resident(case)
    before = len(bench.links)
    found = bench.train(f"{name}-{len(bench.links)}", {**case, **STRATEGIES[name]})
    assert_same_run(found, expected)
    [link] = bench.links[before:]
    assert link.loads > 0 and not link.slots  # all of it was given back
    shutil.rmtree(found)


RESUMED: Mapping[str, tuple[Keys, Keys]] = {
    "under the same strategy": (STRATEGIES["3 swapped"], STRATEGIES["3 swapped"]),
    "from resident to disk": ({}, STRATEGIES["groups on disk"]),
    "from one strategy to another": (STRATEGIES["groups of 2"], STRATEGIES["RamTorch, half"]),
}


@pytest.mark.parametrize("name", RESUMED)
def test_a_run_is_resumed_exactly_wherever_its_weights_live(name: str, bench: Bench) -> None:
    before, after = RESUMED[name]
    whole = bench.resident(REGULARIZED)
    folder = bench.project.folder / f"resumed-{len(bench.links)}"
    if before:
        bench.train(folder.name, {**REGULARIZED, **before}, max_train_steps=2)
    else:
        shutil.copytree(whole, folder)
        shutil.rmtree(folder / "checkpoint-3")
    bench.train(folder.name, {**REGULARIZED, **after}, resume_from_checkpoint="latest")
    assert_same_run(folder, whole)
    assert bench.project.events("training", folder.name)[-1]["from_step"] == 2


# --- encoding and sampling ---------------------------------------------------------------------------------------
GROUPED: Keys = {"group_offload_text_encoder": True, "group_offload_vae": True}
ENCODING: Mapping[str, Keys] = {
    "groups with a stream": GROUPED | STREAM,
    "text layers on disk": {"group_offload_text_encoder": True, **DISK},
    "leaves in line": GROUPED | LEAVES,
    "RamTorch": {"ramtorch_text_encoder": True, "ramtorch_text_encoder_percent": 50, "ramtorch_vae": True},
}
SAMPLING: Mapping[str, Keys] = {
    "groups with a stream": {**STRATEGIES["groups with a stream"], **GROUPED},
    "leaves": {**STRATEGIES["leaves"], **GROUPED},
    "3 swapped, encoders by RamTorch": {**STRATEGIES["3 swapped"], **ENCODING["RamTorch"]},
    "RamTorch": {**STRATEGIES["RamTorch"], **ENCODING["RamTorch"]},
}


@pytest.fixture
def small_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Layers stream however small they are: the tiny encoders have no others."""
    monkeypatch.setattr(group, "LeafSession", functools.partial(LeafSession, smallest=0))
    monkeypatch.setattr(RamTorch, "smallest", 0)


def shell(bench: Bench, command: str, keys: Keys, *arguments: object, **changes: object) -> None:
    """A command that must succeed, and stream if it is told to."""
    before = len(bench.links)
    given = {key: str(bench.project.folder / "disk") if value == "DISK" else value for key, value in keys.items()}
    assert bench.project.tuner(command, "--config", bench.project.config(**given, **changes), *arguments) == 0
    assert bool(keys) == (len(bench.links) > before)
    assert all(link.loads > 0 and not link.slots for link in bench.links[before:])


@pytest.mark.parametrize("name", ENCODING)
@pytest.mark.usefixtures("small_layers")
def test_records_are_those_of_resident_encoders(name: str, bench: Bench) -> None:
    bench.resident(REGULARIZED)
    cache = bench.project.folder / f"cache-{name}"
    shell(bench, "cache", ENCODING[name], cache_dir=str(cache))
    records = [path.relative_to(cache) for path in cache.rglob("*.safetensors")]
    assert len(records) >= 6  # picture, sound and caption of two clips
    for record in records:
        assert_same_tensors(cache / record, bench.project.folder / "cache" / record)


@pytest.mark.parametrize("name", SAMPLING)
@pytest.mark.usefixtures("small_layers")
def test_a_sample_is_that_of_a_resident_model(name: str, bench: Bench) -> None:
    adapter, folder = bench.resident(REGULARIZED) / "lora.safetensors", bench.project.folder
    size = {"validation_resolution": "64x64", "validation_num_video_frames": 9, "validation_guidance": 1}

    def sample(target: Path, keys: Keys) -> bytes:
        if not target.exists():
            arguments = ("--prompt", "a drifting pattern", "--lora", adapter, "-o", target)
            shell(bench, "sample", keys, *arguments, validation_num_inference_steps=1, **size)
        return target.read_bytes()

    assert sample(folder / f"{name}.mp4", SAMPLING[name]) == sample(folder / "resident.mp4", {})


# --- refusals ----------------------------------------------------------------------------------------------------
REFUSED: Mapping[str, tuple[Keys, int, list[str]]] = {
    "too many blocks": ({"musubi_blocks_to_swap": 4}, 2, ["musubi_blocks_to_swap: 4 is more than the 3", "give at most 3"]),
    "too large groups": (
        {**GROUPS, "group_offload_blocks_per_group": 5}, 2, ["group_offload_blocks_per_group: 5 is more than the 4", "give at most 1"],
    ),
    "two strategies": (
        {**GROUPS, "ramtorch": True}, 2, ["enable_group_offload, ramtorch: two memory strategies", "transformer", "switch one of them off"],
    ),
    "two for the text encoder": (
        {"group_offload_text_encoder": True, "ramtorch_text_encoder": True}, 2,
        ["group_offload_text_encoder, ramtorch_text_encoder", "text_encoder", "switch one of them off"],
    ),
    "unknown precision": ({"base_model_precision": "int9-torchao"}, 2, ["base_model_precision", "int9-torchao", "int8-torchao"]),
    "all of full fine-tuning": (
        {"model_type": "full", **GROUPS, "musubi_blocks_to_swap": 1, "ramtorch": True, **INT8}, 2,
        [
            "enable_group_offload, model_type: full fine-tuning", "musubi_blocks_to_swap, model_type: full fine-tuning",
            "ramtorch, model_type: full fine-tuning", "base_model_precision: full fine-tuning", "'int8-torchao'", "model_type to lora",
        ],
    ),
    "a file for a folder": (
        {**GROUPS, "group_offload_to_disk_path": "clips/amber.txt/disk"}, 9,
        ["group_offload_to_disk_path: the folder cannot be written", "clips/amber.txt/disk", "on a local disk"],
    ),
    "leaves on disk": (
        GROUPS | LEAVES | DISK, 2, ["group_offload_type, group_offload_to_disk_path", "leave one of the two out"],
    ),
    "names of nothing": (
        {"ramtorch": True, "ramtorch_target_modules": ["*.attn9.*", "*.to_q"]}, 2,
        ["ramtorch_target_modules: fits no linear layer", "'*.attn9.*'", "there are attn1.to_k"],
    ),
    "too many percent": ({"ramtorch": True, "ramtorch_transformer_percent": 150}, 2, ["ramtorch_transformer_percent", "150", "100"]),
    "another device": (
        {"musubi_blocks_to_swap": 1, "musubi_block_swap_device": "cuda:1"}, 2, ["musubi_block_swap_device", "'cuda:1'", "set it to cpu"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_done_is_refused_at_planning(
    name: str, bench: Bench, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    keys, code, words = REFUSED[name]
    monkeypatch.chdir(bench.project.folder)
    assert_refused(bench.project, capsys, keys, code, words)


@pytest.mark.parametrize("name", ["groups in line", "3 swapped", "RamTorch"])
def test_host_memory_that_is_too_small_is_refused_at_planning(
    name: str, bench: Bench, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tuner.train.forecast.sizes.free_host_memory", lambda: 5_000_000)
    keys = STRATEGIES[name]
    words = [f"{next(iter(keys))}: ", "of host memory are needed", "5.0 MB are free", "8-bit base_model_precision"]
    assert_refused(bench.project, capsys, keys, 5, words)


def assert_refused(project: Project, capsys: pytest.CaptureFixture[str], keys: Keys, code: int, words: list[str]) -> None:
    assert project.train("--dry-run", **keys, output_dir=str(project.folder / "refused")) == code
    error = capsys.readouterr().err
    assert "Traceback" not in error and not (project.folder / "refused").exists()
    for word in words:
        assert word in error, error
