"""TREAD through LTX-2's real forward pass, made small: against a forward by hand that indexes in plain torch, in every mode and layout."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diffusers import LTX2VideoTransformer3DModel
from torch import Tensor

from ltxvideo2.ltx2_models import GRID, LENGTH, batch_and_noise, transformer, with_reference
from tuner.builtins.losses import FlowMatchingLoss
from tuner.interfaces.blocks import Aligned, BlockSet, BlockState
from tuner.interfaces.family import Batch, BuildContext, Noise
from tuner.interfaces.losses import StepState, Tap
from tuner.interfaces.memory import MemorySession
from tuner.model.runner import BlockRunner, Checkpointing
from tuner_ltxvideo2 import sides
from tuner_ltxvideo2 import transformer as forward
from tuner_ltxvideo2.block import call_block
from tuner_regularizers.tread import Tread
from tuner_regularizers.tread_options import TreadOptions

torch.set_num_threads(1)
DEPTH = 4
S = GRID[0] * GRID[1] * GRID[2]
SIGMAS = {"video": (0.8, 0.35), "audio": (0.15, 0.6)}
FIRST_FRAME = torch.stack([torch.arange(S) < GRID[1] * GRID[2], torch.zeros(S, dtype=torch.bool)])
MASKS = torch.stack([torch.arange(S) % 3 == 0, torch.arange(S) % 5 == 1])
HEARD = (torch.arange(LENGTH) < 4).float().expand(2, LENGTH)
Layout = tuple[tuple[float, int, int], ...]
INSIDE: Layout = ((0.5, 1, -2),)
LAYOUTS: list[Layout] = [
    INSIDE, ((0.5, 0, -1),), ((0.75, 2, 2),), ((0.5, 0, 1), (0.25, 2, 3)), ((0.5, 0, 0), (0.0, 1, 1), (0.5, 3, -1)),
]  # fmt: skip
POLICIES: list[Iterable[int]] = [(), (0, 2), range(DEPTH)]
VARIANTS = [("2.0", "split"), ("2.0", "interleaved"), ("2.3", "split"), ("2.5", "split")]
Given = Callable[[LTX2VideoTransformer3DModel], tuple[Batch, Noise]]
MODES: dict[str, Given] = {
    "plain": lambda model: batch_and_noise(model, SIGMAS),
    "first frame": lambda model: batch_and_noise(model, SIGMAS, conditioned=FIRST_FRAME),
    "masks": lambda model: batch_and_noise(model, SIGMAS, conditioned=MASKS),
    "reference": lambda model: with_reference(*batch_and_noise(model, SIGMAS, conditioned=FIRST_FRAME)),
    "a clip without sound": lambda model: batch_and_noise(model, SIGMAS, present=torch.tensor([True, False]), loss_mask=HEARD),
    "video alone": lambda model: batch_and_noise(model, {"video": SIGMAS["video"]}),
}


def tread(layout: Layout, given: Batch) -> Tread:
    """With the draws for a batch."""
    names = ("selection_ratio", "start_layer_idx", "end_layer_idx")
    routes = [dict(zip(names, route, strict=True)) for route in layout]
    context = BuildContext(torch.device("cpu"), torch.float32, 0, 0, Path())
    made = Tread(TreadOptions(tread_config={"routes": routes}), context)  # type: ignore[arg-type]
    made.attach(BlockSet((torch.nn.Identity(),) * DEPTH, ("",) * DEPTH), context)
    made.begin_step(0, given, Noise({}), torch.Generator().manual_seed(5))
    return made


def loss_of(model: LTX2VideoTransformer3DModel, given: tuple[Batch, Noise], state: BlockState, tapped: Tensor | None) -> Tensor:
    prediction = forward.exit(model, state)
    seen = StepState(*given, prediction)
    terms = [FlowMatchingLoss(name)(seen).reduced() for name in state.streams]
    return torch.stack(terms).sum() + (0 if tapped is None else tapped.sin().mean())


def gradients(model: LTX2VideoTransformer3DModel, loss: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    loss.backward()  # type: ignore[no-untyped-call]
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


# --- by hand -----------------------------------------------------------------------------------------------------
def indexed(tensor: Tensor, ids: Tensor) -> Tensor:
    """The tokens `ids` of each sample: of tables with heads (B, H, S, r) along dimension 2, of everything else along dimension 1."""
    rows = [row[:, own] if tensor.ndim == 4 else row[own] for row, own in zip(tensor, ids, strict=True)]
    return torch.stack(rows)


def by_hand(
    model: LTX2VideoTransformer3DModel, given: tuple[Batch, Noise], layout: Layout, drawn: list[Tensor]
) -> tuple[BlockState, Tensor]:
    """Plain autograd over `call_block`: the state after the last block, and what the first routed block gives."""
    state = forward.enter(model, *given, forward.RotaryTables())
    spans = [(first % DEPTH, last % DEPTH, ids) for (_, first, last), ids in zip([r for r in layout if r[0]], drawn, strict=True)]
    tapped: Tensor | None = None
    for index, block in enumerate(sides.transformer_blocks(model)):
        ids = next((ids for first, last, ids in spans if first <= index <= last), None)
        if ids is None:
            state = call_block(block, state)
            continue
        video = state.streams["video"]
        names = {"rope_cos", "rope_sin", "cross_rope_cos", "cross_rope_sin", "clean"} & video.aligned.keys()
        aligned = {name: Aligned(indexed(video.aligned[name].tensor, ids), ()) for name in names}
        few = replace(video, hidden=indexed(video.hidden, ids), aligned=aligned)
        after = call_block(block, BlockState({**state.streams, "video": few}, state.shared))
        merged = video.hidden.clone()
        merged[torch.arange(2)[:, None], ids] = after.streams["video"].hidden
        tapped = after.streams["video"].hidden if tapped is None else tapped
        state = BlockState({**after.streams, "video": replace(video, hidden=merged)}, state.shared)
    assert tapped is not None
    return state, tapped


class Watched(MemorySession):
    """Makes the runner walk tapes also where nothing is recomputed."""


def check(model: LTX2VideoTransformer3DModel, given: tuple[Batch, Noise], layout: Layout) -> None:
    """Forward bit for bit, gradients of every parameter up to the order of sums; all checkpointing policies bit for bit alike."""
    model.requires_grad_(True)
    routing = tread(layout, given[0])
    assert routing._ids and all(ids.shape[1] < given[0].streams["video"].latents.shape[1] for ids in routing._ids)
    state, tapped = by_hand(model, given, layout, list(routing._ids))
    expected = gradients(model, loss_of(model, given, state, tapped))
    blocks = BlockSet.of(model, sides.transformer_blocks(model))
    tap = Tap("inside", routing.routes[0].first, "video")
    found = []
    for policy in POLICIES:
        for session in (None, Watched()):
            runner = BlockRunner(
                blocks, call_block, checkpointing=Checkpointing(frozenset(policy)), transforms=routing.transforms(), taps=[tap],
                session=session,
            )  # fmt: skip
            final = runner.run(forward.enter(model, *given, forward.RotaryTables()))
            value = runner.tapped["inside"]
            assert value.token_ids is not None and torch.equal(value.token_ids, routing._ids[0]) and torch.equal(value.hidden, tapped)
            assert all(torch.equal(final.streams[name].hidden, stream.hidden) for name, stream in state.streams.items())
            found.append(gradients(model, loss_of(model, given, final, value.hidden)))
    assert found[0].keys() == expected.keys()
    for name, wanted in expected.items():
        torch.testing.assert_close(found[0][name], wanted, rtol=1e-4, atol=1e-6 + 1e-5 * float(wanted.abs().max()), msg=name)
        assert all(torch.equal(each[name], found[0][name]) for each in found), name


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("generation", "rope_type"), VARIANTS)
def test_gradients_are_those_of_a_forward_by_hand(generation: str, rope_type: str, mode: str) -> None:
    model = transformer(generation, rope_type, layers=DEPTH)
    check(model, MODES[mode](model), INSIDE)


@pytest.mark.parametrize("layout", LAYOUTS[1:], ids=str)
def test_every_layout_of_routes(layout: Layout) -> None:
    model = transformer("2.3", layers=DEPTH)
    check(model, MODES["first frame"](model), layout)


@pytest.mark.parametrize("mode", MODES)
def test_skipped_tokens_come_back_as_they_were_and_given_ones_never_leave(mode: str) -> None:
    """Over a route that holds every block a token leaves as it entered, or was among the kept."""
    model = transformer("2.3", layers=DEPTH)
    given = MODES[mode](model)
    routing = tread(((0.5, 0, -1),), given[0])
    runner = BlockRunner(BlockSet.of(model, sides.transformer_blocks(model)), call_block, transforms=routing.transforms())
    entered = forward.enter(model, *given, forward.RotaryTables())
    final = runner.run(entered).streams["video"]
    before = entered.streams["video"]
    skipped = torch.ones(before.hidden.shape[:2], dtype=torch.bool).scatter(1, routing._ids[0], False)
    assert torch.equal((final.hidden == before.hidden).all(-1), skipped)
    assert before.protected is None or not (before.protected & skipped).any()
    assert final.token_ids is None and final.protected is before.protected
    assert all(final.aligned[name].tensor is each.tensor for name, each in before.aligned.items())


def test_sound_reads_the_kept_tokens_and_sampling_all() -> None:
    """What leaves is missed by the cross-modal attention too; a pass without gradients is that of the model alone."""
    model = transformer("2.3", layers=DEPTH)
    given = MODES["plain"](model)
    routing = tread(INSIDE, given[0])
    blocks = BlockSet.of(model, sides.transformer_blocks(model))
    routed, whole = (
        BlockRunner(blocks, call_block, transforms=transforms).run(forward.enter(model, *given, forward.RotaryTables()))
        for transforms in (routing.transforms(), ())
    )
    assert not torch.equal(routed.streams["audio"].hidden, whole.streams["audio"].hidden)
    with torch.no_grad():
        sampled = BlockRunner(blocks, call_block, transforms=routing.transforms()).run(
            forward.enter(model, *given, forward.RotaryTables())
        )
    assert all(torch.equal(sampled.streams[name].hidden, stream.hidden) for name, stream in whole.streams.items())
