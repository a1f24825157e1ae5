"""`base_model_precision` and the model it is meant for: a run, its files, what a resume compares, how far gradients are off, memory."""

from __future__ import annotations

import weakref

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import Gemma3TextConfig, Gemma3TextModel

from integration.project import Project
from tuner.config.options import Options
from tuner.config.resolve import resolve
from tuner.config.settings import AdapterSettings
from tuner.interfaces.family import ClipShape
from tuner.interfaces.memory import QuantizedPart, Quantizer
from tuner.model.adapters import add_adapters
from tuner.model.quantized import QuantizedLinear
from tuner.model.runner import BlockRunner, Checkpointing
from tuner.plugins.loader import load_plugins
from tuner.train.plan import ModelPlan, memory_facts, quantized_bytes
from tuner.train.planning import make_plan, plan_model

CPU = torch.device("cpu")
STREAMS = ("video", "audio")


def test_a_quantized_run_leaves_plain_files_and_is_resumed_as_it_was(project: Project, capsys: pytest.CaptureFixture[str]) -> None:
    short = {"max_train_steps": 1, "checkpoint_step_interval": 1}
    assert project.train(**short, base_model_precision="int8-torchao", text_encoder_1_precision="int8-torchao") == 0
    shown = capsys.readouterr().out
    assert "int8-torchao: 0.02 -> 0.01 GiB" in shown and "text encoder int8-torchao" in shown
    weights = load_file("out/lora.safetensors")
    assert {tensor.dtype for tensor in weights.values()} == {torch.float32}
    assert all(key.endswith((".lora_A.weight", ".lora_B.weight")) for key in weights)
    config = project.folder / "config.json"
    assert project.tuner("sample", "--config", config, "--prompt", "a pattern", "--weights", "out", "-o", "never.mp4") == 2
    assert "full weights are not put over a quantized model" in capsys.readouterr().err

    again = {"max_train_steps": 2, "resume_from_checkpoint": "latest", "lr_scheduler": "constant"}
    assert project.train(**again, base_model_precision="int8-quanto") == 6
    error = capsys.readouterr().err
    assert "base_model_precision: 'int8-torchao' in the checkpoint, 'int8-quanto' now" in error and "versions.optimum-quanto" in error


def test_packed_weights_train_to_the_bit_as_plain_ones(project: Project, capsys: pytest.CaptureFixture[str]) -> None:
    packed = {"base_model_precision": "bf16-packed"}
    ways = ({}, packed, {**packed, "enable_group_offload": True, "group_offload_use_stream": True}, {**packed, "ramtorch": True})
    found = []
    for number, keys in enumerate(ways):
        assert project.train(max_train_steps=2, mixed_precision="bf16", output_dir=f"out{number}", **keys) == 0
        found.append(load_file(project.folder / f"out{number}" / "lora.safetensors"))
        assert ("bf16-packed" in capsys.readouterr().out) == bool(keys)
    assert all(one.keys() == found[0].keys() and all(torch.equal(one[key], found[0][key]) for key in one) for one in found[1:])
    assert project.train("--dry-run", mixed_precision="no", **packed) == 2
    assert "would take fewer bytes" in capsys.readouterr().err


def test_full_fine_tuning_of_a_quantized_model_is_refused(project: Project, capsys: pytest.CaptureFixture[str]) -> None:
    assert project.train("--dry-run", base_model_precision="fp8-torchao", model_type="full") == 2
    assert "base_model_precision: full fine-tuning needs the weights as they are" in capsys.readouterr().err


def test_products_in_8_bit_floats_from_the_plan_to_a_resume(project: Project, capsys: pytest.CaptureFixture[str]) -> None:
    short = {"max_train_steps": 1, "checkpoint_step_interval": 1}
    assert project.train(**short, base_model_compute="fp8") == 0
    shown = capsys.readouterr()
    assert "fp8-torchao: 0.02 -> 0.01 GiB, multiplied in fp8" in shown.out
    assert "base_model_compute: fp8 holds the blocks in fp8-torchao" in shown.out + shown.err
    assert "multiplied in fp8" in (project.folder / "out" / "outbox").rglob("README.md").__next__().read_text()
    again = {"max_train_steps": 2, "resume_from_checkpoint": "latest", "lr_scheduler": "constant"}
    assert project.train(**again, base_model_precision="fp8-torchao") == 6
    assert "base_model_compute: 'fp8' in the checkpoint" in capsys.readouterr().err


@pytest.mark.parametrize(("keys", "said"), [
    ({"base_model_precision": "int8-torchao"}, "base_model_compute: int8-torchao weights are no 8-bit floats (got 'fp8')"),
    ({"model_type": "full"}, "base_model_precision: full fine-tuning needs the weights as they are"),
    ({"base_model_compute": "fp4"}, "base_model_compute"),
])  # fmt: skip
def test_products_that_cannot_be(project: Project, keys: dict[str, object], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert project.train("--dry-run", **{"base_model_compute": "fp8", **keys}) == 2
    assert said in capsys.readouterr().err


def test_a_plan_for_8_bit_products_recommends_only_what_can_carry_them_out(project: Project, capsys: pytest.CaptureFixture[str]) -> None:
    config = project.config(base_model_compute="fp8")
    assert project.tuner("plan", "--config", config, "--gpu_memory", "24GiB", "--host_memory", "64GiB") == 0
    shown = capsys.readouterr().out
    assert "fp8-torchao" in shown and "int8" not in shown and "no_change" not in shown


def planned(project: Project, **changes: object) -> ModelPlan:
    registry = load_plugins()
    config = project.config(**changes)
    return plan_model(registry, resolve(registry.option_types, config_file=config, flags={}, environ={}, hint=""), CPU)


def test_captions_of_another_precision_are_other_records(project: Project) -> None:
    plans = [planned(project), *(planned(project, text_encoder_1_precision=name) for name in ("int8-torchao", "fp8-torchao"))]
    text = [plan.family.encoders(plan.source, STREAMS)[0].settings() for plan in plans]
    assert [settings.get("precision") for settings in text] == [None, "int8-torchao", "fp8-torchao"]


class Watched(Quantizer):
    """Counts the unquantized weights of blocks that are alive when a block is handed over, and what is left of them afterwards."""

    def __init__(self, inner: Quantizer) -> None:
        self.inner, self.name = inner, inner.name
        self.seen: list[weakref.ref[Tensor]] = []
        self.alive: list[tuple[int, int]] = []
        self.bytes = 0

    def quantize(self, module: nn.Module) -> QuantizedPart:
        own = [weakref.ref(layer.weight) for layer in module.modules() if isinstance(layer, nn.Linear)]
        self.seen += own
        before = sum(reference() is not None for reference in self.seen) - len(own)
        done = self.inner.quantize(module)
        self.alive.append((before, sum(reference() is not None for reference in own) - (len(own) - len(done.modules))))
        self.bytes += done.bytes_before - done.bytes_after
        return done

    def bytes_of(self, weight: torch.Size, dtype: torch.dtype) -> int:
        return self.inner.bytes_of(weight, dtype)


def adapter_gradients(plan: ModelPlan) -> Tensor:
    """Of all adapters, with a B that is not zero, on a batch of random tokens; flat."""
    placement = plan.memory.open("transformer", 4, CPU)
    family = plan.family
    model = family.load(plan.source, STREAMS, torch.float32, CPU, placement)
    add_adapters(model, family.adapter_targets(model, STREAMS), AdapterSettings(lora_rank=4), 0)
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(7)
        for name, parameter in trained.items():
            if "lora_B" in name:
                parameter.copy_(torch.randn(parameter.shape) / 50)
        batch, noise = family.dummy_batch(model, ClipShape(64, 64, 9, 25.0, 0.36), 2, STREAMS, CPU)
    blocks = family.block_set(model)
    runner = BlockRunner(blocks, family.call_block, checkpointing=Checkpointing.every(4), session=placement.attach(blocks))
    prediction = family.exit(model, runner.run(family.enter(model, batch, noise)))
    losses = [(out - noise.streams[name].target).square().mean() for name, out in prediction.streams.items()]
    torch.stack(losses).sum().backward()  # type: ignore[no-untyped-call]
    return torch.cat([parameter.grad.flatten() for parameter in trained.values() if parameter.grad is not None])


def test_gradients_of_adapters_stay_close_and_one_block_at_a_time_is_read_unquantized(project: Project) -> None:
    plain = adapter_gradients(planned(project))
    ways: list[tuple[dict[str, object], float]] = [
        ({"base_model_precision": "int8-torchao"}, 0.03), ({"base_model_precision": "int4-torchao"}, 0.3),
        ({"base_model_compute": "fp8"}, 0.12),
    ]  # fmt: skip
    for keys, limit in ways:
        plan = planned(project, **keys)
        watched = plan.memory.quantizers["transformer"] = Watched(plan.memory.quantizers["transformer"])
        found = adapter_gradients(plan)
        off = float((found - plain).norm() / plain.norm())
        assert 1e-4 < off < limit, (keys, off)
        assert watched.alive == [(0, 0)] * 4


def test_the_plan_knows_the_bytes_that_a_quantized_block_takes(project: Project) -> None:
    registry = load_plugins()
    config = project.config(base_model_precision="int4-quanto", text_encoder_1_precision="int8-quanto")
    plan = make_plan(registry, resolve(registry.option_types, config_file=config, flags={}, environ={}, hint=""), CPU)
    facts = memory_facts(plan)
    watched = plan.memory.quantizers["transformer"] = Watched(plan.memory.quantizers["transformer"])
    placement = plan.memory.open("transformer", 4, CPU)
    model = plan.family.load(plan.source, plan.streams, torch.float32, CPU, placement)
    assert quantized_bytes(plan) == plan.facts.bytes - watched.bytes
    assert facts.block_bytes == (plan.facts.block_bytes - watched.bytes // 4,) * 4
    linears = [layer for layer in plan.family.block_set(model).blocks[0].modules() if isinstance(layer, nn.Linear)]
    assert sorted(plan.facts.linear_shapes) == sorted((layer.out_features, layer.in_features) for layer in linears)
    assert len(facts.linear_bytes) == len(linears) and facts.quantizer == "int4-quanto"
    assert memory_facts(plan, "text_encoder").quantizer == plan.memory.precision("text_encoder") == "int8-quanto"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("precision", ["int8-torchao", "fp8-quanto"])
def test_a_language_models_layers_compute_with_quantized_weights(precision: str, dtype: torch.dtype) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = Gemma3TextConfig(
            vocab_size=32, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=2,
            head_dim=32, query_pre_attn_scalar=32, sliding_window=16, layer_types=["sliding_attention", "full_attention"],
        )  # fmt: skip
        model = Gemma3TextModel(config).to(dtype).eval().requires_grad_(False)
    quantizer = load_plugins().component("quantizer", precision).load()(Options(), None)  # type: ignore[operator]
    for layer in model.layers:
        assert len(quantizer.quantize(layer).modules) == 7
    ids = torch.arange(12).view(2, 6)
    with torch.no_grad():
        found = model(input_ids=ids, use_cache=False).last_hidden_state
        for module in model.modules():
            if isinstance(module, QuantizedLinear):
                dense = module.dense(dtype)
                module.__class__ = nn.Linear
                module.weight = nn.Parameter(dense, requires_grad=False)
        assert torch.equal(found, model(input_ids=ids, use_cache=False).last_hidden_state)
