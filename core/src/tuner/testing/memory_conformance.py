"""What every memory strategy has to keep to, checked in runs of the tiny family: where weights wait never changes what is computed."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from tuner.errors import NumericError, TunerError
from tuner.interfaces.memory import MemoryFacts, MemoryPlan, MemoryStrategy
from tuner.plugins.record import Kind
from tuner.testing.conformance import RECOMPUTED, SwitchedComponent, check, equal, same_bits
from tuner.testing.project import Trial
from tuner.train.plan import memory_facts


class MemoryStrategyConformance(SwitchedComponent):
    """Subclass it, and say where the strategy is:

        class TestMine(MemoryStrategyConformance):
            plugin = tuner_mine.plugin
            component = "mine"
            options = {"mine": True}

    `tiny_blocks` and `tiny_width` in `options` change the model, for strategies that leave small layers alone.
    """

    kind: ClassVar[Kind] = "memory_strategy"
    refused: ClassVar[Sequence[tuple[Mapping[str, object], str]]] = ()
    """Settings that must be refused while planning, and the key that the error must name."""
    copies: ClassVar[bool] = True
    """Whether weights that are not on the device are counted as `host_bytes`; off for those that are kept elsewhere, such as on disk."""

    def strategy(self) -> MemoryStrategy:
        """The strategy, built as a run builds it."""
        built = self.build()
        assert isinstance(built, MemoryStrategy)
        return built

    def facts(self) -> MemoryFacts:
        """Of the tiny model."""
        return memory_facts(self.project.plan(**self.options))

    # --- before anything is loaded -------------------------------------------------------------------------------
    def test_its_keys_are_its_own(self) -> None:
        strategy = self.strategy()
        own = set(self.record().options.model_fields)
        for part in strategy.parts():
            keys = strategy.keys(part)
            check(bool(keys), f"keys({part!r}) is empty: where two strategies want the same part, users are told which keys to change")
            check(set(keys) <= own, f"keys({part!r}) names {sorted(set(keys) - own)}, which its options do not declare")

    def test_changing_it_does_not_forbid_a_resume(self) -> None:
        check(
            not self.record().options.changes_numbers,
            "its options do not say `changes_numbers = False`: a run could not be resumed on another machine with another strategy",
        )

    def test_the_plan_is_plausible(self) -> None:
        facts = self.facts()
        plan, total = self.strategy().plan(facts), sum(facts.block_bytes)
        numbers = (plan.device_bytes, plan.host_bytes, plan.pinned_bytes, plan.traffic_bytes, plan.forward_bytes, plan.overhead)
        check(all(math.isfinite(number) and number >= 0 for number in numbers), f"a number of the plan is negative or not finite: {plan}")
        for wrong in self._contradictions(plan, total, max(facts.block_bytes)):
            raise AssertionError(f"{wrong}: `tuner plan` would advise for or against it for the wrong reason ({plan})")
        check(bool(plan.summary.strip()), "the plan has no summary: users are shown it before anything is loaded")

    def _contradictions(self, plan: MemoryPlan, total: int, largest: int) -> list[str]:
        places = plan.device_bytes + plan.host_bytes
        found = {
            f"{plan.device_bytes} bytes on the device are more than all blocks twice ({total})": plan.device_bytes > 2 * total + largest,
            f"device and host together hold {places} of {total} bytes": self.copies and places < total,
            "more is page-locked than is in host memory": plan.pinned_bytes > plan.host_bytes,
            "more is copied on the way forward than in the whole step": plan.forward_bytes > plan.traffic_bytes,
        }
        return [words for words, contradicted in found.items() if contradicted]

    def test_objections_name_keys(self) -> None:
        strategy, facts = self.strategy(), self.facts()
        check(not strategy.supports(facts), f"it objects to the run that `options` describe: {[str(p) for p in strategy.supports(facts)]}")
        own = self.record().options.model_fields
        hard = [replace(facts, full_finetuning=True), replace(facts, host_bytes=1), replace(facts, block_bytes=facts.block_bytes[:1])]
        for problem in (problem for case in hard for problem in strategy.supports(case)):
            check(isinstance(problem, TunerError), f"supports() gives {problem!r}: it must be a TunerError, which says what to do")
            check(
                any(key in problem.where for key in own), f"an objection names none of its keys, so nobody knows what to change: {problem}"
            )

    def test_what_cannot_work_is_refused_while_planning(self) -> None:
        for keys, named in self.refused:
            try:
                self.project.plan(**{**self.options, **keys})
            except TunerError as error:
                check(named in str(error), f"{dict(keys)} is refused, but the error does not name {named}: {error}")
            else:
                raise AssertionError(f"{dict(keys)} is not refused while planning: the run would fail after everything was encoded")

    def policies(self) -> Mapping[str, Mapping[str, object]]:
        """Those of activation checkpointing that planning does not refuse; recomputing every block must be among them."""
        found = dict(RECOMPUTED)
        for name, keys in RECOMPUTED.items():
            try:
                self.project.plan(**{**self.options, **keys})
            except TunerError as error:
                check(name != "all blocks recomputed", f"a run that recomputes every block, as most do, is refused: {error}")
                del found[name]
        return found

    # --- its numbers ---------------------------------------------------------------------------------------------
    def test_steps_are_those_of_resident_weights(self) -> None:
        """To the last bit, with every policy of activation checkpointing."""
        for name, keys in self.policies().items():
            managed, resident = self.trial(**keys), self.plain_trial(**keys)
            try:
                managed.steps(4)
            except NumericError as error:
                raise AssertionError(f"with {name} the loss is not finite: a block ran before its weights were there") from error
            resident.steps(4)
            check(managed.rows == resident.rows, f"with {name} the losses are others than with resident weights")
            wrong = same_bits(managed.weights(), resident.weights())
            check(
                not wrong,
                f"with {name} {len(wrong)} trained weights are others than with resident weights, such as {wrong[:1]}: backward needs the "
                "same bytes as forward, also in blocks whose graph is kept",
            )
            managed.detach()

    def test_passes_without_gradients_are_those_of_resident_weights(self) -> None:
        managed, resident = self.trial(), self.plain_trial()
        managed.steps(1)
        resident.steps(1)
        with torch.no_grad():
            there, here = ([trial.loss(*trial.batch(index)) for index in (0, 1)] for trial in (resident, managed))
        wrong = [index for index, (a, b) in enumerate(zip(there, here, strict=True)) if not equal(a, b)]
        check(not wrong, "forward passes without gradients, as samples and validation make them, give other numbers")
        managed.steps(1)
        resident.steps(1)
        check(not same_bits(managed.weights(), resident.weights()), "the training step behind passes without gradients is another one")

    def test_a_step_that_failed_harms_no_later_one(self) -> None:
        for backward in (False, True):
            managed, resident = self.trial(), self.plain_trial()
            managed.steps(1)
            resident.steps(1)
            _fail_once(managed, backward=backward)
            where = f"after an exception {'on the way back' if backward else 'on the way forward'}"
            try:
                managed.steps(1)
                resident.steps(1)
            except (RuntimeError, NumericError) as error:
                raise AssertionError(
                    f"{where} the next step ends in {type(error).__name__}: {error}; abort() must make it right"
                ) from error
            wrong = same_bits(managed.weights(), resident.weights())
            check(not wrong, f"{where} the next step is wrong: abort() must bring the session back to where a step can begin")
            managed.detach()

    # --- the weights themselves ----------------------------------------------------------------------------------
    def test_frozen_weights_keep_their_bytes(self) -> None:
        managed, resident = self.trial(), self.plain_trial()
        expected = resident.frozen()
        managed.steps(1)
        wrong = same_bits(managed.frozen(), expected)
        check(
            not wrong, f"materialize() gives {len(wrong)} weights with other bytes, such as {wrong[:1]}: full weights would be saved wrong"
        )
        managed.steps(1)
        resident.steps(2)
        check(not same_bits(managed.weights(), resident.weights()), "the step behind materialize() is another one")
        managed.detach()
        model = managed.assembly.training.model
        found = {name: p.detach().cpu() for name, p in model.named_parameters() if not p.requires_grad}
        wrong = same_bits(found, expected)
        check(not wrong, f"after detach() {len(wrong)} weights have other bytes, such as {wrong[:1]}")
        plain, ours = _kinds(resident.assembly.training.model), _kinds(model)
        check(plain == ours, f"after detach() modules are not what they were: {sorted(set(ours.items()) ^ set(plain.items()))[:2]}")


class _Failure(RuntimeError):
    """The exception that a check raises inside a pass."""


def _fail_once(trial: Trial, *, backward: bool) -> None:
    """One pass that ends with an exception in the middle block: when it runs, or when its gradients pass."""
    blocks = trial.assembly.training.blocks.blocks.blocks
    block, batch = blocks[len(blocks) // 2], trial.batch(0)
    handle = block.register_forward_hook(_raising(backward))
    try:
        trial.loss(*batch).backward()  # type: ignore[no-untyped-call]
    except _Failure:
        pass
    else:
        raise AssertionError("the pass did not go through the middle block")
    finally:
        handle.remove()
    trial.drop_gradients()


def _raising(backward: bool) -> Callable[[nn.Module, Any, Any], None]:
    def fail(gradient: Tensor) -> None:
        raise _Failure

    def hook(module: nn.Module, inputs: Any, outputs: Any) -> None:
        if not backward:
            raise _Failure
        for tensor in outputs if isinstance(outputs, tuple) else (outputs,):
            if isinstance(tensor, Tensor) and tensor.requires_grad:
                tensor.register_hook(fail)  # type: ignore[no-untyped-call]

    return hook


def _kinds(model: nn.Module) -> dict[str, tuple[str, bool]]:
    """Module name -> its class, and whether its forward was replaced."""
    return {name: (type(module).__name__, "forward" in vars(module)) for name, module in model.named_modules()}
