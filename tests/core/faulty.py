"""Plugins with one fault each, for showing that the conformance tests find it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from tuner.builtins.formats import PeftFormat
from tuner.component import Component
from tuner.config.options import Options, option
from tuner.hookspecs import hookimpl
from tuner.interfaces.blocks import BlockSet, BlockState
from tuner.interfaces.encoders import LatentEncoder, Record, Source, VideoClip
from tuner.interfaces.family import Batch, BuildContext, ClipShape, ModelFacts, Noise, Sample
from tuner.interfaces.losses import LossTerm, LossValue, Regularizer, StepState, Tap, Transform
from tuner.interfaces.memory import MemoryFacts, MemoryPlan, MemorySession, Placement
from tuner.interfaces.services import AdapterState, WeightSource
from tuner.testing.blocks import MixingModel, call_mixing_block
from tuner.testing.family import TinyFamily
from tuner.testing.options import SimulatedOptions, TinyOptions
from tuner.testing.streaming import SimulatedSession, SimulatedStreaming
from tuner.testing.weights import TinyFile


class FaultOptions(Options):
    """One switch for all."""

    fault: str = option("", help="Which fault takes part.")
    fault_weight: float = option(0.5, ge=0, help="Weight of its loss.")
    fault_block: int = option(1, help="Block that is looked at.")

    def enabled(self) -> bool:
        return bool(self.fault)


class AlwaysOptions(Options):
    """Forgets to say when it is on."""

    always_weight: float = option(0.5, ge=0, help="Weight of its loss.")


# --- regularizers --------------------------------------------------------------------------------------------------
class Fine(Regularizer):
    """Nothing is wrong with this one: the mean square of the tokens after a block."""

    name = "fine"

    def __init__(self, options: FaultOptions, context: BuildContext) -> None:
        self.options = options

    def attach(self, blocks: BlockSet, context: BuildContext) -> None:
        self.blocks = blocks

    def taps(self) -> Sequence[Tap]:
        return (Tap("tokens", self.options.fault_block, "video"),)

    def loss_terms(self) -> Sequence[LossTerm]:
        return (TapTerm(self),)

    def strength(self) -> float | Tensor:
        return self.options.fault_weight


class TapTerm(LossTerm):
    name = "fine"

    def __init__(self, owner: Fine) -> None:
        self.owner = owner

    def __call__(self, state: StepState) -> LossValue:
        return LossValue(self.name, state.taps["tokens"].hidden.float().square().mean((1, 2)), weight=self.owner.strength())


class Draws(Fine):
    """Draws noise inside a transform."""

    def transforms(self) -> Sequence[Transform]:
        def noisy(state: BlockState) -> BlockState:
            video = state.streams["video"].hidden
            return state.with_hidden({"video": video + 0.1 * torch.randn_like(video)})

        return (Transform(1, "before", noisy),)


class Forgets(Fine):
    """Its weight grows from step to step, and a resume starts over."""

    steps = 0

    def after_step(self, step: int) -> None:
        self.steps += 1

    def strength(self) -> float:
        return self.steps


class Counts(Fine):
    """Its term is another one each time it is called."""

    calls = 0

    def strength(self) -> float:
        self.calls += 1
        return self.calls


class Replaced(Fine):
    """Says that a graph may replay it, and draws into a new tensor each step."""

    capturable = True

    def begin_step(self, step: int, batch: Batch, noise: Noise, generator: torch.Generator) -> None:
        self.drawn = {"scale": torch.rand((), generator=generator)}

    def strength(self) -> Tensor:
        return self.drawn["scale"]


class InPlaceDraws(Replaced):
    """As it should be."""

    def attach(self, blocks: BlockSet, context: BuildContext) -> None:
        self.drawn = {"scale": torch.zeros(())}

    def begin_step(self, step: int, batch: Batch, noise: Noise, generator: torch.Generator) -> None:
        self.drawn["scale"].copy_(torch.rand((), generator=generator))


class Hooks(Fine):
    """Hangs a hook on a block and leaves it there."""

    def attach(self, blocks: BlockSet, context: BuildContext) -> None:
        blocks.blocks[1].register_forward_hook(lambda module, inputs, outputs: None)


class Redraws(Fine):
    """Drops tokens in a hook of the block, which draws anew when the block is recomputed."""

    def attach(self, blocks: BlockSet, context: BuildContext) -> None:
        def drop(module: nn.Module, inputs: object, outputs: tuple[Tensor, Tensor | None]) -> tuple[Tensor, Tensor | None]:
            return outputs[0] * (torch.rand_like(outputs[0]) > 0.5), outputs[1]

        self.handle = blocks.blocks[1].register_forward_hook(drop)

    def detach(self) -> None:
        self.handle.remove()


class ReadsWeights(Fine):
    """Its strength is a block's weight, read when no block runs."""

    def strength(self) -> Tensor:
        return next(p for p in self.blocks.blocks[1].parameters() if not p.requires_grad).abs().mean()


class NeedsSound(Fine):
    """Takes a stream for granted."""

    def taps(self) -> Sequence[Tap]:
        return (Tap("tokens", 1, "audio"),)


class NeverNothing(Fine):
    """Does a little even at zero."""

    def strength(self) -> float:
        return self.options.fault_weight + 0.01


class WritesBatch(Fine):
    """Changes what all terms read."""

    def begin_step(self, step: int, batch: Batch, noise: Noise, generator: torch.Generator) -> None:
        noise.streams["video"].noisy.mul_(0.5)


# --- loss terms ----------------------------------------------------------------------------------------------------
class FineTerm(LossTerm):
    """Nothing is wrong with this one."""

    name = "fine"

    def __init__(self, options: FaultOptions, context: BuildContext) -> None:
        self.options = options

    def error(self, state: StepState) -> Tensor:
        return state.prediction.streams["video"].float() - state.noise.streams["video"].target

    def __call__(self, state: StepState) -> LossValue:
        return LossValue(self.name, self.error(state).abs().mean((1, 2)), weight=self.options.fault_weight)


class Reduced(FineTerm):
    def __call__(self, state: StepState) -> LossValue:
        return LossValue(self.name, self.error(state).abs().mean())


class Compares(FineTerm):
    def __call__(self, state: StepState) -> LossValue:
        values = self.error(state).abs().mean((1, 2))
        return LossValue(self.name, values / values.mean())


class Silence(FineTerm):
    def __call__(self, state: StepState) -> LossValue:
        sound = state.batch.streams["audio"]
        kept = torch.ones(len(sound.latents)) if sound.present is None else sound.present.float()
        return LossValue(self.name, sound.latents.square().mean((1, 2)) / kept)


class InPlace(FineTerm):
    def error(self, state: StepState) -> Tensor:
        return state.prediction.streams["video"].detach().sub_(state.noise.streams["video"].target)


class Idle(FineTerm):
    def error(self, state: StepState) -> Tensor:
        return super().error(state).detach()


# --- memory strategies ---------------------------------------------------------------------------------------------
class FaultyStrategy(SimulatedStreaming):
    """Opens a session with a fault."""

    name = "fine"

    def __init__(self, options: FaultOptions, context: BuildContext) -> None:
        super().__init__(SimulatedOptions(), context)

    def keys(self, part: str) -> tuple[str, ...]:
        return ("fault",)

    def supports(self, facts: MemoryFacts) -> Sequence[Exception]:
        return [replace_where(problem) for problem in super().supports(facts)]  # type: ignore[override]

    session: ClassVar[type[SimulatedSession]] = SimulatedSession

    def open(self, part: str, blocks: int, device: torch.device) -> MemorySession:
        return self.session()


def replace_where(problem: Exception) -> Exception:
    problem.where = "fault, model_type"  # type: ignore[attr-defined]
    return problem


class CorruptsSession(SimulatedSession):
    def after_backward(self, index: int) -> None:
        for parameter, value in self._kept[index]:
            value.copy_(parameter.data * 1.001)
        super().after_backward(index)


class Corrupts(FaultyStrategy):
    """A weight is not what it was after it came back."""

    session = CorruptsSession


class ForwardOnlySession(SimulatedSession):
    def before_backward(self, index: int) -> None:
        self._held.add(index)


class ForwardOnly(FaultyStrategy):
    """Backward finds no weights."""

    session = ForwardOnlySession


class NeverAbortsSession(SimulatedSession):
    def abort(self) -> None:
        pass


class NeverAborts(FaultyStrategy):
    """An exception leaves it in the middle of a step."""

    session = NeverAbortsSession


class KeepsSession(SimulatedSession):
    def detach(self) -> None:
        self._take_all_away()


class Keeps(FaultyStrategy):
    """Takes the weights along when it goes."""

    session = KeepsSession


class Promises(FaultyStrategy):
    """Its plan leaves weights out."""

    def plan(self, facts: MemoryFacts) -> MemoryPlan:
        return MemoryPlan(0, 0, 1, 0, 0.0, "no memory at all")


class Nameless(FaultyStrategy):
    """Objects without saying to what."""

    def supports(self, facts: MemoryFacts) -> Sequence[Exception]:
        return [] if not facts.full_finetuning else [type(super().supports(facts)[0])("does not work")]  # type: ignore[override]


class ChangingOptions(FaultOptions):
    changes_numbers: ClassVar[bool] = True


class QuietOptions(FaultOptions):
    changes_numbers: ClassVar[bool] = False


# --- encoders ------------------------------------------------------------------------------------------------------
class FineEncoder(LatentEncoder):
    """Nothing is wrong with this one: the mean colour of each frame through a matrix."""

    name = "colours"
    reads: ClassVar[Literal["video", "audio", "text"]] = "video"

    def __init__(self, options: FaultOptions, context: BuildContext) -> None:
        self.matrix: Tensor | None = None

    def settings(self) -> Mapping[str, str | int | float | bool]:
        return {"encoder": "colours of a test", "version": 1}

    def load(self, device: torch.device) -> None:
        self.matrix = torch.eye(3, device=device)

    def unload(self) -> None:
        self.matrix = None

    def encode(self, sources: Sequence[Source]) -> list[Record]:
        assert self.matrix is not None
        means = torch.stack([source.frames.float().mean((1, 2)) for source in sources if isinstance(source, VideoClip)])
        return [Record({"mean": one.clone()}) for one in self.features(means @ self.matrix)]

    def features(self, means: Tensor) -> Tensor:
        return means


class Normalises(FineEncoder):
    """Over the batch."""

    def features(self, means: Tensor) -> Tensor:
        return means - means.mean(0)


class Numbers(FineEncoder):
    """By the place in the batch."""

    def features(self, means: Tensor) -> Tensor:
        return means + torch.arange(len(means))[:, None, None]


class Samples(FineEncoder):
    """Draws from a posterior."""

    def features(self, means: Tensor) -> Tensor:
        return means + torch.randn_like(means)


class Views(FineEncoder):
    """Records are slices of the batch."""

    def encode(self, sources: Sequence[Source]) -> list[Record]:
        stacked = torch.stack([record.tensors["mean"] for record in super().encode(sources)])
        return [Record({"mean": one}) for one in stacked]


class Holds(FineEncoder):
    """Weights stay."""

    def unload(self) -> None:
        pass


class Places(FineEncoder):
    """Names its folder."""

    def settings(self) -> Mapping[str, str | int | float | bool]:
        return {"weights": str(Path("models", "encoder").absolute())}


class Blind(FineEncoder):
    """Every clip is the same to it."""

    def features(self, means: Tensor) -> Tensor:
        return torch.zeros_like(means)


class Coarser(FineEncoder):
    """In less memory it computes something else."""

    rough = False

    def features(self, means: Tensor) -> Tensor:
        return means.round() if self.rough else means

    def reduce_memory(self) -> str | None:
        said = None if self.rough else "rounded"
        self.rough = True
        return said


# --- formats -------------------------------------------------------------------------------------------------------
class ForgetsAlpha(PeftFormat):
    name = "fine"

    def read(self, path: Path) -> AdapterState:
        state = super().read(path)
        return replace(state, alpha=float(state.rank))


class TakesAll(PeftFormat):
    name = "fine"

    def accepts(self, path: Path) -> bool:
        return path.suffix == ".safetensors"


class Tells(PeftFormat):
    name = "fine"

    def write(self, path: Path, adapter: AdapterState, facts: Mapping[str, str]) -> None:
        super().write(path, adapter, {**facts, "written_to": str(path)})


class Widens(PeftFormat):
    name = "fine"

    def read(self, path: Path) -> AdapterState:
        state = super().read(path)
        return replace(state, weights={name: (a.float(), b.float()) for name, (a, b) in state.weights.items()})


# --- families ------------------------------------------------------------------------------------------------------
class AnyTinyFile(TinyFile):
    families: ClassVar[tuple[str, ...]] = ("fine",)


class HidesTable(TinyFamily):
    """Positions travel beside the tokens, unlisted."""

    def enter(self, model: nn.Module, batch: Batch, noise: Noise) -> BlockState:
        state = super().enter(model, batch, noise)
        video = state.streams["video"]
        aligned = dict(video.aligned)
        table = aligned.pop("table").tensor
        return BlockState({**state.streams, "video": replace(video, aligned=aligned)}, {**state.shared, "table": table})

    def call_block(self, block: nn.Module, state: BlockState) -> BlockState:
        video = state.streams["video"]
        listed = {**video.aligned, "table": replace(video.aligned["scale"], tensor=state.shared["table"])}
        after = call_mixing_block(block, BlockState({**state.streams, "video": replace(video, aligned=listed)}, state.shared))
        return state.with_hidden({name: stream.hidden for name, stream in after.streams.items()})


class Overwrites(TinyFamily):
    """Blocks work in place."""

    def call_block(self, block: nn.Module, state: BlockState) -> BlockState:
        with torch.no_grad():
            state.streams["video"].hidden.mul_(0.9)
        return super().call_block(block, state)


class Deaf(TinyFamily):
    """Padding and missing sound are looked at like sound."""

    def enter(self, model: nn.Module, batch: Batch, noise: Noise) -> BlockState:
        state = super().enter(model, batch, noise)
        streams = {name: replace(s, aligned={k: a for k, a in s.aligned.items() if k != "heard"}) for name, s in state.streams.items()}
        return BlockState(streams, state.shared)


class Misnames(TinyFamily):
    def module_name(self, original_name: str) -> str:
        return original_name.replace("layers", "blocks")


class Miscounts(TinyFamily):
    def inspect(self, source: WeightSource, streams: Sequence[str]) -> ModelFacts:
        facts = super().inspect(source, streams)
        return replace(facts, parameters=facts.parameters + 1)


class Shrinks(TinyFamily):
    def dummy_batch(
        self, model: nn.Module, shape: ClipShape, batch_size: int, streams: Sequence[str], device: torch.device
    ) -> tuple[Batch, Noise]:
        return super().dummy_batch(model, replace(shape, width=shape.width // 2), batch_size, streams, device)


class LoadsAtOnce(TinyFamily):
    def load(
        self, source: WeightSource, streams: Sequence[str], dtype: torch.dtype, device: torch.device, placement: Placement | None = None
    ) -> nn.Module:
        model = super().load(source, streams, dtype, device)
        assert isinstance(model, MixingModel)
        for index, block in reversed(list(enumerate(model.blocks))):
            if placement is not None:
                placement.received(index, block)
        return model


class Ungridded(TinyFamily):
    def enter(self, model: nn.Module, batch: Batch, noise: Noise) -> BlockState:
        state = super().enter(model, batch, noise)
        video = replace(state.streams["video"], grid=(1, 1, 1))
        return BlockState({**state.streams, "video": video}, state.shared)


class Unlucky(TinyFamily):
    """Draws when it collates: nothing is repeated."""

    def collate(self, samples: Sequence[Sample], streams: Sequence[str]) -> Batch:
        batch = super().collate(samples, streams)
        self.luck = math.sqrt(torch.rand(()).item())
        return batch

    def call_block(self, block: nn.Module, state: BlockState) -> BlockState:
        after = super().call_block(block, state)
        video = after.streams["video"].hidden
        return after.with_hidden({"video": video * (1 + 0.1 * torch.rand(()))})


HOOKS = {
    Regularizer: ("tuner_register_regularizers", FaultOptions), LossTerm: ("tuner_register_loss_terms", FaultOptions),
    SimulatedStreaming: ("tuner_register_memory_strategies", QuietOptions), LatentEncoder: ("tuner_register_latent_encoders", FaultOptions),
    PeftFormat: ("tuner_register_checkpoint_formats", Options), TinyFamily: ("tuner_register_families", TinyOptions),
}  # fmt: skip


class Plugin:
    """A plugin that offers one class of a module under the name "fine"."""

    def __init__(self, kind: type, options: type[Options] | None = None) -> None:
        hook, usual = next(entry for base, entry in HOOKS.items() if issubclass(kind, base))
        components = [Component("fine", "for a test", options or usual, f"{kind.__module__}:{kind.__name__}")]
        setattr(self, hook, hookimpl(lambda: components))
        if issubclass(kind, TinyFamily):
            loaders = [Component("fine", "for a test", Options, "core.faulty:AnyTinyFile")]
            self.tuner_register_loaders = hookimpl(lambda: loaders)
