"""How many operations a training step issues and how many bytes their results take, counted on the meta device: no GPU is needed.

    python benchmarks/operations.py

LTX-2 2.0 at its real width, rank 32, 832x480x17, batch 2, activations kept and recomputed. Counted is what one block adds to a step,
forward and backward, with tuner's products of adapted layers and with peft's, over the same model and runner. Attention is counted as the
separate steps that it has on this device.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from plain import REAL, WORK, Shape, default_dtype
from tuner.builtins.losses import FlowMatchingLoss
from tuner.config.settings import AdapterSettings
from tuner.interfaces.family import Batch, BuildContext, Noise, Sample, StreamBatch, StreamNoise
from tuner.model.adapters import add_adapters
from tuner.model.low_rank import LoraLinear
from tuner.model.runner import BlockRunner, Checkpointing
from tuner.train.step import TrainingModel, train_step
from tuner_ltxvideo2.family import LTX2Family
from tuner_ltxvideo2.options import LTX2Options

META = torch.device("meta")
PRODUCTS = ("mm", "addmm", "addmm_", "bmm", "baddbmm")


@dataclass
class Count(TorchDispatchMode):
    """Operations that make or change tensors, and the bytes of their results."""

    names: Counter[str] = field(default_factory=Counter)
    bytes: Counter[str] = field(default_factory=Counter)

    def __post_init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        name = func.name().split("::")[1].split(".")[0]
        # `empty_like` stands for a kernel of our own, which has nothing else to show on this device.
        if not func.is_view and (name == "empty_like" or not name.startswith(("empty", "_unsafe_view", "detach", "view"))):
            self.names[name] += 1
            self.bytes[name] += sum(leaf.numel() * leaf.element_size() for leaf in tree_leaves(result) if isinstance(leaf, Tensor))
        return result

    @property
    def row(self) -> tuple[int, int, float, float]:
        """Products, other operations, GB of the results of either."""
        products = sum(self.names[name] for name in PRODUCTS)
        written = sum(self.bytes[name] for name in PRODUCTS)
        return products, self.names.total() - products, written / 1e9, (self.bytes.total() - written) / 1e9


def step_of(layers: int, recomputed: bool, shape: Shape) -> Callable[[], None]:
    """Forward and backward of a model with so many blocks."""
    from diffusers import LTX2VideoTransformer3DModel

    with META, default_dtype(torch.bfloat16):
        model: Any = LTX2VideoTransformer3DModel(**{**REAL, "num_layers": layers})
    family = LTX2Family(LTX2Options(), BuildContext(META, torch.bfloat16, 0, 0, Path()))
    targets = [name for name in family.adapter_targets(model, ("video", "audio")) if ".attn" in name or "_attn" in name]
    add_adapters(model, targets, AdapterSettings(lora_rank=32, lora_alpha=32), 0)
    blocks = family.block_set(model.train())
    runner = BlockRunner(blocks, family.call_block, checkpointing=Checkpointing.every(layers) if recomputed else Checkpointing())
    training = TrainingModel(family, model, runner, [FlowMatchingLoss(name) for name in ("video", "audio")])
    batch, noise = data(shape, int(model.config.caption_channels))

    def step() -> None:
        train_step(training, batch, noise).loss.backward()  # type: ignore[no-untyped-call]
        model.zero_grad()

    return step


def data(shape: Shape, text_width: int) -> tuple[Batch, Noise]:
    """Of the right shapes."""
    counts = {"video": shape.video_tokens, "audio": shape.audio_tokens}
    grids = {"video": shape.grid, "audio": (shape.audio_tokens, 1, 1)}
    latents = {name: torch.empty(shape.batch, counts[name], 128, device=META) for name in counts}
    streams = {name: StreamBatch(latents[name], grids[name]) for name in counts}
    text = {name: torch.empty(shape.batch, shape.text_tokens, text_width, dtype=torch.bfloat16, device=META) for name in counts}
    rates = (shape.frame_rate,) * shape.batch
    samples = tuple(Sample(str(i), "", i, 0, rates[i], shape.frames, shape.height, shape.width, {}) for i in range(shape.batch))
    sigma = torch.empty(shape.batch, device=META)
    return Batch(samples, streams, text, rates), Noise({n: StreamNoise(sigma, t, t, t) for n, t in latents.items()})


def block_alone(recomputed: bool, shape: Shape) -> tuple[int, int, float, float]:
    """What one block adds to a step."""
    rows = []
    for layers in (1, 2):
        step = step_of(layers, recomputed, shape)
        step()  # tables
        with Count() as counted:
            step()
        rows.append(counted.row)
    return tuple(b - a for a, b in zip(*rows, strict=True))  # type: ignore[return-value]


def main() -> int:
    """Prints the table."""
    shape = WORK["real"]["head"]
    print(f"torch {torch.__version__}, counted on the meta device; one block of LTX-2 2.0, rank 32, 832x480x17, batch 2\n")
    print("| Adapted layers | activations | products | other operations | GB written by products | GB written by others |")
    print("|---|---|---|---|---|---|")
    for name, peft in (("peft's", True), ("tuner's", False)):
        for recomputed in (False, True):
            row = measured(peft, recomputed, shape)
            print(f"| {name} | {'recomputed' if recomputed else 'kept'} | {row[0]} | {row[1]} | {row[2]:.2f} | {row[3]:.2f} |")
    return 0


def measured(peft: bool, recomputed: bool, shape: Shape) -> tuple[int, int, float, float]:
    """With peft's own layers, or as it is."""
    if not peft:
        return block_alone(recomputed, shape)
    with mock.patch.object(LoraLinear, "is_plain", lambda *_: False):
        return block_alone(recomputed, shape)


if __name__ == "__main__":
    sys.exit(main())
