"""A moving average of the trained weights as teacher: it sees the same samples with less noise, and the student's tokens follow its own.

The teacher's weights are m <- decay m + (1 - decay) w after each step, from the trained weights w (mean teacher; Tarvainen and Valpola
2017, arXiv:1703.01780). In each step it runs without gradients at sigma' = scale sigma on the path of the same draw,
x' = (1 - sigma') x0 + sigma' eps, and

    loss = 1 - mean over tokens n of cos(h_student[n], h_teacher[n])

draws the tokens after a block of the student towards those after a later block of the teacher. That a less noisy view guides a noisier one
is the idea of Self-Flow (Chefer et al. 2026, arXiv:2603.06507), which gives tokens of one sample different noise levels and compares
through a trained head; here each sample has one level, and there is no head.

Dimensions: B samples, S tokens of the stream, K those that the student's block computed, D channels.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

from tuner.errors import CheckpointError, ConfigError, TunerError
from tuner.interfaces.blocks import BlockSet
from tuner.interfaces.family import Batch, BuildContext, Noise, StreamBatch, StreamNoise
from tuner.interfaces.losses import ForwardPasses, LossTerm, LossValue, Regularizer, StepState, Tap, TrainingFacts
from tuner_ema_teacher.options import EmaTeacherOptions

STUDENT, TEACHER = "ema_teacher.student", "ema_teacher.teacher"


class EmaTeacher(Regularizer):
    """Holds the average in float32 and the teacher's tokens of the batch at hand."""

    name = "ema_teacher"
    capturable: ClassVar[bool] = True

    def __init__(self, options: EmaTeacherOptions, context: BuildContext) -> None:
        self.options = options
        self.target: Tensor | None = None
        """(B, S, D): the teacher's tokens of this batch; None: it lacks the stream."""
        self._blocks = (0, 0)
        self._passes: ForwardPasses | None = None
        self._average: dict[str, Tensor] = {}
        self._kept: dict[tuple[object, ...], Tensor] = {}
        """One tensor for each shape, which every batch of that shape is written into: a captured step reads it there."""

    def check(self, facts: TrainingFacts) -> Sequence[TunerError]:
        problems: list[TunerError] = []
        if self.options.ema_teacher_stream not in facts.streams:
            problems.append(ConfigError(
                "is no stream of this run", where="ema_teacher_stream", value=self.options.ema_teacher_stream,
                remedy=f"there are: {', '.join(facts.streams)}",
            ))  # fmt: skip
        try:
            student, _ = chosen_blocks(self.options, facts.blocks)
        except ConfigError as error:
            return [*problems, error]
        if facts.trained_blocks and student < facts.trained_blocks[0]:
            problems.append(ConfigError(
                f"no trained weight lies in blocks 0 to {student}, so block {student} cannot learn", where="ema_teacher_block",
                value=student, remedy=f"choose a block from {facts.trained_blocks[0]} on, or adapt earlier ones (peft_lora_target_modules)",
            ))  # fmt: skip
        return problems

    def describe(self, facts: TrainingFacts) -> str:
        options, (student, target) = self.options, chosen_blocks(self.options, facts.blocks)
        return (
            f"{options.ema_teacher_stream} tokens of block {student} follow block {target} of an average "
            f"(decay {options.ema_teacher_decay:g}) at {options.ema_teacher_sigma_scale:g} of the noise level; "
            "one forward pass more in each step"
        )

    def attach(self, blocks: BlockSet, context: BuildContext) -> None:
        self._blocks = chosen_blocks(self.options, len(blocks))

    def connect(self, passes: ForwardPasses) -> None:
        """The teacher starts as the student."""
        self._passes = passes
        self._average = {name: weight.detach().float().clone() for name, weight in passes.trained().items()}

    def taps(self) -> Sequence[Tap]:
        return (Tap(STUDENT, self._blocks[0], self.options.ema_teacher_stream),)

    def loss_terms(self) -> Sequence[LossTerm]:
        return (EmaTeacherTerm(self),)

    def begin_step(self, step: int, batch: Batch, noise: Noise, generator: torch.Generator) -> None:
        """The teacher's forward pass."""
        self.target = None
        if self._passes is None or self.options.ema_teacher_stream not in batch.streams:
            return
        cleaner = with_less_noise(batch, noise, self.options.ema_teacher_sigma_scale)
        tap = Tap(TEACHER, self._blocks[1], self.options.ema_teacher_stream)
        found = self._passes.run(batch, cleaner, weights=self._average, taps=[tap]).taps[TEACHER].hidden
        key = (*found.shape, found.dtype)
        if key not in self._kept:
            self._kept[key] = torch.empty_like(found)
        self.target = self._kept[key].copy_(found)

    @torch.no_grad()
    def after_step(self, step: int) -> None:
        """m <- m + (1 - decay) (w - m)."""
        if self._passes is None:
            return
        trained = self._passes.trained()
        weights = [trained[name].float() for name in self._average]
        torch._foreach_lerp_(list(self._average.values()), weights, 1 - self.options.ema_teacher_decay)

    def state_dict(self) -> Mapping[str, Tensor]:
        return dict(self._average)

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Raises `CheckpointError` for a state of other weights."""
        odd = [name for name in {**self._average, **state} if name not in state or name not in self._average]
        odd += [name for name in state if name in self._average and state[name].shape != self._average[name].shape]
        if odd:
            raise CheckpointError(
                "the teacher's weights in the checkpoint are not those trained here", where=odd[0],
                remedy="resume with the adapter and ema_teacher_weight of that run",
            )  # fmt: skip
        for name, average in self._average.items():
            average.copy_(state[name])

    def detach(self) -> None:
        self._passes, self.target = None, None
        self._average, self._kept = {}, {}


class EmaTeacherTerm(LossTerm):
    """The term above. Samples without the stream are not counted."""

    name = "ema_teacher"

    def __init__(self, owner: EmaTeacher) -> None:
        self.owner = owner

    def __call__(self, state: StepState) -> LossValue:
        weight, target = self.owner.options.ema_teacher_weight, self.owner.target
        if STUDENT not in state.taps or target is None:
            other = next(iter(state.prediction.streams.values()))
            values = torch.zeros(other.shape[0], device=other.device)
            return LossValue(self.name, values, counted=values > 0, weight=weight)
        student = state.taps[STUDENT]
        if student.token_ids is not None:
            target = target.gather(1, student.token_ids[..., None].expand(-1, -1, target.shape[2]))
        similarity = cosine_similarity(student.hidden.float(), target.float(), dim=-1)
        present = state.batch.streams[self.owner.options.ema_teacher_stream].present
        return LossValue(self.name, 1 - similarity.mean(dim=1), counted=present, weight=weight)


def with_less_noise(batch: Batch, noise: Noise, scale: float) -> Noise:
    """The same draws at `scale` times their noise level. Streams and tokens that are given stay so."""
    if scale == 1:
        return noise
    return Noise({name: _cleaner(batch.streams[name], draw, scale) for name, draw in noise.streams.items()})


def _cleaner(stream: StreamBatch, draw: StreamNoise, scale: float) -> StreamNoise:
    if stream.clean:
        return draw
    sigma = draw.sigma * scale
    level = sigma[:, None, None]
    x0 = stream.latents.float()
    noisy = (1 - level) * x0 + level * draw.noise
    if stream.conditioned is not None:
        noisy = torch.where(stream.conditioned[..., None], x0, noisy)
    return replace(draw, sigma=sigma, noisy=noisy.to(draw.noisy.dtype))


def chosen_blocks(options: EmaTeacherOptions, blocks: int) -> tuple[int, int]:
    """Indices of the student's and the teacher's block among `blocks`. Raises `ConfigError` that names the key."""
    student = _index("ema_teacher_block", options.ema_teacher_block, blocks, blocks // 3)
    return student, _index("ema_teacher_target_block", options.ema_teacher_target_block, blocks, blocks * 2 // 3)


def _index(key: str, given: int | None, blocks: int, default: int) -> int:
    if given is None:
        return default
    if not -blocks <= given < blocks:
        raise ConfigError(f"the model has blocks 0 to {blocks - 1}", where=key, value=given, remedy=f"or -{blocks} to -1, from the end")
    return given % blocks
