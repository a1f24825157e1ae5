"""BlockRunner: gradients of every parameter and input equal plain autograd, whatever attaches."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from tuner.interfaces.blocks import Aligned, BlockState
from tuner.interfaces.losses import Tap, Transform
from tuner.interfaces.memory import MemorySession
from tuner.model.runner import BlockRunner, Checkpointing
from tuner.testing.blocks import MixingModel, call_mixing_block
from tuner.train.masters import MasterWeights

DEPTH = 4


def inputs(audio: bool = True) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
    g = torch.Generator().manual_seed(1)
    draw = lambda *shape: torch.randn(*shape, generator=g, dtype=torch.float64)
    return draw(2, 5, 6), draw(2, 3, 6) if audio else None, draw(2, 4, 6), draw(2, 5)


def model(dropout: float = 0.0) -> MixingModel:
    torch.manual_seed(0)
    return MixingModel(DEPTH, dropout=dropout).double()


def gradients(net: MixingModel, prediction: dict[str, Tensor], extra: Tensor | float = 0.0) -> dict[str, Tensor]:
    net.zero_grad()
    (sum(p.square().sum() for p in prediction.values()) + extra).backward()
    return {name: p.grad.clone() for name, p in net.named_parameters() if p.grad is not None}


def plain(net: MixingModel, state: BlockState, transforms: tuple[Transform, ...] = ()) -> BlockState:
    for index, block in enumerate(net.blocks):
        for t in transforms:
            if (t.block, t.when) == (index, "before"):
                state = t.apply(state)
        state = call_mixing_block(block, state)
        for t in transforms:
            if (t.block, t.when) == (index, "after"):
                state = t.apply(state)
    return state


def assert_equal(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert one.keys() == other.keys()
    for name in one:
        torch.testing.assert_close(one[name], other[name], rtol=1e-12, atol=1e-12, msg=name)


@pytest.mark.parametrize("recomputed", [(), (0, 1, 2, 3), (1, 3), (0,)])
@pytest.mark.parametrize("watched", [True, False])
@pytest.mark.parametrize("audio", [True, False])
@pytest.mark.parametrize("trained", ["", "blocks", "blocks.2", "blocks.0.to_q", "blocks.1.audio"])
def test_gradients_equal_plain_autograd(recomputed: tuple[int, ...], audio: bool, trained: str, watched: bool) -> None:
    if trained == "blocks.1.audio" and not audio:
        pytest.skip("nothing is trained")
    net = model()
    for name, p in net.named_parameters():
        p.requires_grad_(name.startswith(trained))
    expected = gradients(net, net.exit(plain(net, net.enter(*inputs(audio)))))
    session = Journal() if watched else None
    runner = BlockRunner(net.block_set(), call_mixing_block, checkpointing=Checkpointing(frozenset(recomputed)), session=session)
    assert_equal(gradients(net, net.exit(runner.run(net.enter(*inputs(audio))))), expected)
    assert expected


def test_what_is_recomputed_and_who_watches_changes_no_bit() -> None:
    """In float32, and of what all blocks share too: text, modulation, tokens with a tap or several."""
    net, given = model().float(), [tensor.float() for tensor in inputs() if tensor is not None]
    found = []
    taps = [Tap("middle", 1, "video"), Tap("other", 2, "audio"), Tap("same", 1, "video"), Tap("again", 1, "video")]
    for recomputed, session in itertools.product(((), (1, 3), range(DEPTH)), (None, Journal())):
        policy = Checkpointing(frozenset(recomputed))
        runner = BlockRunner(net.block_set(), call_mixing_block, checkpointing=policy, session=session, taps=taps)
        final = runner.run(net.enter(*given))
        extra = torch.stack([value.hidden.sin().sum() for value in runner.tapped.values()]).sum() + final.shared["text"].square().sum()
        found.append(gradients(net, net.exit(final), extra))
    assert len(found[0]) == len(list(net.parameters()))
    assert all(torch.equal(each[name], found[0][name]) for each in found for name in found[0])


def select(keep: Tensor) -> tuple[Transform, Transform]:
    """Drops the tokens that are not in `keep` (K,) before block 1 and puts them back after block 2."""

    def drop(state: BlockState) -> BlockState:
        video = state.streams["video"]
        aligned = {k: Aligned(a.tensor[:, keep], a.token_dims, a.batched) for k, a in video.aligned.items()}
        carried = {"route.hidden": video.hidden} | {f"route.{k}": a.tensor for k, a in video.aligned.items()}
        ids = keep.expand(video.hidden.shape[0], -1)
        stream = replace(video, hidden=video.hidden[:, keep], aligned=aligned, token_ids=ids)
        return BlockState({**state.streams, "video": stream}, {**state.shared, **carried})

    def restore(state: BlockState) -> BlockState:
        video, shared = state.streams["video"], dict(state.shared)
        hidden = shared.pop("route.hidden").index_copy(1, keep, video.hidden)
        aligned = {k: Aligned(shared.pop(f"route.{k}"), a.token_dims, a.batched) for k, a in video.aligned.items()}
        return BlockState({**state.streams, "video": replace(video, hidden=hidden, aligned=aligned, token_ids=None)}, shared)

    return Transform(1, "before", drop), Transform(2, "after", restore)


@pytest.mark.parametrize("recomputed", [(), (0, 1, 2, 3), (2,)])
def test_transforms_and_taps_carry_gradients(recomputed: tuple[int, ...]) -> None:
    net, pair = model(), select(torch.tensor([0, 2, 3]))
    # Plain: by hand, with the tap inside the route.
    state = call_mixing_block(net.blocks[0], net.enter(*inputs()))
    state = call_mixing_block(net.blocks[1], pair[0].apply(state))
    tapped = state.streams["video"].hidden
    state = call_mixing_block(net.blocks[3], pair[1].apply(call_mixing_block(net.blocks[2], state)))
    expected = gradients(net, net.exit(state), tapped.sin().sum())

    runner = BlockRunner(
        net.block_set(), call_mixing_block, checkpointing=Checkpointing(frozenset(recomputed)),
        transforms=pair, taps=[Tap("middle", 1, "video")],
    )
    final = runner.run(net.enter(*inputs()))
    value = runner.tapped["middle"]
    assert value.hidden.shape == (2, 3, 8) and value.token_ids is not None and value.token_ids[0].tolist() == [0, 2, 3]
    torch.testing.assert_close(value.hidden, tapped)
    assert final.streams["video"].token_ids is None and final.streams["video"].hidden.shape[1] == 5
    assert_equal(gradients(net, net.exit(final), value.hidden.sin().sum()), expected)


@pytest.mark.parametrize("recomputed", [(), (0, 1, 2, 3)])
def test_a_batch_without_a_taps_stream_gives_it_nothing(recomputed: tuple[int, ...]) -> None:
    net = model()
    policy = Checkpointing(frozenset(recomputed))
    runner = BlockRunner(net.block_set(), call_mixing_block, checkpointing=policy, taps=[Tap("heard", 1, "audio"), Tap("seen", 1, "video")])
    final = runner.run(net.enter(*inputs(audio=False)))
    assert list(runner.tapped) == ["seen"]
    expected = gradients(net, net.exit(plain(net, net.enter(*inputs(audio=False)))))
    assert_equal(gradients(net, net.exit(final)), expected)


def test_dropout_repeats_its_draws_in_the_recomputation() -> None:
    net = model(dropout=0.5)
    results = []
    for recomputed in [(), (0, 1, 2, 3)]:
        runner = BlockRunner(net.block_set(), call_mixing_block, checkpointing=Checkpointing(frozenset(recomputed)))
        torch.manual_seed(3)
        results.append(gradients(net, net.exit(runner.run(net.enter(*inputs())))))
        torch.rand(1)
    assert_equal(*results)


class Journal(MemorySession):
    """Writes down every event; fails where told to."""

    def __init__(self, fail: tuple[str, int] | None = None) -> None:
        self.events: list[str] = []
        self.fail = fail

    def _note(self, name: str, index: int) -> None:
        self.events.append(f"{name}{index}")
        if self.fail == (name, index):
            raise RuntimeError("planned")

    def begin_step(self, first_backward: int) -> None:
        self.events.append("begin")

    def before_forward(self, index: int) -> None:
        self._note("F", index)

    def after_forward(self, index: int) -> None:
        self._note("f", index)

    def before_backward(self, index: int) -> None:
        self._note("B", index)

    def after_backward(self, index: int) -> None:
        self._note("b", index)

    def end_step(self) -> None:
        self.events.append("end")

    def abort(self) -> None:
        self.events.append("abort")


@pytest.mark.parametrize("recomputed", [(), (0, 1, 2, 3)])
def test_events_come_in_order_and_backward_stops_at_the_first_trained_block(recomputed: tuple[int, ...]) -> None:
    net, journal = model(), Journal()
    for name, p in net.named_parameters():
        p.requires_grad_(name.startswith("blocks.2"))
    runner = BlockRunner(net.block_set(), call_mixing_block, checkpointing=Checkpointing(frozenset(recomputed)), session=journal)
    gradients(net, net.exit(runner.run(net.enter(*inputs()))))
    assert " ".join(journal.events) == "begin F0 f0 F1 f1 F2 f2 F3 f3 B3 b3 B2 b2 end"


@pytest.mark.parametrize("fail", [("F", 2), ("B", 1)])
def test_an_exception_aborts_the_session_and_the_next_step_is_right(fail: tuple[str, int]) -> None:
    net, journal = model(), Journal(fail)
    runner = BlockRunner(net.block_set(), call_mixing_block, checkpointing=Checkpointing.every(DEPTH), session=journal)
    with pytest.raises(RuntimeError, match="planned"):
        gradients(net, net.exit(runner.run(net.enter(*inputs()))))
    assert journal.events[-1] == "abort"
    journal.fail = None
    expected = gradients(net, net.exit(plain(net, net.enter(*inputs()))))
    assert_equal(gradients(net, net.exit(runner.run(net.enter(*inputs())))), expected)


def test_without_gradients_it_is_a_plain_loop() -> None:
    net, journal = model(), Journal()
    pair = select(torch.tensor([0, 1]))
    runner = BlockRunner(net.block_set(), call_mixing_block, session=journal, transforms=pair, taps=[Tap("t", 0, "video")])
    with torch.no_grad():
        final = runner.run(net.enter(*inputs()))
        expected = plain(net, net.enter(*inputs()))
    assert torch.equal(final.streams["video"].hidden, expected.streams["video"].hidden)
    assert not runner.tapped and journal.events[-1] == "end"


def test_recomputation_keeps_only_block_inputs() -> None:
    """The saved bytes of a pass: with checkpointing, one hidden tensor per stream and block."""
    net = model()
    kept: dict[bool, int] = {}
    for recompute in (False, True):
        policy = Checkpointing.every(DEPTH) if recompute else Checkpointing()
        runner = BlockRunner(net.block_set(), call_mixing_block, checkpointing=policy, session=Journal())
        final = runner.run(net.enter(*inputs()))
        tapes = final.streams["video"].hidden.grad_fn.passes[0].tapes  # type: ignore[union-attr]
        kept[recompute] = sum(tape.graph is not None for tape in tapes)
    assert kept == {False: DEPTH, True: 0}


def test_backward_twice_is_refused() -> None:
    net = model()
    runner = BlockRunner(net.block_set(), call_mixing_block, checkpointing=Checkpointing.every(DEPTH))
    loss = net.exit(runner.run(net.enter(*inputs())))["video"].sum()
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="twice"):
        loss.backward()


def test_policies() -> None:
    assert Checkpointing.every(4).recomputed == {0, 1, 2, 3}
    assert Checkpointing.every(4, 2).recomputed == {0, 2}
    assert Checkpointing().recomputed == frozenset()


def test_indices_outside_the_blocks_are_refused() -> None:
    net = model()
    with pytest.raises(IndexError, match=r"outside 0\.\.3"):
        BlockRunner(net.block_set(), call_mixing_block, taps=[Tap("t", 4, "video")])


# --- several states at once ----------------------------------------------------------------------------------------
@pytest.mark.parametrize("recomputed", [(), (0, 1, 2, 3), (1, 3)])
@pytest.mark.parametrize("trained", ["blocks", "blocks.2"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_batches_taken_together_give_the_gradients_of_batches_one_by_one(
    recomputed: tuple[int, ...], trained: str, dtype: torch.dtype
) -> None:
    """To the last bit, with float32 sums of bfloat16 gradients too; a batch without sound among them."""
    net, journal, tapped = model().to(dtype), Journal(), []
    for name, p in net.named_parameters():
        p.requires_grad_(name.startswith(trained))
    runner = BlockRunner(
        net.block_set(), call_mixing_block, checkpointing=Checkpointing(frozenset(recomputed)), session=journal,
        taps=[Tap("middle", 1, "video")],
    )  # fmt: skip
    given = [[None if t is None else t.to(dtype) * (turn + 1) for t in inputs(turn != 1)] for turn in range(4)]
    weights = MasterWeights({n: p for n, p in net.named_parameters() if p.requires_grad}, low_precision=False)
    runner.sink = weights

    def loss(state: BlockState, middle: Tensor) -> Tensor:
        return torch.stack([p.float().square().sum() for p in net.exit(state).values()]).sum() + middle.float().sin().sum()

    def taken() -> list[Tensor]:
        weights.collect()
        found = [p.grad.clone() for p in weights.optimized() if p.grad is not None]
        for p in weights.optimized():
            p.grad = None
        return found

    for one in given:
        after = runner.run(net.enter(*one))  # type: ignore[arg-type]
        tapped.append(runner.tapped["middle"].hidden.detach())
        loss(after, runner.tapped["middle"].hidden).backward()
        weights.collect()
    expected, journal.events = taken(), []
    passed = runner.run_all([net.enter(*one) for one in given])  # type: ignore[arg-type]
    assert all(torch.equal(taps["middle"].hidden, before) for (_, taps), before in zip(passed, tapped, strict=True))
    torch.stack([loss(after, taps["middle"].hidden) for after, taps in passed]).sum().backward()
    together = taken()
    assert len(together) == len(expected) > 0 and all(torch.equal(a, b) for a, b in zip(together, expected, strict=True))
    back = "B3 b3 B2 b2" + (" B1 b1 B0 b0" if trained == "blocks" else "")
    assert " ".join(journal.events) == f"begin F0 f0 F1 f1 F2 f2 F3 f3 {back} end"


def test_gradients_of_what_feeds_all_batches_add_up() -> None:
    net = model()
    expected: dict[str, Tensor] = {}
    for turn in range(3):
        one = gradients(net, net.exit(plain(net, net.enter(*inputs(turn != 1)))))
        expected |= {name: expected[name] + gradient if name in expected else gradient for name, gradient in one.items()}
    runner = BlockRunner(net.block_set(), call_mixing_block, checkpointing=Checkpointing.every(DEPTH), session=Journal())
    passed = runner.run_all([net.enter(*inputs(turn != 1)) for turn in range(3)])
    predictions = {f"{turn} {name}": p for turn, (after, _) in enumerate(passed) for name, p in net.exit(after).items()}
    assert_equal(gradients(net, predictions), expected)
