"""How a step is carried out: the plain way here; what decides about the other, which tests/offload and the benchmarks run on a GPU."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn

from tuner.interfaces.family import Batch, Noise, Sample, StreamBatch, StreamNoise
from tuner.interfaces.memory import MemorySession
from tuner.model.runner import BlockRunner
from tuner.testing.blocks import MixingModel, call_mixing_block
from tuner.train.execute import copied, reasons_against_graphs, signature, tensors
from tuner.train.masters import MasterWeights

CUDA, CPU = torch.device("cuda"), torch.device("cpu")


def batch(tokens: int = 4, conditioned: bool = False, rate: float = 25.0) -> Batch:
    given = torch.zeros(2, tokens, dtype=torch.bool) if conditioned else None
    sample = Sample("k", "d", 0, 0, rate, 9, 32, 32, {})
    stream = StreamBatch(torch.randn(2, tokens, 3), (1, 2, 2), conditioned=given)
    return Batch((sample,) * 2, {"video": stream}, {"video": torch.randn(2, 5, 3)}, (rate,) * 2)


def test_batches_of_one_signature_differ_in_values_only():
    assert signature(batch()) == signature(batch())
    others = [batch(tokens=8), batch(conditioned=True), batch(rate=24.0)]
    assert len({signature(b) for b in (batch(), *others)}) == 4


def test_how_many_tokens_are_given_is_no_part_of_a_signature():
    assert signature(replace(batch(conditioned=True), most_given={"video": 3})) == signature(batch(conditioned=True))


def test_a_copy_shares_no_memory_and_samples_stay():
    given = batch(conditioned=True)
    own = copied(given)
    assert own.samples is given.samples
    pairs = list(zip(tensors(own), tensors(given), strict=True))
    assert len(pairs) == 3
    assert all(torch.equal(a, b) and a.data_ptr() != b.data_ptr() for a, b in pairs)
    level = StreamNoise(torch.rand(2), torch.rand(2, 4, 3), torch.rand(2, 4, 3), torch.rand(2, 4, 3))
    assert len(list(tensors(Noise({"video": level})))) == 4


def test_what_speaks_against_a_graph_is_said():
    model = MixingModel()
    runner = BlockRunner(model.block_set(), call_mixing_block)
    assert reasons_against_graphs(runner, CUDA, (), 0) == []
    assert reasons_against_graphs(runner, CPU, (), 1) == ["the device is cpu", "loss terms of plugins may depend on the step's number"]
    runner.session = type("Disk", (MemorySession,), {"capturable": False})()
    assert "cannot be replayed" in reasons_against_graphs(runner, CUDA, (), 0)[0]


@pytest.mark.parametrize("low_precision", [False, True])
def test_gathered_gradients_add_up_to_collected_ones(low_precision: bool):
    def masters() -> tuple[MasterWeights, list[nn.Parameter]]:
        torch.manual_seed(0)
        members = [nn.Parameter(torch.randn(3, dtype=torch.bfloat16)), nn.Parameter(torch.randn(2))]
        return MasterWeights({"a": members[0], "b": members[1]}, low_precision), members

    (collecting, first), (gathering, second) = masters(), masters()
    for members, take in ((first, collecting.collect), (second, lambda: gathering.add(gathering.gather(), copy=True))):
        for share in (1.0, 0.5):
            for member in members:
                gradient = torch.full_like(member, share)
                member.grad = gradient if member.grad is None or take is not collecting.collect else member.grad + gradient
            take()
    for one, other in zip(collecting.optimized(), gathering.optimized(), strict=True):
        assert one.grad is not None and torch.equal(one.grad, other.grad)
