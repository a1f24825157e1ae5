"""The term is the formula of the paper, teaches the early block alone, and compares only tokens that both blocks computed."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from torch import Tensor

from tuner.interfaces.blocks import Aligned, BlockState
from tuner.interfaces.family import Batch, BuildContext, Noise, Prediction, Sample, StreamBatch
from tuner.interfaces.losses import LossValue, StepState, TapValue, TrainingFacts, Transform
from tuner.model.runner import BlockRunner, Checkpointing
from tuner.testing import RegularizerConformance
from tuner.testing.blocks import MixingModel, call_mixing_block
from tuner_layersync import plugin
from tuner_layersync.layersync import EARLY, LATE, LayerSync, LayerSyncTerm, chosen_blocks, matched
from tuner_layersync.options import LayerSyncOptions

FACTS = TrainingFacts(4, (0, 1, 2, 3), ("video", "audio"), ("video", "audio"), (), False, ("clips",))
TOKENS = 5


def options(**changes: object) -> LayerSyncOptions:
    return LayerSyncOptions.model_validate({"layersync_weight": 0.5, **changes})


def context(folder: Path = Path()) -> BuildContext:
    return BuildContext(torch.device("cpu"), torch.float32, 0, 0, folder)


def batch(present: Tensor | None = None) -> Batch:
    stream = StreamBatch(torch.zeros(2, TOKENS, 6), (1, 1, TOKENS), present=present)
    return Batch((Sample("k", "d", 0, 0, 25.0, 9, 32, 32, {}),) * 2, {"video": stream}, {}, (25.0,) * 2)


def cosine(a: Tensor, b: Tensor) -> Tensor:
    return (a * b).sum(-1) / (a.norm(dim=-1) * b.norm(dim=-1))


def run(recomputed: tuple[int, ...] = (), transforms: tuple[Transform, ...] = ()) -> tuple[MixingModel, LossValue, BlockRunner]:
    """The term over a model of four blocks, whose blocks 1 and 2 are compared."""
    torch.manual_seed(0)
    model = MixingModel(4)
    technique = LayerSync(options(), context())
    technique.attach(model.block_set(), context())
    runner = BlockRunner(
        model.block_set(), call_mixing_block, checkpointing=Checkpointing(frozenset(recomputed)), taps=technique.taps(),
        transforms=transforms,
    )  # fmt: skip
    drawn = torch.Generator().manual_seed(1)
    video, text = torch.randn(2, TOKENS, 6, generator=drawn), torch.randn(2, 4, 6, generator=drawn)
    predicted = model.exit(runner.run(model.enter(video, None, text, torch.rand(2, TOKENS, generator=drawn))))
    (term,) = technique.loss_terms()
    return model, term(StepState(batch(), Noise({}), Prediction(predicted), runner.tapped)), runner


def test_the_term_is_the_mean_cosine_per_token() -> None:
    _, value, runner = run()
    early, late = runner.tapped[EARLY].hidden, runner.tapped[LATE].hidden
    torch.testing.assert_close(value.values, 1 - cosine(early, late).mean(dim=1))
    torch.testing.assert_close(value.reduced(), 0.5 * (1 - cosine(early, late).mean()))


@pytest.mark.parametrize("recomputed", [(), (0, 1, 2, 3), (1, 3)])
def test_gradients_reach_the_early_block_and_what_comes_before(recomputed: tuple[int, ...]) -> None:
    model, value, runner = run(recomputed)
    value.reduced().backward()
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None and p.grad.any()}
    assert any(name.startswith("blocks.0.") for name in found) and any(name.startswith("blocks.1.") for name in found)
    assert not any(name.startswith(("blocks.2.", "blocks.3.", "proj_out.")) for name in found)
    # The later block's tokens are a constant.
    fixed, (other, _, again) = runner.tapped[LATE].hidden.detach(), run()
    (0.5 * (1 - cosine(again.tapped[EARLY].hidden, fixed).mean())).backward()
    for name, parameter in other.named_parameters():
        if name in found:
            torch.testing.assert_close(found[name], parameter.grad)


def test_recomputed_blocks_get_the_same_gradients_to_the_last_bit() -> None:
    gradients = []
    for recomputed in ((), (0, 1, 2, 3)):
        model, value, _ = run(recomputed)
        value.reduced().backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None and p.grad.any()})
    assert gradients[0].keys() == gradients[1].keys()
    assert all(torch.equal(gradients[0][name], gradients[1][name]) for name in gradients[0])


def dropped(ids: Tensor, block: int) -> Transform:
    """Leaves only the tokens `ids` (B, K) from a block on."""

    def apply(state: BlockState) -> BlockState:
        video = state.streams["video"]

        def pick(tensor: Tensor) -> Tensor:
            return tensor.expand(ids.shape[0], -1, -1).gather(1, ids[..., None].expand(-1, -1, tensor.shape[2]))

        aligned = {name: Aligned(pick(a.tensor), a.token_dims, a.batched) for name, a in video.aligned.items()}
        return BlockState({"video": replace(video, hidden=pick(video.hidden), aligned=aligned, token_ids=ids)}, state.shared)

    return Transform(block, "before", apply)


@pytest.mark.parametrize("block", [1, 2])
def test_inside_a_route_the_common_tokens_are_compared(block: int) -> None:
    """From block 1 on both see the selection, from block 2 on only the later one does."""
    ids = torch.tensor([[4, 0, 2], [1, 3, 4]])
    _, value, runner = run(transforms=(dropped(ids, block),))
    early, late = runner.tapped[EARLY], runner.tapped[LATE]
    assert (early.token_ids is None) == (block == 2) and late.token_ids is not None
    expected = []
    for sample in range(2):
        pairs = [(early.hidden[sample, ids[sample, k] if block == 2 else k], late.hidden[sample, k]) for k in range(3)]
        expected.append(1 - torch.stack([cosine(a, b) for a, b in pairs]).mean())
    torch.testing.assert_close(value.values, torch.stack(expected))


def test_of_two_selections_only_what_is_in_both_counts() -> None:
    torch.manual_seed(0)
    early = TapValue(torch.randn(2, 3, 4), (1, 1, 9), torch.tensor([[8, 1, 5], [0, 2, 3]]))
    late = TapValue(torch.randn(2, 4, 4), (1, 1, 9), torch.tensor([[5, 7, 8, 2], [6, 5, 7, 8]]))
    target, common = matched(early, late)
    assert common.tolist() == [[True, False, True], [False] * 3]
    assert torch.equal(target[0, 0], late.hidden[0, 2]) and torch.equal(target[0, 2], late.hidden[0, 0])
    prediction = Prediction({"video": torch.zeros(2, 9, 3)})
    value = LayerSyncTerm("video", 1.0)(StepState(batch(), Noise({}), prediction, {EARLY: early, LATE: late}))
    assert value.counted is not None and value.counted.tolist() == [True, False]
    similar = [cosine(early.hidden[0, k], target[0, k]) for k in (0, 2)]
    torch.testing.assert_close(value.reduced(), 1 - torch.stack(similar).mean())


def test_samples_and_batches_without_the_stream_are_not_counted() -> None:
    tap = TapValue(torch.randn(2, TOKENS, 4), (1, 1, TOKENS), None)
    term, prediction = LayerSyncTerm("video", 1.0), Prediction({"audio": torch.zeros(2, 3, 4)})
    some = term(StepState(batch(torch.tensor([True, False])), Noise({}), prediction, {EARLY: tap, LATE: tap}))
    assert some.counted is not None and some.counted.tolist() == [True, False]
    none = term(StepState(batch(), Noise({}), prediction, {}))
    assert none.reduced().item() == 0 and none.counted is not None and not none.counted.any()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"layersync_block": 4}, ["layersync_block", "0 to 3", "4"]),
        ({"layersync_target_block": -5}, ["layersync_target_block", "-4 to -1"]),
        ({"layersync_block": 2, "layersync_target_block": 2}, ["layersync_block, layersync_target_block", "after"]),
        ({"layersync_stream": "vidoe"}, ["layersync_stream", "vidoe", "video, audio"]),
    ],
)
def test_mistakes_are_named_while_planning(changes: dict[str, object], words: list[str]) -> None:
    (problem,) = LayerSync(options(**changes), context()).check(FACTS)
    assert all(word in str(problem) for word in words)


def test_a_block_below_all_that_is_trained_is_refused() -> None:
    (problem,) = LayerSync(options(), context()).check(replace(FACTS, trained_blocks=(2, 3)))
    assert "layersync_block" in str(problem) and "from 2 on" in str(problem)
    assert not LayerSync(options(), context()).check(FACTS)
    assert not LayerSync(options(), context()).check(replace(FACTS, trained_blocks=()))  # what is trained lies outside the blocks


def test_blocks_are_counted_from_both_ends() -> None:
    assert chosen_blocks(options(), 48) == (16, 32)
    assert chosen_blocks(options(layersync_block=0, layersync_target_block=-1), 48) == (0, 47)
    assert LayerSync(options(layersync_block=-3), context()).describe(FACTS) == "video tokens of block 1 follow block 2 of 4"


def test_it_is_off_unless_asked_for() -> None:
    assert not LayerSyncOptions().enabled() and options().enabled()


class TestConformance(RegularizerConformance):
    plugin = plugin
    component = "layersync"
    options: ClassVar = {"layersync_weight": 0.5}
    zero: ClassVar = {"layersync_weight": 0.0}
    refused: ClassVar = [({"layersync_block": 4}, "layersync_block"), ({"layersync_stream": "vidoe"}, "layersync_stream")]


class TestConformanceOnSound(RegularizerConformance):
    plugin = plugin
    component = "layersync"
    options: ClassVar = {"layersync_weight": 0.5, "layersync_stream": "audio", "layersync_block": 0, "layersync_target_block": -1}
