"""Layers whose weights are on the device only while they compute: `nn.Linear` and convolutions.

Special here: a layer is streamed by changing its class to a subclass of its own, so it stays the object that everybody holds, and detaching
changes the class back. Autograd keeps nothing of the weights: they are fetched again for the gradient of the input, the only one there
is, since the weights are frozen. The products are the layer's own, of the same shapes, so results are bitwise those of a resident layer.

Dimensions: N out, K in, B samples.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from functools import cache
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from tuner.model.quantized import QuantizedLinear, added_product
from tuner_offload.layer_ring import LayerRing


def is_streamable(layer: nn.Module, *, trained: bool) -> bool:
    """Whether `layer` is one that can be streamed. `trained`: gradients will flow through it."""
    if any(True for _ in layer.children()) or getattr(layer, "weight", None) is None:
        return False
    if isinstance(layer, nn.Linear):
        return True
    # Other padding is computed before the convolution, outside the rule for its gradient below.
    return isinstance(layer, _ConvNd) and (not trained or (layer.padding_mode == "zeros" and not isinstance(layer.padding, str)))


class StreamedLayer(nn.Module):
    """What a streamed layer's class is derived from, together with the layer's own."""

    ring: LayerRing
    number: int
    """In the ring."""

    def forward(self, input: Tensor, *more: Any, **named: Any) -> Any:
        """As the layer's own."""
        if torch.is_grad_enabled() and input.requires_grad:
            return _Streamed.apply(input, self, more, named)  # type: ignore[no-untyped-call]
        return self.plain(input, *more, **named)

    def plain(self, input: Tensor, *more: Any, **named: Any) -> Any:
        """The layer's own forward, with its weights on the device."""
        with self.fetched():
            return super().forward(input, *more, **named)

    @contextlib.contextmanager
    def fetched(self) -> Iterator[None]:
        """The layer holds parameters on the device; afterwards those in host memory again."""
        stored = self.ring.layers[self.number]
        stored.parcel.put(self.ring.acquire(self.number))
        try:
            yield
        finally:
            stored.parcel.put(stored.stored)
            self.ring.release(self.number)


class _Streamed(torch.autograd.Function):
    """A layer's forward and the gradient of its input; of the weights nothing is kept."""

    @staticmethod
    def forward(ctx: Any, input: Tensor, layer: StreamedLayer, more: tuple[Any, ...], named: dict[str, Any]) -> Any:
        ctx.layer, ctx.shape = layer, input.shape
        return layer.plain(input, *more, **named)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        layer: StreamedLayer = ctx.layer
        if isinstance(layer, StreamedLinear):
            return layer.input_gradient(gradient.reshape(-1, gradient.shape[-1])).view(ctx.shape), None, None, None
        with layer.fetched():
            return _to_input(layer, gradient, ctx.shape), None, None, None


class StreamedLinear(StreamedLayer):
    """A streamed `nn.Linear`, plain or quantized."""

    weight: Tensor
    in_features: int

    def input_gradient(self, gradient: Tensor, into: Tensor | None = None) -> Tensor:
        """gradient (M, N) -> gradient · W, (M, K), a new tensor; or added to `into`: the very operations of the layer's own class."""
        with self.fetched():
            if isinstance(self, QuantizedLinear):
                return super().input_gradient(gradient, into)  # type: ignore[misc, no-any-return]
            if is_traceable_wrapper_subclass(self.weight):
                found = _by_autograd(self, gradient, torch.Size((len(gradient), self.in_features)))
                return found if into is None else into.add_(found)
            return added_product(gradient, self.weight, into)


def _to_input(layer: StreamedLayer, gradient: Tensor, shape: torch.Size) -> Tensor:
    """The gradient of a convolution's input of `shape`, from that of its output: the very operation that autograd would call."""
    convolution = cast(_ConvNd, layer)
    transposed = isinstance(convolution, _ConvTransposeNd)
    found = torch.ops.aten.convolution_backward(
        gradient, gradient.new_empty(()).expand(shape), convolution.weight, None, convolution.stride, convolution.padding,
        convolution.dilation, transposed, convolution.output_padding, convolution.groups, (True, False, False),
    )  # fmt: skip
    return found[0]  # type: ignore[no-any-return]


def _by_autograd(layer: StreamedLayer, gradient: Tensor, shape: torch.Size) -> Tensor:
    """The same where only the library that made the weight knows its products; costs one more of them.

    The input itself is not needed: the gradient of a linear map is the same everywhere.
    """
    given = gradient.new_zeros(()).expand(shape).requires_grad_()
    with torch.enable_grad():
        output = super(StreamedLayer, layer).forward(given)
    return torch.autograd.grad(output, given, gradient)[0]


@cache
def streamed_class(own: type[nn.Module]) -> type[nn.Module]:
    """The subclass of a layer's own class that streams it."""
    base = StreamedLinear if issubclass(own, nn.Linear) else StreamedLayer
    made: type[nn.Module] = type(f"Streamed{own.__name__}", (base, own), {"__module__": own.__module__})
    return made


def stream(layer: nn.Module, ring: LayerRing, number: int) -> Callable[[], None]:
    """Lets `layer` fetch its weights from `ring`; returns what takes that back."""
    own = type(layer)
    layer.__class__ = streamed_class(own)  # type: ignore[arg-type]
    layer.__dict__["ring"], layer.__dict__["number"] = ring, number

    def undo() -> None:
        layer.__class__ = own
        del layer.__dict__["ring"], layer.__dict__["number"]

    return undo
