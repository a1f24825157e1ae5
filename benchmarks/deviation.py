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

import torch
from torch import Tensor

from plain import Shape
from product import ProductStep, Setup
from program import begin, find_device

WAYS: Mapping[str, Mapping[str, str]] = {
    "bf16": {}, "int8 weights": {"base_model_precision": "int8-torchao"}, "fp8 weights": {"base_model_precision": "fp8-torchao"},
    "fp8 products": {"base_model_precision": "fp8-torchao", "base_model_compute": "fp8"},
    "int4 weights": {"base_model_precision": "int4-torchao"},
}  # fmt: skip


def gradients(blocks: int, keys: Mapping[str, str], dtype: torch.dtype, shape: Shape, device: torch.device) -> Tensor:
    """Of all adapters, flat, float32, on the host."""
    step = ProductStep(shape, Setup(keys=keys, layers=blocks, dtype=dtype, trained=True), device, "real")
    step.differentiate()
    found = flat(step)
    step.close()
    return found


def flat(step: ProductStep) -> Tensor:
    """The gradients that are there, one after the other, float32, on the host."""
    return torch.cat([gradient.float().cpu().flatten() for gradient in step.masters.gradients().values()])


def distance(found: Tensor, reference: Tensor) -> float:
    """|found - reference| / |reference|."""
    return float((found - reference).norm() / reference.norm())


def main(argv: list[str]) -> int:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    device = find_device()
    parser.add_argument("--blocks", default="1,2,6,12,24,48" if device.type == "cuda" else "1,2,4", help="depths, separated by commas")
    parser.add_argument("--reference", choices=("bf16", "fp32"), default="bf16" if device.type == "cuda" else "fp32")
    arguments = parser.parse_args(argv)
    shape = Shape("head", 1, 832, 480, 17) if device.type == "cuda" else Shape("small", 1, 256, 192, 9, text_tokens=64)
    begin()
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
            row.append(distance(found, reference))
            gc.collect()
        print(f"| {depth} |" + "".join(f" {value:.2%} |" for value in row), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
