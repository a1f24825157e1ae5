"""What a step takes, told without a device: counted bytes, stand-ins, two blocks for all, costs of optimizers and precisions, sizes."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from torch import nn
from torch.nn import functional

from tuner.cli.plan import parse_shape, parse_size
from tuner.config.resolve import resolve
from tuner.errors import ConfigError, EnvironmentProblem
from tuner.interfaces.blocks import BlockSet, BlockState
from tuner.interfaces.family import Batch, BuildContext, ClipShape, ModelFacts, Noise, Prediction, StreamBatch, StreamNoise
from tuner.interfaces.losses import LossTerm, LossValue, StepState
from tuner.interfaces.memory import MemoryPlan
from tuner.model.placing import RunMemory
from tuner.plugins.loader import load_plugins
from tuner.testing.blocks import MixingModel, call_mixing_block
from tuner.train.forecast import advise, costs, footprint
from tuner.train.forecast.advise import rank
from tuner.train.forecast.costs import Job, OptimizerCost
from tuner.train.forecast.footprint import Footprint, FusedKernels, LiveBytes, Trained, Work
from tuner.train.forecast.machine import ATTENTION, CARDS, GIB, PRODUCTS, RESERVE, SPARE, Machine, find_machine, measure_speed
from tuner.train.forecast.row import Predicted, Row
from tuner.train.plan import ModelPlan

CPU, META = torch.device("cpu"), torch.device("meta")
SHAPE = ClipShape(32, 32, 9, 25.0, 0.36)


# --- counting --------------------------------------------------------------------------------------------------------
def test_storages_count_once_and_as_long_as_they_live() -> None:
    known = torch.zeros(1000)
    with (live := LiveBytes([known.untyped_storage()])):
        a = torch.zeros(64)
        b = a.view(8, 8).t()
        c = known.detach().add(1)
        assert (live.now, live.take_peak(), live.kernels) == (4 * 1064, 4 * 1064, 2)
        del c
        a.add_(1)
        assert (live.now, live.take_peak(), live.kernels) == (4 * 64, 4 * 1064, 3)
        moved = live.moved
        d = b @ b
        assert (live.now, live.flops, live.moved) == (4 * 128, 2 * 8**3, moved)
        del a, b, d
        assert (live.now, live.take_peak()) == (0, 4 * 128)


@pytest.mark.parametrize("queries, keys", [(24, 24), (24, 10)])
def test_stand_ins_keep_and_count_what_fused_kernels_do(queries: int, keys: int) -> None:
    q = torch.zeros(2, 3, queries, 16, device=META, dtype=torch.bfloat16, requires_grad=True)
    k, v = (torch.zeros(2, 3, keys, 16, device=META, dtype=torch.bfloat16, requires_grad=True) for _ in range(2))
    with LiveBytes() as live, FusedKernels() as fused:
        out = functional.scaled_dot_product_attention(q, k, v)
        assert out.shape == q.shape and out.transpose(1, 2).is_contiguous()
        assert live.now == 2 * q.numel() + 4 * q.numel() // 16  # the result, and a number a row
        assert fused.flops == 4 * 2 * 3 * queries * keys * 16
        torch.autograd.backward(out, torch.zeros_like(out))
        assert fused.flops == 14 * 2 * 3 * queries * keys * 16
        x = torch.zeros(5, 16, device=META, requires_grad=True)
        before = live.now
        y = functional.rms_norm(x, (16,))
        assert live.now - before == 4 * (5 * 16 + 5) and y.grad_fn is not None
    assert q.grad is not None and q.grad.shape == q.shape and k.grad is not None and k.grad.shape == k.shape


# --- two blocks for all ----------------------------------------------------------------------------------------------
class MixingFamily:
    """As much of a family as a step calls."""

    def __init__(self, depth: int) -> None:
        torch.manual_seed(0)
        self.model = MixingModel(depth, width=16)

    def dummy_batch(self, model: nn.Module, shape: ClipShape, batch_size: int, streams: Any, device: torch.device) -> tuple[Batch, Noise]:
        latents = torch.zeros(batch_size, 40, 6, device=device)
        return (
            Batch((), {"video": StreamBatch(latents, (1, 1, 40))}, {"video": torch.zeros(batch_size, 7, 6, device=device)}, (25.0,)),
            Noise({"video": StreamNoise(torch.zeros(batch_size, 40, device=device), latents, latents, latents)}),
        )

    def enter(self, model: Any, batch: Batch, noise: Noise) -> BlockState:
        drawn = noise.streams["video"]
        entered: BlockState = model.enter(drawn.noisy, drawn.noisy[:, :5], batch.text["video"], drawn.sigma)
        return entered

    call_block = staticmethod(call_mixing_block)

    def exit(self, model: Any, state: BlockState) -> Prediction:
        return Prediction(model.exit(state))


class Square(LossTerm):
    name = "square"

    def __call__(self, state: StepState) -> LossValue:
        values = state.prediction.streams["video"].square().mean(dim=(1, 2))
        return LossValue(self.name, values, counted=torch.ones_like(values, dtype=torch.bool), weight=1.0)


def observe(depth: int, device: torch.device, recomputed: bool, blocks: int) -> tuple[Footprint, int]:
    """A step over the last `blocks`, all weights trained; and the most bytes that really lived."""
    family = MixingFamily(depth)
    model = family.model.to(device)
    found = family.model.block_set()
    observed = BlockSet(found.blocks[-blocks:], found.names[-blocks:])
    peaks: list[int] = []
    original = LiveBytes.take_peak

    class Recording(LiveBytes):
        def take_peak(self) -> int:
            peaks.append(original(self))
            return peaks[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(footprint, "LiveBytes", Recording)
        patch.setattr(footprint, "META", device)
        asked = Trained(("video",), SHAPE, 3, None)
        seen = footprint._observe(cast(Any, family), model, observed, asked, [Square()], recomputed=recomputed)
    facts = ModelFacts(cast(Any, None), 0, depth, 0, 0, 0)
    return replace(seen, **footprint._weights(model, found, facts)), max(peaks)


@pytest.mark.parametrize("recomputed", [True, False])
def test_two_blocks_tell_what_eight_take(recomputed: bool) -> None:
    told, _ = observe(8, META, recomputed, blocks=2)
    _, lived = observe(8, CPU, recomputed, blocks=8)
    _, without_storage = observe(8, META, recomputed, blocks=8)
    assert without_storage == lived
    assert told.peak == lived
    block = 4 * (16 * 16 + 16)
    assert told.trained == (block, 2 * (6 * 16 + 16) + 2 * 16 + 16 * 6 + 6) and told.outside == 0
    assert told.gradients == 4 * (8 * told.trained[0] + told.trained[1])
    assert told.backward_work.flops > told.forward_work.flops > 0


def test_recomputing_keeps_inputs_and_computes_once_more() -> None:
    every, none = observe(4, META, True, 2)[0], observe(4, META, False, 2)[0]
    assert every.kept == 4 * 3 * (40 + 5) * 16 < none.kept  # a block's two streams
    assert every.backward_work.flops - none.backward_work.flops == every.forward_work.flops


# --- costs -----------------------------------------------------------------------------------------------------------
def planned(**keys: object) -> ModelPlan:
    registry = load_plugins()
    settings = resolve(registry.option_types, flags={key: str(value) for key, value in keys.items()}, environ={})
    context = BuildContext(CPU, torch.bfloat16, 0, 0, Path())
    return ModelPlan(registry, settings, cast(Any, None), "mixing", cast(Any, None), context, RunMemory())


@pytest.mark.parametrize("name, low, state", [("adamw", False, 8), ("adamw_bf16", True, 4), ("adamw8bit", True, 2)])
def test_optimizers_show_what_they_keep(name: str, low: bool, state: float) -> None:
    cost = costs.optimizer_cost(planned(optimizer=name))
    assert cost.low_precision is low
    assert cost.state == pytest.approx(state, rel=0.04)  # 8 bits have a scale for some numbers together


def test_precisions_show_how_far_they_are_off() -> None:
    model = planned()
    component = model.registry.component("quantizer", "int8-torchao")
    found = costs.probe(component.load()(model.settings.get(component.options), model.context))  # type: ignore[operator]
    weight = torch.randn(costs.PROBE, costs.PROBE, generator=torch.Generator().manual_seed(0)).bfloat16().float()
    rounding = weight.abs().amax(1) / 127.5 / math.sqrt(12)  # uniform in a step
    assert found.error == pytest.approx(float(rounding.square().mean().sqrt() / weight.square().mean().sqrt()), rel=0.15)
    assert 1.0 <= found.expanding <= 2.5


STEP = Footprint(
    blocks=10, outside=5000, trained=(100, 50), width=2, entered=1000, kept=300, forward=700, tail=900, turn=2060, backward=2300,
    forward_work=Work(4000, 3, 100), backward_work=Work(8000, 5, 300), other_work=Work(1000, 2, 50),
)  # fmt: skip
FACTS = ModelFacts(cast(Any, None), 0, 10, 40_000, 0, 0, ((100, 60), (60, 100)), ("a", "b"))
MACHINE = Machine("test", 2 * GIB, 0, flops=1e3, bandwidth=1e6, link=1e4, words="", launch=1e-3)


def job(low: bool = False, graphs: bool = False, **keys: object) -> Job:
    return Job(planned(**keys), FACTS, {True: STEP, False: replace(STEP, kept=3000)}, OptimizerCost(low, 8.0), graphs)


def test_the_peak_is_that_of_the_fullest_moment() -> None:
    # Loss 1000 + 10 x 300 + 900; the last block back 1000 + 10 x 300 + 2060; the one before it 1000 + 9 x 300 + 2300.
    assert STEP.peak == 6060
    assert replace(STEP, backward=2400).peak == 6100
    assert replace(STEP, trained=(1000, 50)).peak == 1000 + 300 + 2300 + 2 * 8 * 1000  # the first block, eight with gradients
    assert replace(STEP, forward=2500).peak == 6200 and replace(STEP, blocks=1).peak == 1000 + 300 + 2060
    resident = MemoryPlan(400_000, 0, 0, 0, 0.0, "")
    parts = costs.peak_parts(job(), STEP, resident, costs.plain())
    # 1,050 weights with 4 + 8 bytes of masters and states; their gradients are taken out beside what entered: 2 bytes, then 2 + 4.
    assert parts == {
        "block weights": 400_000, "other weights": 5000, "trained weights": 2100, "optimizer": 12 * 1050,
        "activations and gradients": max(6060, 1000 + 8 * 1050), "workspace": costs.WORKSPACE,
    }  # fmt: skip
    accumulating = costs.peak_parts(job(gradient_accumulation_steps=2), STEP, resident, costs.plain())
    assert accumulating["activations and gradients"] == max(6060 + 4 * 1050, 1000 + 8 * 1050)
    graphs = costs.peak_parts(job(graphs=True), STEP, resident, costs.plain())
    assert graphs["activations and gradients"] == 1000 + 8 * 1050 + 6 * 1050  # taking gradients out is the fullest moment here
    low = costs.peak_parts(job(low=True), STEP, resident, costs.plain())
    assert (low["optimizer"], low["activations and gradients"]) == (8 * 1050, 1000 + 34 * 1050)


def test_time_is_that_of_the_slowest_of_what_runs_side_by_side() -> None:
    resident = MemoryPlan(0, 0, 0, 0, 0.0, "")
    rate = 1e3 * PRODUCTS
    there, back = 10 * 4000 / rate + 10 * 100 / 1e6, 10 * 8000 / rate + 10 * 300 / 1e6
    rest = 1000 / rate + 50 / 1e6
    blocks = there + back
    assert costs.seconds(job(), STEP, resident, costs.plain(), MACHINE) == pytest.approx(blocks + rest)
    # The way back takes 90 s of products, the way there 45: 100 s of copies are longer than either.
    streamed = MemoryPlan(0, 0, 0, 1_500_000, 0.0, "", forward_bytes=1_000_000)
    assert costs.seconds(job(), STEP, streamed, costs.plain(), MACHINE) == pytest.approx(100 + back + rest)
    in_line = costs.seconds(job(), STEP, replace(streamed, beside=False), costs.plain(), MACHINE)
    assert in_line == pytest.approx(blocks + 150 + rest)
    # Two batches together are computed in twice the time, and weights are copied once.
    pair = replace(STEP, forward_work=STEP.forward_work * 2, backward_work=STEP.backward_work * 2, other_work=STEP.other_work * 2)
    together = costs.seconds(job(gradient_accumulation_steps=2), pair, streamed, costs.plain(), MACHINE, joint=True)
    assert together == pytest.approx(100 + 2 * (back + rest))
    one_by_one = costs.seconds(job(gradient_accumulation_steps=2), STEP, streamed, costs.plain(), MACHINE)
    assert one_by_one == pytest.approx(2 * (100 + back + rest))
    launching = replace(MACHINE, flops=1e12, launch=1.0)
    assert costs.seconds(job(), STEP, resident, costs.plain(), launching) == pytest.approx(10 * (3 + 5) + 2)
    assert costs.seconds(job(graphs=True), STEP, resident, costs.plain(), launching) < 1
    # Attention reaches less than products do.
    attending = replace(STEP, forward_work=Work(4000, 3, 100, 4000))
    slower = 10 * 4000 / 1e3 * (1 / ATTENTION - 1 / PRODUCTS)
    assert costs.seconds(job(), attending, resident, costs.plain(), MACHINE) == pytest.approx(blocks + rest + slower)


def test_every_second_block_recomputed_lies_between() -> None:
    every_second = job(gradient_checkpointing_interval=2)
    half = costs.footprint(every_second, costs.kept_blocks(every_second, "some"))
    assert half.kept == (300 + 3000) // 2 and half.backward_work == STEP.backward_work
    assert costs.current_checkpointing(planned(gradient_checkpointing_interval=2)) == "some"


def test_as_many_blocks_are_kept_as_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where all of them do not; the row says so in the words of the configuration."""
    monkeypatch.setattr(advise, "residencies", lambda job: iter([(None, {})]))
    monkeypatch.setattr(advise, "worthwhile", lambda model, facts: [costs.plain()])
    asked = job()
    none, every = (advise.row(asked, MACHINE, None, {}, costs.plain(), way).needs() for way in ("none", "all"))
    between = replace(MACHINE, memory=(none + every) // 2)
    found = [row for row in advise.rows(asked, between) if not row.current]
    (some,) = [row for row in found if row.checkpointing == "some"]
    assert 0 < some.kept < 10 and some.fits(between) and some.keys["gradient_checkpointing"] == "auto"
    assert rank(found, between)[0] is some
    for memory in (none, every - 1):
        assert all(row.checkpointing != "some" for row in advise.rows(asked, replace(MACHINE, memory=memory)))


def test_what_fits_comes_first_then_what_is_fast_then_what_is_exact() -> None:
    def row(peak: float, seconds: float, error: float = 0.0, host: int = 0, problem: str = "") -> Row:
        return Row("r", "p", "all", {}, int(peak * GIB), {}, 0, host, seconds, error, problem=problem)

    best, same_but_off = row(1, 1.0), row(0.5, 0.999, error=0.1)
    moves_more, slow, large, larger = row(0.5, 1.0, host=5), row(0.1, 2.0), row(3, 0.1), row(4, 0.05)
    impossible = row(0.1, 0.1, problem="no")
    ranked = rank([impossible, larger, slow, same_but_off, large, moves_more, best], MACHINE)
    assert ranked == [best, moves_more, same_but_off, slow, large, larger, impossible]
    assert best.needs() == int(GIB * (1 + SPARE)) + RESERVE


def test_what_other_programs_hold_is_not_planned_with(monkeypatch: pytest.MonkeyPatch) -> None:
    """24 GiB, of which a desktop holds 2; this process has reserved 3, and its driver half a GiB."""
    total, others, own = 24 * GIB, 2 * GIB, 3 * GIB
    card = SimpleNamespace(name="NVIDIA GeForce RTX 4090", total_memory=total)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: card)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (total - others - own - RESERVE, total))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: own)
    found = find_machine(torch.device("cuda", 0), host=64 * GIB)
    assert (found.memory, found.taken) == (total - others, others) and "RTX 4090" in found.words
    assert find_machine(torch.device("cuda", 0), 16 * GIB, 64 * GIB).memory == 16 * GIB
    (notice,) = Predicted(Row("r", "p", "all", {}, total, {}, 0, 0, 1.0, 0.0), found).notices
    assert "other programs hold 2.0 GiB of it" in notice


# --- machines and sizes ----------------------------------------------------------------------------------------------
def test_a_machine_of_a_size_is_assumed_and_said_so() -> None:
    found = find_machine(CPU, 24 * GIB, 64 * GIB)
    assert (found.memory, found.host) == (24 * GIB, 64 * GIB) and "assumed as fast as a RTX 4090" in found.words
    assert find_machine(CPU, GIB).host > 0
    with pytest.raises(EnvironmentProblem, match="no GPU"):
        find_machine(CPU)
    for index, card in enumerate(CARDS):
        assert not [longer for longer in CARDS[index + 1 :] if card.name in longer.name], card
    assert all(value > 0 for value in measure_speed(CPU, size=16))


@pytest.mark.parametrize(
    "text, size",
    [("24", 24 * GIB), ("24GiB", 24 * GIB), ("24 gib", 24 * GIB), ("24GB", 24 * 10**9), ("24G", 24 * GIB), ("1.5GiB", 3 * 2**29),
     ("512MiB", 2**29), ("1000b", 1000)],
)  # fmt: skip
def test_sizes(text: str, size: int) -> None:
    assert parse_size(text, "gpu_memory") == size


@pytest.mark.parametrize("text", ["nonsense", "", "24 GX", "-1", "0", "1e3GiB", "GiB", "24GiB GiB"])
def test_what_is_no_size(text: str) -> None:
    with pytest.raises(ConfigError, match="gpu_memory: is no size"):
        parse_size(text, "gpu_memory")


def test_shapes() -> None:
    settings = planned().settings
    assert parse_shape("832x480x17", settings, 32, 25.0) == ClipShape(832, 480, 17, 25.0, 17 / 25)
    for text in ("832x480", "830x480x17", "0x480x17", "axbxc", "832x480x0"):
        with pytest.raises(ConfigError, match="steps of 32 pixels"):
            parse_shape(text, settings, 32, 25.0)

