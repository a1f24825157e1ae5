"""CREPA on a small model: what is aligned with what, where gradients go, when it rests, and what it refuses while planning."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from tuner.errors import ConfigError
from tuner.interfaces.blocks import BlockState
from tuner.interfaces.family import Batch, BuildContext, ClipShape, Geometry, Noise, Prediction, Sample, StreamBatch
from tuner.interfaces.losses import LossValue, StepState, TapValue, TrainingFacts, Transform
from tuner.model.runner import BlockRunner, Checkpointing
from tuner.testing.blocks import MixingModel, call_mixing_block
from tuner_regularizers.crepa import RECORD, Crepa, Mode
from tuner_regularizers.crepa_course import LAG
from tuner_regularizers.crepa_options import CrepaOptions

CPU = torch.device("cpu")
CONTEXT = BuildContext(CPU, torch.float64, 0, 0, Path(), geometry=Geometry(8, 32, 16000, 2, 25.0), total_steps=20)
DEPTH, GRID, EXTRA = 4, (3, 2, 2), 2
PLACES = 12
ON = {"crepa_enabled": True, "crepa_encoder": "tiny", "crepa_encoder_image_size": 56, "crepa_block_index": 1}
NOTHING = Noise({})


def regularizer(net: MixingModel, **keys: object) -> Crepa:
    """Attached, in float64, with the same projector each time."""
    made = Crepa(CrepaOptions(**{**ON, **keys}), CONTEXT)
    torch.manual_seed(4)
    made.attach(net.block_set(), CONTEXT)
    made.trainable().double()
    return made


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed + sum(shape)), dtype=torch.float64)


def batch_of(features: Tensor | None, *, extra: int = 0, **changes: object) -> Batch:
    """Two clips of three latent frames."""
    video = StreamBatch(draw(2, PLACES + extra, 6), GRID, **changes)
    sample = Sample("a", "d", 0, 0, 25.0, 17, 64, 64, {})
    return Batch((sample,) * 2, {"video": video}, {}, (25.0,) * 2, {} if features is None else {RECORD: features})


FEATURES = draw(2, *GRID, 32)


@dataclass
class Step:
    """One forward and backward pass."""

    term: LossValue
    gradients: Mapping[str, Tensor]
    tapped: TapValue


def model() -> MixingModel:
    torch.manual_seed(0)
    return MixingModel(DEPTH).double()


def entered(net: MixingModel, batch: Batch) -> BlockState:
    video = batch.streams["video"]
    state = net.enter(video.latents, draw(2, 3, 6), draw(2, 4, 6), draw(2, video.latents.shape[1], seed=3))
    stream = replace(state.streams["video"], grid=GRID, extra_tokens=video.latents.shape[1] - PLACES)
    return BlockState({**state.streams, "video": stream}, state.shared)


def step(
    net: MixingModel, crepa: Crepa | None, batch: Batch, at: int = 0, recomputed: Sequence[int] = (), transforms: Sequence[Transform] = ()
) -> Step:
    """Loss: the prediction's square, and the term. Gradients of the model, then of the projector (`crepa...`)."""
    taps = crepa.taps() if crepa else ()
    runner = BlockRunner(
        net.block_set(), call_mixing_block, checkpointing=Checkpointing(frozenset(recomputed)), taps=taps, transforms=transforms
    )
    if crepa is not None:
        crepa.begin_step(at, batch, NOTHING, torch.Generator())
    final = runner.run(entered(net, batch))
    prediction = net.exit(final)
    (term,) = crepa.loss_terms() if crepa else (None,)
    seen = StepState(batch, NOTHING, Prediction(prediction), runner.tapped, at)
    value = LossValue("none", torch.zeros(2)) if term is None else term(seen)
    named = {f"model.{name}": p for name, p in net.named_parameters()}
    named |= {f"crepa.{name}": p for name, p in crepa.trainable().named_parameters()} if crepa else {}
    for parameter in named.values():
        parameter.grad = None
    (sum(p.square().mean() for p in prediction.values()) + value.reduced()).backward()
    found = {name: p.grad.clone() for name, p in named.items() if p.grad is not None}
    if crepa is not None:
        crepa.after_step(at)
    return Step(value, found, runner.tapped.get("crepa", TapValue(torch.empty(0), GRID, None)))


def same(one: Mapping[str, Tensor], other: Mapping[str, Tensor], prefix: str = "") -> bool:
    left, right = ({k: v for k, v in each.items() if k.startswith(prefix)} for each in (one, other))
    return left.keys() == right.keys() and bool(left) and all(torch.equal(left[name], right[name]) for name in left)


def cosines(crepa: Crepa, tokens: Tensor, features: Tensor) -> Tensor:
    """(K,) of one sample, through the projector written out."""
    projector = crepa.trainable()
    normed = (tokens - tokens.mean(-1, keepdim=True)) / (tokens.var(-1, unbiased=False, keepdim=True) + 1e-5).sqrt()
    projected = (normed * projector.norm.weight + projector.norm.bias) @ projector.linear.weight.T + projector.linear.bias
    return functional.cosine_similarity(projected, features, dim=-1)


# --- what is aligned ---------------------------------------------------------------------------------------------
def test_each_token_with_the_features_at_its_own_place() -> None:
    net = model()
    crepa = regularizer(net, crepa_adjacent_distance=0, crepa_lambda=0.7)
    found = step(net, crepa, batch_of(FEATURES))
    expected = torch.stack([cosines(crepa, h, y.flatten(0, 2)).mean() for h, y in zip(found.tapped.hidden, FEATURES, strict=True)])
    torch.testing.assert_close(found.term.values, -expected, check_dtype=False)
    torch.testing.assert_close(found.term.measured["similarity"], expected, check_dtype=False)
    assert found.term.reduced().item() == pytest.approx(-0.7 * expected.mean().item())


def test_tokens_that_do_not_count_in_the_loss_do_not_count_here() -> None:
    """Given clean, outside the mask, of a sample without picture, on no place of the grid."""
    net = model()
    conditioned = torch.zeros(2, PLACES + EXTRA, dtype=torch.bool)
    conditioned[:, :4] = conditioned[:, PLACES:] = True
    mask = torch.ones(2, PLACES + EXTRA)
    mask[:, 5] = 0
    crepa = regularizer(net, crepa_adjacent_distance=0)
    given = batch_of(FEATURES, extra=EXTRA, conditioned=conditioned, loss_mask=mask, present=torch.tensor([True, False]))
    found = step(net, crepa, given)
    each = cosines(crepa, found.tapped.hidden[0, :PLACES], FEATURES[0].flatten(0, 2))
    assert found.term.counted is not None and found.term.counted.tolist() == [True, False]
    assert found.term.values[0].item() == pytest.approx(-(each[[4, 6, 7]].mean() + each[8:12].mean()).item() / 2)
    clean = step(net, crepa, batch_of(FEATURES, clean=True))
    assert not clean.term.counted.any() and same(clean.gradients, step(net, None, batch_of(None)).gradients, "model")


KEPT = torch.tensor([[0, 2, 3, 9, 12, 13], [5, 4, 11, 8, 12, 13]])
"""Of each sample: of the first no token of frame 1, of both the two behind the grid."""


def route() -> tuple[Transform, Transform]:
    """Only `KEPT` are there from block 1 to block 2; behind it the others are back."""

    def drop(state: BlockState) -> BlockState:
        video = state.streams["video"]
        pick = lambda t: t.expand(2, -1, -1).gather(1, KEPT[..., None].expand(-1, -1, t.shape[-1]))
        aligned = {name: replace(a, tensor=pick(a.tensor)) for name, a in video.aligned.items()}
        carried = {"all": video.hidden, **{name: a.tensor for name, a in video.aligned.items()}}
        stream = replace(video, hidden=pick(video.hidden), aligned=aligned, token_ids=KEPT)
        return BlockState({**state.streams, "video": stream}, {**state.shared, **carried})

    def restore(state: BlockState) -> BlockState:
        video, shared = state.streams["video"], dict(state.shared)
        hidden = shared.pop("all").scatter(1, KEPT[..., None].expand(-1, -1, 8), video.hidden)
        aligned = {name: replace(a, tensor=shared.pop(name)) for name, a in video.aligned.items()}
        return BlockState({**state.streams, "video": replace(video, hidden=hidden, aligned=aligned, token_ids=None)}, shared)

    return Transform(1, "before", drop), Transform(2, "after", restore)


def test_inside_a_route_the_kept_tokens_alone() -> None:
    net = model()
    crepa = regularizer(net, crepa_adjacent_tau=2.0)
    conditioned = torch.zeros(2, PLACES + EXTRA, dtype=torch.bool)
    conditioned[0, 2] = True  # kept, and given clean; what lies behind the grid is left out without being marked
    given = batch_of(FEATURES, extra=EXTRA, conditioned=conditioned)
    found = step(net, crepa, given, transforms=route())
    assert found.tapped.hidden.shape == (2, 6, 8)
    weight = torch.tensor(-0.5).exp().item()

    def of(sample: int, own: int, tokens: Sequence[int], frame: int) -> float:
        """Mean cosine of some kept tokens, which lie in frame `own`, with frame `frame`."""
        places = [int(KEPT[sample, t]) - 4 * own + 4 * frame for t in tokens]
        return cosines(crepa, found.tapped.hidden[sample, tokens], FEATURES[sample].flatten(0, 2)[places]).mean().item()

    first = of(0, 0, [0, 2], 0) + weight * of(0, 0, [0, 2], 1) + of(0, 2, [3], 2) + weight * of(0, 2, [3], 1)
    second = of(1, 1, [0, 1], 1) + weight * (of(1, 1, [0, 1], 0) + of(1, 1, [0, 1], 2)) + of(1, 2, [2, 3], 2) + weight * of(1, 2, [2, 3], 1)
    assert found.term.values.tolist() == pytest.approx([-first / 2, -second / 2])
    for recomputed in ((1, 2), range(DEPTH)):
        again = step(net, crepa, given, recomputed=recomputed, transforms=route()).gradients
        assert again.keys() == found.gradients.keys()
        assert all(torch.allclose(again[name], g, rtol=1e-12, atol=1e-14) for name, g in found.gradients.items())


def test_a_picture_and_a_grid_of_another_shape() -> None:
    net = model()
    crepa = regularizer(net)
    picture = batch_of(draw(2, 1, 3, 5, 32))
    tap = TapValue(draw(2, PLACES, 8), (1, 3, 4), None)
    crepa.begin_step(0, picture, NOTHING, torch.Generator())
    (term,) = crepa.loss_terms()
    value = term(StepState(picture, NOTHING, Prediction({"video": draw(2, PLACES, 6)}), {"crepa": tap}))
    maps = functional.interpolate(picture.extras[RECORD][:, 0].movedim(-1, 1), (3, 4), mode="bilinear", antialias=True)
    expected = [cosines(crepa, h, y.flatten(1).T).mean().item() for h, y in zip(tap.hidden, maps, strict=True)]
    assert value.values.tolist() == pytest.approx([-e for e in expected])
    with pytest.raises(ConfigError, match="crepa_enabled: features of 1 frames for 3 frames of tokens"):
        term(StepState(picture, NOTHING, Prediction({}), {"crepa": replace(tap, grid=GRID)}))


# --- where gradients go ------------------------------------------------------------------------------------------
@pytest.mark.parametrize("recomputed", [(), (1,), (0, 2, 3), range(DEPTH)])
def test_gradients_are_the_same_however_blocks_are_recomputed(recomputed: Sequence[int]) -> None:
    net = model()
    crepa = regularizer(net, crepa_cumulative_neighbors=True, crepa_adjacent_distance=2)
    plain, found = (step(net, crepa, batch_of(FEATURES), recomputed=which).gradients for which in ((), recomputed))
    assert plain.keys() == found.keys() and {"crepa.linear.weight", "crepa.norm.weight", "model.blocks.0.to_q.weight"} < found.keys()
    assert all(torch.allclose(found[name], plain[name], rtol=1e-12, atol=1e-14) for name in plain)
    without = step(net, None, batch_of(None)).gradients
    changed = {name.split(".")[2] for name in without if "blocks" in name and not torch.equal(without[name], plain[name])}
    assert changed == {"0", "1"}  # what lies behind the tapped block does not see the term


@pytest.mark.parametrize("name", ["linear.weight", "linear.bias", "norm.weight", "norm.bias"])
def test_gradients_of_the_projector_are_finite_differences(name: str) -> None:
    net = model()
    crepa = regularizer(net)
    (term,) = crepa.loss_terms()
    given, tap = batch_of(FEATURES), TapValue(draw(2, PLACES, 8), GRID, None)
    crepa.begin_step(0, given, NOTHING, torch.Generator())

    def value(parameter: Tensor) -> Tensor:
        with pytest.MonkeyPatch.context() as patch:
            owner, leaf = crepa.trainable().get_submodule(name.split(".")[0]), name.split(".")[1]
            patch.delitem(owner._parameters, leaf)
            patch.setattr(owner, leaf, parameter, raising=False)
            return term(StepState(given, NOTHING, Prediction({}), {"crepa": tap})).values

    assert torch.autograd.gradcheck(value, crepa.trainable().get_parameter(name).detach().clone().requires_grad_())


@pytest.mark.parametrize(
    ("keys", "at", "mode", "extras"),
    [
        ({"crepa_lambda": 0.0}, 3, Mode.MEASURE, True),
        ({"crepa_warmup_steps": 2}, 0, Mode.MEASURE, True),
        ({"crepa_scheduler": "linear"}, 20, Mode.MEASURE, True),
        ({"crepa_cutoff_step": 3}, 3, Mode.OFF, True),
        ({}, 0, Mode.ALIGN, False),
    ],
    ids=["no weight", "warm-up", "decayed", "cut off", "no features"],
)
@pytest.mark.parametrize("recomputed", [(), range(DEPTH)])
def test_where_it_rests_no_bit_of_the_model_changes(
    keys: dict[str, object], at: int, mode: Mode, extras: bool, recomputed: Sequence[int]
) -> None:
    net, given = model(), batch_of(FEATURES if extras else None)
    crepa = regularizer(net, **keys)
    found = step(net, crepa, given, at, recomputed)
    assert crepa.mode is mode and crepa.graph_key() == mode.value
    assert same(found.gradients, step(net, None, given, at, recomputed).gradients)  # and the projector has none
    assert found.term.reduced().item() == 0 and not found.term.values.requires_grad
    assert bool(found.term.counted.any()) == (mode is Mode.MEASURE)


def test_the_step_before_the_cut_off_still_learns() -> None:
    net = model()
    crepa = regularizer(net, crepa_cutoff_step=3)
    assert "crepa.linear.weight" in step(net, crepa, batch_of(FEATURES), 2).gradients and crepa.mode is Mode.ALIGN


def test_a_batch_without_picture_contributes_nothing() -> None:
    net = model()
    crepa = regularizer(net)
    sound = replace(batch_of(None), streams={"audio": StreamBatch(draw(2, 3, 6), (3, 1, 1))})
    crepa.begin_step(0, sound, NOTHING, torch.Generator())
    value = crepa.loss_terms()[0](StepState(sound, NOTHING, Prediction({"audio": draw(2, 3, 6)}), {}))
    assert value.values.tolist() == [0, 0] and not value.counted.any() and value.reduced().item() == 0


# --- the cut-off by similarity -----------------------------------------------------------------------------------
@pytest.mark.parametrize("mode", ["permanent", "recoverable"])
def test_once_the_similarity_is_reached_gradients_are_those_of_a_run_without(mode: str) -> None:
    net = model()
    crepa = regularizer(net, crepa_similarity_threshold=-1.0, crepa_threshold_mode=mode)
    without = step(net, None, batch_of(None)).gradients
    for at in range(LAG + 1):
        assert not same(step(net, crepa, batch_of(FEATURES), at).gradients, without)
    after = step(net, crepa, batch_of(FEATURES), LAG + 1)
    assert crepa.mode is (Mode.OFF if mode == "permanent" else Mode.MEASURE) and same(after.gradients, without)
    assert bool(after.term.counted.any()) == (mode == "recoverable") and after.term.reduced().item() == 0


def test_nothing_waits_for_the_device() -> None:
    """The meta device has no values: whoever reads one there fails. Whole, inside a route, on another grid, with tokens that are given."""
    meta = torch.device("meta")
    context = replace(CONTEXT, device=meta)
    crepa = Crepa(CrepaOptions(**ON, crepa_similarity_threshold=0.9), context)
    blocks = model().block_set()
    crepa.attach(blocks, context)
    crepa.trainable().to(meta)
    (term,) = crepa.loss_terms()
    given = torch.zeros(2, PLACES + EXTRA, dtype=torch.bool, device=meta)
    for kept, size in ((None, (2, 2)), (torch.zeros(2, 8, dtype=torch.int64, device=meta), (4, 3))):
        features = torch.empty(2, GRID[0], *size, 32, dtype=torch.float16, device=meta)
        sample, latents = Sample("a", "d", 0, 0, 25.0, 17, 64, 64, {}), torch.empty(2, PLACES + EXTRA, 6, device=meta)
        batch = Batch((sample,) * 2, {"video": StreamBatch(latents, GRID, conditioned=given)}, {}, (25.0,) * 2, {RECORD: features})
        crepa.begin_step(0, batch, NOTHING, torch.Generator())
        count = PLACES + EXTRA if kept is None else kept.shape[1]
        hidden = torch.empty(2, count, blocks.widths["video"], dtype=torch.bfloat16, device=meta, requires_grad=True)
        value = term(StepState(batch, NOTHING, Prediction({"video": latents}), {"crepa": TapValue(hidden, GRID, kept)}, 0))
        value.reduced().backward()
        assert hidden.grad is not None and hidden.grad.dtype == torch.bfloat16 and value.values.dtype == torch.float32


def test_a_resumed_cut_off_is_the_uninterrupted_one() -> None:
    net = model()
    build = lambda: regularizer(net, crepa_similarity_threshold=0.0, crepa_threshold_mode="recoverable", crepa_similarity_ema_decay=0.1)
    steps = [batch_of(sign * FEATURES) for sign in (1, 1, -1, -1, 1, -1, 1, 1, 1, -1, -1, -1, 1, 1, 1)]
    whole, parts = build(), build()
    modes = [(step(net, whole, given, at), whole.mode)[1] for at, given in enumerate(steps)]
    assert Mode.ALIGN in modes[modes.index(Mode.MEASURE) :]  # cut off, and back again
    found = []
    for at, given in enumerate(steps):
        if at == 7:
            saved = {name: tensor.clone() for name, tensor in parts.state_dict().items()}
            parts = build()
            parts.load_state_dict(saved)
        step(net, parts, given, at)
        found.append(parts.mode)
    assert found == modes
    assert regularizer(net).state_dict() == {}
    regularizer(net).load_state_dict({})


# --- planning ----------------------------------------------------------------------------------------------------
CLIP = ClipShape(64, 64, 17, 25.0, 0.68)
FACTS = TrainingFacts(4, (0, 1, 2, 3), ("video", "audio"), ("video", "audio"), (CLIP,), False)


def problems(facts: TrainingFacts = FACTS, **keys: object) -> list[str]:
    return [str(problem) for problem in Crepa(CrepaOptions(**{**ON, **keys}), CONTEXT).check(facts)]


def test_what_fits_has_no_problem() -> None:
    for index in (0, 3, -1, -4):
        assert problems(crepa_block_index=index) == []
    assert problems(replace(FACTS, trained_blocks=(1, 2)), crepa_block_index=1) == []
    described = Crepa(CrepaOptions(**ON, crepa_scheduler="cosine"), CONTEXT).describe(FACTS)
    assert described == "tokens after block 1 of 4 are drawn to tiny at 56 px, weight 0.5 to 0"
    assert problems(replace(FACTS, shapes=(replace(CLIP, frames=1), replace(CLIP, frames=0)))) == []


@pytest.mark.parametrize("index", [4, -5, 99])
def test_a_block_that_is_none(index: int) -> None:
    (said,) = problems(crepa_block_index=index)
    assert said.startswith(f"crepa_block_index: the model has no such block, it has 4 (got {index})") and "use 0 to 3" in said
    crepa = Crepa(CrepaOptions(**{**ON, "crepa_block_index": index}), CONTEXT)
    with pytest.raises(ConfigError, match="crepa_block_index"):
        crepa.attach(model().block_set(), CONTEXT)


def test_a_block_that_would_teach_nothing() -> None:
    (early,) = problems(replace(FACTS, trained_blocks=(2, 3)))
    assert early.startswith("crepa_block_index, peft_lora_target_modules: no weight up to this block is trained")
    assert "the first is block 2 (got 1)" in early
    (none,) = problems(replace(FACTS, trained_blocks=()))
    assert "no block has any" in none
    (late,) = problems(replace(FACTS, trained_blocks=(0, 1)), crepa_block_index=-1)
    assert late.startswith("crepa_block_index, peft_lora_target_modules: nothing from block 2 on is trained") and "choose block 1" in late


def test_data_without_anything_to_align() -> None:
    sound = replace(CLIP, width=0, height=0, frames=0)
    for facts in (replace(FACTS, streams=("audio",), learned_streams=("audio",)), replace(FACTS, shapes=(sound,))):
        (said,) = problems(facts)
        assert said.startswith("crepa_enabled: there is no picture")
    (given,) = problems(replace(FACTS, learned_streams=("audio",)))
    assert given.startswith("crepa_enabled: the picture is given")


def test_everything_wrong_is_told_at_once(tmp_path: Path) -> None:
    found = problems(replace(FACTS, learned_streams=("audio",)), crepa_block_index=9, crepa_encoder_image_size=57)
    assert [said.partition(":")[0] for said in found] == ["crepa_block_index", "crepa_enabled", "crepa_encoder_image_size"]
    assert "must be a multiple of 14, the encoder's patch (got 57)" in found[2] and "use 56 or 70" in found[2]
    (tmp_path / "config.json").write_text("{}")
    assert [said.partition(":")[0] for said in problems(crepa_encoder=str(tmp_path))] == ["crepa_encoder"]


def test_a_family_that_does_not_tell_the_width_of_its_tokens() -> None:
    blocks = replace(model().block_set(), widths={})
    with pytest.raises(ConfigError, match="crepa_enabled: the model family does not tell the width"):
        Crepa(CrepaOptions(**ON), CONTEXT).attach(blocks, CONTEXT)
