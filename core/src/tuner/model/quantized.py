"""A linear layer whose frozen weight is stored in 8 or 4 bits, and dequantized anew for every product.

Special here: autograd keeps nothing dequantized. Backward dequantizes again and reads the weight from the layer at that moment, so whoever
moves weights between forward and backward only has to have the right ones in place when a block is walked back. The weight is a tensor
subclass of the library that quantized it; its inner tensors are read as plain attributes, once a product, so nothing is dispatched
through the subclass on the way and nothing waits for the device.

Dimensions: N out, K in, B samples, S tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

Made = TypeVar("Made")
Expand = Callable[[Any, torch.dtype], Tensor]
"""(quantized weight, dtype) -> a new plain tensor of its N·K values, row by row."""


class QuantizedLinear(nn.Linear):
    """Computes like `nn.Linear` with the dequantized weight, in the dtype of its input; the weight gets no gradient.

    It is an `nn.Linear` that changed its class (see `become_quantized`), so every test for one holds.
    """

    expand: Expand
    kept: dict[object, Any] | None = None
    """What was made of the weight already, inside `made_once`."""

    def forward(self, input: Tensor, *prepared: Any) -> Tensor:
        """(B, S, K) or (S, K) -> (..., N). `prepared`: what `prepare` gave for the same input."""
        bias = self.bias
        if torch.is_grad_enabled() and (input.requires_grad or (bias is not None and bias.requires_grad)):
            return _Product.apply(input, bias, self)  # type: ignore[no-any-return, no-untyped-call]
        return self.product(input, *prepared)

    def prepare(self, input: Tensor) -> tuple[Any, ...]:
        """What `forward` takes beside `input`, made once for all layers of the same kind that read it."""
        return ()

    def product(self, input: Tensor, *prepared: Any) -> Tensor:
        """`forward` without a graph."""
        return functional.linear(input, self.dense(input.dtype), _cast(self.bias, input.dtype))

    def input_gradient(self, gradient: Tensor, into: Tensor | None = None) -> Tensor:
        """gradient (M, N) -> gradient · W, (M, K), a new tensor; or added to `into`, which is returned."""
        return added_product(gradient, self.dense(gradient.dtype), into)

    def dense(self, dtype: torch.dtype) -> Tensor:
        """The weight as a plain (N, K) tensor: a new one, or inside `made_once` the one of the first call, which nobody may write to."""
        # The shape is the layer's: to ask the weight for its own would be dispatched.
        return self.once(dtype, lambda: self.expand(self.weight, dtype).view(self.out_features, self.in_features))

    def once(self, name: object, make: Callable[[], Made]) -> Made:
        """What `make` returns; inside `made_once` it is called for the first of all calls with that `name`."""
        if torch.compiler.is_compiling() or self.kept is None:
            return make()
        if name not in self.kept:
            self.kept[name] = make()
        made: Made = self.kept[name]
        return made

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> QuantizedLinear:
        # `.to(device)` piece by piece: the libraries would repack the whole weight for kernels of their own. A change of dtype leaves
        # the weight alone, whose pieces mean nothing in another one.
        weight = self._parameters["weight"]
        assert weight is not None
        self._parameters["weight"] = None
        try:
            super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        finally:
            self._parameters["weight"] = weight
        moved = map_pieces(weight, lambda piece: _same_dtype(piece, fn(piece)))
        self._parameters["weight"] = nn.Parameter(moved, requires_grad=False)
        return self


@contextmanager
def made_once(layers: Sequence[QuantizedLinear]) -> Iterator[None]:
    """Inside, each of `layers` makes of its weight what products need once, and keeps it to the end."""
    for layer in layers:
        layer.kept = {}
    try:
        yield
    finally:
        for layer in layers:
            layer.kept = None


class _Product(torch.autograd.Function):
    """x · W^T + b with a W that exists only while it is used."""

    @staticmethod
    def forward(ctx: Any, input: Tensor, bias: Tensor | None, layer: QuantizedLinear) -> Tensor:
        ctx.layer = layer
        return layer.product(input)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        layer: QuantizedLinear = ctx.layer
        to_input = to_bias = None
        if ctx.needs_input_grad[0]:
            to_input = layer.input_gradient(gradient.reshape(-1, gradient.shape[-1])).view(*gradient.shape[:-1], layer.in_features)
        if ctx.needs_input_grad[1]:
            to_bias = gradient.reshape(-1, gradient.shape[-1]).sum(0).to(layer.bias.dtype)
        return to_input, to_bias, None


def added_product(gradient: Tensor, weight: Tensor, into: Tensor | None) -> Tensor:
    """gradient (M, N) · weight (N, K): a new tensor; or added to `into` (M, K), which is returned."""
    return gradient.mm(weight) if into is None else into.addmm_(gradient, weight)


def _cast(bias: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    return bias if bias is None or bias.dtype == dtype else bias.to(dtype)


def become_quantized(layer: nn.Linear, weight: Tensor, expand: Expand, kind: type[QuantizedLinear] = QuantizedLinear) -> QuantizedLinear:
    """Turns `layer` into one of that `kind` in place; its former weight is free afterwards."""
    layer.weight = nn.Parameter(weight, requires_grad=False)
    layer.__class__ = kind
    assert isinstance(layer, QuantizedLinear)
    layer.expand = expand
    return layer


# --- the pieces of a quantized weight ----------------------------------------------------------------------------
def pieces(weight: Tensor) -> list[Tensor]:
    """The plain tensors that `weight` is made of, in a fixed order; a plain tensor is its own only piece."""
    if not is_traceable_wrapper_subclass(weight):
        return [weight]
    names, _ = weight.__tensor_flatten__()
    return [piece for name in names for piece in pieces(getattr(weight, name))]


def map_pieces(weight: Tensor, change: Callable[[Tensor], Tensor]) -> Tensor:
    """The same kind of tensor over `change`d pieces. Nested kinds are taken apart to the bottom."""
    if not is_traceable_wrapper_subclass(weight):
        return change(weight)
    names, facts = weight.__tensor_flatten__()
    changed = {name: map_pieces(getattr(weight, name), change) for name in names}
    return type(weight).__tensor_unflatten__(changed, facts, weight.size(), weight.stride())  # type: ignore[attr-defined, no-any-return]


def _same_dtype(before: Tensor, after: Tensor) -> Tensor:
    return after if after.dtype == before.dtype else before.to(after.device)


def stored_bytes(weight: Tensor) -> int:
    """Bytes of a weight as it lies in memory, scales included."""
    return sum(piece.numel() * piece.element_size() for piece in pieces(weight))
