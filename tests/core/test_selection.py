"""Tokens that are left out of blocks and put back: against plain indexing, alone and under the runner with every checkpointing."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from tuner.interfaces.blocks import Aligned, BlockState, TokenStream
from tuner.interfaces.family import Batch, Sample, StreamBatch
from tuner.interfaces.losses import Tap, Transform
from tuner.interfaces.memory import MemorySession
from tuner.model.runner import BlockRunner, Checkpointing
from tuner.model.selection import restore, select, with_counts
from tuner.testing.blocks import MixingModel, call_mixing_block

B, S, D = 2, 6, 4
IDS = torch.tensor([[0, 2, 5], [1, 2, 4]])
ROWS = torch.arange(B)[:, None]
"""`tensor[ROWS, IDS]` gathers by plain indexing."""


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def per_sample(tensor: Tensor, dim: int) -> Tensor:
    """(B, ..., S, ...) gathered along `dim`, sample by sample."""
    return torch.stack([row.index_select(dim - 1, ids) for row, ids in zip(tensor, IDS, strict=True)])


ALIGNED = {
    "modulation": Aligned(draw(B, S, D), (1,)),
    "shared by samples": Aligned(draw(1, S, 1), (1,)),
    "a view for all samples": Aligned(draw(1, S, D).expand(B, S, D), (1,)),
    "rotary": Aligned(draw(B, 3, S, 2), (2,)),
    "counted from the end": Aligned(draw(B, 3, S, 2), (-2,)),
    "mask over pairs": Aligned(draw(B, S, S) > 0, (1, 2)),
    "mask over keys": Aligned(draw(B, 1, 1, S) > 0, (2, 3)),
    "one for all": Aligned(draw(B, 1, D), (1,)),
    "without samples": Aligned(draw(S, D), (0,), batched=False),
    "pairs without samples": Aligned(draw(3, S, S), (1, 2), batched=False),
}
EXPECTED = {
    "modulation": ALIGNED["modulation"].tensor[ROWS, IDS],
    "shared by samples": ALIGNED["shared by samples"].tensor[0][IDS],
    "a view for all samples": ALIGNED["a view for all samples"].tensor[ROWS, IDS],
    "rotary": per_sample(ALIGNED["rotary"].tensor, 2),
    "counted from the end": per_sample(ALIGNED["counted from the end"].tensor, 2),
    "mask over pairs": torch.stack([m[i][:, i] for m, i in zip(ALIGNED["mask over pairs"].tensor, IDS, strict=True)]),
    "mask over keys": per_sample(ALIGNED["mask over keys"].tensor, 3),
    "one for all": ALIGNED["one for all"].tensor,
    "without samples": ALIGNED["without samples"].tensor[IDS],
    "pairs without samples": torch.stack([ALIGNED["pairs without samples"].tensor[:, i][:, :, i] for i in IDS]),
}


def state() -> BlockState:
    protected = torch.zeros(B, S, dtype=torch.bool)
    protected[:, 2] = True
    video = TokenStream(draw(B, S, D, seed=1), ALIGNED, (1, 1, 4), protected=protected, extra_tokens=2)
    return BlockState({"video": video, "audio": TokenStream(draw(B, 3, D))}, {"text": draw(B, 5, D)})


def test_everything_aligned_goes_along() -> None:
    before = state()
    video = select(before, "video", IDS).streams["video"]
    assert torch.equal(video.hidden, before.streams["video"].hidden[ROWS, IDS])
    assert {name: torch.equal(each.tensor, EXPECTED[name]) for name, each in video.aligned.items()} == dict.fromkeys(EXPECTED, True)
    assert video.protected is not None and video.protected.tolist() == [[False, True, False], [False, True, False]]
    assert video.token_ids is IDS and (video.grid, video.extra_tokens) == ((1, 1, 4), 2)
    assert video.aligned["pairs without samples"].token_dims == (2, 3) and video.aligned["pairs without samples"].batched
    again = select(BlockState({"video": video}), "video", torch.tensor([[1], [0]])).streams["video"]
    for name, each in again.aligned.items():  # what was gathered can be gathered once more
        sizes = [each.tensor.shape[dim] for dim in each.token_dims]
        assert set(sizes) <= {1}, name


def test_the_other_stream_and_what_is_shared_stay_the_same_objects() -> None:
    before = state()
    after = select(before, "video", IDS)
    assert after.streams["audio"] is before.streams["audio"] and after.shared["text"] is before.shared["text"]


def test_skipped_tokens_come_back_bit_for_bit_and_everything_else_whole() -> None:
    before = state()
    inside = select(before, "video", IDS)
    changed = inside.with_hidden({"video": inside.streams["video"].hidden * 3, "audio": before.streams["audio"].hidden + 1})
    after = restore(changed, "video")
    video, first = after.streams["video"], before.streams["video"]
    expected = first.hidden.clone()
    expected[ROWS, IDS] = first.hidden[ROWS, IDS] * 3
    assert torch.equal(video.hidden, expected)
    assert torch.equal(after.streams["audio"].hidden, before.streams["audio"].hidden + 1)
    assert video.token_ids is None and video.protected is first.protected
    assert after.shared.keys() == before.shared.keys()
    for name, each in video.aligned.items():
        given = ALIGNED[name]
        assert each.tensor is given.tensor and each.batched == given.batched, name
        assert [dim % each.tensor.ndim for dim in given.token_dims] == list(each.token_dims), name


def test_selections_nest() -> None:
    before = state()
    inner = torch.tensor([[0, 2], [1, 2]])
    twice = select(select(before, "video", IDS), "video", inner)
    assert twice.streams["video"].token_ids is not None and twice.streams["video"].token_ids.tolist() == [[0, 5], [2, 4]]
    once = restore(twice.with_hidden({"video": twice.streams["video"].hidden + 1}), "video")
    assert once.streams["video"].token_ids is IDS
    whole = restore(once, "video")
    expected = before.streams["video"].hidden.clone()
    expected[ROWS, torch.tensor([[0, 5], [2, 4]])] += 1
    assert torch.equal(whole.streams["video"].hidden, expected) and whole.shared.keys() == before.shared.keys()


def test_both_streams_are_selected_apart() -> None:
    both = select(select(state(), "video", IDS), "audio", torch.tensor([[2], [0]]))
    after = restore(restore(both, "video"), "audio")
    assert all(torch.equal(after.streams[name].hidden, stream.hidden) for name, stream in state().streams.items())


@pytest.mark.parametrize("ids", [torch.zeros(3, 2, dtype=torch.int64), torch.zeros(2, dtype=torch.int64)])
def test_ids_of_another_batch_are_refused(ids: Tensor) -> None:
    with pytest.raises(ValueError, match=r"must be \(2, K\) for 2 samples of video"):
        select(state(), "video", ids)


def test_nothing_can_be_restored_where_nothing_is_selected() -> None:
    with pytest.raises(ValueError, match="no tokens of audio"):
        restore(select(state(), "video", IDS), "audio")


def test_given_tokens_are_counted_on_the_host() -> None:
    conditioned = torch.tensor([[True, False, True], [False, True, False]])
    plain = StreamBatch(torch.zeros(2, 3, 1), (3, 1, 1))
    samples = (Sample("k", "d", 0, 0, 25.0, 9, 32, 32, {}),) * 2
    batch = Batch(samples, {"video": replace(plain, conditioned=conditioned), "audio": plain}, {}, ())
    assert not batch.most_given and with_counts(batch).most_given == {"video": 2, "audio": 0}


# --- under the runner --------------------------------------------------------------------------------------------
DEPTH = 5
LAYOUTS = [((1, 3),), ((0, 4),), ((2, 2),), ((0, 1), (3, 4)), ((0, 1), (2, 4))]
"""Routes by first and last block: inside, over all, over one, two apart, two that meet."""
ROUTES = [torch.tensor([[0, 2, 3], [1, 2, 4]]), torch.tensor([[1, 4], [0, 3]])]
POLICIES = [(), (1, 3), range(DEPTH)]


def model() -> MixingModel:
    torch.manual_seed(0)
    return MixingModel(DEPTH).double()


def inputs(audio: bool = True) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
    return draw(2, 5, 6), draw(2, 3, 6, seed=1) if audio else None, draw(2, 4, 6, seed=2), draw(2, 5, seed=3)


def gradients(net: MixingModel, loss: Tensor) -> dict[str, Tensor]:
    net.zero_grad()
    loss.backward()  # type: ignore[no-untyped-call]
    return {name: p.grad.clone() for name, p in net.named_parameters() if p.grad is not None}


def plain(net: MixingModel, given: BlockState, layout: tuple[tuple[int, int], ...]) -> tuple[Tensor, dict[str, Tensor], list[Tensor]]:
    """By hand, in plain autograd, blocks called with gathered tensors: the loss, the streams, tokens after the first routed block."""
    video, audio = given.streams["video"].hidden, given.streams["audio"].hidden if "audio" in given.streams else None
    text, aligned = given.shared["text"], given.streams["video"].aligned
    scale, table = aligned["scale"].tensor, aligned["table"].tensor
    seen = []
    for index, block in enumerate(net.blocks):
        route = next((r for r, (first, last) in enumerate(layout) if first <= index <= last), None)
        if route is None:
            video, audio = block(video, audio, text, scale, table)
            continue
        rows, ids = torch.arange(2)[:, None], ROUTES[route]
        kept, audio = block(video[rows, ids], audio, text, scale[rows, ids], table[0][ids])
        skipped = torch.ones(2, 5, dtype=torch.bool)
        skipped[rows, ids] = False
        merged = torch.zeros_like(video)
        merged[rows, ids] = kept
        video = torch.where(skipped[..., None], video, merged)
        if index == layout[0][0]:
            seen.append(kept)
    streams = {"video": video} | ({"audio": audio} if audio is not None else {})
    loss = torch.stack([net.proj_out(tokens).square().sum() for tokens in streams.values()]).sum() + seen[0].sin().sum()
    return loss, streams, seen


def routed(
    net: MixingModel, layout: tuple[tuple[int, int], ...], policy: Iterable[int], session: MemorySession | None = None
) -> BlockRunner:
    transforms = [
        each
        for ids, (first, last) in zip(ROUTES, layout, strict=False)
        for each in (
            Transform(first, "before", lambda state, ids=ids: select(state, "video", ids)),
            Transform(last, "after", lambda state: restore(state, "video")),
        )
    ]
    taps = [Tap("inside", layout[0][0], "video")]
    checkpointing = Checkpointing(frozenset(policy))
    return BlockRunner(
        net.block_set(), call_mixing_block, checkpointing=checkpointing, transforms=transforms, taps=taps, session=session
    )


@pytest.mark.parametrize("trained", ["", "blocks.2", "blocks.4", "proj_in"])
@pytest.mark.parametrize("audio", [True, False])
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_gradients_are_those_of_a_forward_by_hand(layout: tuple[tuple[int, int], ...], audio: bool, trained: str) -> None:
    net = model()
    for name, p in net.named_parameters():
        p.requires_grad_(name.startswith(trained))
    loss, streams, seen = plain(net, net.enter(*inputs(audio)), layout)
    expected = gradients(net, loss)
    found = []
    for policy, session in itertools.product(POLICIES, (None, Watched())):
        runner = routed(net, layout, policy, session)
        final = runner.run(net.enter(*inputs(audio)))
        tap = runner.tapped["inside"]
        assert tap.token_ids is ROUTES[0] and torch.equal(tap.hidden, seen[0])
        assert all(torch.equal(final.streams[name].hidden, tokens) for name, tokens in streams.items())
        assert final.streams["video"].token_ids is None and final.shared.keys() == {"text"}
        total = torch.stack([p.square().sum() for p in net.exit(final).values()]).sum() + tap.hidden.sin().sum()
        found.append(gradients(net, total))
    assert expected and found[0].keys() == expected.keys()
    for name, wanted in expected.items():
        torch.testing.assert_close(found[0][name], wanted, rtol=1e-12, atol=1e-12, msg=name)
        assert all(torch.equal(each[name], found[0][name]) for each in found), name


class Watched(MemorySession):
    """Makes the runner walk tapes also where nothing is recomputed."""


def test_skipped_tokens_are_bitwise_unchanged_over_a_route() -> None:
    net = model()
    runner = routed(net, ((0, DEPTH - 1),), range(DEPTH))
    first = net.enter(*inputs())
    final = runner.run(first).streams["video"].hidden
    skipped = torch.ones(2, 5, dtype=torch.bool).scatter(1, ROUTES[0], False)
    same = (final == first.streams["video"].hidden).all(-1)
    assert torch.equal(same, skipped)


def test_a_pass_without_gradients_selects_nothing() -> None:
    net = model()
    runner = routed(net, ((1, 3),), ())
    with torch.no_grad():
        found = runner.run(net.enter(*inputs())).streams["video"].hidden
        expected = BlockRunner(net.block_set(), call_mixing_block).run(net.enter(*inputs())).streams["video"].hidden
    assert torch.equal(found, expected)
