"""Streamed training equals resident training bit for bit, for every strategy over blocks, and moves no byte more than the bound."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import nn
from torchao.quantization import Int8WeightOnlyConfig, quantize_

from offload.simulated import SimulatedLink
from offload.streams import CPU, DEPTH, Trained, assert_bitwise, build
from tuner.interfaces.family import BuildContext
from tuner.interfaces.memory import MemorySession, MemoryStrategy
from tuner_offload import block_swap, group
from tuner_offload.block_swap import BlockSwap
from tuner_offload.group import GroupOffload
from tuner_offload.options import BlockSwapOptions, GroupOffloadOptions

STEPS = 10
UPPER = range(3, DEPTH)


@dataclass(frozen=True)
class Way:
    """A strategy's options, and what it should make of DEPTH blocks."""

    options: GroupOffloadOptions | BlockSwapOptions
    units: int
    slots: int
    disk: bool = False

    def strategy(self, folder: Path) -> MemoryStrategy:
        context = BuildContext(CPU, torch.float32, 0, 0, folder)
        if isinstance(self.options, BlockSwapOptions):
            return BlockSwap(self.options, context)
        path = str(folder / "disk") if self.disk else ""
        return GroupOffload(self.options.model_copy(update={"group_offload_to_disk_path": path}), context)


def grouped(blocks: int, *, stream: bool) -> GroupOffloadOptions:
    return GroupOffloadOptions(enable_group_offload=True, group_offload_blocks_per_group=blocks, group_offload_use_stream=stream)


WAYS = {
    "groups of 1 with a stream": Way(grouped(1, stream=True), 5, 2),
    "groups of 2 in line": Way(grouped(2, stream=False), 3, 1),
    "groups on disk": Way(grouped(1, stream=True), 5, 2, disk=True),
    "2 swapped": Way(BlockSwapOptions(musubi_blocks_to_swap=2), 2, 1),
    "all but one swapped": Way(BlockSwapOptions(musubi_blocks_to_swap=DEPTH - 1), 4, 2),
}


@dataclass(frozen=True)
class Case:
    """How the model is trained."""

    recomputed: tuple[int, ...]
    adapted: Sequence[int] = range(DEPTH)
    accumulation: int = 1
    int8: bool = False


ALL, SOME, NONE = tuple(range(DEPTH)), (0, 3), ()
CASES = {
    "all recomputed": Case(ALL),
    "all recomputed, upper half": Case(ALL, UPPER),
    "some recomputed, accumulated": Case(SOME, accumulation=2),
    "some recomputed, upper half, int8": Case(SOME, UPPER, int8=True),
    "none recomputed, int8": Case(NONE, int8=True),
    "none recomputed, upper half, accumulated": Case(NONE, UPPER, accumulation=2),
}


def to_int8(block: nn.Module) -> None:
    quantize_(block, Int8WeightOnlyConfig())


def trained(case: Case, open_session: Callable[[], MemorySession] = MemorySession) -> Trained:
    prepare = to_int8 if case.int8 else lambda block: None
    return build(open_session, recomputed=case.recomputed, adapted=case.adapted, prepare=prepare)


@functools.cache
def resident(case: Case) -> Trained:
    model = trained(case)
    for step in range(STEPS):
        model.step(step, case.accumulation)
    return model


@pytest.fixture
def link(monkeypatch: pytest.MonkeyPatch) -> SimulatedLink:
    simulated = SimulatedLink()
    for module in (group, block_swap):
        monkeypatch.setattr(module, "link_to", lambda device, stream=True: simulated)
    return simulated


def session_of(way: Way, folder: Path) -> Callable[[], MemorySession]:
    return lambda: way.strategy(folder).open("transformer", DEPTH, CPU)


FEWER = {"groups on disk": (0, 2, 3, 5), "2 swapped": (1, 2, 4)}
"""What other strategies share with these is not tried again: the numbers of the cases for them."""
PAIRS = [(way, case) for way in WAYS for number, case in enumerate(CASES) if number in FEWER.get(way, range(len(CASES)))]


@pytest.mark.parametrize(("way", "case"), [(WAYS[way], CASES[case]) for way, case in PAIRS], ids=[", ".join(pair) for pair in PAIRS])
def test_ten_steps_equal_resident_ones_bit_for_bit(way: Way, case: Case, link: SimulatedLink, tmp_path: Path) -> None:
    expected, model = resident(case), trained(case, session_of(way, tmp_path))
    loads = []
    for step in range(STEPS):
        model.step(step, case.accumulation)
        loads.append(link.loads)
    assert_bitwise(model.losses, expected.losses)
    assert_bitwise(model.gradients, expected.gradients)
    steady = (loads[-1] - loads[0]) / (STEPS - 1) / case.accumulation
    assert len(link.slots) == way.slots
    if case.adapted == range(DEPTH):
        assert loads[0] == way.units + (way.units - way.slots) + (case.accumulation - 1) * 2 * (way.units - way.slots)
        assert steady == 2 * (way.units - way.slots)
    else:
        assert steady <= 2 * (way.units - way.slots)
    assert model.session.stats()["misses"] == 0
    before = {name: value.clone() for name, value in resident_weights(expected).items()}
    model.session.detach()
    assert not link.slots and not list(tmp_path.glob("disk/*"))
    after = resident_weights(model)
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
def test_batches_that_a_block_takes_together_cost_the_loads_of_one(way: Way, link: SimulatedLink, tmp_path: Path) -> None:
    case = Case(ALL, accumulation=4)
    model, plainly = trained(case, session_of(way, tmp_path)), trained(case)
    loads = []
    for step in range(4):
        plainly.step(step, case.accumulation)
        model.step(step, case.accumulation, together=True)
        loads.append(link.loads)
    assert_bitwise(model.losses, plainly.losses)
    assert_bitwise(model.gradients, plainly.gradients)
    assert (loads[-1] - loads[0]) / 3 == 2 * (way.units - way.slots) and model.session.stats()["misses"] == 0
    model.session.detach()


def resident_weights(model: Trained) -> dict[str, torch.Tensor]:
    """Frozen weights, quantized ones as the tensors that they are made of."""
    found: dict[str, torch.Tensor] = {}
    for name, parameter in model.net.named_parameters():
        if not parameter.requires_grad:
            parts = parameter.__tensor_flatten__()[0] if hasattr(parameter, "__tensor_flatten__") else []
            found |= {f"{name}.{part}": getattr(parameter, part) for part in parts} or {name: parameter.detach()}
    return found


@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
def test_on_a_machine_without_an_accelerator(way: Way, tmp_path: Path) -> None:
    case = CASES["all recomputed"]
    model = trained(case, session_of(way, tmp_path))
    for step in range(2):
        model.step(step)
    assert_bitwise(model.losses, resident(case).losses[:2])
    assert_bitwise(model.gradients, resident(case).gradients[: len(model.gradients)])
    model.session.detach()


@pytest.mark.parametrize("name", ["groups of 2 in line", "groups on disk", "all but one swapped"])
def test_the_step_after_an_exception_anywhere_is_right(name: str, link: SimulatedLink, tmp_path: Path) -> None:
    way, case = WAYS[name], CASES["some recomputed, accumulated"]
    model = trained(case, session_of(way, tmp_path))
    call, calls = model.runner.call_block, 0

    def failing(block: nn.Module, state: object) -> object:
        nonlocal calls
        calls += 1
        if calls == fail_at:
            raise RuntimeError("planned")
        return call(block, state)  # type: ignore[arg-type]

    model.runner.call_block = failing  # type: ignore[assignment]
    for step, fail_at in enumerate([1, 3, 5, 6, 7, 0]):  # five calls forward, then the recomputations
        calls = 0
        if fail_at:
            with pytest.raises(RuntimeError, match="planned"):
                model.loss(step).backward()
            fail_at = 0
        else:
            model.loss(step)  # its backward never comes
        model.optimizer.zero_grad()
        model.step(step, case.accumulation)
    done = len(model.losses)
    assert_bitwise(model.losses, resident(case).losses[:done])
    assert_bitwise(model.gradients, resident(case).gradients[: len(model.gradients)])
    model.session.detach()


@pytest.mark.parametrize("name", ["groups of 1 with a stream", "all but one swapped"])
def test_sampling_saving_and_merging_between_steps(name: str, link: SimulatedLink, tmp_path: Path) -> None:
    way, case = WAYS[name], CASES["all recomputed"]
    model, other = trained(case, session_of(way, tmp_path)), trained(case)
    for step in range(4):
        assert torch.equal(model.sample(), other.sample())
        loss = model.loss(7)
        model.sample()  # a pass inside another one
        loss.backward()
        model.optimizer.zero_grad()
        model.session.materialize()
        weights = resident_weights(model)
        assert all(torch.equal(weights[key], value) for key, value in resident_weights(other).items())
        for changed in (model, other):  # as a merge does
            with torch.no_grad():
                resident_weights(changed)["blocks.2.to_k.weight"].add_(0.1)
        model.step(step)
        other.step(step)
    assert_bitwise(model.losses + model.gradients, other.losses + other.gradients)
    model.session.detach()
    weights = resident_weights(model)
    assert all(torch.equal(weights[key], value) for key, value in resident_weights(other).items())
