"""Training with layers streamed one by one equals resident training bit for bit, with three loads a layer, and says what it cannot do."""

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
from tuner.builtins.quantizers import Fp8Torchao, Int8Torchao
from tuner.config.options import Options
from tuner.errors import ConfigError, OutOfMemoryError
from tuner.interfaces.blocks import BlockSet
from tuner.interfaces.family import BuildContext
from tuner.interfaces.memory import MemoryFacts, MemorySession
from tuner.model.quantized import pieces
from tuner.testing.blocks import MixingModel
from tuner_offload.leaf import SLOTS, LeafSession
from tuner_offload.options import RamTorchOptions
from tuner_offload.ramtorch import RamTorch, RamTorchChoice, RamTorchSession, Share, fits, patterns_of

STEPS = 10
WIDTH = 64
"""As narrow as quantizers take."""
LAYERS = 4
"""Of a block that reads sound."""
ALL, SOME, NONE = tuple(range(DEPTH)), (0, 3), ()
CONTEXT = BuildContext(CPU, torch.float32, 0, 0, Path())


def torchao_alone(block: nn.Module) -> None:
    quantize_(block, Int8WeightOnlyConfig())


def int8(block: nn.Module) -> None:
    Int8Torchao(Options(), CONTEXT).quantize(block)


def fp8(block: nn.Module) -> None:
    Fp8Torchao(Options(), CONTEXT).quantize(block)


def fp8_products(block: nn.Module) -> None:
    quantizer = Fp8Torchao(Options(), CONTEXT)
    quantizer.compute = "fp8"
    quantizer.quantize(block)


@dataclass(frozen=True)
class Case:
    """How the model is trained."""

    recomputed: tuple[int, ...]
    adapted: Sequence[int] = range(DEPTH)
    accumulation: int = 1
    quantize: Callable[[nn.Module], None] = nn.Module.eval
    stream: bool = True
    choice: Callable[[], RamTorchChoice] = RamTorchChoice


CASES = {
    "all recomputed": Case(ALL),
    "some recomputed, accumulated, in line": Case(SOME, accumulation=2, stream=False),
    "some recomputed, upper half, int8": Case(SOME, range(3, DEPTH), quantize=int8),
    "none recomputed, fp8, in line": Case(NONE, quantize=fp8, stream=False),
    "some recomputed, fp8 products": Case(SOME, quantize=fp8_products),
    "none recomputed, upper half, torchao's own layers": Case(NONE, range(3, DEPTH), quantize=torchao_alone),
    "all recomputed, half of it": Case(ALL, accumulation=2, choice=lambda: RamTorchChoice(percent=50)),
}


def trained(case: Case, open_session: Callable[[], MemorySession] = MemorySession) -> Trained:
    return build(open_session, recomputed=case.recomputed, adapted=case.adapted, prepare=case.quantize, width=WIDTH)


@functools.cache
def resident(case: Case) -> Trained:
    model = trained(case)
    for step in range(STEPS):
        model.step(step, case.accumulation)
    return model


def streamed(case: Case, link: SimulatedLink) -> Trained:
    if case.stream:
        return trained(case, lambda: RamTorchSession(link, "ramtorch", case.choice(), smallest=0))
    return trained(case, lambda: LeafSession(link, "enable_group_offload", stream=False, smallest=0))


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_ten_steps_equal_resident_ones_bit_for_bit(case: Case) -> None:
    link, expected = SimulatedLink(), resident(case)
    model = streamed(case, link)
    classes = {type(layer) for layer in model.net.blocks.modules()}
    for step in range(STEPS):
        model.step(step, case.accumulation)
    assert_bitwise(model.losses, expected.losses)
    assert_bitwise(model.gradients, expected.gradients)
    assert len(link.slots) == (SLOTS if case.stream else 1)
    model.session.detach()
    assert not link.slots
    assert not any(kind.__name__.startswith("Streamed") for kind in map(type, model.net.modules()))
    assert any(kind.__name__.startswith("Streamed") for kind in classes)
    left, handed_over = (plain_tensors(net) for net in (model.net, trained(case).net))
    assert left.keys() == handed_over.keys() and all(torch.equal(left[name], handed_over[name]) for name in left)


def plain_tensors(net: nn.Module) -> dict[str, torch.Tensor]:
    """Frozen weights, quantized ones as the tensors that they are made of."""
    frozen = {name: parameter for name, parameter in net.named_parameters() if not parameter.requires_grad}
    return {f"{name}.{number}": piece for name, parameter in frozen.items() for number, piece in enumerate(pieces(parameter))}


def test_three_loads_a_layer_in_a_steady_step() -> None:
    link = SimulatedLink()
    model = streamed(CASES["all recomputed"], link)
    # Forward and recomputation of all, gradients of all but the lowest block, whose input wants none. The layer that a recomputation ends
    # with is the first whose gradient is wanted, and the last one of the forward pass is not: backward starts with another.
    steady = DEPTH * LAYERS + DEPTH * LAYERS + (DEPTH - 1) * (LAYERS - 1)
    found = []
    for _ in range(4):
        before = dict(model.session.stats())
        model.step(0)
        after = model.session.stats()
        found.append((after["loads"] - before["loads"], after["misses"] - before["misses"]))
    assert found == [(steady, steady), *[(steady, 0)] * 3]
    largest = max(slot.memory.numel() for slot in link.slots)
    assert link.bytes <= 4 * steady * largest and largest == 4 * WIDTH * (WIDTH + 1) + 4 * WIDTH % 512


def test_two_loads_a_layer_without_recomputation() -> None:
    link = SimulatedLink()
    model = streamed(Case(NONE), link)
    for _ in range(2):
        before = link.loads
        model.step(0)
    # the last layer of forward is the first of backward
    assert link.loads - before == DEPTH * LAYERS + (DEPTH - 1) * LAYERS - 1


def test_passes_of_other_kinds_are_learned_once() -> None:
    """Training with and without sound, and sampling, in turn: each has an order of its own."""
    model = streamed(CASES["all recomputed"], SimulatedLink())
    for step in range(4):
        model.step(step)
        model.sample()
    before = model.session.stats()["misses"]
    for step in range(4, 8):
        model.step(step)
        model.sample()
    # A pass without sound begins like one with it: what was sent for in vain is found out at the first layer left out.
    assert model.session.stats()["misses"] - before <= 4


def test_the_step_after_an_exception_anywhere_is_right() -> None:
    case = CASES["some recomputed, accumulated, in line"]
    model = streamed(Case(case.recomputed, accumulation=case.accumulation), SimulatedLink())
    call, calls, fail_at = model.runner.call_block, 0, 0

    def failing(block: nn.Module, state: object) -> object:
        nonlocal calls
        calls += 1
        if calls == fail_at:
            block(*broken)  # inside a layer: the products of this text have another width
        return call(block, state)  # type: ignore[arg-type]

    broken = (torch.zeros(1, 1, WIDTH), None, torch.zeros(1, 1, WIDTH), torch.zeros(1), torch.zeros(WIDTH + 1))
    model.runner.call_block = failing  # type: ignore[assignment]
    for step, failure in enumerate([1, 4, 6, 7, 0]):  # five calls forward, then the recomputations
        calls, fail_at = 0, failure
        if failure:
            with pytest.raises(RuntimeError, match="size"):
                model.loss(step).backward()
        else:
            model.loss(step)  # its backward never comes
        fail_at = 0
        model.optimizer.zero_grad()
        model.step(step, case.accumulation)
    assert_bitwise(model.losses, resident(case).losses[: len(model.losses)])
    assert_bitwise(model.gradients, resident(case).gradients[: len(model.gradients)])


def test_sampling_saving_and_merging_between_steps() -> None:
    case = CASES["all recomputed"]
    model, other = streamed(case, SimulatedLink()), trained(case)
    for step in range(3):
        assert torch.equal(model.sample(), other.sample())
        loss = model.loss(7)
        model.sample()  # a pass inside another one
        loss.backward()
        model.optimizer.zero_grad()
        model.session.materialize()
        saved, expected = model.net.state_dict(), other.net.state_dict()
        assert saved.keys() == expected.keys() and all(torch.equal(saved[name], expected[name]) for name in saved)
        for changed in (saved, expected):  # as a merge does
            changed["blocks.2.to_k.weight"].add_(0.1)
        model.step(step)
        other.step(step)
    assert_bitwise(model.losses + model.gradients, other.losses + other.gradients)


def test_small_layers_stay_on_the_device() -> None:
    link = SimulatedLink()
    model = build(lambda: RamTorchSession(link, "ramtorch", RamTorchChoice()), width=WIDTH)
    model.step(0)
    assert link.loads == 0 and model.session.stats()["loads"] == 0
    model.session.detach()


# --- which layers ------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("pattern", "chosen"),
    [
        ("*", ["ff.net.0.proj", "attn1.to_q", "audio_ff.net.0.proj"]),
        ("attn1.*", ["attn1.to_q"]),
        ("*.to_q", ["attn1.to_q"]),
        ("*.attn*", ["attn1.to_q"]),
        ("audio_ff.*.proj", ["audio_ff.net.0.proj"]),
        ("transformer_blocks.*.ff.*", ["ff.net.0.proj"]),
        ("transformer_blocks.3.attn1.to_q", ["attn1.to_q"]),
        ("transformer_blocks.4.attn1.to_q", []),
        ("*.3.attn1.*", ["attn1.to_q"]),
        ("net.0.proj", []),
    ],
)
def test_patterns_mean_names_in_the_block_or_in_the_model(pattern: str, chosen: list[str]) -> None:
    names = ["ff.net.0.proj", "attn1.to_q", "audio_ff.net.0.proj"]
    first_words = {name.partition(".")[0] for name in names}
    assert [name for name in names if fits(pattern, 3, name, first_words)] == chosen


def test_a_share_is_spread_evenly_by_bytes() -> None:
    sizes = [8, 8, 8, 8, 32, 32] * 20
    for percent in (0, 10, 25, 50, 90, 100):
        share, taken = Share(percent), [0]
        for size in sizes:
            taken.append(taken[-1] + size * share.take(size))
        seen = [sum(sizes[:count]) for count in range(len(sizes) + 1)]
        assert all(percent / 100 * whole - 32 <= part <= percent / 100 * whole for part, whole in zip(taken, seen, strict=True))
    assert taken[-1] == sum(sizes)


def test_patterns_are_a_list_or_separated_by_commas() -> None:
    assert patterns_of(None) == patterns_of("") == ()
    assert patterns_of("a.*, b") == patterns_of(["a.*", " b"]) == ("a.*", "b")


def test_only_named_layers_stream_and_a_name_without_layer_is_an_error() -> None:
    link = SimulatedLink()
    model = build(lambda: RamTorchSession(link, "ramtorch", RamTorchChoice(["blocks.*.to_q", "*.audio"]), smallest=0), width=WIDTH)
    streaming = [name for name, layer in model.net.named_modules() if type(layer).__name__ == "StreamedLinear"]
    assert sorted({name.split(".")[2] for name in streaming}) == ["audio", "to_q"] and len(streaming) == 2 * DEPTH
    with pytest.raises(ConfigError, match=r"ramtorch_target_modules.*to_x") as raised:
        build(lambda: RamTorchSession(SimulatedLink(), "ramtorch", RamTorchChoice(["to_q", "to_x"]), smallest=0), width=WIDTH)
    assert "to_k" in raised.value.remedy


# --- planning ----------------------------------------------------------------------------------------------------
def strategy(**options: object) -> RamTorch:
    return RamTorch(RamTorchOptions.model_validate(options), CONTEXT)


def facts_of(net: MixingModel, **more: object) -> MemoryFacts:
    blocks: BlockSet = net.block_set()
    linears = {name: layer for name, layer in blocks.blocks[0].named_modules() if isinstance(layer, nn.Linear)}
    sizes = tuple(layer.weight.numel() * 4 for layer in linears.values())
    block_bytes = tuple(sum(p.numel() * 4 for p in block.parameters()) for block in blocks.blocks)
    values = {"full_finetuning": False, "quantizer": "no_change", "checkpointing": "all"} | more
    return MemoryFacts(block_bytes, linear_bytes=sizes, linear_names=tuple(linears), **values)  # type: ignore[arg-type]


@pytest.mark.parametrize("options", [{}, {"ramtorch_transformer_percent": 40.0}, {"ramtorch_target_modules": "*.to_q"}])
def test_the_plan_is_what_a_session_takes(options: dict[str, object]) -> None:
    width = 160  # a weight of 100 KiB, and its bias of 640 B
    planned = strategy(ramtorch=True, **options)
    net = MixingModel(DEPTH, width)
    plan = planned.plan(facts_of(net))
    session = planned.open("transformer", DEPTH, CPU)
    for index, block in enumerate(net.blocks):
        session.receive(index, block, CPU)
    session.attach(net.block_set())
    assert isinstance(session, LeafSession)
    streaming = [layer for layer in net.blocks.modules() if type(layer).__name__ == "StreamedLinear"]
    weights = sum(4 * layer.weight.numel() for layer in streaming)
    assert plan.host_bytes == weights and plan.pinned_bytes == 0
    assert plan.traffic_bytes == 3 * weights
    every = DEPTH * LAYERS * 4 * width * (width + 1)
    slots = sum(slot.memory.numel() for slot in session.link.slots)
    assert plan.device_bytes == pytest.approx(every - weights + slots, rel=0.01)
    assert f"{len(streaming)} of {DEPTH * LAYERS} linear layers" in plan.summary
    session.detach()


def test_the_forecast_of_a_large_model_follows_from_its_bytes() -> None:
    """48 blocks of 0.77 GB: 37 GB forward and 74 GB backward at 50 GB/s, where computing takes 0.41 and 0.81 s."""
    linears = (134_217_728,) * 5 + (33_554_432,) * 3
    facts = MemoryFacts((sum(linears),) * 48, False, "no_change", "all", linear_bytes=linears, linear_names=tuple("abcdefgh"))
    plan = RamTorch(RamTorchOptions(ramtorch=True), BuildContext(torch.device("cuda"), torch.bfloat16, 0, 0, Path())).plan(facts)
    moved = 48 * sum(linears)
    compute = moved / 2 * 2.2e-11
    assert (plan.host_bytes, plan.pinned_bytes, plan.traffic_bytes, plan.device_bytes) == (moved, moved, 3 * moved, SLOTS * linears[0])
    assert plan.overhead == pytest.approx(3 * moved / 50e9 / (3 * compute) - 1)
    unknown = MemoryFacts((), False, "no_change", "none", 1, "text_encoder")
    assert "when it is opened" in strategy(ramtorch_text_encoder=True).plan(unknown).summary


def test_what_it_cannot_do_is_said_while_planning() -> None:
    net = MixingModel(DEPTH, 160)
    whole = strategy(ramtorch=True)
    assert whole.supports(facts_of(net)) == []
    [full] = whole.supports(facts_of(net, full_finetuning=True))
    assert isinstance(full, ConfigError) and "ramtorch" in full.where
    [small] = whole.supports(facts_of(net, host_bytes=1000))
    assert isinstance(small, OutOfMemoryError)
    [unused] = strategy(ramtorch=True, ramtorch_target_modules="to_q,to_x").supports(facts_of(net))
    assert isinstance(unused, ConfigError) and unused.value == "to_x"
    with pytest.raises(ValueError, match="less than or equal to 100"):
        RamTorchOptions(ramtorch_transformer_percent=101)


def test_each_key_asks_for_its_part() -> None:
    parts = {"ramtorch": "transformer", "ramtorch_text_encoder": "text_encoder", "ramtorch_vae": "vae"}
    for key, part in parts.items():
        asked = strategy(**{key: True})
        assert asked.parts() == {part} and asked.keys(part) == (key,) and asked.options.enabled()
    assert not strategy().options.enabled()
