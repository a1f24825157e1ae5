"""Products of adapted layers, W·x + s·B·A·x: of one layer, or of several that read the same tokens.

Special here: they take few kernels and few passes over tokens. B·A·x is added by the product itself where the result of W lies, and the
gradients of W and A are added up in the same way, so nothing of the tokens' size is written only to be added. Layers with one input
(queries, keys and values) share the products with their A, which are laid one under the other. Autograd keeps what it would keep
without: the input and A·x; weights are read from the layers when backward comes, so whoever streams them has to have them in place then.

Dimensions: M tokens of all samples, K in, N out, r rank, L layers.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol, cast, runtime_checkable

import torch
from peft.tuners.lora import Linear
from torch import Tensor, nn
from torch.nn import functional
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from tuner.errors import ConfigError
from tuner.model.quantized import QuantizedLinear, added_product

ADAPTER = "default"
"""peft's name for the one adapter that is trained."""


@runtime_checkable
class FrozenLayer(Protocol):
    """A linear layer that knows the gradient of its input: one that is not computed from a plain `weight` where that lies."""

    def input_gradient(self, gradient: Tensor, into: Tensor | None = None) -> Tensor:
        """gradient (M, N) -> gradient · W, (M, K), a new tensor; or added to `into`, which is returned."""


class LoraLinear(Linear):
    """peft's plain LoRA over any linear layer, quantized or not; into quantized weights it is never merged."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """(..., K) -> (..., N)."""
        if args or kwargs or torch.compiler.is_compiling() or not self.is_plain(x):
            return cast(Tensor, super().forward(x, *args, **kwargs))
        return _adapted((self,), x)[0]

    def is_plain(self, x: Tensor) -> bool:
        """Whether its result for `x` is W·x + s·B·A·x with the one adapter and a frozen W, and nothing else."""
        if self.disable_adapters or self.merged or self.active_adapters != [ADAPTER] or self.lora_variant:
            return False
        base, down = self.get_base_layer(), self.lora_A[ADAPTER].weight
        return (
            _has_known_gradient(base) and x.dtype == down.dtype and self.lora_B[ADAPTER].bias is None
            and isinstance(self.lora_dropout[ADAPTER], nn.Identity)
        )  # fmt: skip

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Raises `ConfigError` where the base is quantized: the sum would be rounded to 8 or 4 bits, and small updates lost."""
        if is_traceable_wrapper_subclass(self.get_base_layer().weight):
            raise ConfigError(
                "an adapter is not merged into quantized weights", where="base_model_precision",
                remedy="keep it as a file of its own, or load the model with base_model_precision no_change",
            )  # fmt: skip
        super().merge(safe_merge, adapter_names)


def _has_known_gradient(base: nn.Module) -> bool:
    """Not so: layers that another library made, or whose weight is a tensor with products of its own."""
    weight: Any = base.weight
    if weight.requires_grad or not (type(base) is nn.Linear or isinstance(base, FrozenLayer)):
        return False
    return isinstance(base, QuantizedLinear) or not is_traceable_wrapper_subclass(weight)


def project(layers: Sequence[nn.Module], x: Tensor) -> tuple[Tensor, ...]:
    """What each of `layers` makes of the same `x` (..., K): (..., N) each. Adapted ones share what they can."""
    if not all(isinstance(layer, LoraLinear) and not _is_watched(layer) and layer.is_plain(x) for layer in layers):
        return tuple(layer(x) for layer in layers)
    adapted = cast(Sequence[LoraLinear], layers)
    return _adapted_by_compiler(adapted, x) if torch.compiler.is_compiling() else _adapted(adapted, x)


def _is_watched(layer: nn.Module) -> bool:
    """Whether somebody wants to know when it is called: others' adapters in samples, for one."""
    return bool(layer._forward_hooks or layer._forward_pre_hooks or layer._backward_hooks or layer._backward_pre_hooks)


def _adapted(layers: Sequence[LoraLinear], x: Tensor) -> tuple[Tensor, ...]:
    return _Adapted.apply(x, tuple(layers), *_downs(layers), *_ups(layers))  # type: ignore[no-any-return, no-untyped-call]


def _adapted_by_compiler(layers: Sequence[LoraLinear], x: Tensor) -> tuple[Tensor, ...]:
    """The same for a compiler, which takes no step in place and fuses the sums itself."""
    downs, ups = _downs(layers), _ups(layers)
    lows = torch.split(functional.linear(x, _stacked(downs)), [len(down) for down in downs], dim=-1)
    return tuple(
        layer.get_base_layer()(x) + functional.linear(low, up) * layer.scaling[ADAPTER]
        for layer, low, up in zip(layers, lows, ups, strict=True)
    )


def _downs(layers: Sequence[LoraLinear]) -> list[nn.Parameter]:
    return [layer.lora_A[ADAPTER].weight for layer in layers]


def _ups(layers: Sequence[LoraLinear]) -> list[nn.Parameter]:
    return [layer.lora_B[ADAPTER].weight for layer in layers]


def _stacked(downs: Sequence[Tensor]) -> Tensor:
    """(L·r, K)."""
    return downs[0] if len(downs) == 1 else torch.cat(list(downs))


def _rows(tensor: Tensor) -> Tensor:
    """(..., N) -> (M, N)."""
    return tensor.reshape(-1, tensor.shape[-1])


class _Adapted(torch.autograd.Function):
    """x (..., K) and the layers' A (r, K) and B (N, r) -> each layer's (..., N). W gets no gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layers: tuple[LoraLinear, ...], *matrices: Tensor) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        ctx.layers = layers
        downs, ups = matrices[: len(layers)], matrices[len(layers) :]
        low = _rows(x).mm(_stacked(downs).t())
        ctx.save_for_backward(x, low, *matrices)
        results = []
        prepared = _prepared([layer.get_base_layer() for layer in layers], x)
        for layer, part, up in zip(layers, torch.split(low, [len(down) for down in downs], dim=1), ups, strict=True):
            result: Tensor = layer.get_base_layer()(x, *prepared)
            result.view(-1, len(up)).addmm_(part, up.t(), alpha=layer.scaling[ADAPTER])
            results.append(result)
        return tuple(results)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> Any:
        layers: tuple[LoraLinear, ...] = ctx.layers
        x, low, *matrices = ctx.saved_tensors
        # A result that nobody used has no gradient.
        found = [(place, _rows(gradient)) for place, gradient in enumerate(gradients) if gradient is not None]
        if not found:
            return (None,) * (2 + len(matrices))
        downs, ups = matrices[: len(layers)], matrices[len(layers) :]
        used = [downs[place] for place, _ in found]
        parts = torch.split(low, [len(down) for down in downs], dim=1)
        to_low = [_scaled(gradient.mm(ups[place]), layers[place]) for place, gradient in found]
        lows = to_low[0] if len(to_low) == 1 else torch.cat(to_low, dim=1)
        to_downs: list[Tensor | None] = [None] * len(layers)
        to_ups: list[Tensor | None] = [None] * len(layers)
        to_stacked = torch.split(lows.t().mm(_rows(x)), [len(down) for down in used])
        for (place, gradient), to_down in zip(found, to_stacked, strict=True):
            to_downs[place] = to_down
            to_ups[place] = _scaled(gradient.t().mm(parts[place]), layers[place])
        to_x: Tensor | None = None
        if ctx.needs_input_grad[0]:
            for place, gradient in reversed(found):
                to_x = _input_gradient(layers[place].get_base_layer(), gradient, to_x)
            assert to_x is not None
            to_x = to_x.addmm_(lows, _stacked(used)).view(x.shape)
        return to_x, None, *to_downs, *to_ups


def _prepared(bases: Sequence[nn.Module], x: Tensor) -> tuple[Any, ...]:
    """What layers of one kind make of their input before they multiply."""
    first = bases[0]
    alike = isinstance(first, QuantizedLinear) and all(type(base) is type(first) for base in bases)
    return first.prepare(x) if alike and isinstance(first, QuantizedLinear) else ()


def _scaled(tensor: Tensor, layer: LoraLinear) -> Tensor:
    scale = layer.scaling[ADAPTER]
    return tensor if scale == 1 else tensor.mul_(scale)


def _input_gradient(layer: nn.Linear | FrozenLayer, gradient: Tensor, into: Tensor | None) -> Tensor:
    """As `FrozenLayer.input_gradient`, of a plain layer too."""
    if isinstance(layer, FrozenLayer):
        return layer.input_gradient(gradient, into)
    return added_product(gradient, layer.weight, into)
