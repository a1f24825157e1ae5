"""What every regularizer has to keep to, checked in runs of the tiny family."""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Hashable, Mapping, Sequence
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor, nn

from tuner.errors import NumericError, PluginError, TunerError
from tuner.interfaces.losses import Regularizer
from tuner.plugins.record import Kind
from tuner.testing.conformance import RECOMPUTED, SwitchedComponent, check, equal, same_bits
from tuner.testing.project import Trial
from tuner.train.rules import training_facts


class RegularizerConformance(SwitchedComponent):
    """Subclass it, and say where the regularizer is:

    class TestMine(RegularizerConformance):
        plugin = tuner_mine.plugin
        component = "mine"
        options = {"mine_weight": 0.5}
        zero = {"mine_weight": 0.0}
        refused = [({"mine_block": 99}, "mine_block")]
    """

    kind: ClassVar[Kind] = "regularizer"
    zero: ClassVar[Mapping[str, object] | None] = None
    """Keys at which it must change nothing, together with the others of `options`; None: it has no such setting."""
    refused: ClassVar[Sequence[tuple[Mapping[str, object], str]]] = ()
    """Settings that must be refused before anything is loaded, and the key that the error must name."""

    def attached(self, trial: Trial) -> Regularizer:
        """The regularizer in a run."""
        return next(one for one in trial.assembly.regularizers if one.name == self.component)

    # --- what it asks for ----------------------------------------------------------------------------------------
    def test_what_it_attaches_is_within_the_model(self) -> None:
        try:
            trial = self.trial()
        except PluginError as error:
            raise AssertionError(f"{error}: resolve indices in attach, and refuse in check what does not fit") from error
        one, blocks = self.attached(trial), len(trial.assembly.training.blocks.blocks)
        places = [(tap.name, tap.block) for tap in one.taps()] + [("a transform", transform.block) for transform in one.transforms()]
        wrong = [f"{name}: block {block}" for name, block in places if not 0 <= block < blocks]
        check(not wrong, f"{wrong} are outside the {blocks} blocks: resolve indices in attach, and refuse in check what does not fit")
        names = [tap.name for tap in one.taps()]
        check(len(set(names)) == len(names), f"taps share names, {names}: the last one would hide the others in StepState.taps")
        unknown = [tap.stream for tap in one.taps() if tap.stream not in trial.plan.family.stream_names]
        check(not unknown, f"no stream is called {unknown}: the tap would never hand out anything")
        check(isinstance(one.graph_key(), Hashable), "graph_key() cannot be hashed: steps are told apart by it")

    def test_planning_finds_nothing_wrong_with_it(self) -> None:
        plan = self.project.plan(**self.options)
        (one,) = [regularizer for regularizer in plan.regularizers if regularizer.name == self.component]
        problems = [str(problem) for problem in one.check(training_facts(plan))]
        check(not problems, f"check() objects to a run that `options` describe: {problems}")

    def test_what_cannot_work_is_refused_while_planning(self) -> None:
        for keys, named in self.refused:
            try:
                self.project.plan(**{**self.options, **keys})
            except TunerError as error:
                check(named in str(error), f"{dict(keys)} is refused, but the error does not name {named}: {error}")
            else:
                raise AssertionError(
                    f"{dict(keys)} is not refused while planning: the run would fail, or do something else than asked, after everything "
                    "was encoded and loaded; return a ConfigError from check()"
                )

    # --- its numbers ---------------------------------------------------------------------------------------------
    def test_gradients_do_not_depend_on_checkpointing(self) -> None:
        found = {name: self._first_gradients(**keys) for name, keys in RECOMPUTED.items()}
        expected = found.pop("no block recomputed")
        check(bool(expected), "nothing is trained")
        for name, gradients in found.items():
            wrong = [key for key in expected if not torch.allclose(gradients[key], expected[key], rtol=1e-4, atol=1e-7)]
            check(
                not wrong,
                f"with {name} {len(wrong)} of {len(expected)} gradients are others than without checkpointing: what a block is given must "
                "not depend on how often it runs, so draw in begin_step, and keep what a later transform needs in the state it returns",
            )

    def _first_gradients(self, **keys: object) -> dict[str, Tensor]:
        trial = self.trial(**keys)
        trial.steps(1)
        return trial.gradients()

    def test_a_step_is_a_function_of_what_begin_step_was_given(self) -> None:
        trial = self.trial()
        batch, noise = trial.batch()
        given = copy.deepcopy((batch, noise))

        def loss(seed: int, *, begin: bool = True) -> Tensor:
            if begin:
                for one in trial.assembly.regularizers:
                    one.begin_step(0, batch, noise, torch.Generator().manual_seed(1))
            torch.manual_seed(seed)
            return trial.tried(batch, noise)

        first, other = loss(1), loss(2)
        check(
            equal(first, other),
            f"the loss is {first.item():.6g} or {other.item():.6g}, depending on the global random generator: draw in begin_step, from the "
            "generator that it is given. Draws inside a transform or loss term are repeated neither by a replayed CUDA graph nor by a "
            "resumed run with another regularizer beside it, and they shift the draws of dropout",
        )
        again = loss(2, begin=False)
        check(
            equal(other, again),
            f"a second forward pass after one begin_step gives the loss {again.item():.6g} instead of {other.item():.6g}: transforms and "
            "loss terms must leave the regularizer as it is; what changes from step to step belongs into begin_step and after_step",
        )
        changed = [name for name, one in given[0].streams.items() if not equal(one.latents, batch.streams[name].latents)]
        changed += [name for name, one in given[1].streams.items() if not equal(one.noisy, noise.streams[name].noisy)]
        check(not changed, f"the batch of {changed} was changed in place: other loss terms and a replayed step read the same tensors")

    def test_a_graph_may_replay_it_if_it_says_so(self) -> None:
        """A CUDA graph reads the tensors that were there when it was captured: later draws must be written into these."""
        trial = self.trial()
        one, (batch, noise) = self.attached(trial), trial.batch()
        if not one.capturable:
            return
        one.begin_step(0, batch, noise, torch.Generator().manual_seed(1))
        trial.tried(batch, noise)
        before, key = held(one), one.graph_key()
        one.begin_step(1, batch, noise, torch.Generator().manual_seed(2))
        after = held(one)
        moved = sorted(name for name, place in before.items() if name in after and after[name] != place)
        check(
            not moved or one.graph_key() != key,
            f"capturable is true, but begin_step puts new tensors into {moved}: a replayed graph would go on reading the old ones; write "
            "into them (copy_), or let graph_key() tell the steps apart",
        )

    def test_two_runs_with_one_seed_are_equal(self) -> None:
        one, other = self.trial(), self.trial()
        one.steps(3)
        other.steps(3)
        wrong = same_bits(one.weights(), other.weights())
        check(not wrong, f"two runs with the same seed train {wrong[:3]} to other values: something is drawn that no seed decides")

    def test_a_resumed_run_equals_an_uninterrupted_one(self) -> None:
        whole, first, second = self.trial(), self.trial(), self.trial()
        whole.steps(4)
        first.steps(2)
        second.go_on_from(first)
        second.steps(2)
        wrong = same_bits(whole.weights(), second.weights())
        check(
            not wrong,
            f"after a resume {len(wrong)} trained weights differ from those of an uninterrupted run, such as {wrong[:1]}: what a step left "
            "for the next one belongs into state_dict(), and load_state_dict() must bring it back",
        )
        check(whole.rows[2:] == second.rows, "after a resume the losses are others than those of an uninterrupted run")

    def test_at_zero_it_changes_nothing(self) -> None:
        if self.zero is None:
            return
        trial, plain = self.trial(**self.zero), self.plain_trial()
        trial.steps(3)
        plain.steps(3)
        own = {name: tensor for name, tensor in trial.weights().items() if name in plain.weights()}
        wrong = same_bits(own, plain.weights())
        check(
            not wrong,
            f"with {dict(self.zero)} {len(wrong)} trained weights are others than without the regularizer: at zero strength a run must be "
            "the same to the last bit, or nobody can tell what the technique does",
        )

    def test_batches_without_a_stream_are_taken(self) -> None:
        """One of the clips is silent: its batch has no audio tokens, so taps on that stream hand out nothing."""
        trial = self.trial(train_batch_size=1)
        try:
            trial.steps(4)
        except (KeyError, NumericError) as error:
            raise AssertionError(
                f"a batch without sound ends in {type(error).__name__}: {error}; where StepState.taps lacks the tap, give values that are "
                "not counted"
            ) from error

    # --- what it leaves ------------------------------------------------------------------------------------------
    def test_detach_leaves_the_model_as_it_was(self) -> None:
        trial, plain = self.trial(), self.plain_trial()
        trial.steps(2)
        plain.steps(2)
        trial.detach()
        plain.detach()
        here, there = described(trial.assembly.training.model), described(plain.assembly.training.model)
        wrong = [
            f"{name}: {here.get(name)} instead of {there.get(name)}"
            for name in here.keys() | there.keys()
            if here.get(name) != there.get(name)
        ]
        check(not wrong, f"after detach() the model is not what it was: {wrong[:3]}; samples and saved weights would carry the technique")
        moved = same_bits(trial.frozen(), plain.frozen())
        check(not moved, f"frozen weights have changed: {moved[:3]}; a LoRA would not fit the base model it was trained on")

    def test_nothing_of_it_is_in_the_adapter_file(self) -> None:
        trial, plain = self.trial(), self.plain_trial()
        trial.steps(1)
        with tempfile.TemporaryDirectory() as folder:
            more = set(trial.adapter_keys(Path(folder) / "with")) - set(plain.adapter_keys(Path(folder) / "without"))
        check(not more, f"the adapter file holds {sorted(more)[:3]}: no other program could load it; hand modules out through trainable()")

    def test_weights_may_be_streamed(self) -> None:
        """Under a strategy whose weights are NaN whenever a block does not run."""
        resident, streamed = self.trial(), self.trial(simulated_streaming=True)
        resident.steps(2)
        try:
            streamed.steps(2)
        except NumericError as error:
            raise AssertionError(
                f"with weights that are there only while their block runs the loss is not finite ({error.message}): a block's weights were "
                "read outside its own pass; use taps, transforms and the forward passes that connect() hands out"
            ) from error
        wrong = same_bits(resident.weights(), streamed.weights())
        check(
            not wrong,
            f"with streamed weights {len(wrong)} trained weights are others, such as {wrong[:1]}: it reads or keeps weights of blocks",
        )


def held(owner: object, lead: str = "", depth: int = 3) -> dict[str, int]:
    """Path -> address, of the tensors in an object's attributes and in what they hold; blocks and other modules are left out."""
    if isinstance(owner, Tensor):
        return {lead: owner.data_ptr()}
    if depth == 0 or isinstance(owner, nn.Module | type):
        return {}
    if isinstance(owner, Mapping):
        inner = {f"{lead}[{key!r}]": value for key, value in owner.items()}
    elif isinstance(owner, list | tuple):
        inner = {f"{lead}[{index}]": value for index, value in enumerate(owner)}
    else:
        inner = {f"{lead}.{name}".lstrip("."): value for name, value in getattr(owner, "__dict__", {}).items()}
    return {name: place for path, value in inner.items() for name, place in held(value, path, depth - 1).items()}


def described(model: nn.Module) -> dict[str, tuple[object, ...]]:
    """Module name -> what may be hung on it: its class, hooks, a replaced forward, its mode, which of its parameters are trained."""
    return {
        name: (
            type(module).__name__, len(module._forward_hooks), len(module._forward_pre_hooks), len(module._backward_hooks),
            "forward" in vars(module), module.training, [p.requires_grad for p in module.parameters(recurse=False)],
        )
        for name, module in model.named_modules()
    }  # fmt: skip
