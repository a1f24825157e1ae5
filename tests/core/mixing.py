"""`MixingModel` as a family's seam, and batches for it."""

from __future__ import annotations

import torch
from torch import nn

from tuner.interfaces.blocks import BlockState
from tuner.interfaces.family import Batch, Noise, Prediction, Sample, StreamBatch, StreamNoise
from tuner.testing.blocks import MixingModel
from tuner.train.step import Item


class Mixing:
    """The seam of a family, over `MixingModel`, in `dtype`; a test may count blocks until the device is `full_after` so many."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        self.dtype = dtype
        self.full_after = 99
        self.called = 0

    def enter(self, model: nn.Module, batch: Batch, noise: Noise) -> BlockState:
        self.called = 0
        video = noise.streams["video"]
        assert isinstance(model, MixingModel)
        sigma = video.sigma[:, None].expand(-1, video.noisy.shape[1])
        return model.enter(video.noisy.to(self.dtype), None, batch.text["video"].to(self.dtype), sigma.to(self.dtype))

    def exit(self, model: nn.Module, state: BlockState) -> Prediction:
        assert isinstance(model, MixingModel)
        return Prediction(model.exit(state))


def item(number: int, frames: int) -> Item:
    draw = torch.Generator().manual_seed(number)
    noisy, target, text = (torch.randn(2, 5, 6, generator=draw) for _ in range(3))
    samples = tuple(Sample(str(i), "made", i, 0, 25.0, frames, 32, 32, {}) for i in range(2))
    video = StreamNoise(torch.rand(2, generator=draw), noisy, target, target)
    return Item(Batch(samples, {"video": StreamBatch(noisy, (1, 1, 5))}, {"video": text}, (25.0, 25.0)), Noise({"video": video}))
