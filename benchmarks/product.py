"""tuner's side of `step.py`: the product's own objects around a transformer with random weights; one call is one optimizer step.

Nothing here is special to the benchmark but the weights and the data: adapters, runner, losses, masters and optimizer are those of
`tuner train`, and so is `train_step`.
"""

from __future__ import annotations

import functools
import gc
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from plain import REAL, TINY, Shape, Size, StepFunction, default_dtype
from tuner.builtins.losses import FlowMatchingLoss
from tuner.builtins.optimizers import AdamW
from tuner.builtins.options import AdamOptions
from tuner.component import Component
from tuner.config.resolve import resolve
from tuner.config.settings import AdapterSettings, ModelSettings, TrainSettings
from tuner.data.prefetch import Prefetcher
from tuner.interfaces.blocks import BlockSet
from tuner.interfaces.family import Batch, BuildContext, Noise, Sample, StreamBatch
from tuner.interfaces.losses import Regularizer
from tuner.interfaces.memory import Placement
from tuner.model.adapters import add_adapters
from tuner.model.compiled import CompiledBlocks
from tuner.model.placing import RunMemory
from tuner.model.runner import BlockRunner, Checkpointing
from tuner.model.selection import with_counts
from tuner.plugins.loader import load_plugins
from tuner.train.execute import GraphExecution, PlainExecution
from tuner.train.masters import MasterWeights
from tuner.train.noise import NoiseSampler
from tuner.train.placement import to_device
from tuner.train.step import Item, TrainingModel
from tuner_ltxvideo2.family import LTX2Family
from tuner_ltxvideo2.options import LTX2Options
from tuner_ltxvideo2.sides import drop_unused

RANK = 32


@dataclass(frozen=True)
class Setup:
    """How the step is held and carried out, in the words of config.json."""

    checkpointing: bool = True
    video_only: bool = False
    graphs: bool = False
    """Replay forward and backward as a CUDA graph."""
    dynamo_mode: str = ""
    """Compile the blocks in this mode of torch.compile; empty: not."""
    lanes: int = 2
    """2: a replayed step does small work beside large work."""
    batches: int = 1
    """Batches of an optimizer step."""
    together: bool = True
    """Each block takes all of them while its weights are there; else one batch goes through all blocks after the other."""
    keys: Mapping[str, str] = field(default_factory=dict)
    """Memory, precision and regularizer keys, such as {"musubi_blocks_to_swap": "47"}."""
    extras: Mapping[str, Tensor] = field(default_factory=dict)
    """What regularizers find in `Batch.extras`; with them one batch is prepared at a time."""
    layers: int = 0
    """Blocks of the transformer; 0: all."""
    dtype: torch.dtype = torch.bfloat16
    """Of computation."""
    trained: bool = False
    """Whether adapters begin as if they had been trained: B is random and not zero, under which A would have no gradient."""


class ProductStep:
    """Model, optimizer and one batch."""

    def __init__(self, shape: Shape, setup: Setup, device: torch.device, size: Size) -> None:
        self.device = device
        self.setup = setup
        self.streams = ("video",) if setup.video_only else ("video", "audio")
        context = BuildContext(device, setup.dtype, 0, 0, Path())
        self.family = LTX2Family(LTX2Options(), context)
        config = dict(REAL if size == "real" else TINY) | ({"num_layers": setup.layers} if setup.layers else {})
        self.placement = open_memory(setup.keys, device).open("transformer", int(str(config.get("num_layers", 48))), device)
        model = build_model(config, self.streams, self.placement, device, setup.dtype)
        targets = [name for name in self.family.adapter_targets(model, self.streams) if ".attn" in name or "_attn" in name]
        add_adapters(model, targets, AdapterSettings(lora_rank=RANK, lora_alpha=RANK), 0)
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.to(device)
        if setup.trained:
            train_somewhat(model)
        blocks = self.family.block_set(model)
        self.session = self.placement.attach(blocks)
        policy = Checkpointing.every(len(blocks)) if setup.checkpointing else Checkpointing()
        self.regularizers = attached(setup.keys, blocks, replace(context, geometry=self.family.geometry, total_steps=1000))
        self.runner = BlockRunner(
            blocks, self.family.call_block, checkpointing=policy, session=self.session,
            transforms=[t for r in self.regularizers for t in r.transforms()], taps=[t for r in self.regularizers for t in r.taps()],
            train_block=CompiledBlocks(self.family.call_block, setup.dynamo_mode) if setup.dynamo_mode else None,
        )  # fmt: skip
        self.runner.lanes = setup.lanes > 1
        terms = [*(FlowMatchingLoss(name) for name in self.streams), *(t for r in self.regularizers for t in r.loss_terms())]
        self.run = run = TrainingModel(self.family, model, self.runner, terms, self.regularizers)
        trained = {n: p for n, p in model.named_parameters() if p.requires_grad} | trained_along(self.regularizers, device)
        self.masters = MasterWeights(trained, low_precision=False)
        self.runner.sink = self.masters
        self.execution = GraphExecution(run, self.masters) if setup.graphs else PlainExecution(run, self.masters)
        self.optimizer = AdamW(self.masters.optimized(), 1e-4, AdamOptions())
        self.steps = 0
        self.take(shape)

    def take(self, shape: Shape) -> None:
        """Goes on with random data of that shape."""
        if "feed" in self.__dict__:
            self.feed.close()
        drawn = with_counts(self._batch(shape, int(self.run.model.config.caption_channels)))
        self.batch = to_device(drawn, self.device)
        sampler = NoiseSampler(TrainSettings(), self.family.token_shift, 0)
        pin = self.device.type == "cuda"

        def draw(index: int) -> Noise:
            noise = sampler.sample(drawn, index)
            return to_device(noise, self.device, pin=True) if pin else noise

        self.feed = Prefetcher(draw)

    def draw(self) -> Noise:
        """The next draws, on the device."""
        return to_device(next(self.feed), self.device)

    def close(self) -> None:
        """Frees everything; the step must not be called afterwards."""
        self.feed.close()
        self.placement.close()
        self.__dict__.clear()
        gc.collect()

    def _batch(self, shape: Shape, text_width: int) -> Batch:
        counts = {"video": shape.video_tokens, "audio": shape.audio_tokens}
        grids = {"video": shape.grid, "audio": (shape.audio_tokens, 1, 1)}
        draws = {name: torch.Generator().manual_seed(seed) for seed, name in enumerate(counts)}
        streams = {
            name: StreamBatch(torch.randn(shape.batch, counts[name], 128, generator=draws[name]), grids[name]) for name in self.streams
        }
        width = (shape.batch, shape.text_tokens, text_width)
        text = {name: torch.randn(width, generator=draws[name]).to(self.setup.dtype) for name in self.streams}
        samples = tuple(
            Sample(str(i), "random", i, 0, shape.frame_rate, shape.frames, shape.height, shape.width, {}) for i in range(shape.batch)
        )
        return Batch(samples, streams, text, (shape.frame_rate,) * shape.batch, self.setup.extras)

    def differentiate(self) -> Tensor:
        """Draws, forward and backward; gradients are left in `masters`. The loss of the last batch."""
        items = [Item(self.batch, self.draw()) for _ in range(self.setup.batches)]
        for group in [items] if self.setup.together else [[item] for item in items]:
            for regularizer in self.regularizers:
                regularizer.begin_step(self.steps, group[0].batch, group[0].noise, torch.Generator().manual_seed(self.steps))
            result = self.execution(group, self.steps, 1 / len(items))[-1]
        return result.loss.detach().clone()

    def __call__(self) -> Tensor:
        """What `tuner.train.loop` does in a step: draws, forward, backward, clip, optimizer, publish."""
        loss = self.differentiate()
        self.masters.clip_(1.0)
        self.optimizer.step()
        self.masters.publish()
        self.forget()
        for regularizer in self.regularizers:
            regularizer.after_step(self.steps)
        self.steps += 1
        return loss

    def forget(self) -> None:
        """Frees the gradients."""
        for parameter in self.masters.optimized():
            parameter.grad = None


def open_memory(keys: Mapping[str, str], device: torch.device) -> RunMemory:
    """The strategies and quantizers that `keys` switch on, found and built as a run does."""
    if not keys:
        return RunMemory()
    registry = load_plugins()
    settings = resolve(registry.option_types, flags=dict(keys))
    context = BuildContext(device, torch.bfloat16, 0, 0, Path())

    def build(component: Component) -> Any:
        return component.load()(settings.get(component.options), context)  # type: ignore[operator]

    strategies = [build(c) for c in registry.components("memory_strategy") if settings.get(c.options).enabled()]
    model = settings.get(ModelSettings)
    precisions = {"transformer": model.base_model_precision, "text_encoder": model.text_encoder_1_precision}
    wanted = {part: registry.component("quantizer", name) for part, name in precisions.items() if name != "no_change"}
    quantizers = {part: build(component) for part, component in wanted.items()}
    if "transformer" in quantizers:
        quantizers["transformer"].compute = model.base_model_compute
    return RunMemory(strategies, quantizers)


def attached(keys: Mapping[str, str], blocks: BlockSet, context: BuildContext) -> tuple[Regularizer, ...]:
    """The regularizers that `keys` switch on."""
    if not keys:
        return ()
    registry = load_plugins()
    settings = resolve(registry.option_types, flags=dict(keys))
    chosen = [component for component in registry.components("regularizer") if settings.get(component.options).enabled()]
    made: tuple[Any, ...] = tuple(component.load()(settings.get(component.options), context) for component in chosen)  # type: ignore[operator]
    for regularizer in made:
        regularizer.attach(blocks, context)
    return made


def trained_along(regularizers: Sequence[Regularizer], device: torch.device) -> dict[str, nn.Parameter]:
    """The parameters of their modules, by name."""
    modules = {regularizer.name: regularizer.trainable() for regularizer in regularizers}
    found = {name: module.to(device) for name, module in modules.items() if module is not None}
    return {f"{name}.{inner}": p for name, module in found.items() for inner, p in module.named_parameters()}


def build_model(
    config: Mapping[str, object], streams: Sequence[str], placement: Placement, device: torch.device, dtype: torch.dtype = torch.bfloat16
) -> Any:
    """The transformer with random weights, made as a loader makes it: block by block through `placement`.

    A weight is the same bfloat16 numbers wherever it is drawn, and whatever else the model has.
    """
    from diffusers import LTX2VideoTransformer3DModel

    with torch.device("meta"), default_dtype(torch.bfloat16):
        model: Any = LTX2VideoTransformer3DModel(**config)
    drop_unused(model, streams)
    model.requires_grad_(False)
    inside = {id(module) for block in model.transformer_blocks for module in block.modules()}
    for name, module in model.named_modules():
        if id(module) not in inside:
            fill(name, module, device, dtype)
    for index, block in enumerate(model.transformer_blocks):
        placement.expect(index, block, dtype)
        for name, module in block.named_modules(prefix=f"transformer_blocks.{index}"):
            fill(name, module, placement.reading, dtype)
        placement.received(index, block.requires_grad_(False))
    model.requires_grad_(False)
    return model


DRAWN, REPEATED = 1 << 20, 32


@torch.no_grad()
def fill(prefix: str, module: nn.Module, device: torch.device, dtype: torch.dtype) -> None:
    """Gives the module's own parameters small random values, which their full names decide; on `device`, where they have no memory yet."""
    for name, parameter in module.named_parameters(recurse=False):
        # To draw 19 B normal numbers would take minutes. A piece of a short draw, from another place on for each, repeated:
        # that does not change what is measured.
        start = zlib.crc32(f"{prefix}.{name}".encode()) % DRAWN
        value = torch.empty(parameter.shape, dtype=dtype, device=device) if parameter.is_meta else parameter.detach()
        drawn = drawn_on(value.device)[start : start + REPEATED * DRAWN]
        for piece in value.view(-1).split(len(drawn)):
            piece.copy_(drawn[: piece.numel()])
        if parameter.is_meta:
            setattr(module, name, nn.Parameter(value, requires_grad=False))


@functools.cache
def drawn_on(device: torch.device) -> Tensor:
    """Normal numbers, the same ones several times one after the other."""
    drawn = torch.randn(DRAWN, generator=torch.Generator().manual_seed(0)).mul_(0.02).bfloat16()
    return drawn.repeat(REPEATED + 1).to(device)


@torch.no_grad()
def train_somewhat(model: nn.Module) -> None:
    """Random values for all B, which their names decide."""
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            draws = torch.Generator().manual_seed(zlib.crc32(name.encode()))
            parameter.copy_(torch.randn(parameter.shape, generator=draws) * 0.02)


def product_step_factory(shape: Shape, setup: Setup, device: torch.device, size: Size) -> tuple[StepFunction, Callable[[], None]]:
    """The step, and what frees its memory. After the second is called the first must not be."""
    held = [ProductStep(shape, setup, device, size)]

    def step() -> Tensor:
        return held[0]()

    def cleanup() -> None:
        held.pop().close()
        if device.type == "cuda":
            torch.cuda.empty_cache()

    return step, cleanup
