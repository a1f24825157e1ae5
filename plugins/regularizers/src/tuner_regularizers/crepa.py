"""CREPA (arXiv 2506.09229): hidden tokens of a frame are drawn to an image encoder's features of that frame and of its neighbours.

    loss = -lambda · mean over samples of 1/F · sum_f [ sim(y_f, p(h_f)) + sum_k exp(-|k - f| / tau) · sim(y_k, p(h_f)) ]

h: video tokens after one block, p: a trained projector, y: cached features, sim: the mean cosine over a frame's tokens.

Special here: tokens are compared where they lie, so that any subset of them will do. Those that do not count in the video's own loss
(given clean, outside a mask) do not count here: a clean token shows its picture without having learned anything.

Dimensions: B samples, S tokens of the full sequence, K tokens that are there, D their channels, F H W the video's grid, E the teacher's
width.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from enum import Enum

import torch
from torch import Tensor, nn

from tuner.errors import ConfigError, TunerError
from tuner.interfaces.blocks import BlockSet
from tuner.interfaces.encoders import LatentEncoder
from tuner.interfaces.family import Batch, BuildContext, Noise, StreamBatch
from tuner.interfaces.losses import LossTerm, LossValue, Regularizer, StepState, Tap, TapValue, TrainingFacts, token_mask
from tuner_regularizers.crepa_course import CutOff, weight_at
from tuner_regularizers.crepa_options import CrepaOptions
from tuner_regularizers.matching import Alignment, Neighbours, align, on_grid
from tuner_regularizers.teacher import TeacherEncoder
from tuner_regularizers.teacher_files import find_teacher

STREAM = "video"
RECORD = f"{TeacherEncoder.name}.features"
"""In `Batch.extras`: (B, F, h, w, E)."""


class Mode(Enum):
    """What a step does."""

    ALIGN = "align"
    MEASURE = "measure"
    """The weight is 0, for now: the similarity is computed, and nothing is learned from it."""
    OFF = "off"


class Projector(nn.Module):
    """Tokens (B, K, D) of any precision -> (B, K, E) in the precision of its weights."""

    def __init__(self, width: int, features: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width, dtype=torch.float32)
        self.linear = nn.Linear(width, features, dtype=torch.float32)

    def forward(self, tokens: Tensor) -> Tensor:
        projected: Tensor = self.linear(self.norm(tokens.to(self.linear.weight.dtype)))
        return projected


class Crepa(Regularizer):
    """The regularizer."""

    name = "crepa"
    capturable = True

    def __init__(self, options: CrepaOptions, context: BuildContext) -> None:
        self.options = options
        self.mode = Mode.ALIGN
        self.neighbours = Neighbours(
            options.crepa_adjacent_distance, options.crepa_adjacent_tau, options.crepa_cumulative_neighbors,
            options.crepa_normalize_neighbour_sum,
        )  # fmt: skip
        self.weight = torch.zeros((), device=context.device)
        """Of the coming step."""
        self.cutoff: CutOff | None = None
        if options.crepa_similarity_threshold is not None:
            recoverable = options.crepa_threshold_mode == "recoverable"
            decay = options.crepa_similarity_ema_decay
            self.cutoff = CutOff(options.crepa_similarity_threshold, decay, recoverable, context.device)
        self._teacher = find_teacher(options.crepa_encoder)
        self._geometry = context.geometry
        self._block = 0
        self._total_steps = 0
        self._step = -1
        self._projector: Projector | None = None

    # --- planning ------------------------------------------------------------------------------------------------
    def check(self, facts: TrainingFacts) -> Sequence[TunerError]:
        return [*self._block_problems(facts), *self._data_problems(facts), *self._teacher_problems()]

    def _block_problems(self, facts: TrainingFacts) -> list[TunerError]:
        key, asked, index = "crepa_block_index", self.options.crepa_block_index, self._index(facts.blocks)
        if not 0 <= index < facts.blocks:
            return [_outside(asked, facts.blocks)]
        keys, trained = f"{key}, peft_lora_target_modules", facts.trained_blocks
        if not any(block <= index for block in trained):
            first = f"the first is block {trained[0]}" if trained else "no block has any"
            problem = f"no weight up to this block is trained, so nothing would be learned; {first}"
            return [ConfigError(problem, where=keys, value=asked, remedy="choose a later block, or adapt earlier ones")]
        if index > trained[-1]:
            problem = f"nothing from block {trained[-1] + 1} on is trained: tokens there are what the frozen blocks make of earlier ones"
            return [ConfigError(problem, where=keys, value=asked, remedy=f"choose block {trained[-1]} or an earlier one")]
        return []

    def _data_problems(self, facts: TrainingFacts) -> list[TunerError]:
        if STREAM not in facts.streams or not any(shape.frames for shape in facts.shapes):
            problem = "there is no picture in what is trained on, so there is nothing to align"
        elif STREAM not in facts.learned_streams:
            problem = "the picture is given and not learned, so there is nothing to align"
        else:
            return []
        return [ConfigError(problem, where="crepa_enabled", value=True, remedy="switch it off")]

    def _teacher_problems(self) -> list[TunerError]:
        try:
            patch = self._teacher.shape().patch
        except TunerError as error:
            return [error]
        size = self.options.crepa_encoder_image_size
        if size % patch == 0:
            return []
        below = max(patch, size // patch * patch)
        problem, remedy = f"must be a multiple of {patch}, the encoder's patch", f"use {below} or {below + patch}"
        return [ConfigError(problem, where="crepa_encoder_image_size", value=size, remedy=remedy)]

    def describe(self, facts: TrainingFacts) -> str:
        options, block = self.options, self._index(facts.blocks)
        teacher = f"{options.crepa_encoder} at {options.crepa_encoder_image_size} px"
        weight = f"{options.crepa_lambda:g}" + (f" to {options.crepa_lambda_end:g}" if options.crepa_scheduler != "constant" else "")
        return f"tokens after block {block} of {facts.blocks} are drawn to {teacher}, weight {weight}"

    def encoders(self) -> Sequence[LatentEncoder]:
        if self._geometry is None:
            raise ValueError("the context has no geometry: features belong to a family's latent frames")
        size, at_once = self.options.crepa_encoder_image_size, self.options.crepa_encoder_frames_batch_size
        return (TeacherEncoder(self._teacher, size, self._geometry, at_once),)

    # --- attaching -----------------------------------------------------------------------------------------------
    def attach(self, blocks: BlockSet, context: BuildContext) -> None:
        self._block = self._index(len(blocks))
        if not 0 <= self._block < len(blocks):
            raise _outside(self.options.crepa_block_index, len(blocks))
        if STREAM not in blocks.widths:
            raise ConfigError("the model family does not tell the width of its video tokens", where="crepa_enabled", value=True)
        self._projector = Projector(blocks.widths[STREAM], self._teacher.shape().width)
        self._total_steps = context.total_steps

    def _index(self, blocks: int) -> int:
        index = self.options.crepa_block_index
        return index if index >= 0 else blocks + index

    def taps(self) -> Sequence[Tap]:
        return (Tap(self.name, self._block, STREAM),)

    def loss_terms(self) -> Sequence[LossTerm]:
        return (CrepaTerm(self),)

    def trainable(self) -> Projector:
        assert self._projector is not None, "attach comes first"
        return self._projector

    # --- training ------------------------------------------------------------------------------------------------
    def begin_step(self, step: int, batch: Batch, noise: Noise, generator: torch.Generator) -> None:
        if self.cutoff is not None and step != self._step:
            self.cutoff.clear()
        elif self.cutoff is not None:
            self.cutoff.next_batch()
        self._step = step
        weight = weight_at(self.options, step, self._total_steps)
        self.mode = self._mode(step, weight)
        self.weight.fill_(weight if self.mode is Mode.ALIGN else 0.0)

    def _mode(self, step: int, weight: float) -> Mode:
        if 0 < self.options.crepa_cutoff_step <= step:
            return Mode.OFF
        if self.cutoff is not None and self.cutoff.cut:
            return Mode.OFF if self.options.crepa_threshold_mode == "permanent" else Mode.MEASURE
        return Mode.ALIGN if weight > 0 else Mode.MEASURE

    def graph_key(self) -> Hashable:
        return self.mode.value

    def after_step(self, step: int) -> None:
        if self.cutoff is not None and self.mode is not Mode.OFF:
            self.cutoff.end_step()

    def state_dict(self) -> Mapping[str, Tensor]:
        return self.cutoff.state_dict() if self.cutoff is not None else {}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        if self.cutoff is not None and state:
            self.cutoff.load_state_dict(state)


class CrepaTerm(LossTerm):
    """Minus the alignment, in float32; logs the mean cosine with the own frame as `similarity`.

    A sample counts if any of its video tokens does. A batch without picture or without features gives zeros that are not counted.
    """

    name = Crepa.name

    def __init__(self, owner: Crepa) -> None:
        self._owner = owner

    def __call__(self, state: StepState) -> LossValue:
        owner, tap, features = self._owner, state.taps.get(self.name), state.batch.extras.get(RECORD)
        if owner.mode is Mode.OFF or tap is None or features is None:
            return self._nothing(state)
        with torch.set_grad_enabled(owner.mode is Mode.ALIGN and torch.is_grad_enabled()):
            found = self._align(tap, features, state.batch.streams[STREAM])
        if owner.cutoff is not None:
            owner.cutoff.add(found.similarity, found.counted)
        return LossValue(self.name, -found.score, found.counted, owner.weight, {"similarity": found.similarity})

    def _align(self, tap: TapValue, features: Tensor, stream: StreamBatch) -> Alignment:
        projector, options = self._owner.trainable(), self._owner.options
        weights, places, count = token_mask(stream), tap.token_ids, tap.grid[0] * tap.grid[1] * tap.grid[2]
        hidden = tap.hidden
        if places is None:
            hidden, weights = hidden[:, :count], weights[:, :count]
        else:  # positions behind the grid's, such as a reference clip's, lie on no place of it
            weights = weights.gather(1, places) * (places < count)
            places = places.clamp(max=count - 1)
        projected = projector(hidden)
        try:
            wanted = on_grid(features.to(projected.dtype), tap.grid)
        except ValueError as error:
            remedy = "this model family cannot be trained with it: tokens of one latent frame each are needed"
            raise ConfigError(str(error), where="crepa_enabled", value=True, remedy=remedy) from error
        by_frames = options.crepa_normalize_by_frames
        return align(projected, wanted, weights.to(projected.dtype), places, self._owner.neighbours, by_frames=by_frames)

    def _nothing(self, state: StepState) -> LossValue:
        other = next(iter(state.prediction.streams.values()))
        zeros = torch.zeros(other.shape[0], device=other.device)
        nobody = torch.zeros_like(zeros, dtype=torch.bool)
        return LossValue(self.name, zeros, nobody, self._owner.weight, {"similarity": zeros})


def _outside(asked: int, blocks: int) -> ConfigError:
    remedy = f"use 0 to {blocks - 1}, or -{blocks} to -1 to count from the end"
    return ConfigError(f"the model has no such block, it has {blocks}", where="crepa_block_index", value=asked, remedy=remedy)
