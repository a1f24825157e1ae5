"""On a GPU: a run whose steps are replayed as CUDA graphs is the run whose steps are called, bit for bit, whatever it is made of."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pytest
import torch

from integration.gpu_runs import (
    CPU,
    CREPA,
    CUT,
    DEVICE,
    FP8,
    GROUPS,
    HAS_GPU,
    INSIDE,
    INT8,
    PACKED,
    RAMTORCH,
    SAME,
    SWAP,
    TREAD,
    Bench,
    Keys,
    Result,
    assert_same,
    graphs,
    lenient,
    needs_gpu,
    plugin,
)
from tuner.builtins.losses import FlowMatchingLoss
from tuner.interfaces.losses import LossValue, StepState
from tuner_ltxvideo2 import block
from tuner_offload.ramtorch import RamTorch

pytestmark = lenient
ACCUMULATED = {**SAME, **INSIDE, "train_batch_size": 1}
ONE_LANE = {"cuda_graph_lanes": 1}
CASES: Mapping[str, Keys] = {
    "plain": {},
    "nothing recomputed": {"gradient_checkpointing": False},
    "every other block recomputed": {"gradient_checkpointing_interval": 2},
    "kept by budget": {"gradient_checkpointing": "auto"},
    "int8": INT8,
    "12 bits": PACKED,
    "products in 8 bits": FP8,
    "adamw_bf16": {"optimizer": "adamw_bf16"},
    "TREAD": TREAD,
    "CREPA": CREPA,
    "CREPA that watches": CUT,
    "TREAD and CREPA": {**TREAD, **CUT},
    "TREAD and CREPA, nothing recomputed": {**TREAD, **CREPA, "gradient_checkpointing": False},
    "given tokens": {**SAME, **TREAD, "i2v_conditioning_probability": 0.5},
    "two batches": {**ACCUMULATED, "gradient_accumulation_steps": 2},
    "four batches": {**ACCUMULATED, "gradient_accumulation_steps": 4},
    "two batches, TREAD and CREPA": {**ACCUMULATED, **TREAD, **CUT, "gradient_accumulation_steps": 2},
    "four batches in 8 bits": {**ACCUMULATED, **INT8, "gradient_accumulation_steps": 4},
    "one lane": ONE_LANE,
    "one lane, nothing recomputed": {**ONE_LANE, "gradient_checkpointing": False},
    "scheduled sampling": {**SAME, "scheduled_sampling_max_step_offset": 2, "scheduled_sampling_probability": 1.0},
}  # fmt: skip
STREAMED: Mapping[str, tuple[Keys, Keys]] = {
    "groups": (GROUPS, {}),
    "groups in 8 bits": (GROUPS, INT8),
    "groups in 12 bits": (GROUPS, PACKED),
    "groups with TREAD and CREPA": (GROUPS, {**TREAD, **CUT}),
    "groups, nothing recomputed": (GROUPS, {"gradient_checkpointing": False}),
    "groups, kept by budget": (GROUPS, {"gradient_checkpointing": "auto"}),
    "groups, two batches": (GROUPS, CASES["two batches"]),
    "groups, four batches": (GROUPS, CASES["four batches"]),
    "groups, four batches in 8 bits": (GROUPS, {**CASES["four batches"], **INT8}),
    "swapped": (SWAP, {}),
    "swapped in 8 bits": (SWAP, INT8),
    "swapped with TREAD and CREPA": (SWAP, {**TREAD, **CUT}),
    "layers": (RAMTORCH, {}),
    "layers in 8 bits": (RAMTORCH, INT8),
    "groups, products in 8 bits": (GROUPS, FP8),
    "layers, products in 8 bits": (RAMTORCH, FP8),
    "layers with TREAD": (RAMTORCH, TREAD),
    "groups, four batches, products in 8 bits": (GROUPS, {**CASES["four batches"], **FP8}),
    "groups on one lane": (GROUPS, ONE_LANE),
    "groups in 8 bits, nothing recomputed": (GROUPS, {**INT8, "gradient_checkpointing": False}),
}
TOLERANCE = 0.03
"""Of a loss: fused kernels round once where plain ones round several times to 8 bits of precision, in each block, and 8 steps add up."""


@pytest.fixture(autouse=True)
def every_layer_streams(monkeypatch: pytest.MonkeyPatch) -> None:
    """The tiny flavour's are all small."""
    monkeypatch.setattr(RamTorch, "smallest", 0)


def replayed(bench: Bench, keys: Keys, extra: Sequence[tuple[str, object]] = ()) -> Result:
    found = bench.run({**keys, **graphs()}, extra=extra)
    assert found.captured > 0 or not HAS_GPU
    return found


@needs_gpu
@pytest.mark.parametrize("name", CASES)
def test_replayed_is_called(name: str, bench: Bench) -> None:
    assert_same(replayed(bench, CASES[name]), bench.run({**CASES[name], "cuda_graphs": "off"}))


@needs_gpu
@pytest.mark.parametrize("name", STREAMED)
def test_streamed_and_replayed_is_resident_and_called(name: str, bench: Bench) -> None:
    strategy, keys = STREAMED[name]
    found = replayed(bench, {**keys, **strategy})
    assert found.together == keys.get("gradient_accumulation_steps", 1)
    resident = bench.run({**keys, "cuda_graphs": "off"})
    assert_same(bench.run({**keys, **strategy, "cuda_graphs": "off"}), resident)
    assert_same(found, resident)


@needs_gpu
@pytest.mark.parametrize(("name", "keys"), [
    ("ema-teacher", {"ema_teacher_weight": 0.5, "ema_teacher_decay": 0.5}), ("layersync", {"layersync_weight": 0.5}),
])  # fmt: skip
def test_other_regularizers_are_replayed(name: str, keys: Keys, bench: Bench) -> None:
    """One of them runs forward passes beside the step."""
    given = {**SAME, **keys}
    assert_same(replayed(bench, given, [plugin(name)]), bench.run({**given, "cuda_graphs": "off"}, extra=[plugin(name)]))


@needs_gpu
def test_which_blocks_are_recomputed_changes_no_bit(bench: Bench) -> None:
    plain = bench.run({"cuda_graphs": "off"})
    for keys in ({"gradient_checkpointing": False}, {"gradient_checkpointing_interval": 2}, {"gradient_checkpointing": "auto"}):
        assert_same(replayed(bench, keys), plain)


@needs_gpu
@pytest.mark.skipif(not HAS_GPU, reason="on a processor it compiles for minutes")
@pytest.mark.parametrize("keys", [{}, GROUPS, {**TREAD, **CREPA}], ids=["resident", "streamed", "with regularizers"])
def test_compiled_blocks_are_replayed(keys: Keys, bench: Bench) -> None:
    given = {**SAME, **keys, "max_train_steps": 8}
    plain = bench.run({**given, "cuda_graphs": "off"})
    with bench.loop({**given, **graphs(), "dynamo_mode": "default"}) as loop:
        loop.run()
        blocks = loop.assembly.training.blocks.train_block
        assert not blocks.failed and blocks._known  # type: ignore[union-attr]
        losses = [row["loss"] for row in loop.rows]  # type: ignore[attr-defined]
    assert losses == pytest.approx([row["loss"] for row in plain.rows], rel=TOLERANCE)


@needs_gpu
@pytest.mark.parametrize("keys", [{}, GROUPS, RAMTORCH], ids=["resident", "groups", "layers"])
def test_a_capture_that_fails_is_followed_by_plain_steps(keys: Keys, bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """And by captures of other runs: neither streams nor the allocator stay in it."""
    expected = bench.run({**SAME, "cuda_graphs": "off"})
    call, waits = FlowMatchingLoss.__call__, DEVICE.type == "cuda"

    def reading(term: FlowMatchingLoss, state: StepState) -> LossValue:
        value = call(term, state)
        if waits and torch.cuda.is_current_stream_capturing():
            value.values.sum().item()
        return value

    with monkeypatch.context() as patch:
        patch.setattr(FlowMatchingLoss, "__call__", reading)
        with bench.loop({**SAME, **keys, "cuda_graphs": "auto"}) as loop:
            loop.run()
            found = Result(list(loop.rows), expected.weights, 0, 1)  # type: ignore[attr-defined]
    assert_same(found, expected)
    with bench.loop({**SAME, **keys, **graphs()}) as loop:
        loop.run()
        assert loop.rows == expected.rows  # type: ignore[attr-defined]


@needs_gpu
@pytest.mark.skipif(not HAS_GPU, reason="nothing is captured on a processor")
@pytest.mark.parametrize("back", [False, True], ids=["on the way there", "on the way back"])
def test_a_capture_that_fails_beside_a_lane_is_ended(back: bool, bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a block, where the lane is away; on the way back blocks are called once more."""
    expected, attend, seen = bench.run({**SAME, "cuda_graphs": "off"}), block._attend_self, [0]

    def failing(*given: Any) -> Any:
        if torch.cuda.is_current_stream_capturing():
            seen[0] += torch.is_grad_enabled() == back
            if seen[0] == 4:  # of the second block, when the sound's part is on its way
                raise ValueError("planned") if back else RuntimeError("planned")
        return attend(*given)

    with monkeypatch.context() as patch:
        patch.setattr(block, "_attend_self", failing)
        with bench.loop({**SAME, "cuda_graphs": "auto"}) as loop:
            if back:
                with pytest.raises(ValueError, match="planned"):
                    loop.run()
            else:
                loop.run()
                assert_same(Result(list(loop.rows), expected.weights, 0, 1), expected)  # type: ignore[attr-defined]
    assert_same(bench.run({**SAME, **graphs()}), expected)


@needs_gpu
@pytest.mark.skipif(not HAS_GPU, reason="a processor is not full")
def test_a_full_device_is_an_error_of_memory_and_not_of_capturing(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """Streams and allocator are as before."""
    call = FlowMatchingLoss.__call__

    def taking(term: FlowMatchingLoss, state: StepState) -> LossValue:
        if torch.cuda.is_current_stream_capturing():
            torch.empty(1 << 50, dtype=torch.uint8, device=DEVICE)
        return call(term, state)

    with monkeypatch.context() as patch:
        patch.setattr(FlowMatchingLoss, "__call__", taking)
        with bench.loop({**SAME, **GROUPS, **graphs()}) as loop, pytest.raises(torch.OutOfMemoryError):
            loop.run()
    assert_same(bench.run({**SAME, **GROUPS, **graphs()}), bench.run({**SAME, "cuda_graphs": "off"}))


def test_the_tests_themselves_run_without_a_device(bench: Bench) -> None:
    """What the others do, on the processor: too little to find faults in the steps, enough to find those in the tests."""
    keys = {**ACCUMULATED, **TREAD, **CUT, **SWAP, "max_train_steps": 2, "gradient_accumulation_steps": 2, "cuda_graphs": "auto"}
    one, other = (bench.run({**keys, "seed": 3, "dataloader_prefetch": depth}, CPU) for depth in (0, 2))
    assert_same(one, other)
