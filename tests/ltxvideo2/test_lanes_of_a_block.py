"""What the two lanes of a block share is named: every tensor that one makes and the other reads. Observed operation by operation."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ltxvideo2.ltx2_models import GRID, batch_and_noise, transformer
from tuner.config.settings import AdapterSettings
from tuner.interfaces.family import BuildContext
from tuner.model.adapters import add_adapters
from tuner.model.lanes import Lane
from tuner_ltxvideo2 import block as block_module
from tuner_ltxvideo2 import sides
from tuner_ltxvideo2 import transformer as forward
from tuner_ltxvideo2.block import call_block
from tuner_ltxvideo2.family import LTX2Family
from tuner_ltxvideo2.options import LTX2Options

S = GRID[0] * GRID[1] * GRID[2]
APART = {"video": (0.8, 0.35), "audio": (0.15, 0.6)}


class Observed(Lane):
    """Notes in order what it is asked for, and which lane is at work."""

    def __init__(self) -> None:
        super().__init__()
        self.small = False
        self.asked: list[str] = []
        self.named: dict[str, set[int]] = {"fork": set(), "join": set()}
        self.held: list[Tensor] = []

    def _name(self, kind: str, tensors: tuple[Tensor, ...]) -> None:
        self.asked.append(kind)
        for tensor in tensors:
            self.held.append(tensor)  # so that no other storage gets its address
            self.named[kind].add(tensor.untyped_storage().data_ptr())

    def fork(self, *given: Tensor) -> None:
        self._name("fork", given)

    def join(self, *made: Tensor) -> None:
        self._name("join", made)

    @contextmanager
    def beside(self, small: bool = True) -> Iterator[None]:
        self.small = small
        yield
        self.small = False


class Watch(TorchDispatchMode):
    """Which lane made a storage, and what is read from the other one without having been named."""

    def __init__(self, lane: Observed, known: set[int]) -> None:
        super().__init__()
        self.lane, self.known = lane, known
        self.made: dict[int, bool] = {}
        self.crossed = {"fork": 0, "join": 0}
        self.unnamed: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {t.untyped_storage().data_ptr(): t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        for place in given.keys() - self.known:
            if self.made.get(place, False) != self.lane.small:
                kind = "fork" if self.lane.small else "join"
                self.crossed[kind] += 1
                if place not in self.lane.named[kind]:
                    self.unnamed.append(f"{kind}: {func} reads {tuple(given[place].shape)}")
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor) and tensor.untyped_storage().data_ptr() not in given:
                self.made[tensor.untyped_storage().data_ptr()] = self.lane.small
                self.lane.held.append(tensor)
        return result


@pytest.mark.parametrize("with_gradients", [False, True])
@pytest.mark.parametrize("conditioned", [False, True])
@pytest.mark.parametrize("generation", ["2.0", "2.3", "2.5"])
def test_what_crosses_between_the_lanes_is_named(
    generation: str, conditioned: bool, with_gradients: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = transformer(generation)
    family = LTX2Family(LTX2Options(), BuildContext(torch.device("cpu"), torch.float32, 0, 0, Path()))
    targets = family.adapter_targets(model, ("video", "audio"))
    add_adapters(model, targets, AdapterSettings(lora_rank=4), 0)
    given = torch.stack([torch.arange(S) < GRID[1] * GRID[2], torch.zeros(S, dtype=torch.bool)]) if conditioned else None
    batch, noise = batch_and_noise(model, APART, conditioned=given)
    lane = Observed()
    with torch.set_grad_enabled(with_gradients):
        state = forward.enter(model, batch, noise, forward.RotaryTables())
        block = sides.transformer_blocks(model)[0]
        expected = call_block(block, state)
        monkeypatch.setattr(block_module, "lane_for", lambda tokens: lane)
        with Watch(lane, places(block)) as watch:
            found = call_block(block, state)
    assert lane.asked == ["fork", "join", "fork", "join"]
    assert watch.unnamed == [] and watch.crossed["fork"] > 5 and watch.crossed["join"] >= 1
    for name in ("video", "audio"):
        assert torch.equal(found.streams[name].hidden, expected.streams[name].hidden)


def places(block: nn.Module) -> set[int]:
    """Of what is there for the whole step."""
    return {tensor.untyped_storage().data_ptr() for tensor in (*block.parameters(), *block.buffers())}


def test_one_stream_has_one_lane(monkeypatch: pytest.MonkeyPatch) -> None:
    model = transformer("2.0")
    monkeypatch.setattr(block_module, "lane_for", lambda tokens: pytest.fail("one stream needs no second lane"))
    with torch.no_grad():
        state = forward.enter(model, *batch_and_noise(model, {"video": (0.8, 0.35)}), forward.RotaryTables())
        call_block(sides.transformer_blocks(model)[0], state)
