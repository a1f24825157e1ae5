"""The transformer's blocks go through the compiler whole: no graph break, one graph for all blocks, the plain numbers."""

from __future__ import annotations

from pathlib import Path

import torch
from torch._dynamo.utils import counters

from ltxvideo2.ltx2_models import text_widths, transformer
from tuner.builtins.losses import FlowMatchingLoss
from tuner.config.settings import AdapterSettings
from tuner.interfaces.family import BuildContext, ClipShape
from tuner.model.adapters import add_adapters
from tuner.model.compiled import CompiledBlocks
from tuner.model.runner import BlockRunner, Checkpointing
from tuner.train.step import TrainingModel, train_step
from tuner_ltxvideo2 import inputs
from tuner_ltxvideo2.family import LTX2Family
from tuner_ltxvideo2.options import LTX2Options

CPU = torch.device("cpu")


def test_adapted_blocks_compile_whole() -> None:
    torch._dynamo.reset()
    counters.clear()
    net = transformer(layers=3)
    targets = [name for name, _ in net.named_modules() if name.endswith(("attn1.to_q", "audio_to_video_attn.to_out.0"))]
    add_adapters(net, targets, AdapterSettings(lora_rank=2), 0)
    family = LTX2Family(LTX2Options(), BuildContext(CPU, torch.float32, 0, 0, Path()))
    text = {name: (6, width) for name, width in text_widths(net).items()}
    torch.manual_seed(0)
    item = inputs.dummy_batch(ClipShape(64, 64, 9, 25.0, 0.36), 1, text, torch.float32, CPU)
    blocks, compiled = family.block_set(net.train()), CompiledBlocks(family.call_block, backend="aot_eager")

    def gradients(train_block: CompiledBlocks | None) -> dict[str, torch.Tensor]:
        runner = BlockRunner(blocks, family.call_block, checkpointing=Checkpointing.every(3), train_block=train_block)
        train_step(TrainingModel(family, net, runner, [FlowMatchingLoss(n) for n in ("video", "audio")]), *item).loss.backward()  # type: ignore[no-untyped-call]
        found = {name: p.grad.clone() for name, p in net.named_parameters() if p.grad is not None}
        net.zero_grad()
        return found

    plain, fast = gradients(None), gradients(compiled)
    assert plain.keys() == fast.keys()
    for name, gradient in plain.items():  # the compiler differentiates formulas, which are not called step by step otherwise
        torch.testing.assert_close(fast[name], gradient, rtol=1e-4, atol=1e-6)
    # There without gradients; back with them, the first block apart, whose input wants none.
    assert counters["stats"]["unique_graphs"] == 3 and not counters["graph_break"] and not compiled.failed
    torch._dynamo.reset()
