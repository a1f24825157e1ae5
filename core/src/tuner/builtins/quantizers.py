"""The precisions a user can name: which library quantizes, how, and what a weight takes afterwards.

Special here: the libraries only quantize and hold the result; the product is that of `tuner.model.quantized` (or of `tuner.model.fp8`,
where 8-bit floats are multiplied as they are), the same on every device. So none of their compiled kernels is needed, and all precisions
train and sample alike. Scales are found in float32 whatever the dtype of the weight: found in bfloat16, the largest value of a row would
fall off the end by up to a quarter of a step.

Dimensions: N out, K in, G groups of a row.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from tuner.builtins import packed, quantized
from tuner.config.options import Options
from tuner.errors import EnvironmentProblem
from tuner.interfaces.memory import QuantizedPart, Quantizer
from tuner.model import fp8
from tuner.model.quantized import QuantizedLinear, become_quantized, stored_bytes

if TYPE_CHECKING:
    from tuner.interfaces.family import BuildContext

SMALLEST = 64
"""Features in and out from which on a layer is quantized: what is smaller, such as the gates of attention heads, costs no memory."""
GROUPS = (64, 32)
"""Columns that share a scale in 4 bits: the first that divides K. quanto repacks groups of 128 for kernels whose layout it cannot undo."""
TINY = 1e-12
"""Least scale, so that a row of zeros stays one."""


class LinearQuantizer(Quantizer):
    """Quantizes the weights of all large linear layers of a module; biases and everything else stay as they are.

    Raises `EnvironmentProblem` where the library is not installed.
    """

    library: ClassVar[str] = ""
    """The extra of this distribution that installs it; empty: there is none."""
    expand: ClassVar[staticmethod[[Any, torch.dtype], Tensor]]
    """How a layer gets its weight back."""
    parts: ClassVar[staticmethod[[Any], tuple[Tensor, Tensor]] | None] = None
    """Of 8-bit floats: values and scale of a weight, which can be multiplied as they are."""

    def __init__(self, options: Options, context: BuildContext) -> None:
        try:
            self.open_library()
        except ImportError as error:
            raise EnvironmentProblem(
                f"the precision {self.name} needs {self.library}, which cannot be imported: {error}",
                remedy=f"pip install 'tuner-framework[{self.library}]'",
            ) from error

    @torch.no_grad()
    def quantize(self, module: nn.Module) -> QuantizedPart:
        changed, left, before, after = [], [], 0, 0
        for name, layer in module.named_modules():
            if type(layer) is not nn.Linear or not self.fits(layer.out_features, layer.in_features):
                continue
            size = stored_bytes(layer.weight)
            if self._become(layer):
                before, after = before + size, after + stored_bytes(layer.weight)
                changed.append(name)
            else:
                left.append(name)
        return QuantizedPart(tuple(changed), before, after, tuple(left))

    @property
    def computes(self) -> frozenset[str]:
        return frozenset({"", "fp8"} if self.parts is not None else {""})

    def _become(self, layer: nn.Linear) -> bool:
        """Whether it could."""
        packed = self.pack(layer.weight.detach())
        if packed is None:
            return False
        multiplied = self.compute == "fp8" and fp8.fits(layer.out_features, layer.in_features)
        changed = become_quantized(layer, packed, self.expand, fp8.Fp8Linear if multiplied else QuantizedLinear)
        if isinstance(changed, fp8.Fp8Linear) and self.parts is not None:
            changed.parts = self.parts
        return True

    def bytes_of(self, weight: torch.Size, dtype: torch.dtype) -> int:
        width = torch.empty((), dtype=dtype).element_size()
        rows, columns = weight
        return self.packed_bytes(rows, columns, width) if self.fits(rows, columns) else rows * columns * width

    def fits(self, rows: int, columns: int) -> bool:
        """Whether a weight (N, K) of this shape is quantized at all."""
        return min(rows, columns) >= SMALLEST

    def open_library(self) -> None:
        """Imports the library, where there is one. Raises ImportError."""

    @abstractmethod
    def pack(self, weight: Tensor) -> Tensor | None:
        """(N, K) plain -> a tensor of another kind of the same shape and dtype, on the same device; None: it stays as it is."""

    @abstractmethod
    def packed_bytes(self, rows: int, columns: int, width: int) -> int:
        """What `pack` gives takes; `width`: bytes of an element of the plain weight."""


# --- without rounding --------------------------------------------------------------------------------------------
class Packed(LinearQuantizer):
    """bfloat16 in 12 bits, exactly. Weights of another dtype, and those whose exponents are spread too far, stay as they are."""

    name = "bf16-packed"
    expand = staticmethod(packed.expand_packed)

    def fits(self, rows: int, columns: int) -> bool:
        return super().fits(rows, columns) and columns % 2 == 0

    def pack(self, weight: Tensor) -> Tensor | None:
        return packed.pack(weight) if weight.dtype == torch.bfloat16 else None

    def packed_bytes(self, rows: int, columns: int, width: int) -> int:
        return packed.packed_bytes(rows, columns) if width == 2 else rows * columns * width


# --- torchao -----------------------------------------------------------------------------------------------------
class TorchaoQuantizer(LinearQuantizer):
    """What the torchao precisions share."""

    library = distribution = "torchao"

    def open_library(self) -> None:
        import torchao.quantization
        from torchao.quantization import Float8Tensor, Int4Tensor, Int8Tensor  # noqa: F401 - older versions lack one or another

        self.ao = torchao.quantization


class Int8Torchao(TorchaoQuantizer):
    """A scale for each row, symmetric: |w - q·s| <= s/2 with s = max|row| / 127.5."""

    name = "int8-torchao"
    expand = staticmethod(quantized.expand_int8)

    def pack(self, weight: Tensor) -> Tensor:
        found = self.ao.Int8Tensor.from_hp(weight.float(), self.ao.PerRow())
        # Without the zero points, which are all 0: a tensor less to copy.
        return self.ao.Int8Tensor(found.qdata, found.scale, found.block_size, weight.dtype)  # type: ignore[no-any-return]

    def packed_bytes(self, rows: int, columns: int, width: int) -> int:
        return rows * columns + 4 * rows


class Fp8Torchao(TorchaoQuantizer):
    """e4m3 with a scale for each row: |w - q·s| <= |w| / 16, and 2^-10·s near 0; s = max|row| / 448."""

    name = "fp8-torchao"
    expand = staticmethod(quantized.expand_float8)
    parts = staticmethod(quantized.float8_parts)

    def pack(self, weight: Tensor) -> Tensor:
        # A lower bound for the scales also keeps torchao off another package's kernels, which differ.
        found = self.ao.Float8Tensor.from_hp(weight.float(), granularity=self.ao.PerRow(), hp_value_lb=TINY)
        return self.ao.Float8Tensor(found.qdata, found.scale, found.block_size, dtype=weight.dtype)  # type: ignore[no-any-return]

    def packed_bytes(self, rows: int, columns: int, width: int) -> int:
        return rows * columns + 4 * rows


class Int4Torchao(TorchaoQuantizer):
    """A scale and a zero for each group of a row: |w - (q·s + z)| <= s/2, s = (max - min) / 15 of the group, both in the weight's dtype.

    The layout is torchao's plain one, which any device can hold; torchao itself can only fill it with another package's kernels.
    """

    name = "int4-torchao"
    expand = staticmethod(quantized.expand_int4)

    def fits(self, rows: int, columns: int) -> bool:
        return super().fits(rows, columns) and columns % GROUPS[-1] == 0

    def pack(self, weight: Tensor) -> Tensor:
        rows, columns = weight.shape
        size = group_size(columns)
        groups = weight.float().view(rows, -1, size)
        lowest, highest = groups.amin(-1, keepdim=True), groups.amax(-1, keepdim=True)
        # Rounded first, so that the values are the best for the scale and zero that are kept.
        scale = ((highest - lowest) / 15).clamp(min=TINY).to(weight.dtype)
        zero = (lowest + 8 * scale.float()).to(weight.dtype)
        values = ((groups - zero.float()) / scale.float()).round().clamp(-8, 7).to(torch.int8).view(rows, columns)
        packed = (values[:, ::2] & 15) | (values[:, 1::2] << 4)
        scale, zero = (each.squeeze(-1).t().contiguous() for each in (scale, zero))
        return self.ao.Int4Tensor(packed, scale, zero, [1, size], weight.shape)  # type: ignore[no-any-return]

    def packed_bytes(self, rows: int, columns: int, width: int) -> int:
        return rows * columns // 2 + 2 * rows * (columns // group_size(columns)) * width


# --- quanto ------------------------------------------------------------------------------------------------------
class QuantoQuantizer(LinearQuantizer):
    """What the quanto precisions share."""

    library, distribution = "quanto", "optimum-quanto"

    def open_library(self) -> None:
        import optimum.quanto

        self.quanto = optimum.quanto


class BytesQuanto(QuantoQuantizer):
    """8 bits with a scale for each row, in the weight's dtype."""

    kind: ClassVar[str]
    """quanto's name of the 8-bit type."""

    def pack(self, weight: Tensor) -> Tensor:
        kind = getattr(self.quanto, self.kind)
        plain = weight.float()
        scale = self.quanto.AbsmaxOptimizer()(plain, kind, axis=0).to(weight.dtype).clamp(min=TINY)
        found = self.quanto.quantize_weight(plain, kind, 0, scale.float(), optimized=False)
        return self.quanto.WeightQBytesTensor(  # type: ignore[no-any-return]
            kind, 0, weight.size(), weight.stride(), found._data, scale, activation_qtype=None
        )

    def packed_bytes(self, rows: int, columns: int, width: int) -> int:
        return rows * columns + rows * width


class Int8Quanto(BytesQuanto):
    """Symmetric: |w - q·s| <= s/2 with s = max|row| / 127."""

    name = "int8-quanto"
    kind = "qint8"
    expand = staticmethod(quantized.expand_bytes)


class Fp8Quanto(BytesQuanto):
    """e4m3: |w - q·s| <= |w| / 16, and 2^-10·s near 0; s = max|row| / 448."""

    name = "fp8-quanto"
    kind = "qfloat8"
    expand = staticmethod(quantized.expand_float_bytes)
    parts = staticmethod(quantized.float_bytes_parts)


class Int4Quanto(QuantoQuantizer):
    """A scale and a shift for each group of a row: |w - (q·s - shift)| <= s/2, both in the weight's dtype."""

    name = "int4-quanto"
    expand = staticmethod(quantized.expand_nibbles)

    def fits(self, rows: int, columns: int) -> bool:
        return super().fits(rows, columns) and columns % GROUPS[-1] == 0 and rows % 2 == 0

    def pack(self, weight: Tensor) -> Tensor:
        kind, size, plain = self.quanto.qint4, group_size(weight.shape[1]), weight.float()
        scale, shift = self.quanto.MaxOptimizer()(plain, kind, axis=0, group_size=size)
        scale, shift = scale.clamp(min=TINY).to(weight.dtype), shift.to(weight.dtype)
        found = self.quanto.quantize_weight(plain, kind, 0, scale.float(), shift.float(), group_size=size, optimized=False)
        return self.quanto.WeightQBitsTensor(  # type: ignore[no-any-return]
            kind, 0, size, weight.size(), weight.stride(), found._data, scale, shift
        )

    def packed_bytes(self, rows: int, columns: int, width: int) -> int:
        return rows * columns // 2 + 2 * rows * (columns // group_size(columns)) * width


def group_size(columns: int) -> int:
    """Columns of a row (K) that share a scale."""
    return next(size for size in GROUPS if columns % size == 0)
