"""What a steady step asks of the host: no value is read back from the device, no tensor is brought there, nothing is cast twice.

The meta device stands for a GPU: tensors there have no values to be read (`item` raises), and an operation that touches a tensor of the
host can be told by its arguments.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ltxvideo2.ltx2_models import text_widths, transformer
from tuner.builtins.losses import FlowMatchingLoss
from tuner.config.settings import AdapterSettings
from tuner.interfaces.family import BuildContext, ClipShape
from tuner.model.adapters import add_adapters
from tuner.model.runner import BlockRunner, Checkpointing
from tuner.train.execute import PlainExecution
from tuner.train.masters import MasterWeights
from tuner.train.step import Item, TrainingModel
from tuner_ltxvideo2 import inputs
from tuner_ltxvideo2.family import LTX2Family
from tuner_ltxvideo2.options import LTX2Options

META = torch.device("meta")
CLIP = ClipShape(64, 64, 17, 25.0, 0.68)
STREAMS = ("video", "audio")


class Made(TorchFunctionMode):
    """Counts tensors that are made of Python's values: torch copies those to their device unseen by dispatch."""

    def __init__(self, host: Counter[str]) -> None:
        super().__init__()
        self.host = host

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (torch.tensor, torch.as_tensor, torch.asarray):
            self.host[func.__name__] += 1
        return func(*args, **(kwargs or {}))


class Watch(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts operations of the device, and those that touch tensors or values of the host; views cost nothing."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.launched: Counter[str] = Counter()
        self.host: Counter[str] = Counter()
        self.made = Made(self.host)

    def __enter__(self) -> Watch:
        self.made.__enter__()
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *state: Any) -> None:
        super().__exit__(*state)  # type: ignore[no-untyped-call]
        self.made.__exit__(*state)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        found = [leaf for leaf in tree_leaves((args, kwargs, result)) if isinstance(leaf, Tensor)]
        if any(tensor.device.type == "cpu" for tensor in found):
            self.host[str(func)] += 1
        elif not func.is_view:
            self.launched[str(func)] += 1
        return result


@dataclass(frozen=True)
class Case:
    """What is trained, and how."""

    generation: str = "2.0"
    rope: str = "split"
    recomputed: bool = True
    conditioned: bool = False
    layers: int = 2


class Trained:
    """A model on the meta device with everything that a step needs."""

    def __init__(self, case: Case) -> None:
        net = nn.Module.to(transformer(case.generation, case.rope, case.layers), META, torch.bfloat16)
        targets = [name for name, _ in net.named_modules() if name.endswith(("to_q", "to_k", "to_v", "to_out.0"))]
        add_adapters(net, targets, AdapterSettings(lora_rank=4), 0)
        family = LTX2Family(LTX2Options(), BuildContext(META, torch.bfloat16, 0, 0, Path()))
        blocks = family.block_set(net)
        policy = Checkpointing.every(len(blocks)) if case.recomputed else Checkpointing()
        runner = BlockRunner(blocks, family.call_block, checkpointing=policy)
        self.masters = MasterWeights({n: p for n, p in net.named_parameters() if p.requires_grad}, low_precision=False)
        training = TrainingModel(family, net.train(), runner, [FlowMatchingLoss(name) for name in STREAMS])
        self.execution = PlainExecution(training, self.masters)
        text = {name: (6, width) for name, width in text_widths(net).items()}
        batch, noise = inputs.dummy_batch(CLIP, 2, text, torch.bfloat16, META)
        if case.conditioned:
            video = batch.streams["video"]
            given = torch.zeros(video.latents.shape[:2], dtype=torch.bool, device=META)
            batch = replace(batch, streams={**batch.streams, "video": replace(video, conditioned=given)})
        self.item = Item(batch, noise)

    def step(self) -> None:
        """Without the optimizer, which is torch's fused one and takes no tensors of the meta device."""
        self.execution([self.item], 0, 1.0)
        self.masters.clip_(1.0)
        self.masters.publish()
        for parameter in self.masters.optimized():
            parameter.grad = None


def watched(case: Case) -> Watch:
    """A step after the one that builds tables."""
    trained, watch = Trained(case), Watch()
    trained.step()
    with watch:
        trained.step()
    return watch


@pytest.mark.parametrize("case", [
    Case(), Case(recomputed=False), Case(rope="interleaved"), Case(conditioned=True), Case("2.3"), Case("2.5"),
], ids=["2.0", "nothing recomputed", "interleaved", "given tokens", "2.3", "2.5"])  # fmt: skip
def test_no_value_is_read_and_no_tensor_is_brought(case: Case) -> None:
    watch = watched(case)
    assert not watch.host


def test_what_would_be_noticed() -> None:
    there = torch.ones(3, device=META)
    with pytest.raises(RuntimeError, match="meta"):
        there.sum().item()
    watch = Watch()
    with watch:
        there + torch.tensor([1.0, 2.0, 3.0]).to(META)
    assert watch.host
    watch = Watch()
    with watch:
        there + torch.tensor([1.0, 2.0, 3.0], device=META)
    assert watch.host
