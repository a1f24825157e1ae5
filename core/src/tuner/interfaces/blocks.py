"""The seam between families and techniques: streams of tokens that flow through an ordered list of blocks.

Dimensions: B samples, S tokens of one stream, D channels, T text tokens, F H W latent frames, rows, columns.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from torch import Tensor, nn


@dataclass(frozen=True)
class Aligned:
    """A tensor with one entry per token of its stream (rotary table, per-token modulation, mask).

    `token_dims`: the dimensions of `tensor` that run over tokens. A tensor whose size there is 1 holds for all tokens
    and is not selected. `batched`: whether dimension 0 runs over samples (size 1 there broadcasts).
    """

    tensor: Tensor
    token_dims: tuple[int, ...]
    batched: bool = True


@dataclass(frozen=True)
class TokenStream:
    """The tokens of one modality on their way through the blocks."""

    hidden: Tensor
    """(B, S, D)."""
    aligned: Mapping[str, Aligned] = field(default_factory=dict)
    """Every tensor with one entry per token."""
    grid: tuple[int, int, int] = (1, 1, 1)
    """Latent (F, H, W); audio (L, 1, 1). Token order f, h, w."""
    token_ids: Tensor | None = None
    """(B, K) int64: positions in the full sequence, once tokens have been selected; None: all, in order."""
    protected: Tensor | None = None
    """(B, S) bool: conditioning tokens that nobody may drop; None: none."""
    extra_tokens: int = 0
    """So many tokens at the end of the full sequence lie on no place of `grid`, such as those of a reference clip: S = F·H·W + this.
    They are protected. Who works on the grid leaves out positions (`token_ids`) from F·H·W on."""


@dataclass(frozen=True)
class BlockState:
    """Everything a block reads. Blocks return a state with new `hidden` and everything else the same objects."""

    streams: Mapping[str, TokenStream]
    shared: Mapping[str, Tensor] = field(default_factory=dict)
    """Text and per-sample modulation: tensors without a token dimension of a stream."""

    def with_hidden(self, hidden: Mapping[str, Tensor]) -> BlockState:
        """The same state with the named streams' tokens replaced."""
        streams = {name: replace(s, hidden=hidden[name]) if name in hidden else s for name, s in self.streams.items()}
        return BlockState(streams, self.shared)


@dataclass(frozen=True)
class BlockSet:
    """The ordered blocks of a model, by name, with the bytes of their weights."""

    blocks: tuple[nn.Module, ...]
    names: tuple[str, ...]
    widths: Mapping[str, int] = field(default_factory=dict)
    """Stream -> D, the channels of its tokens; a stream that is missing: not told."""

    def __len__(self) -> int:
        return len(self.blocks)

    def frozen_bytes(self, index: int) -> int:
        """Bytes of the parameters of block `index` that are not trained."""
        return sum(p.numel() * p.element_size() for p in self.blocks[index].parameters() if not p.requires_grad)

    @staticmethod
    def of(model: nn.Module, blocks: Sequence[nn.Module], widths: Mapping[str, int] | None = None) -> BlockSet:
        """Names the given blocks as `model` does; `widths`: stream -> channels of its tokens.

        Raises KeyError for a block that is not one of the model's modules.
        """
        names = {id(module): name for name, module in model.named_modules()}
        return BlockSet(tuple(blocks), tuple(names[id(block)] for block in blocks), widths or {})


def trainable_parameters(module: nn.Module) -> list[nn.Parameter]:
    """The parameters of `module` that receive gradients, in a fixed order."""
    return [p for p in module.parameters() if p.requires_grad]
