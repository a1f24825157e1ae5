"""What every model family has to keep to. Its forward pass must be what the core takes it for: streams of tokens through pure blocks."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import ClassVar

import torch
from torch import Tensor, nn

from tuner.interfaces.blocks import Aligned, BlockSet, BlockState, TokenStream
from tuner.interfaces.family import Batch, ClipShape, Noise, SampleRequest
from tuner.interfaces.memory import MemorySession, Placement
from tuner.plugins.record import Kind
from tuner.testing.conformance import RECOMPUTED, Conformance, check, equal, same_bits
from tuner.testing.project import Trial

CPU = torch.device("cpu")


class FamilyConformance(Conformance):
    """Subclass it, and say where the family is, and which of its models is small:

        class TestMine(FamilyConformance):
            plugin = tuner_mine.plugin
            component = "mine"
            options = {"model_flavour": "tiny", "resolution": 64}

    Clips of 64 x 64 pixels and 9 or 13 frames, one of them silent, are encoded with the family's own encoders and trained on.
    """

    kind: ClassVar[Kind] = "family"
    request: ClassVar[SampleRequest | None] = SampleRequest("a red ball", width=64, height=64, frames=9, steps=2, guidance=3.0)
    """A clip to generate; None: not tried."""
    captions_of_full_length: ClassVar[bool] = True
    """Whether the small model's captions have as many tokens as the real one's, which dummy batches have."""
    tolerance: ClassVar[float] = 1e-4
    """How far numbers may be apart that are sums in another order, relative to the largest."""

    def trial(self, **keys: object) -> Trial:
        """A run of the family."""
        return self.project.trial(**{"model_family": self.component, **self.options, **keys})

    @property
    def shared(self) -> Trial:
        """A run that checks look at and leave as it is."""
        case = type(self)
        if case not in _SHARED:
            _SHARED[case] = case().trial()
        return _SHARED[case]

    def entered(self, batch: Batch, noise: Noise) -> BlockState:
        """What goes into the first block, in evaluation mode."""
        run = self.shared.assembly.training
        run.model.eval()
        with torch.no_grad():
            return run.family.enter(run.model, batch, noise)

    def through(self, state: BlockState) -> BlockState:
        """A plain walk over the blocks."""
        run = self.shared.assembly.training
        run.model.eval()
        with torch.no_grad():
            for block in run.blocks.blocks.blocks:
                state = run.family.call_block(block, state)
        return state

    # --- tokens and blocks ---------------------------------------------------------------------------------------
    def test_every_tensor_with_an_entry_per_token_is_listed(self) -> None:
        """Tokens in another order, with all that is aligned to them, must give the same numbers in that order."""
        for index in range(4):
            state = self.entered(*self.shared.batch(index))
            expected = self.through(state)
            for name, stream in state.streams.items():
                order = torch.randperm(stream.hidden.shape[1], generator=torch.Generator().manual_seed(index))
                found = self.through(replace(state, streams={**state.streams, name: reordered(stream, order)}))
                for other in state.streams:
                    wanted = expected.streams[other].hidden
                    wanted = wanted[:, order] if other == name else wanted
                    check(
                        self.near(found.streams[other].hidden, wanted),
                        f"the tokens of {name!r} in another order change what comes out for {other!r}: something with one entry per token "
                        f"(positions, modulation, a mask) is not in TokenStream.aligned, which has {sorted(stream.aligned)}; a technique "
                        "that drops tokens would pair tokens with others' positions",
                    )

    def test_aligned_tensors_have_the_dimensions_they_claim(self) -> None:
        state = self.entered(*self.shared.batch())
        for name, stream in state.streams.items():
            samples, tokens = stream.hidden.shape[:2]
            for label, aligned in stream.aligned.items():
                sizes = [aligned.tensor.shape[dim] for dim in aligned.token_dims]
                check(
                    bool(sizes) and all(size in (1, tokens) for size in sizes),
                    f"{name}/{label} has {sizes} entries along its token dimensions {aligned.token_dims}, for {tokens} tokens",
                )
                rows = aligned.tensor.shape[0]
                check(
                    not aligned.batched or rows in (1, samples),
                    f"{name}/{label} is said to run over samples and has {rows} rows for {samples}",
                )
            frames, rows, columns = stream.grid
            check(
                frames * rows * columns + stream.extra_tokens == tokens,
                f"the grid of {name!r} is {stream.grid} with {stream.extra_tokens} tokens behind it, but there are {tokens} tokens",
            )

    def test_blocks_are_pure_functions(self) -> None:
        run = self.shared.assembly.training
        state = self.entered(*self.shared.batch())
        before = {key: tensor.clone() for key, tensor in tensors_of(state)}
        weights = {name: tensor.clone() for name, tensor in run.model.state_dict().items()}
        first, again = self.through(state), self.through(state)
        check(not same_bits(dict(tensors_of(first)), dict(tensors_of(again))), "the same state gives other numbers the second time")
        changed = same_bits(before, dict(tensors_of(state)))
        check(not changed, f"a block changes what it was given in place: {changed}; a recomputed block would start from something else")
        moved = same_bits(weights, dict(run.model.state_dict()))
        check(not moved, f"a pass changes the model's own tensors: {moved[:3]}; recomputation would run with others")
        kept = first.shared.keys() == state.shared.keys() and first.streams.keys() == state.streams.keys()
        check(kept, "blocks add or drop streams or shared tensors: they return the state with new hidden, and nothing else")

    def test_checkpointing_changes_nothing(self) -> None:
        found = {}
        for name, keys in RECOMPUTED.items():
            trial = self.trial(**keys)
            trial.steps(1)
            found[name] = trial.gradients()
        expected = found.pop("no block recomputed")
        for name, gradients in found.items():
            wrong = [key for key in expected if not self.near(gradients[key], expected[key])]
            check(
                not wrong,
                f"with {name} {len(wrong)} of {len(expected)} gradients are others: call_block depends on more than its arguments",
            )

    # --- batches -------------------------------------------------------------------------------------------------
    def test_what_is_missing_does_not_matter(self) -> None:
        """Tokens of a stream that a sample does not have may hold anything."""
        for batch, noise in (self.shared.batch(index) for index in range(4)):
            for name, stream in batch.streams.items():
                if stream.present is None or stream.present.all():
                    continue
                odd = replace(noise.streams[name], noisy=torch.where(stream.present[:, None, None], noise.streams[name].noisy, 3.0))
                changed = Noise({**noise.streams, name: odd})
                one, other = (self.predicted(batch, given) for given in (noise, changed))
                for stream_name in one:
                    kept = torch.ones(len(stream.present), dtype=torch.bool) if stream_name != name else stream.present
                    check(
                        self.near(one[stream_name][kept], other[stream_name][kept]),
                        f"tokens of {name!r} that a sample does not have change the prediction for {stream_name!r}: silent clips would be "
                        "trained with noise for sound; keep them out of attention by StreamBatch.present",
                    )
                losses = [self.shared.tried(batch, given) for given in (noise, changed)]
                check(self.near(*losses), f"tokens of {name!r} that a sample does not have change the loss")
                return

    def predicted(self, batch: Batch, noise: Noise) -> Mapping[str, Tensor]:
        """Stream -> velocity."""
        run = self.shared.assembly.training
        with torch.no_grad():
            return run.family.exit(run.model, self.through(self.entered(batch, noise))).streams

    def test_a_prediction_has_the_shape_of_its_latents(self) -> None:
        batch, noise = self.shared.batch()
        for name, values in self.predicted(batch, noise).items():
            wanted = batch.streams[name].latents.shape
            check(values.shape == wanted, f"the prediction for {name!r} has the shape {tuple(values.shape)} instead of {tuple(wanted)}")
            check(bool(values.isfinite().all()), f"the prediction for {name!r} is not finite")

    def test_a_dummy_batch_has_the_shapes_of_a_real_one(self) -> None:
        trial = self.shared
        batches = (trial.batch(index)[0] for index in range(4))
        batch = next(one for one in batches if len(one.streams) == len(trial.plan.streams))
        first = batch.samples[0]
        shape = ClipShape(first.width, first.height, first.frames, first.frame_rate, first.seconds or first.frames / first.frame_rate)
        model = trial.assembly.training.model
        made, drawn = trial.plan.family.dummy_batch(model, shape, len(batch.samples), trial.plan.streams, CPU)
        real, found = (shapes_of(one, text=self.captions_of_full_length) for one in (batch, made))
        check(
            real == found,
            f"a dummy batch for {shape} has the shapes {found}, a real one {real}: memory would be predicted for another model",
        )
        check(set(drawn.streams) == set(made.streams), "the dummy batch has noise for other streams than it has latents for")

    # --- weights and names ---------------------------------------------------------------------------------------
    def test_the_empty_model_is_the_loaded_one(self) -> None:
        plan = self.shared.plan
        family, streams, dtype = plan.family, plan.streams, plan.context.dtype
        empty = family.empty(plan.source, streams, dtype)
        if empty is None:
            return
        loaded = family.load(plan.source, streams, dtype, CPU)
        here, there = ({n: (tuple(p.shape), p.dtype) for n, p in model.named_parameters()} for model in (empty, loaded))
        check(
            here == there,
            f"empty() and load() differ in {sorted(set(here.items()) ^ set(there.items()))[:3]}: plans would be about another model",
        )
        check(all(p.is_meta for p in empty.parameters()), "empty() takes memory: its weights must be on the meta device")
        one = family.empty(plan.source, streams, dtype, 1)
        check(one is not None and len(family.block_set(one)) == 1, "empty(blocks=1) gives another number of blocks")

    def test_headers_tell_what_is_loaded(self) -> None:
        plan = self.shared.plan
        model = plan.family.load(plan.source, plan.streams, plan.context.dtype, CPU)
        facts, blocks = plan.facts, plan.family.block_set(model)
        targets = plan.family.adapter_targets(model, plan.streams)
        loaded = {
            "parameters": sum(p.numel() for p in model.parameters()), "blocks": len(blocks),
            "bytes": sum(p.numel() * p.element_size() for p in model.parameters()), "adapter_targets": len(targets),
            "block_bytes": max(sum(p.numel() * p.element_size() for p in block.parameters()) for block in blocks.blocks),
        }  # fmt: skip
        wrong = {name: (getattr(facts, name), value) for name, value in loaded.items() if getattr(facts, name) != value}
        check(not wrong, f"inspect() says otherwise than load() gives (said, given): {wrong}")
        trained = [name for name, p in model.named_parameters() if p.requires_grad]
        check(not trained, f"load() leaves weights that require gradients: {trained[:3]}; a LoRA run would train them")

    def test_blocks_are_handed_over_one_by_one(self) -> None:
        plan, seen = self.shared.plan, Received()
        model = plan.family.load(plan.source, plan.streams, plan.context.dtype, CPU, seen)
        blocks = plan.family.block_set(model)
        check(
            seen.order == list(range(len(blocks))),
            f"load() hands over the blocks {seen.order} of {len(blocks)}: each once, in order, when it is whole",
        )
        check(not seen.unread, f"block {seen.unread[:1]} is handed over before its weights are there")
        plain = plan.family.load(plan.source, plan.streams, plan.context.dtype, CPU)
        wrong = same_bits(dict(model.named_parameters()), dict(plain.named_parameters()))
        check(not wrong, f"with a placement other weights are loaded: {wrong[:3]}")

    def test_names_go_both_ways(self) -> None:
        run = self.shared.plan
        model = run.family.load(run.source, run.streams, run.context.dtype, CPU)
        names = [name for name, module in model.named_modules() if name and next(module.parameters(recurse=False), None) is not None]
        wrong = [name for name in names if run.family.module_name(run.family.original_name(name)) != name]
        check(not wrong, f"module_name(original_name(name)) is another name for {wrong[:3]}: adapter files would be read into other layers")
        originals = [run.family.original_name(name) for name in names]
        check(len(set(originals)) == len(originals), "two modules have one original name")

    def test_adapter_targets_are_linear_layers(self) -> None:
        run = self.shared.plan
        model = run.family.load(run.source, run.streams, run.context.dtype, CPU)
        modules, targets = dict(model.named_modules()), run.family.adapter_targets(model, run.streams)
        check(bool(targets) and len(set(targets)) == len(targets), "there are no adapter targets, or some twice")
        wrong = [name for name in targets if not isinstance(modules.get(name), nn.Linear)]
        check(not wrong, f"no linear layer has the name {wrong[:3]}")

    # --- a run ---------------------------------------------------------------------------------------------------
    def test_a_resumed_run_equals_an_uninterrupted_one(self) -> None:
        whole, first, second = self.trial(), self.trial(), self.trial()
        whole.steps(2)
        first.steps(1)
        second.go_on_from(first)
        second.steps(1)
        check(
            not same_bits(whole.weights(), second.weights()),
            "after a resume trained weights differ: the forward pass keeps or draws something",
        )

    def test_weights_may_be_streamed(self) -> None:
        resident, streamed = self.trial(), self.trial(simulated_streaming=True)
        resident.steps(1)
        streamed.steps(1)
        check(
            not same_bits(resident.weights(), streamed.weights()),
            "weights of a block are read outside call_block: streamed, they are not there",
        )

    def test_it_makes_clips(self) -> None:
        if self.request is None:
            return
        trial = self.trial()
        run, family = trial.assembly.training, trial.plan.family
        family.check_request(self.request)
        one, again = (family.sample(run.model, trial.plan.source, [self.request], run.blocks, trial.plan.streams)[0] for _ in range(2))
        if one.video is not None:
            wanted = (self.request.frames, self.request.height, self.request.width, 3)
            check(tuple(one.video.frames.shape) == wanted, f"the clip has the shape {tuple(one.video.frames.shape)} instead of {wanted}")
            check(one.video.frames.dtype == torch.uint8, f"pictures are {one.video.frames.dtype} instead of uint8")
        check(all(bool(tensor.isfinite().all()) for tensor in one.latents.values()), "latents of the sample are not finite")
        check(not same_bits(dict(one.latents), dict(again.latents)), "the same seed gives another clip")

    def near(self, one: Tensor, other: Tensor) -> bool:
        """Equal but for the order of sums."""
        if one.shape != other.shape:
            return False
        scale = float(other.abs().max().clamp(min=1e-6)) if other.numel() else 1.0
        return equal(one, other) or bool(((one - other).abs() <= self.tolerance * scale).all())


_SHARED: dict[type[FamilyConformance], Trial] = {}


class Received(Placement):
    """Notes which blocks a loader hands over."""

    reading = CPU

    def __init__(self) -> None:
        self.order: list[int] = []
        self.unread: list[int] = []

    def received(self, index: int, block: nn.Module) -> None:
        self.order.append(index)
        if any(parameter.is_meta for parameter in block.parameters()):
            self.unread.append(index)

    def attach(self, blocks: BlockSet, *, owner: nn.Module | None = None) -> MemorySession:
        return MemorySession()

    def hold(self, module: nn.Module) -> None:
        """Nothing to note."""

    def close(self) -> None:
        """Nothing to free."""


def reordered(stream: TokenStream, order: Tensor) -> TokenStream:
    """The same tokens in another order, with everything that is aligned to them."""
    aligned = {label: replace(one, tensor=_reordered(one, order)) for label, one in stream.aligned.items()}
    protected = None if stream.protected is None else stream.protected[:, order]
    return replace(stream, hidden=stream.hidden[:, order], aligned=aligned, protected=protected)


def _reordered(aligned: Aligned, order: Tensor) -> Tensor:
    take: Callable[[Tensor, int], Tensor] = lambda tensor, dim: tensor.index_select(dim, order) if tensor.shape[dim] > 1 else tensor
    return functools.reduce(take, aligned.token_dims, aligned.tensor)


def tensors_of(state: BlockState) -> Iterator[tuple[str, Tensor]]:
    """Every tensor of a state, by a name."""
    for name, stream in state.streams.items():
        yield f"{name}/hidden", stream.hidden
        for label, aligned in stream.aligned.items():
            yield f"{name}/{label}", aligned.tensor
    yield from ((f"shared/{label}", tensor) for label, tensor in state.shared.items())


def shapes_of(batch: Batch, *, text: bool = True) -> dict[str, object]:
    """Shapes of latents, grids and `text`."""
    found: dict[str, object] = {f"latents of {n}": (tuple(s.latents.shape), s.grid) for n, s in batch.streams.items()}
    return found | {f"text for {name}": tuple(tensor.shape) for name, tensor in batch.text.items() if text}
