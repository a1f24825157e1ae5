"""tuner's side of `step.py`: the product's own objects around a transformer with random weights; one call is one optimizer step.

Nothing here is special to the benchmark but the weights and the data: adapters, runner, losses, masters and optimizer are those of
`tuner train`, and so is `train_step`.
"""

from __future__ import annotations

import gc
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from plain import REAL, TINY, Shape, Size, StepFunction, default_dtype
from tuner.builtins.losses import FlowMatchingLoss
from tuner.builtins.optimizers import AdamW
from tuner.builtins.options import AdamOptions
from tuner.config.settings import AdapterSettings, TrainSettings
from tuner.data.prefetch import Prefetcher
from tuner.interfaces.family import Batch, BuildContext, Noise, Sample, StreamBatch
from tuner.model.adapters import add_adapters
from tuner.model.runner import BlockRunner, Checkpointing
from tuner.train.masters import MasterWeights
from tuner.train.noise import NoiseSampler
from tuner.train.placement import to_device
from tuner.train.step import TrainingModel, train_step
from tuner_ltxvideo2.family import LTX2Family
from tuner_ltxvideo2.options import LTX2Options
from tuner_ltxvideo2.transformer import drop_audio

RANK = 32


class ProductStep:
    """Model, optimizer and one batch."""

    def __init__(self, shape: Shape, checkpointing: bool, video_only: bool, device: torch.device, size: Size) -> None:
        from diffusers import LTX2VideoTransformer3DModel

        torch.manual_seed(0)
        self.device = device
        self.streams = ("video",) if video_only else ("video", "audio")
        self.family = LTX2Family(LTX2Options(), BuildContext(device, torch.bfloat16, 0, 0, Path()))
        config = REAL if size == "real" else TINY
        with default_dtype(torch.bfloat16), device:
            model = LTX2VideoTransformer3DModel(**config)
        if video_only:
            drop_audio(model)
        model.requires_grad_(False)
        targets = [name for name in self.family.adapter_targets(model, self.streams) if ".attn" in name or "_attn" in name]
        add_adapters(model, targets, AdapterSettings(lora_rank=RANK, lora_alpha=RANK), 0)
        blocks = self.family.block_set(model)
        policy = Checkpointing.every(len(blocks)) if checkpointing else Checkpointing()
        runner = BlockRunner(blocks, self.family.call_block, checkpointing=policy)
        self.run = TrainingModel(self.family, model, runner, [FlowMatchingLoss(name) for name in self.streams])
        self.masters = MasterWeights({n: p for n, p in model.named_parameters() if p.requires_grad}, low_precision=False)
        self.optimizer = AdamW(self.masters.optimized(), 1e-4, AdamOptions())
        drawn = self._batch(shape, int(model.config.caption_channels))
        self.batch = to_device(drawn, device)
        sampler = NoiseSampler(TrainSettings(), self.family.token_shift, 0)
        pin = device.type == "cuda"

        def draw(index: int) -> Noise:
            noise = sampler.sample(drawn, index)
            return to_device(noise, device, pin=True) if pin else noise

        self.feed = Prefetcher(draw)
        self.steps = 0

    def _batch(self, shape: Shape, text_width: int) -> Batch:
        counts = {"video": shape.video_tokens, "audio": shape.audio_tokens}
        grids = {"video": shape.grid, "audio": (shape.audio_tokens, 1, 1)}
        streams = {name: StreamBatch(torch.randn(shape.batch, counts[name], 128), grids[name]) for name in self.streams}
        text = {name: torch.randn(shape.batch, shape.text_tokens, text_width, dtype=torch.bfloat16) for name in self.streams}
        samples = tuple(
            Sample(str(i), "random", i, 0, shape.frame_rate, shape.frames, shape.height, shape.width, {}) for i in range(shape.batch)
        )
        return Batch(samples, streams, text, (shape.frame_rate,) * shape.batch)

    def __call__(self) -> Tensor:
        """What `tuner.train.loop` does in a step: draws, forward, backward, clip, optimizer, publish."""
        noise = to_device(next(self.feed), self.device)
        result = train_step(self.run, self.batch, noise, self.steps)
        result.loss.backward()  # type: ignore[no-untyped-call]
        self.masters.collect()
        self.masters.clip_(1.0)
        self.optimizer.step()
        self.masters.publish()
        for parameter in self.masters.optimized():
            parameter.grad = None
        self.steps += 1
        return result.loss.detach()


def product_step_factory(
    shape: Shape, checkpointing: bool, video_only: bool, device: torch.device, size: Size
) -> tuple[StepFunction, Callable[[], None]]:
    """The step, and what frees its memory. After the second is called the first must not be."""
    held = [ProductStep(shape, checkpointing, video_only, device, size)]

    def step() -> Tensor:
        return held[0]()

    def cleanup() -> None:
        held[0].feed.close()
        held.clear()
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()

    return step, cleanup
