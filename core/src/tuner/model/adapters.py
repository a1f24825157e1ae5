"""LoRA through peft: which layers, their initial values, and their weights as an `AdapterState`.

An adapted linear computes W·x + alpha / rank · B·A·x (Hu et al. 2021, arXiv:2106.09685). A and B have the dtype of the model, so that the
forward pass casts nothing; float32 copies for the optimizer are the business of `tuner.train.masters`. A's values depend on the seed and
the module's name alone, B starts at 0. A quantized W makes no difference: the layer itself computes W·x, and peft's own layers for the
quantized tensors of this or that library, each with its own limits, are not used.

Dimensions: A (rank, in), B (out, rank).
"""

from __future__ import annotations

import contextlib
import difflib
import math
import warnings
from collections import defaultdict
from collections.abc import Iterator, Sequence

import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from tuner.config.settings import AdapterSettings
from tuner.data.randomness import generator
from tuner.errors import CheckpointError, ConfigError
from tuner.interfaces.services import AdapterState
from tuner.model.low_rank import ADAPTER, LoraLinear

TARGETS_KEY = "peft_lora_target_modules"
ALL_LINEAR = "all-linear"


def resolve_targets(model: nn.Module, wanted: Sequence[str] | str | None, defaults: Sequence[str]) -> list[str]:
    """Full names of the linear layers to adapt, in the model's order.

    `wanted`: full names, name endings of whole words (`to_q`, `attn.to_q`) or `all-linear`, as a list or separated by commas;
    `defaults` when empty. Raises `ConfigError` for an entry that no linear layer answers to.
    """
    linears = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    entries = [entry.strip() for entry in wanted.split(",")] if isinstance(wanted, str) else list(wanted or ())
    entries = [entry for entry in entries if entry] or list(defaults)
    endings = _by_ending(linears)
    chosen: set[str] = set()
    for entry in entries:
        found = linears if entry == ALL_LINEAR else endings.get(entry, [])
        if not found:
            raise _no_such_target(model, entry, list(endings))
        chosen.update(found)
    return [name for name in linears if name in chosen]


def _by_ending(names: Sequence[str]) -> dict[str, list[str]]:
    """"a.b.c" is found under "a.b.c", "b.c" and "c"."""
    found: dict[str, list[str]] = defaultdict(list)
    for name in names:
        words = name.split(".")
        for start in range(len(words)):
            found[".".join(words[start:])].append(name)
    return found


def _no_such_target(model: nn.Module, entry: str, endings: Sequence[str]) -> ConfigError:
    other = next((module for name, module in model.named_modules() if name == entry or name.endswith("." + entry)), None)
    problem = "matches no module of the model" if other is None else f"matches no linear layer, but a {type(other).__name__}"
    near = difflib.get_close_matches(entry, endings, n=3)
    remedy = f"near: {', '.join(near)}" if near else f"give names, name endings such as to_q, or {ALL_LINEAR}"
    return ConfigError(problem, where=TARGETS_KEY, value=entry, remedy=remedy)


def adapter_alpha(settings: AdapterSettings) -> float:
    """`lora_alpha`, or the rank where it is empty."""
    return float(settings.lora_rank if settings.lora_alpha is None else settings.lora_alpha)


def add_adapters(model: nn.Module, targets: Sequence[str], settings: AdapterSettings, seed: int) -> None:
    """Adapts the linear layers named `targets` and freezes everything else, in place.

    Raises `ConfigError` if `targets` is empty or peft cannot adapt one of them.
    """
    if not targets:
        raise ConfigError("no layer to adapt", where=TARGETS_KEY)
    model.requires_grad_(False)
    config = LoraConfig(
        r=settings.lora_rank, lora_alpha=adapter_alpha(settings), lora_dropout=settings.lora_dropout, target_modules=list(targets),
        init_lora_weights=False,  # all are drawn below
    )  # fmt: skip
    # Asked before peft's own dispatchers, which would take a layer by the library that its weight belongs to.
    config._register_custom_module({nn.Linear: LoraLinear})
    # peft reads `target_modules` as name endings, so "proj" would adapt "audio.proj" too; names of a state dict it takes as they are,
    # and warns where the two readings differ.
    names = {f"{name}.lora_A.weight": torch.empty(0) for name in targets}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="While injecting the PEFT adapters", category=RuntimeWarning)
        try:
            inject_adapter_in_model(config, model, adapter_name=ADAPTER, state_dict=names)
        except ValueError as error:
            raise ConfigError(f"peft cannot adapt the model: {error}", where=TARGETS_KEY) from error
    layers = adapted_layers(model)
    missing = set(targets) - set(layers)
    if missing:
        raise ConfigError(f"{len(missing)} layers could not be adapted", where=TARGETS_KEY, value=sorted(missing)[0])
    for name, layer in layers.items():
        _initialise(layer, name, seed)


def adapted_layers(model: nn.Module) -> dict[str, LoraLayer]:
    """The layers with an adapter, by the names they had before."""
    return {name: module for name, module in model.named_modules() if isinstance(module, LoraLayer) and ADAPTER in module.lora_A}


@contextlib.contextmanager
def without_adapters(model: nn.Module) -> Iterator[None]:
    """Inside, adapted layers compute W·x alone. Which parameters are trained is the same afterwards.

    Raises `ValueError` for a model without adapters.
    """
    adapted = adapted_layers(model).values()
    if not adapted:
        raise ValueError("the model has no adapters to be switched off: all its weights are trained")
    layers = [layer for layer in adapted if not layer.disable_adapters]
    trained = [(parameter, parameter.requires_grad) for layer in layers for parameter in _matrices(layer)]
    try:
        for layer in layers:
            layer.enable_adapters(False)
        yield
    finally:
        for layer in layers:
            layer.enable_adapters(True)
        for parameter, flag in trained:
            parameter.requires_grad_(flag)


@torch.no_grad()
def _initialise(layer: LoraLayer, name: str, seed: int) -> None:
    """A uniform in ±1/sqrt(in) as peft draws it, B zero, both in the dtype of the base layer's computation."""
    a, b = _matrices(layer)
    if a.is_meta:
        return
    initial = torch.empty(a.shape, dtype=torch.float32)
    nn.init.kaiming_uniform_(initial, a=math.sqrt(5), generator=generator(seed, f"adapter/{name}"))
    a.copy_(initial)
    b.zero_()


def _matrices(layer: LoraLayer) -> tuple[nn.Parameter, nn.Parameter]:
    return layer.lora_A[ADAPTER].weight, layer.lora_B[ADAPTER].weight


def adapter_state(model: nn.Module, rank: int, alpha: float) -> AdapterState:
    """Copies of all adapters as the model computes with them, float32 on the CPU, under the names of the adapted modules."""
    layers = adapted_layers(model)
    weights = {name: (_copied(_matrices(layer)[0]), _copied(_matrices(layer)[1])) for name, layer in layers.items()}
    return AdapterState(weights=weights, rank=rank, alpha=alpha, targets=tuple(layers))


def _copied(parameter: Tensor) -> Tensor:
    return parameter.detach().to("cpu", torch.float32, copy=True).contiguous()


@torch.no_grad()
def load_adapter_state(model: nn.Module, state: AdapterState) -> None:
    """Writes `state` into the model's adapters. Raises `CheckpointError` unless modules, shapes and alpha / rank are the same."""
    layers = adapted_layers(model)
    _check_fit(layers, state)
    for name, layer in layers.items():
        for parameter, stored in zip(_matrices(layer), state.weights[name], strict=True):
            parameter.copy_(stored)


def _check_fit(layers: dict[str, LoraLayer], state: AdapterState) -> None:
    missing, unknown = sorted(set(layers) - set(state.weights)), sorted(set(state.weights) - set(layers))
    if missing or unknown:
        named = [f"{len(missing)} adapted layers are not in the file, such as {missing[0]}"] if missing else []
        named += [f"{len(unknown)} layers of the file are not adapted here, such as {unknown[0]}"] if unknown else []
        raise CheckpointError("; ".join(named), where="adapter", remedy=f"use the {TARGETS_KEY} and streams it was trained with")
    for name, layer in layers.items():
        expected, found = [tuple(p.shape) for p in _matrices(layer)], [tuple(t.shape) for t in state.weights[name]]
        if expected != found:
            problem = f"shapes are {found}, the model's {expected}"
            raise CheckpointError(problem, where=name, remedy="use the lora_rank and model it was trained with")
        if not math.isclose(float(layer.scaling[ADAPTER]), state.alpha / state.rank, rel_tol=1e-6):
            raise CheckpointError(
                f"alpha / rank is {state.alpha / state.rank:g}, here {float(layer.scaling[ADAPTER]):g}", where=name,
                remedy=f"set lora_alpha to {state.alpha:g}",
            )
