"""How far the gradients of all adapters together are off where the base is held or multiplied in fewer bits, over the depth of the model.

    python benchmarks/deviation.py                       # on a GPU: 1 to 48 blocks, 832x480x17
    python benchmarks/deviation.py --blocks 1,2,4        # on a CPU: small clips, 1.6 GB of host memory a block

LTX-2 2.0 at its real width with random weights, rank 32, B not zero, one batch. Printed is |g - g0| / |g0| over all adapters of the
model, with g0 from the same weights and draws computed in bf16, or (`--reference fp32`, the default on a CPU) in float32.
"""

from __future__ import annotations

import argparse
import gc
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from plain import REAL, Shape, default_dtype
from product import fill, open_memory
from step import describe_machine
from tuner.builtins.losses import FlowMatchingLoss
from tuner.config.settings import AdapterSettings
from tuner.interfaces.family import Batch, BuildContext, Noise, Sample, StreamBatch, StreamNoise
from tuner.model.adapters import add_adapters
from tuner.model.runner import BlockRunner, Checkpointing
from tuner.train.step import TrainingModel, train_step
from tuner_ltxvideo2.family import LTX2Family
from tuner_ltxvideo2.options import LTX2Options

STREAMS = ("video", "audio")
WAYS: Mapping[str, Mapping[str, str]] = {
    "bf16": {}, "int8 weights": {"base_model_precision": "int8-torchao"}, "fp8 weights": {"base_model_precision": "fp8-torchao"},
    "fp8 products": {"base_model_precision": "fp8-torchao", "base_model_compute": "fp8"},
    "int4 weights": {"base_model_precision": "int4-torchao"},
}  # fmt: skip


def gradients(blocks: int, keys: Mapping[str, str], dtype: torch.dtype, shape: Shape, device: torch.device) -> Tensor:
    """Of all adapters, flat, float32, on the host."""
    from diffusers import LTX2VideoTransformer3DModel

    with torch.device("meta"), default_dtype(torch.bfloat16):
        model: Any = LTX2VideoTransformer3DModel(**{**REAL, "num_layers": blocks})
    placement = open_memory(keys, device).open("transformer", blocks, device)
    torch.manual_seed(0)
    inside = {id(module) for block in model.transformer_blocks for module in block.modules()}
    for module in model.modules():
        if id(module) not in inside:
            fill(module, device)
    for index, block in enumerate(model.transformer_blocks):
        for module in block.modules():
            fill(module, placement.reading)
        placement.received(index, block.to(dtype).requires_grad_(False))
    model.to(dtype).requires_grad_(False)
    family = LTX2Family(LTX2Options(), BuildContext(device, dtype, 0, 0, Path()))
    targets = [name for name in family.adapter_targets(model, STREAMS) if ".attn" in name or "_attn" in name]
    add_adapters(model, targets, AdapterSettings(lora_rank=32, lora_alpha=32), 0)
    trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    draws = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in trained:
            if "lora_B" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=draws) * 0.02)
    blocks_set = family.block_set(model.train())
    runner = BlockRunner(blocks_set, family.call_block, checkpointing=Checkpointing.every(blocks), session=placement.attach(blocks_set))
    training = TrainingModel(family, model, runner, [FlowMatchingLoss(name) for name in STREAMS])
    train_step(training, *data(shape, int(model.config.caption_channels), dtype, device)).loss.backward()  # type: ignore[no-untyped-call]
    found = torch.cat([p.grad.float().cpu().flatten() for _, p in trained if p.grad is not None])
    placement.close()
    return found


def data(shape: Shape, text_width: int, dtype: torch.dtype, device: torch.device) -> tuple[Batch, Noise]:
    """The same numbers for every way."""
    draws = torch.Generator().manual_seed(2)

    def draw(*size: int) -> Tensor:
        return torch.randn(size, generator=draws)

    counts = {"video": shape.video_tokens, "audio": shape.audio_tokens}
    grids = {"video": shape.grid, "audio": (shape.audio_tokens, 1, 1)}
    streams, noises = {}, {}
    sigma = torch.full((shape.batch,), 0.7)
    for name, count in counts.items():
        x0, eps = draw(shape.batch, count, 128), draw(shape.batch, count, 128)
        streams[name] = StreamBatch(x0.to(device), grids[name])
        noises[name] = StreamNoise(sigma.to(device), (0.3 * x0 + 0.7 * eps).to(device), (eps - x0).to(device), eps.to(device))
    text = {name: draw(shape.batch, shape.text_tokens, text_width).to(device, dtype) for name in counts}
    rates = (shape.frame_rate,) * shape.batch
    samples = tuple(Sample(str(i), "", i, 0, rates[i], shape.frames, shape.height, shape.width, {}) for i in range(shape.batch))
    return Batch(samples, streams, text, rates), Noise(noises)


def main(argv: list[str]) -> int:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--blocks", default="1,2,6,12,24,48" if device.type == "cuda" else "1,2,4", help="depths, separated by commas")
    parser.add_argument("--reference", choices=("bf16", "fp32"), default="bf16" if device.type == "cuda" else "fp32")
    arguments = parser.parse_args(argv)
    shape = Shape("head", 1, 832, 480, 17) if device.type == "cuda" else Shape("small", 1, 256, 192, 9, text_tokens=64)
    print("\n".join(f"{name}: {value}" for name, value in describe_machine(device).items()))
    print(f"{shape.width}x{shape.height}x{shape.frames}, rank 32; against {arguments.reference}\n")
    depths = [int(word) for word in arguments.blocks.split(",")]
    print("| Blocks |" + "".join(f" {name} |" for name in WAYS) + "\n|---|" + "---|" * len(WAYS), flush=True)
    for depth in depths:
        dtype = torch.float32 if arguments.reference == "fp32" else torch.bfloat16
        reference = gradients(depth, {}, dtype, shape, device)
        row = []
        for name, keys in WAYS.items():
            # Weights of other ways are rounded from the same bf16 ones; a CPU multiplies in float32 what a GPU does in bf16.
            computed = torch.bfloat16 if name == "bf16" or device.type == "cuda" else torch.float32
            found = gradients(depth, keys, computed, shape, device) if (name, computed) != ("bf16", dtype) else reference
            row.append(float((found - reference).norm() / reference.norm()))
            gc.collect()
        print(f"| {depth} |" + "".join(f" {value:.2%} |" for value in row), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
