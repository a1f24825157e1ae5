"""`tuner plan` and what stands on it: the table, its keys in a file, what a run predicts, and what it says when the device is full."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from torch import nn

from integration.project import Project
from ltxvideo2.ltx2_published import RELEASES, TRANSFORMER_20, headers
from tuner.builtins.losses import FlowMatchingLoss
from tuner.config.resolve import resolve
from tuner.config.settings import AdapterSettings
from tuner.interfaces.family import BuildContext, ClipShape, ModelFacts, Variant
from tuner.interfaces.memory import MemoryPlan
from tuner.model.placing import RunMemory
from tuner.plugins.loader import load_plugins
from tuner.train.forecast import advise, costs
from tuner.train.forecast.costs import Job
from tuner.train.forecast.footprint import Trained, measure
from tuner.train.forecast.machine import GIB, described, find_machine
from tuner.train.plan import ModelPlan, Plan
from tuner.train.planning import make_plan
from tuner_ltxvideo2.family import LTX2Family, block_counts, linear_layers
from tuner_ltxvideo2.loading import empty_part
from tuner_ltxvideo2.options import LTX2Options
from tuner_ltxvideo2.sides import drop_unused, skip_for

Capture = pytest.CaptureFixture[str]
CPU = torch.device("cpu")
needs_no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU to plan for")


def everything(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


# --- the command -----------------------------------------------------------------------------------------------------
def test_the_table_has_every_combination_and_nothing_is_written(project: Project, capsys: Capture) -> None:
    config = project.config()
    before = everything(project.folder)
    assert project.tuner("plan", "--config", config, "--gpu_memory", "24GiB", "--json") == 0
    answer = json.loads(capsys.readouterr().out)
    assert everything(project.folder) == before
    rows = answer["rows"]
    assert answer["machine"]["memory"] == 24 * GIB and answer["work"].startswith("2 x 64x64x9 (largest bucket), video + audio")
    seen = {(row["residency"], row["precision"], row["checkpointing"], tuple(row["changes"].items())) for row in rows}
    assert len(seen) == len(rows)
    assert {row["residency"] for row in rows} >= {"resident", "group_offload", "block_swap", "ramtorch"}
    assert {row["checkpointing"] for row in rows} == {"none", "all"}
    precisions = [row["precision"] for row in rows if row["residency"] == "resident" and row["checkpointing"] == "all"]
    assert precisions[0] == "no_change" and {name.partition("-")[0] for name in precisions[1:]} == {"int8", "int4"}
    assert all(row["fits"] and row["device_bytes"] > sum(row["device_parts"].values()) for row in rows)
    (current,) = [row for row in rows if row["current"]]
    assert (current["residency"], current["precision"], current["checkpointing"]) == ("resident", "no_change", "all")
    assert current["changes"] == {}


def test_the_first_rows_keys_are_written(project: Project, capsys: Capture) -> None:
    config = project.config(gradient_checkpointing=True, musubi_blocks_to_swap=0, seed=7)
    arguments = ["plan", "--config", config, "--gpu_memory", "24GiB", "--shape", "64x64x9", "--apply", config]
    names = list(json.loads(config.read_text()))
    assert project.tuner(*arguments) == 0
    shown = capsys.readouterr().out
    assert "gradient_checkpointing: true -> false" in shown and "2 x 64x64x9 (asked for), video + audio" in shown
    content = json.loads(config.read_text())
    assert list(content) == names and content["gradient_checkpointing"] is False and content["seed"] == 7
    assert project.tuner(*arguments) == 0
    assert "holds this already" in capsys.readouterr().out
    assert project.tuner(*arguments, "--gradient_checkpointing", "true") == 2
    assert "a flag sets it and wins over" in capsys.readouterr().err
    config.write_text(config.read_text().replace('"seed": 7', '"seed": 7, "--gradient-checkpointing": false'))
    assert project.tuner(*arguments) == 2
    assert "gradient_checkpointing: is given more than once" in capsys.readouterr().err


@needs_no_gpu
def test_what_cannot_be_planned(project: Project, capsys: Capture) -> None:
    config = project.config()
    quick = ["plan", "--config", config, "--shape", "64x64x9"]
    for arguments, code, words in (
        (["--gpu_memory", "500MiB"], 5, "nothing fits into 0.5 GiB;"),
        (["--gpu_memory", "twenty"], 2, "gpu_memory: is no size of memory (got 'twenty')"),
        ([], 3, "give a size, such as --gpu_memory 24GiB"),
        (["--gpu_memory", "24", "--shape", "65x64x9"], 2, "shape: is no width x height x frames in steps of 32 pixels"),
    ):
        assert project.tuner(*quick, *arguments) == code
        assert words in capsys.readouterr().err
    assert project.tuner("plan", "--gpu_memory", "24GiB") == 2
    assert "no model family was chosen" in capsys.readouterr().err


def test_a_host_that_is_too_small_leaves_what_stays_on_the_device(project: Project, capsys: Capture) -> None:
    host = ["--gpu_memory", "24GiB", "--host_memory", "0.01MiB", "--shape", "64x64x9"]
    assert project.tuner("plan", "--config", project.config(musubi_blocks_to_swap=2), *host) == 0
    shown = capsys.readouterr().out
    assert "not possible: enable_group_offload:" in shown and "host memory are needed" in shown
    rows = [line for line in shown.splitlines() if "GiB  " in line]
    assert '"musubi_blocks_to_swap": 0' in rows[0] and "resident" in rows[0]
    assert all("resident" in row for row in rows if not row.startswith("*!"))


# --- what a run says -------------------------------------------------------------------------------------------------
@pytest.fixture
def plan(project: Project) -> Plan:
    registry = load_plugins()
    return make_plan(registry, resolve(registry.option_types, config_file=project.config()), CPU)


def test_a_run_predicts_its_peak_and_says_what_would_fit(
    project: Project, plan: Plan, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    large = find_machine(CPU, 24 * GIB)
    assert advise.forecast(plan) is None  # a processor has no memory of its own
    found = advise.forecast(plan, large)
    assert found is not None and found.notices == () and found.row.current
    assert "of 24.0 GiB on the device (block weights" in found.describe()
    tight = replace(large, memory=found.row.needs() - (4 << 20))
    told = advise.remedy(plan, tight)
    assert told.startswith("this would fit: ") and "predicted" in told
    monkeypatch.setattr("tuner.train.planning.forecast", lambda plan: advise.forecast(plan, tight))
    assert project.tuner("train", "--config", project.config(), "--dry-run") == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "memory predicted" in shown and "notice: the device's memory is predicted to be" in shown
    assert project.tuner("train", "--config", project.config(), "--dry-run", "--strict") == 2
    assert "too small" in capsys.readouterr().err


def test_batches_that_streamed_blocks_take_together_keep_more_and_copy_once(project: Project) -> None:
    registry, keys = load_plugins(), {"gradient_accumulation_steps": 4, "peft_lora_target_modules": "to_q,to_out.0"}

    def job(**changes: object) -> Job:
        settings = resolve(registry.option_types, config_file=project.config(**{**keys, **changes}))
        return advise.job_of(make_plan(registry, settings, CPU), (True,))

    alone, four = job(gradient_accumulation_order="batch"), job()
    assert not alone.joint and four.footprints == alone.footprints
    single, together = four.footprints[True], four.joint[True]
    assert together.kept == 4 * single.kept and together.forward_work == single.forward_work * 4
    assert together.trained == single.trained and single.peak < together.peak < 4 * single.peak
    outside = job(peft_lora_target_modules="to_q,linear_1")  # gradients of what all batches share would add up in another order
    assert not outside.joint and job(peft_lora_target_modules="linear_1", gradient_accumulation_order="layer").joint
    slow = replace(find_machine(CPU, 24 * GIB), link=1e6)  # copies decide

    def streamed(job: Job) -> float:
        return next(row.seconds for row in advise.rows(job, slow) if row.keys.get("musubi_blocks_to_swap") == 3)

    assert streamed(alone) == pytest.approx(4 * streamed(four), rel=0.05)


def test_as_many_activations_are_kept_as_fit(project: Project) -> None:
    registry = load_plugins()

    def predicted(memory: int, keep: object = "auto") -> advise.Predicted:
        settings = resolve(registry.option_types, config_file=project.config(gradient_checkpointing=keep))
        found = advise.forecast(make_plan(registry, settings, CPU), find_machine(CPU, memory))
        assert found is not None
        return found

    every, none = predicted(24 * GIB, True), predicted(24 * GIB, False)
    assert predicted(24 * GIB).row.kept == 4 and predicted(24 * GIB).row.peak == none.row.peak
    assert predicted(every.row.needs()).row.kept == 0
    between = predicted((every.row.needs() + none.row.needs()) // 2)
    assert 0 < between.row.kept < 4 and every.row.peak < between.row.peak <= none.row.peak
    assert between.row.needs() <= between.machine.memory < between.row.needs() + 2 * between.block
    assert f"activations of {between.row.kept} blocks are kept" in between.describe()
    assert between.row.keys["gradient_checkpointing"] == "auto"


def test_a_family_without_a_skeleton_is_trained_without_a_forecast(plan: Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(advise, "MEASURED", {})
    monkeypatch.setattr(LTX2Family, "empty", lambda *_: None)
    machine = find_machine(CPU, GIB)
    assert advise.forecast(plan, machine) is None and advise.remedy(plan, machine) == ""
    there = replace(plan, context=replace(plan.context, device=torch.device("cuda", 7)))
    error = advise.full_device(there, torch.OutOfMemoryError("full"), "loading the model")
    assert (error.exit_code, error.where, error.remedy) == (5, "loading the model", advise.PLAIN_REMEDY)


def test_a_full_device_is_told_with_its_place(project: Project, capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    calls, fails_after = 0, (0, False)
    call_block, load = LTX2Family.call_block, LTX2Family.load

    def failing_block(self: LTX2Family, block: nn.Module, state: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls > fails_after[0] and torch.is_grad_enabled() == fails_after[1]:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1.00 GiB.\nmore")
        return call_block(self, block, state)

    def failing_load(self: LTX2Family, *arguments: Any) -> nn.Module:
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(LTX2Family, "call_block", failing_block)
    # Eight calls a step: four blocks forward, without a graph, and recomputed with one.
    for where, loads, calls_and_graph in (
        ("loading the model", failing_load, (0, False)),
        ("step 2, batch of 2 x 64x64x9, forward", load, (8, False)),
        ("step 1, batch of 2 x 64x64x9, backward", load, (0, True)),
    ):
        calls, fails_after = 0, calls_and_graph
        monkeypatch.setattr(LTX2Family, "load", loads)
        assert project.train(max_train_steps=2, train_audio=False) == 5
        error = capsys.readouterr().err
        assert f"error: {where}: the device ran out of memory: CUDA out of memory." in error and advise.PLAIN_REMEDY in error
        assert project.events("failed")[-1]["error"] == "OutOfMemoryError"


# --- the real model --------------------------------------------------------------------------------------------------
class Released(LTX2Family):
    """LTX-2.0 at its real size, without a file; adapters as the measured runs had them."""

    def empty(self, source: Any, streams: Sequence[str], dtype: torch.dtype, blocks: int = 0) -> nn.Module:
        model = empty_part("transformer", Variant("ltxvideo2", "2.0", {"transformer": {**TRANSFORMER_20, "num_layers": blocks}}))
        drop_unused(model, streams)
        return nn.Module.to(model, dtype).requires_grad_(False)

    def adapter_targets(self, model: nn.Module, streams: Sequence[str]) -> list[str]:
        return [name for name in super().adapter_targets(model, streams) if "attn" in name]


def released(streams: tuple[str, ...], shape: ClipShape, batch_size: int, ways: Sequence[bool], batches: int = 1) -> Job:
    registry = load_plugins()
    flags = {"optimizer": "adamw", "cuda_graphs": "off", "gradient_accumulation_steps": str(batches)}
    settings = resolve(registry.option_types, flags=flags, environ={})
    context = BuildContext(CPU, torch.bfloat16, 0, 0, Path())
    family = Released(LTX2Options(), context)
    model = ModelPlan(registry, settings, family, "ltxvideo2", cast(Any, None), context, RunMemory())
    skip = skip_for(streams)
    stored = {name: header for name, header in headers("2.0")["transformer"].items() if not skip(name)}
    counts, layers = block_counts(stored), linear_layers(stored, "0")
    facts = ModelFacts(
        Variant("ltxvideo2", "2.0", RELEASES["2.0"]), 0, len(counts), 2 * max(counts.values()), 0, 0,
        linear_shapes=tuple(layers.values()), linear_names=tuple(layers),
    )  # fmt: skip
    asked = Trained(streams, shape, batch_size, AdapterSettings(lora_rank=32))
    terms = [FlowMatchingLoss(name) for name in streams]
    footprints, joint = (
        measure(family, cast(Any, None), facts, replace(asked, together=count), terms, torch.bfloat16, ways) for count in (1, batches)
    )
    return Job(model, facts, footprints, costs.optimizer_cost(model), joint=joint if batches > 1 else {})


Keys = Mapping[str, object]


def held(job: Job, way: str, precision: str, keys: Keys | None, compute: str) -> tuple[costs.Precision, MemoryPlan]:
    """Weights of that precision, resident or held as `keys` say."""
    chosen = costs.plain()
    if precision != "no_change":
        component = job.model.registry.component("quantizer", precision)
        quantizer = component.load()(job.model.settings.get(component.options), job.model.context)  # type: ignore[operator]
        quantizer.compute = compute
        chosen = costs.probe(quantizer)
    facts = costs.memory_facts(job, chosen, way)
    plan = MemoryPlan(sum(facts.block_bytes), 0, 0, 0, 0.0, "")
    for component in job.model.registry.components("memory_strategy") if keys else ():
        options = component.options(**keys) if set(keys or ()) <= set(component.options.model_fields) else component.options()
        if options.enabled():
            plan = component.load()(options, job.model.context).plan(facts)  # type: ignore[operator]
    return chosen, plan


def peak(job: Job, way: str, precision: str = "no_change", keys: Keys | None = None, compute: str = "") -> float:
    """GiB of a step."""
    chosen, plan = held(job, way, precision, keys, compute)
    joint = bool(keys and job.joint)
    step = costs.footprint(job, costs.kept_blocks(job, way), joint=joint)
    return sum(costs.peak_parts(job, step, plan, chosen, joint=joint).values()) / GIB


def seconds(job: Job, way: str, card: str, precision: str, keys: Keys | None, compute: str) -> float:
    """Of a step."""
    chosen, plan = held(job, way, precision, keys, compute)
    machine, joint = described(card, 0, 0, torch.device("cpu")), bool(keys and job.joint)
    return costs.seconds(job, costs.footprint(job, costs.kept_blocks(job, way), joint=joint), plan, chosen, machine, joint=joint)


GROUP = {"enable_group_offload": True, "group_offload_use_stream": True}
H200, H100 = "NVIDIA H200", "NVIDIA H100 80GB HBM3"
MEASURED: tuple[tuple[str, str, str, str, Keys | None, str, float, float], ...] = (
    # work, recomputed blocks, precision, computation, keys; card, GiB by torch.cuda.max_memory_allocated, median seconds
    ("head", "none", "no_change", "", None, H200, 63.6, 0.294), ("head", "all", "no_change", "", None, H200, 40.7, 0.429),
    ("121f", "none", "no_change", "", None, H200, 96.3, 0.840), ("121f", "all", "no_change", "", None, H200, 43.2, 1.172),
    ("video", "none", "no_change", "", None, H200, 44.19, 0.236), ("video", "all", "no_change", "", None, H200, 27.67, 0.337),
    ("head", "none", "fp8-torchao", "fp8", None, H200, 46.4, 0.244), ("head", "all", "fp8-torchao", "fp8", None, H200, 23.5, 0.339),
    ("121f", "all", "fp8-torchao", "fp8", None, H200, 25.8, 0.916),
    ("video", "none", "fp8-torchao", "fp8", None, H200, 32.2, 0.182), ("video", "all", "fp8-torchao", "fp8", None, H200, 15.6, 0.256),
    ("head", "all", "no_change", "", None, H100, 40.57, 0.458), ("121f", "all", "no_change", "", None, H100, 43.05, 1.224),
    ("head", "all", "int8-torchao", "", None, H100, 23.39, 0.509), ("121f", "all", "int8-torchao", "", None, H100, 25.81, 1.275),
    ("head", "all", "int8-torchao", "", GROUP, H100, 6.83, 0.698), ("121f", "all", "int8-torchao", "", GROUP, H100, 9.24, 1.290),
    ("head", "all", "no_change", "", GROUP, H100, 7.49, 1.426), ("121f", "all", "no_change", "", GROUP, H100, 9.96, 1.590),
    ("head", "all", "no_change", "", {"ramtorch": True}, H200, 6.62, 1.923), ("video", "all", "no_change", "", GROUP, H200, 4.66, 0.916),
    ("head", "all", "no_change", "", {"musubi_blocks_to_swap": 47}, H200, 8.27, 1.297),
    ("head", "all", "bf16-packed", "", None, H200, 32.20, 0.484), ("head", "all", "bf16-packed", "", GROUP, H200, 7.32, 1.017),
    ("121f", "all", "bf16-packed", "", None, H200, 34.60, 1.221), ("121f", "all", "bf16-packed", "", GROUP, H200, 9.73, 1.378),
    ("four", "all", "no_change", "", None, H200, 40.01, 0.947), ("four", "all", "no_change", "", GROUP, H200, 8.25, 1.457),
    ("four", "all", "int8-torchao", "", GROUP, H200, 8.26, 1.049), ("four", "all", "bf16-packed", "", GROUP, H200, 8.63, 1.224),
    ("four", "all", "no_change", "", {"musubi_blocks_to_swap": 32}, H200, 19.76, 1.141),
    ("four", "all", "bf16-packed", "", {"musubi_blocks_to_swap": 36}, H200, 15.13, 1.097),
)  # fmt: skip


def test_the_released_model_takes_what_was_measured() -> None:
    """Rank 32, AdamW with float32 masters, steps replayed as CUDA graphs, 2026-11-28: memory within 2 %, time within 10 %.

    Some have a second lane for small work, which is not foreseen."""
    both, head, long = ("video", "audio"), ClipShape(832, 480, 17, 25.0, 17 / 25), ClipShape(768, 512, 121, 25.0, 121 / 25)
    called = released(both, head, 2, (True, False))
    jobs = {
        "head": replace(called, graphs=True), "121f": replace(released(both, long, 1, (True, False)), graphs=True),
        "video": replace(released(("video",), head, 2, (True, False)), graphs=True),
        "four": replace(released(both, head, 1, (True,), batches=4), graphs=True),
    }  # fmt: skip
    assert called.footprints[True].trained_weights == 213_909_504
    # Counted by hand for this work: 143 TFLOP, and 217 with recomputation.
    every, none = (costs.footprint(called, costs.kept_blocks(called, way)) for way in ("all", "none"))
    for found, counted in ((every, 217e12), (none, 143e12)):
        flops = (found.forward_work.flops + found.backward_work.flops) * 48 + found.other_work.flops
        assert flops == pytest.approx(counted, rel=0.03)
    for work, way, precision, compute, keys, card, gib, took in MEASURED:
        name = (work, way, precision, keys, card)
        assert peak(jobs[work], way, precision, keys, compute) == pytest.approx(gib, rel=0.02), name
        assert seconds(jobs[work], way, card, precision, keys, compute) == pytest.approx(took, rel=0.1), name
    # Measured on an H200 on 2026-11-22, when a block at work took more than now: what is foreseen may be below, and not above.
    assert 0.9 * 6.85 < peak(called, "all", keys=GROUP) <= 6.85
