"""LayerSync: an early block's tokens are drawn towards those of a later block of the same model (Haghighi et al. 2025, arXiv:2510.12581).

    loss = 1 - mean over tokens n of cos(h_early[n], stopgrad(h_late[n]))

The 1 changes no gradient; it makes 0 the least value. There is no teacher, no module and no further forward pass. Where tokens have been
dropped before one of the blocks, only positions that both blocks computed are compared.

Dimensions: B samples, K tokens of the early block, M tokens of the late block, D channels.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

from tuner.errors import ConfigError, TunerError
from tuner.interfaces.blocks import BlockSet
from tuner.interfaces.family import BuildContext
from tuner.interfaces.losses import LossTerm, LossValue, Regularizer, StepState, Tap, TapValue, TrainingFacts
from tuner_layersync.options import LayerSyncOptions

EARLY, LATE = "layersync.early", "layersync.late"


class LayerSync(Regularizer):
    """Two taps and a term; no state."""

    name = "layersync"
    capturable: ClassVar[bool] = True

    def __init__(self, options: LayerSyncOptions, context: BuildContext) -> None:
        self.options = options
        self._early, self._late = 0, 0

    def check(self, facts: TrainingFacts) -> Sequence[TunerError]:
        problems: list[TunerError] = []
        if self.options.layersync_stream not in facts.streams:
            problems.append(ConfigError(
                "is no stream of this run", where="layersync_stream", value=self.options.layersync_stream,
                remedy=f"there are: {', '.join(facts.streams)}",
            ))  # fmt: skip
        try:
            early, _ = chosen_blocks(self.options, facts.blocks)
        except ConfigError as error:
            return [*problems, error]
        if facts.trained_blocks and early < facts.trained_blocks[0]:
            problems.append(ConfigError(
                f"no trained weight lies in blocks 0 to {early}, so block {early} cannot learn", where="layersync_block", value=early,
                remedy=f"choose a block from {facts.trained_blocks[0]} on, or adapt earlier ones (peft_lora_target_modules)",
            ))  # fmt: skip
        return problems

    def describe(self, facts: TrainingFacts) -> str:
        early, late = chosen_blocks(self.options, facts.blocks)
        return f"{self.options.layersync_stream} tokens of block {early} follow block {late} of {facts.blocks}"

    def attach(self, blocks: BlockSet, context: BuildContext) -> None:
        self._early, self._late = chosen_blocks(self.options, len(blocks))

    def taps(self) -> Sequence[Tap]:
        stream = self.options.layersync_stream
        return (Tap(EARLY, self._early, stream), Tap(LATE, self._late, stream))

    def loss_terms(self) -> Sequence[LossTerm]:
        return (LayerSyncTerm(self.options.layersync_stream, self.options.layersync_weight),)


class LayerSyncTerm(LossTerm):
    """The term above. Samples without the stream, and those whose blocks share no token, are not counted."""

    name = "layersync"

    def __init__(self, stream: str, weight: float) -> None:
        self.stream = stream
        self.weight = weight

    def __call__(self, state: StepState) -> LossValue:
        if EARLY not in state.taps:
            other = next(iter(state.prediction.streams.values()))
            values = torch.zeros(other.shape[0], device=other.device)
            return LossValue(self.name, values, counted=values > 0, weight=self.weight)
        early, late = state.taps[EARLY], state.taps[LATE]
        target, common = matched(early, late)
        similarity = cosine_similarity(early.hidden.float(), target.detach().float(), dim=-1)
        counts = common.sum(dim=1)
        values = 1 - torch.where(common, similarity, 0.0).sum(dim=1) / counts.clamp(min=1)
        present = state.batch.streams[self.stream].present
        counted = counts > 0 if present is None else (counts > 0) & present
        return LossValue(self.name, values, counted=counted, weight=self.weight)


def matched(early: TapValue, late: TapValue) -> tuple[Tensor, Tensor]:
    """For each token of `early` the one of `late` at the same position, (B, K, D), and whether there is one, (B, K) bool."""
    if late.token_ids is None:
        everywhere = torch.ones(early.hidden.shape[:2], dtype=torch.bool, device=early.hidden.device)
        return late.hidden if early.token_ids is None else take(late.hidden, early.token_ids), everywhere
    ordered, order = late.token_ids.sort(dim=1)
    batch, count = early.hidden.shape[:2]
    positions = torch.arange(count, device=ordered.device).expand(batch, count) if early.token_ids is None else early.token_ids
    place = torch.searchsorted(ordered, positions.contiguous()).clamp(max=ordered.shape[1] - 1)
    return take(late.hidden, order.gather(1, place)), ordered.gather(1, place) == positions


def take(tokens: Tensor, index: Tensor) -> Tensor:
    """`tokens` (B, M, D) at `index` (B, K)."""
    return tokens.gather(1, index[..., None].expand(-1, -1, tokens.shape[2]))


def chosen_blocks(options: LayerSyncOptions, blocks: int) -> tuple[int, int]:
    """Indices of the early and the late block among `blocks`. Raises `ConfigError` that names the key."""
    early = _index("layersync_block", options.layersync_block, blocks, blocks // 3)
    late = _index("layersync_target_block", options.layersync_target_block, blocks, blocks * 2 // 3)
    if early >= late:
        raise ConfigError(
            f"block {early} learns from block {late}, which does not come after it", where="layersync_block, layersync_target_block",
            remedy="let layersync_target_block be the larger one",
        )  # fmt: skip
    return early, late


def _index(key: str, given: int | None, blocks: int, default: int) -> int:
    if given is None:
        return default
    if not -blocks <= given < blocks:
        raise ConfigError(f"the model has blocks 0 to {blocks - 1}", where=key, value=given, remedy=f"or -{blocks} to -1, from the end")
    return given % blocks
