"""Forward passes beside a step's own: what they compute, what they leave behind, when they are refused."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import pytest
import torch
from torch import Tensor, nn

from offload.simulated import SimulatedLink
from tuner.config.settings import AdapterSettings
from tuner.interfaces.blocks import BlockState
from tuner.interfaces.family import Batch, BuildContext, ModelFamily, Noise, Prediction, Sample, StreamBatch, StreamNoise
from tuner.interfaces.losses import LossTerm, LossValue, StepState, Tap, TapValue, Transform
from tuner.interfaces.memory import MemorySession
from tuner.model.adapters import add_adapters
from tuner.model.runner import BlockRunner, Checkpointing
from tuner.testing.blocks import MixingModel, call_mixing_block
from tuner.train.masters import MasterWeights
from tuner.train.passes import ExtraPasses
from tuner.train.step import TrainingModel, train_step
from tuner_offload import group
from tuner_offload.group import GroupOffload
from tuner_offload.options import GroupOffloadOptions

DEPTH, TOKENS, CHANNELS = 4, 5, 6
CPU = torch.device("cpu")
OpenSession = Callable[[], MemorySession]


class Mixing:
    """A family over `MixingModel`, as far as a step needs one."""

    def enter(self, model: MixingModel, batch: Batch, noise: Noise) -> BlockState:
        video = noise.streams["video"]
        sigma = video.sigma[:, None].expand(video.noisy.shape[:2])
        dtype = model.proj_in.weight.dtype
        return model.enter(video.noisy.to(dtype), None, batch.text["video"].to(dtype), sigma.to(dtype))

    def exit(self, model: MixingModel, state: BlockState) -> Prediction:
        return Prediction(model.exit(state))


class Square(LossTerm):
    """Mean square of the prediction, and of a tap where there is one."""

    name = "video"

    def __call__(self, state: StepState) -> LossValue:
        tapped = [tap.hidden.square().mean((1, 2)) for tap in state.taps.values()]
        return LossValue(self.name, state.prediction.streams["video"].square().mean((1, 2)) + sum(tapped, torch.zeros(())))


@dataclass
class Bench:
    """A model with adapters that do something, and passes over it."""

    model: MixingModel
    training: TrainingModel
    masters: MasterWeights
    passes: ExtraPasses

    def trained(self) -> dict[str, nn.Parameter]:
        return {name: p for name, p in self.model.named_parameters() if p.requires_grad}

    def gradients(self, seed: int = 0) -> dict[str, Tensor]:
        self.model.zero_grad()
        train_step(self.training, *draw(seed)).loss.backward()
        return {name: p.grad.clone() for name, p in self.trained().items() if p.grad is not None}


def draw(seed: int = 0) -> tuple[Batch, Noise]:
    drawn = torch.Generator().manual_seed(seed)
    x0, eps = torch.randn(2, 2, TOKENS, CHANNELS, generator=drawn)
    sigma = torch.rand(2, generator=drawn)
    noisy = (1 - sigma)[:, None, None] * x0 + sigma[:, None, None] * eps
    text = torch.randn(2, 3, CHANNELS, generator=drawn)
    samples = (Sample("k", "d", 0, 0, 25.0, 9, 32, 32, {}),) * 2
    batch = Batch(samples, {"video": StreamBatch(x0, (1, 1, TOKENS))}, {"video": text}, (25.0,) * 2)
    return batch, Noise({"video": StreamNoise(sigma, noisy, eps - x0, eps)})


def bare(dtype: torch.dtype = torch.float32, dropout: float = 0.0) -> MixingModel:
    torch.manual_seed(0)
    return MixingModel(DEPTH, dropout=dropout).to(dtype)


def bench(
    open_session: OpenSession = MemorySession, *, full: bool = False, dtype: torch.dtype = torch.float32, dropout: float = 0.0,
    recomputed: int = DEPTH, transforms: tuple[Transform, ...] = (), taps: tuple[Tap, ...] = (),
) -> Bench:  # fmt: skip
    model, session = bare(dtype, dropout), open_session()
    for index, block in enumerate(model.blocks):
        session.receive(index, block, CPU)
    if not full:
        targets = [f"blocks.{index}.{name}" for index in range(DEPTH) for name in ("to_q", "to_v")]
        add_adapters(model, targets, AdapterSettings(lora_rank=2, lora_dropout=dropout), 0)
        with torch.no_grad():  # B starts at zero, and adapters would change nothing
            for name, parameter in model.named_parameters():
                if "lora_B" in name:
                    parameter.copy_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(len(name))) / 4)
    model.train()
    blocks = model.block_set()
    session.attach(blocks)
    policy = Checkpointing(frozenset(range(recomputed)))
    runner = BlockRunner(blocks, call_mixing_block, checkpointing=policy, session=session, transforms=transforms, taps=taps)
    training = TrainingModel(cast(ModelFamily, Mixing()), model, runner, [Square()])
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    head = nn.Linear(2, 2)  # a regularizer's own module is trained along, and is no weight of the model
    masters = MasterWeights({**trained, **{f"head.{name}": p for name, p in head.named_parameters()}}, low_precision=False)
    return Bench(model, training, masters, ExtraPasses(training, masters, trained))


def predicted(made: Bench, seed: int = 0, **changes: object) -> Tensor:
    return made.passes.run(*draw(seed), **changes).prediction.streams["video"]  # type: ignore[arg-type]


@torch.no_grad()
def by_hand(model: MixingModel, seed: int = 0) -> tuple[Tensor, list[Tensor]]:
    """Prediction, and the tokens after each block, of the model as it stands, without dropout."""
    model.eval()
    state, hidden = Mixing().enter(model, *draw(seed)), []
    for block in model.blocks:
        state = call_mixing_block(block, state)
        hidden.append(state.streams["video"].hidden)
    model.train()
    return model.exit(state)["video"], hidden


@pytest.fixture
def link(monkeypatch: pytest.MonkeyPatch) -> SimulatedLink:
    simulated = SimulatedLink()
    monkeypatch.setattr(group, "link_to", lambda device, stream=True: simulated)
    return simulated


def grouped(blocks: int = 1) -> OpenSession:
    options = GroupOffloadOptions(enable_group_offload=True, group_offload_use_stream=True, group_offload_blocks_per_group=blocks)
    return lambda: GroupOffload(options, BuildContext(CPU, torch.float32, 0, 0, Path())).open("transformer", DEPTH, CPU)


# --- what they compute -------------------------------------------------------------------------------------------
@pytest.mark.parametrize("recomputed", [0, DEPTH])
def test_a_pass_is_the_model_as_it_stands(recomputed: int) -> None:
    made = bench(recomputed=recomputed)
    expected, hidden = by_hand(made.model)
    found = made.passes.run(*draw(), taps=[Tap("first", 0, "video"), Tap("last", 3, "video"), Tap("sound", 1, "audio")])
    assert torch.equal(found.prediction.streams["video"], expected)
    assert found.taps.keys() == {"first", "last"}  # there is no sound
    assert torch.equal(found.taps["first"].hidden, hidden[0]) and torch.equal(found.taps["last"].hidden, hidden[3])
    tensors = [found.prediction.streams["video"], *(tap.hidden for tap in found.taps.values())]
    assert not any(tensor.requires_grad for tensor in tensors)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_without_the_adapter_it_is_the_base_model_to_the_last_bit(dtype: torch.dtype) -> None:
    made = bench(dtype=dtype)
    before = {name: p.requires_grad for name, p in made.model.named_parameters()}
    expected, _ = by_hand(bare(dtype))
    assert torch.equal(predicted(made, adapter=False), expected)
    assert not torch.equal(predicted(made), expected)
    assert {name: p.requires_grad for name, p in made.model.named_parameters()} == before


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_other_weights_are_used_and_the_own_ones_lie_where_they_lay(dtype: torch.dtype) -> None:
    made = bench(dtype=dtype)
    other = {name: weight * -0.5 for name, weight in made.passes.trained().items()}
    copy = bench(dtype=dtype)
    with torch.no_grad():
        for name, parameter in copy.trained().items():
            parameter.copy_(other[name])
    places = {name: (p.data_ptr(), p.detach().clone()) for name, p in made.trained().items()}
    assert torch.equal(predicted(made, weights=other), predicted(copy))
    some = dict(list(other.items())[:3])
    assert not torch.equal(predicted(made, weights=some), predicted(made, weights=other))
    for name, parameter in made.trained().items():
        assert parameter.data_ptr() == places[name][0] and torch.equal(parameter, places[name][1])


def test_trained_are_the_models_weights_in_full_precision_and_live() -> None:
    made = bench(dtype=torch.bfloat16)
    assert made.passes.trained().keys() == made.trained().keys()  # not the head's
    name = next(iter(made.trained()))
    assert all(weight.dtype == torch.float32 for weight in made.passes.trained().values())
    with torch.no_grad():
        made.masters.state()[name].add_(1e-4)
        made.masters.publish()
    assert torch.equal(made.passes.trained()[name], made.masters.state()[name])


def test_transforms_and_taps_of_training_and_dropout_stay_out_of_it() -> None:
    def louder(state: BlockState) -> BlockState:
        return state.with_hidden({"video": state.streams["video"].hidden * 10})

    made = bench(dropout=0.5, transforms=(Transform(1, "before", louder),), taps=(Tap("own", 2, "video"),))
    kept = TapValue(torch.zeros(1), (1, 1, 1), None)
    made.training.blocks.tapped = {"own": kept}
    expected, _ = by_hand(made.model)
    generator = torch.get_rng_state()
    found = made.passes.run(*draw())
    assert torch.equal(found.prediction.streams["video"], expected) and not found.taps
    assert torch.equal(torch.get_rng_state(), generator)  # the step's own dropout draws as it would have
    assert made.training.blocks.tapped == {"own": kept}
    assert made.model.training and all(module.training for module in made.model.modules())


# --- the step afterwards -----------------------------------------------------------------------------------------
@pytest.mark.parametrize("recomputed", [0, DEPTH])
def test_the_step_does_not_notice(recomputed: int) -> None:
    tap = (Tap("own", 1, "video"),)
    expected = bench(recomputed=recomputed, taps=tap).gradients()
    made = bench(recomputed=recomputed, taps=tap)
    predicted(made, 1, adapter=False)
    predicted(made, 2, weights={name: weight * 2 for name, weight in made.passes.trained().items()}, taps=[Tap("own", 3, "video")])
    found = made.gradients()
    assert expected.keys() == found.keys() == made.trained().keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.parametrize("blocks", [1, 2])
def test_streamed_weights_are_right_in_both(blocks: int, link: SimulatedLink) -> None:
    resident, made = bench(), bench(grouped(blocks))
    for seed in range(3):
        other = {name: weight * (seed - 1.5) for name, weight in made.passes.trained().items()}
        for changes in ({"adapter": False}, {"weights": other}, {}):
            assert torch.equal(predicted(made, seed, **changes), predicted(resident, seed, **changes))
        expected, found = resident.gradients(seed), made.gradients(seed)
        assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert link.loads > 0


# --- what goes wrong ---------------------------------------------------------------------------------------------
def test_names_and_shapes_that_do_not_fit_are_refused() -> None:
    made = bench()
    name, weight = next(iter(made.passes.trained().items()))
    expected = predicted(made)
    for wrong in ({"blocks.9.to_q": weight}, {name: weight[:1]}, {"head.weight": torch.zeros(2, 2)}):
        with pytest.raises(ValueError, match="no trained weight has this name and shape"):
            predicted(made, weights={name: weight * 2, **wrong})
        assert torch.equal(predicted(made), expected)


def test_taps_of_one_name_are_refused() -> None:
    """One would hide the other in `StepState.taps`."""
    with pytest.raises(ValueError, match="two taps have one name: middle, middle"):
        bench(taps=(Tap("middle", 1, "video"), Tap("middle", 2, "video")))


def test_without_adapters_there_is_nothing_to_switch_off() -> None:
    made = bench(full=True)
    with pytest.raises(ValueError, match="no adapters to be switched off"):
        predicted(made, adapter=False)
    assert made.model.training
    double = {name: weight * 2 for name, weight in made.passes.trained().items()}
    assert not torch.equal(predicted(made, weights=double), predicted(made))


def test_during_a_step_it_is_refused_and_after_it_allowed(link: SimulatedLink) -> None:
    for made in (bench(), bench(grouped())):
        loss = train_step(made.training, *draw()).loss
        with pytest.raises(ValueError, match="begin_step"):
            predicted(made)
        loss.backward()
        predicted(made)


@pytest.mark.parametrize("streamed", [False, True])
def test_an_exception_inside_leaves_everything_as_it_was(streamed: bool, link: SimulatedLink, monkeypatch: pytest.MonkeyPatch) -> None:
    resident, made = bench(), bench(grouped() if streamed else MemorySession)
    places = {name: (p.data_ptr(), p.detach().clone()) for name, p in made.trained().items()}
    other = {name: weight * 2 for name, weight in made.passes.trained().items()}
    with monkeypatch.context() as patch:
        patch.setattr(made.model.blocks[2].drop, "forward", lambda values: 1 / 0)
        for changes in ({"weights": other}, {"adapter": False}):
            with pytest.raises(ZeroDivisionError):
                predicted(made, **changes)
    assert all((p.data_ptr(), True) == (places[name][0], torch.equal(p, places[name][1])) for name, p in made.trained().items())
    assert made.model.training
    assert torch.equal(predicted(made), predicted(resident))
    expected, found = resident.gradients(), made.gradients()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
