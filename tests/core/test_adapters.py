"""LoRA: which layers, initial values, formula, dtype, state."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn
from torch.autograd.graph import saved_tensors_hooks

from tuner.builtins.plugin import tuner_register_quantizers
from tuner.config.options import Options
from tuner.config.settings import AdapterSettings
from tuner.errors import CheckpointError, ConfigError
from tuner.interfaces.services import AdapterState
from tuner.model.adapters import (
    adapted_layers,
    adapter_alpha,
    adapter_state,
    add_adapters,
    load_adapter_state,
    resolve_targets,
    without_adapters,
)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.to_q = nn.Linear(8, 8)
        self.to_out = nn.ModuleList([nn.Linear(8, 6), nn.Dropout(0.0)])
        self.norm = nn.LayerNorm(8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.to_out[0](self.to_q(self.norm(x)))
        return out


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.proj = nn.Linear(8, 8)
        self.blocks = nn.ModuleList([Block(), Block()])
        self.sound = nn.ModuleDict({"proj": nn.Linear(8, 8)})

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h: torch.Tensor = self.proj(x)
        return self.blocks[0](h) + self.blocks[1](self.sound["proj"](h))


def net(dtype: torch.dtype = torch.float32) -> Net:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Net().to(dtype)


TARGETS = ["blocks.0.to_q", "blocks.0.to_out.0", "blocks.1.to_q"]
SETTINGS = AdapterSettings(lora_rank=4, lora_alpha=2.0)


def adapted(settings: AdapterSettings = SETTINGS, seed: int = 5, dtype: torch.dtype = torch.float32, fill: bool = True) -> Net:
    model = net(dtype)
    add_adapters(model, TARGETS, settings, seed)
    if fill:
        draws = torch.Generator().manual_seed(3)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.copy_(torch.randn(parameter.shape, generator=draws))
    return model


def test_names_endings_and_all_linear_resolve() -> None:
    model = net()
    assert resolve_targets(model, ["to_q"], []) == ["blocks.0.to_q", "blocks.1.to_q"]
    assert resolve_targets(model, "to_out.0, 1.to_q", []) == ["blocks.0.to_out.0", "blocks.1.to_q", "blocks.1.to_out.0"]
    assert resolve_targets(model, "proj", []) == ["proj", "sound.proj"]
    assert resolve_targets(model, "all-linear", []) == [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    for empty in (None, [], ""):
        assert resolve_targets(model, empty, TARGETS) == TARGETS


def test_a_target_that_matches_nothing_is_named_with_its_neighbours() -> None:
    with pytest.raises(ConfigError, match=r"peft_lora_target_modules: matches no module.*'to_qq'(.|\n)*near: .*to_q"):
        resolve_targets(net(), ["to_qq"], [])
    with pytest.raises(ConfigError, match="matches no linear layer, but a LayerNorm"):
        resolve_targets(net(), ["norm"], [])
    with pytest.raises(ConfigError, match="matches no module"):
        resolve_targets(net(), ["o_q"], [])


def test_exactly_the_targets_are_adapted_and_only_they_are_trained() -> None:
    model = net()
    add_adapters(model, ["proj"], SETTINGS, seed=5)
    assert list(adapter_state(model, 4, 2.0).weights) == ["proj"]
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert trained == ["proj.lora_A.default.weight", "proj.lora_B.default.weight"]
    with pytest.raises(ConfigError, match="no layer to adapt"):
        add_adapters(net(), [], SETTINGS, seed=5)
    with pytest.raises(ConfigError, match="peft cannot adapt"):
        add_adapters(net(), ["blocks.0.norm"], SETTINGS, seed=5)


def test_it_starts_as_the_base_model_with_values_that_depend_on_seed_and_name_only() -> None:
    x = torch.randn(2, 8)
    model = adapted(fill=False)
    assert torch.equal(model(x), net()(x))
    state = adapter_state(model, 4, 2.0)
    torch.manual_seed(1234)
    fewer = net()
    add_adapters(fewer, TARGETS[1:], SETTINGS, seed=5)
    for name, (a, b) in adapter_state(fewer, 4, 2.0).weights.items():
        assert torch.equal(a, state.weights[name][0]) and torch.equal(b, torch.zeros_like(b))
    assert not torch.equal(adapter_state(adapted(seed=6, fill=False), 4, 2.0).weights[TARGETS[0]][0], state.weights[TARGETS[0]][0])
    a = state.weights["blocks.0.to_q"][0]
    assert float(a.abs().max()) <= 1 / math.sqrt(8) and float(a.std()) == pytest.approx(1 / math.sqrt(24), rel=0.3)


def test_output_is_the_base_weight_plus_the_scaled_product() -> None:
    model = adapted()
    state = adapter_state(model, 4, 2.0)
    merged = net()
    with torch.no_grad():
        for name, (a, b) in state.weights.items():
            linear = merged.get_submodule(name)
            assert isinstance(linear, nn.Linear)
            linear.weight += b @ a * (2.0 / 4)
    x = torch.randn(2, 8)
    torch.testing.assert_close(model(x), merged(x))
    assert (state.rank, state.alpha, state.targets) == (4, 2.0, tuple(TARGETS))


def test_alpha_is_the_rank_where_it_is_not_set() -> None:
    assert adapter_alpha(AdapterSettings(lora_rank=12)) == 12.0
    assert {float(layer.scaling["default"]) for layer in adapted_layers(adapted(AdapterSettings(lora_rank=4))).values()} == {1.0}


def test_a_bfloat16_model_computes_its_adapters_in_bfloat16() -> None:
    model = adapted(dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    kept: list[torch.Tensor] = []
    with saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):  # type: ignore[func-returns-value]
        assert model(torch.randn(2, 8).bfloat16()).dtype == torch.bfloat16
    assert {tensor.dtype for tensor in kept if tensor.shape == (2, 4)} == {torch.bfloat16}  # A·x


def test_dropout_works_on_the_adapters_input_in_training_only() -> None:
    model = adapted(AdapterSettings(lora_rank=4, lora_dropout=0.5))
    x = torch.randn(2, 8)
    assert not torch.equal(model.train()(x), model(x))
    assert torch.equal(model.eval()(x), model(x))


def quantized_pair(precision: str) -> nn.ModuleDict:
    """Two layers of 64 x 64 in bfloat16; `precision` empty: not quantized."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        pair = nn.ModuleDict({"first": nn.Linear(64, 64), "second": nn.Linear(64, 64)}).bfloat16()
    if precision:
        (component,) = (c for c in tuner_register_quantizers() if c.name == precision)
        component.load()(Options(), None).quantize(pair)  # type: ignore[operator]
    return pair


@pytest.mark.parametrize("precision", ["int8-torchao", "int4-torchao", "int4-quanto"])
def test_over_quantized_layers_it_is_the_same_plain_adapter(precision: str) -> None:
    plain, model = quantized_pair(""), quantized_pair(precision)
    dense = model["first"].dense(torch.bfloat16)  # type: ignore[operator]
    for each in (plain, model):
        add_adapters(each, ["first", "second"], SETTINGS, seed=5)
    trained = {name: (p.dtype, p.shape, type(p)) for name, p in model.named_parameters() if p.requires_grad}
    assert trained == {name: (p.dtype, p.shape, type(p)) for name, p in plain.named_parameters() if p.requires_grad}
    assert [type(layer) for layer in adapted_layers(model).values()] == [type(layer) for layer in adapted_layers(plain).values()]
    before, after = (adapter_state(each, 4, 2.0).weights for each in (plain, model))
    assert all(torch.equal(a, b) for name in before for a, b in zip(before[name], after[name], strict=True))
    adapter = adapted_layers(model)["first"]
    with torch.no_grad():
        adapter.lora_B["default"].weight.fill_(0.5)
    x = torch.randn(3, 64).bfloat16()
    low = nn.functional.linear(x, adapter.lora_A["default"].weight)
    base = nn.functional.linear(x, dense, adapter.get_base_layer().bias)
    assert torch.equal(adapter(x), torch.addmm(base, low, adapter.lora_B["default"].weight.t(), alpha=2.0 / 4))
    with without_adapters(model):
        assert torch.equal(adapter(x), base)
    adapter(x).sum().backward()
    assert adapter.lora_A["default"].weight.grad is not None and adapter.get_base_layer().weight.grad is None
    with pytest.raises(ConfigError, match="not merged into quantized weights"):
        adapter.merge()


def test_into_plain_weights_an_adapter_can_be_merged() -> None:
    model = adapted()
    x = torch.randn(2, 8)
    before = model(x)
    for layer in adapted_layers(model).values():
        layer.merge()
    torch.testing.assert_close(model(x), before)


def test_state_round_trip() -> None:
    source, target = adapted(dtype=torch.bfloat16), adapted(dtype=torch.bfloat16, fill=False)
    state = adapter_state(source, 4, 2.0)
    assert {tensor.dtype for pair in state.weights.values() for tensor in pair} == {torch.float32}
    load_adapter_state(target, state)
    x = torch.randn(2, 8).bfloat16()
    assert torch.equal(source(x), target(x))


def test_state_is_a_copy() -> None:
    model = adapted()
    a = adapter_state(model, 4, 2.0).weights[TARGETS[0]][0]
    before = a.clone()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert torch.equal(a, before)


def test_a_state_that_does_not_fit_is_refused() -> None:
    model = adapted()
    state = adapter_state(model, 4, 2.0)
    fewer = {name: pair for name, pair in state.weights.items() if name != TARGETS[0]}
    with pytest.raises(CheckpointError, match=r"1 adapted layers are not in the file, such as blocks\.0\.to_q"):
        load_adapter_state(model, AdapterState(fewer, 4, 2.0, ()))
    with pytest.raises(CheckpointError, match="1 layers of the file are not adapted here, such as other"):
        load_adapter_state(model, AdapterState({**state.weights, "other": state.weights[TARGETS[0]]}, 4, 2.0, ()))
    other_rank = adapter_state(adapted(AdapterSettings(lora_rank=2)), 2, 1.0)
    with pytest.raises(CheckpointError, match="shapes are"):
        load_adapter_state(model, other_rank)
    with pytest.raises(CheckpointError, match=r"alpha / rank is 1, here 0\.5(.|\n)*set lora_alpha to 4"):
        load_adapter_state(model, AdapterState(state.weights, 4, 4.0, ()))


def test_disabled_adapters_leave_the_base_model_and_come_back_as_they_were() -> None:
    model = adapted()
    frozen = model.get_submodule("blocks.0.to_q.lora_A.default")
    frozen.requires_grad_(False)
    trained = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    x = torch.randn(2, 8)
    before = model(x)
    with pytest.raises(RuntimeError, match="inside"), without_adapters(model):
        assert torch.equal(model(x), net()(x))
        raise RuntimeError("inside")
    assert torch.equal(model(x), before)
    assert {name: parameter.requires_grad for name, parameter in model.named_parameters()} == trained
