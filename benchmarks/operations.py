"""How many operations a training step issues and how many bytes their results take, counted on the meta device: no GPU is needed.

    python benchmarks/operations.py

LTX-2 2.0 at its real width, rank 32, 832x480x17, batch 2, activations kept and recomputed. Counted is what one block adds to a step,
forward and backward: of diffusers' model with peft's adapters, of tuner's step with peft's products of adapted layers, and of tuner's own.
Attention is counted as the separate steps that it has on this device.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from diffusers import LTX2VideoTransformer3DModel
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from plain import RANK, REAL, WORK, PlainStep, Shape, default_dtype
from tuner.builtins.losses import FlowMatchingLoss
from tuner.config.settings import AdapterSettings
from tuner.interfaces.family import BuildContext, ClipShape
from tuner.model.adapters import add_adapters
from tuner.model.low_rank import LoraLinear
from tuner.model.runner import BlockRunner, Checkpointing
from tuner.train.step import TrainingModel, train_step
from tuner_ltxvideo2.family import LTX2Family
from tuner_ltxvideo2.options import LTX2Options

Step = Callable[[int, bool, Shape], Callable[[], object]]
STREAMS = ("video", "audio")
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


def product(layers: int, recomputed: bool, shape: Shape) -> Callable[[], object]:
    """Forward and backward of tuner's step over so many blocks."""
    with META, default_dtype(torch.bfloat16):
        model: Any = LTX2VideoTransformer3DModel(**{**REAL, "num_layers": layers})
    family = LTX2Family(LTX2Options(), BuildContext(META, torch.bfloat16, 0, 0, Path()))
    targets = [name for name in family.adapter_targets(model, STREAMS) if ".attn" in name or "_attn" in name]
    add_adapters(model, targets, AdapterSettings(lora_rank=RANK, lora_alpha=RANK), 0)
    blocks = family.block_set(model.train())
    runner = BlockRunner(blocks, family.call_block, checkpointing=Checkpointing.every(layers) if recomputed else Checkpointing())
    training = TrainingModel(family, model, runner, [FlowMatchingLoss(name) for name in STREAMS])
    clip = ClipShape(shape.width, shape.height, shape.frames, shape.frame_rate, shape.frames / shape.frame_rate)
    batch, noise = family.dummy_batch(model, clip, shape.batch, STREAMS, META)

    def step() -> None:
        model.zero_grad()
        train_step(training, batch, noise).loss.backward()  # type: ignore[no-untyped-call]

    return step


def peer(layers: int, recomputed: bool, shape: Shape) -> Callable[[], object]:
    """The same of the peer's; its clipping and optimizer are not counted."""
    with mock.patch.dict(REAL, num_layers=layers):
        plain = PlainStep(shape, recomputed, META, "real", "bf16")

    def step() -> None:
        plain.model.zero_grad()
        plain.differentiate()

    return step


def block_alone(make: Step, recomputed: bool, shape: Shape) -> tuple[int, int, float, float]:
    """What one block adds to a step."""
    rows = []
    for layers in (1, 2):
        step = make(layers, recomputed, shape)
        step()  # tables
        with Count() as counted:
            step()
        rows.append(counted.row)
    return tuple(b - a for a, b in zip(*rows, strict=True))  # type: ignore[return-value]


def main() -> int:
    """Prints the table."""
    shape = WORK["real"]["head"]
    print(f"torch {torch.__version__}, counted on the meta device; one block of LTX-2 2.0, rank 32, 832x480x17, batch 2\n")
    print("| Step | activations | products | other operations | GB written by products | GB written by others |")
    print("|---|---|---|---|---|---|")
    ways = (("diffusers + peft", peer, True), ("tuner, adapted layers as peft's", product, False), ("tuner", product, True))
    for name, make, own in ways:
        for recomputed in (False, True):
            with nullcontext() if own else mock.patch.object(LoraLinear, "is_plain", lambda *_: False):
                row = block_alone(make, recomputed, shape)
            print(f"| {name} | {'recomputed' if recomputed else 'kept'} | {row[0]} | {row[1]} | {row[2]:.2f} | {row[3]:.2f} |", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
