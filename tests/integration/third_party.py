"""A plugin as somebody else would write it: a regularizer with everything that the interface offers and one that changes what blocks see,
a loss term, two memory strategies."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from tuner.component import Component
from tuner.config.options import Options, option
from tuner.errors import ConfigError, TunerError
from tuner.hookspecs import hookimpl
from tuner.interfaces.blocks import BlockSet, BlockState
from tuner.interfaces.encoders import LatentEncoder, Record, Source, VideoClip
from tuner.interfaces.family import Batch, BuildContext, Noise
from tuner.interfaces.losses import LossTerm, LossValue, Regularizer, StepState, Tap, Transform
from tuner.interfaces.memory import MemoryFacts, MemoryPlan, MemorySession, MemoryStrategy

JOURNAL: list[str] = []
"""What happened, in order; a test clears it."""


class BrightnessOptions(Options):
    """Keys of the regularizer."""

    brightness_weight: float = option(0.0, ge=0, help="Weight of the brightness term.")

    def enabled(self) -> bool:
        return self.brightness_weight > 0


class DimOptions(Options):
    """Keys of the second regularizer."""

    dim_by: float = option(0.0, ge=0, lt=1, help="By how much tokens are smaller inside blocks 1 and 2.")

    def enabled(self) -> bool:
        return self.dim_by > 0


class ShrinkOptions(Options):
    """Keys of the loss term."""

    shrink_weight: float = option(0.0, ge=0, help="Weight of the predicted velocity's square.")

    def enabled(self) -> bool:
        return self.shrink_weight > 0


class WatchOptions(Options):
    """Keys of the memory strategy."""

    watch_blocks: bool = option(False, help="Write every block event down.")

    def enabled(self) -> bool:
        return self.watch_blocks


class MeanBrightness(LatentEncoder):
    """The mean of each frame, as a teacher's feature."""

    name = "brightness"
    reads = "video"

    def settings(self) -> Mapping[str, str | int | float | bool]:
        return {"version": 1}

    def load(self, device: torch.device) -> None:
        JOURNAL.append("encoder loaded")

    def unload(self) -> None:
        JOURNAL.append("encoder unloaded")

    def encode(self, sources: Sequence[Source]) -> list[Record]:
        clips = [source for source in sources if isinstance(source, VideoClip)]
        return [Record({"mean": clip.frames.float().mean((1, 2, 3)) / 255}) for clip in clips]


class Brightness(Regularizer):
    """Aligns a projection of the tokens after block 1 with the clip's brightness; adds nothing to the tokens before block 1."""

    name = "brightness"

    def __init__(self, options: BrightnessOptions, context: BuildContext) -> None:
        self.weight = options.brightness_weight
        self.projector = nn.Linear(1, 1)
        self.calls = torch.zeros((), dtype=torch.int64)

    def attach(self, blocks: BlockSet, context: BuildContext) -> None:
        JOURNAL.append(f"attached to {len(blocks)} blocks")

    def encoders(self) -> Sequence[LatentEncoder]:
        return (MeanBrightness(),)

    def transforms(self) -> Sequence[Transform]:
        def unchanged(state: BlockState) -> BlockState:
            video = state.streams["video"]
            return BlockState({**state.streams, "video": replace(video, hidden=video.hidden + 0.0)}, state.shared)

        return (Transform(1, "before", unchanged),)

    def taps(self) -> Sequence[Tap]:
        return (Tap("after one", 1, "video"),)

    def loss_terms(self) -> Sequence[LossTerm]:
        return (BrightnessTerm(self),)

    def trainable(self) -> nn.Module:
        return self.projector

    def begin_step(self, step: int, batch: Batch, noise: Noise, generator: torch.Generator) -> None:
        self.calls += 1

    def state_dict(self) -> Mapping[str, Tensor]:
        return {"calls": self.calls.clone()}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        self.calls = state["calls"].clone()

    def detach(self) -> None:
        JOURNAL.append(f"detached after {int(self.calls)} batches")


class Dim(Regularizer):
    """Every other sample's tokens are smaller inside blocks 1 and 2: what a block is given depends on the step."""

    name = "dim"

    def __init__(self, options: DimOptions, context: BuildContext) -> None:
        self.kept = 1 - options.dim_by
        self.scale = torch.ones(())

    def attach(self, blocks: BlockSet, context: BuildContext) -> None:
        self.scale = self.scale.to(context.device)

    def begin_step(self, step: int, batch: Batch, noise: Noise, generator: torch.Generator) -> None:
        drawn = torch.rand(len(batch.samples), generator=generator) < 0.5
        self.scale = torch.where(drawn, self.kept, 1.0)[:, None, None].to(self.scale.device)

    def transforms(self) -> Sequence[Transform]:
        def scaled(state: BlockState, by: Tensor) -> BlockState:
            return state.with_hidden({name: stream.hidden * by for name, stream in state.streams.items()})

        return (Transform(1, "before", lambda state: scaled(state, self.scale)), Transform(2, "after", lambda s: scaled(s, 1 / self.scale)))


class BrightnessTerm(LossTerm):
    """Squared distance of the projected mean token from the clip's mean brightness."""

    name = "brightness"

    def __init__(self, owner: Brightness) -> None:
        self.owner = owner

    def __call__(self, state: StepState) -> LossValue:
        tokens = state.taps["after one"].hidden.float().mean((1, 2))
        projected = self.owner.projector(tokens[:, None])[:, 0]
        return LossValue(self.name, (projected - state.batch.extras["brightness.mean"].mean(1)).square(), weight=self.owner.weight)


class Shrink(LossTerm):
    """The square of the predicted video velocity."""

    name = "shrink"

    def __init__(self, options: ShrinkOptions, context: BuildContext) -> None:
        self.weight = options.shrink_weight

    def __call__(self, state: StepState) -> LossValue:
        return LossValue(self.name, state.prediction.streams["video"].float().square().mean((1, 2)), weight=self.weight)


class Watching(MemorySession):
    """Writes the block events down."""

    def attach(self, blocks: BlockSet) -> None:
        adapted = any(parameter.requires_grad for block in blocks.blocks for parameter in block.parameters())
        JOURNAL.append("memory attached to adapted blocks" if adapted else "memory attached to bare blocks")

    def before_forward(self, index: int) -> None:
        JOURNAL.append(f"F{index}")

    def before_backward(self, index: int) -> None:
        JOURNAL.append(f"B{index}")

    def detach(self) -> None:
        JOURNAL.append("memory detached")


class WatchAgainOptions(Options):
    """Keys of a second strategy of the same kind."""

    watch_again: bool = option(False, help="Write every block event down once more.")

    def enabled(self) -> bool:
        return self.watch_again


class Watch(MemoryStrategy):
    """Moves nothing."""

    name = "watch"

    def __init__(self, options: Options, context: BuildContext) -> None:
        self.options = options

    def keys(self, part: str) -> tuple[str, ...]:
        return tuple(type(self.options).model_fields)

    def supports(self, facts: MemoryFacts) -> Sequence[TunerError]:
        return [ConfigError("cannot watch every weight", where="watch_blocks")] if facts.full_finetuning else []

    def plan(self, facts: MemoryFacts) -> MemoryPlan:
        return MemoryPlan(sum(facts.block_bytes), 0, 0, 0, 0.0, "everything stays")

    def open(self, part: str, blocks: int, device: torch.device) -> MemorySession:
        return Watching()


@hookimpl
def tuner_register_regularizers() -> list[Component]:
    return [
        Component("brightness", "aligns tokens with brightness", BrightnessOptions, "integration.third_party:Brightness"),
        Component("dim", "smaller tokens in the middle", DimOptions, "integration.third_party:Dim"),
    ]


@hookimpl
def tuner_register_loss_terms() -> list[Component]:
    return [Component("shrink", "small velocities", ShrinkOptions, "integration.third_party:Shrink")]


@hookimpl
def tuner_register_memory_strategies() -> list[Component]:
    factory = "integration.third_party:Watch"
    return [Component("watch", "writes events down", WatchOptions, factory), Component("again", "so too", WatchAgainOptions, factory)]
