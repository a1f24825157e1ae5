"""Each conformance check finds the fault that it is there for, and says so; nothing is found where nothing is wrong."""

from __future__ import annotations

from collections.abc import Mapping

import pytest

from core import faulty
from tuner import testing
from tuner.config.options import Options
from tuner.testing import Conformance

ON: Mapping[str, object] = {"fault": "yes"}


def case(base: type[Conformance], kind: type, model: type[Options] | None = None, **attributes: object) -> Conformance:
    """A conformance class for one faulty component, as a plugin author would write it."""
    named = {"plugin": faulty.Plugin(kind, model), "component": "fine", "options": {} if base in NAMED else ON, **attributes}
    made: type[Conformance] = type("TestFaulty", (base,), named)
    return made()


NAMED = (testing.FamilyConformance, testing.FormatConformance)
"""Kinds without a switch of their own."""
REGULARIZERS = [
    (faulty.Draws, "a_step_is_a_function_of_what_begin_step_was_given", "global random generator: draw in begin_step"),
    (faulty.Counts, "a_step_is_a_function_of_what_begin_step_was_given", "depending on|a second forward pass"),
    (faulty.WritesBatch, "a_step_is_a_function_of_what_begin_step_was_given", "depending on|changed in place"),
    (faulty.Replaced, "a_graph_may_replay_it_if_it_says_so", r"begin_step puts new tensors into \[\"drawn\['scale'\]\"\]"),
    (faulty.Forgets, "a_resumed_run_equals_an_uninterrupted_one", r"belongs into state_dict\(\)"),
    (faulty.Hooks, "detach_leaves_the_model_as_it_was", r"after detach\(\) the model is not what it was"),
    (faulty.Redraws, "gradients_do_not_depend_on_checkpointing", "gradients are others than without checkpointing"),
    (faulty.ReadsWeights, "weights_may_be_streamed", "read outside its own pass"),
    (faulty.NeedsSound, "batches_without_a_stream_are_taken", "a batch without sound ends in KeyError"),
    (faulty.NeverNothing, "at_zero_it_changes_nothing", "must be the same to the last bit"),
]
TERMS = [
    (faulty.Reduced, "values_are_one_number_a_sample", r"shape \(\) instead of \(2,\)"),
    (faulty.Compares, "a_sample_is_judged_by_itself", "not over samples"),
    (faulty.Silence, "values_are_one_number_a_sample", "count it out, with a finite value"),
    (faulty.InPlace, "it_leaves_the_batch_alone", "different values|in place"),
    (faulty.Idle, "it_teaches_something", "the very weights of training without it"),
]
STRATEGIES = [
    (faulty.Corrupts, "steps_are_those_of_resident_weights", "others than with resident weights"),
    (faulty.Corrupts, "frozen_weights_keep_their_bytes", "weights with other bytes"),
    (faulty.ForwardOnly, "steps_are_those_of_resident_weights", "the loss is not finite|others than with resident weights"),
    (faulty.NeverAborts, "a_step_that_failed_harms_no_later_one", "after an exception on the way forward"),
    (faulty.Keeps, "frozen_weights_keep_their_bytes", r"after detach\(\) \d+ weights have other bytes"),
    (faulty.Promises, "the_plan_is_plausible", "device and host together hold 0 of"),
    (faulty.Nameless, "objections_name_keys", "names none of its keys"),
]
ENCODERS = [
    (faulty.Normalises, "a_record_does_not_depend_on_its_batch", "another record in a batch than alone"),
    (faulty.Numbers, "a_record_does_not_depend_on_its_batch", "another record in a batch than alone"),
    (faulty.Samples, "encoding_twice_gives_the_same_bits", "take the mode, draw nothing"),
    (faulty.Views, "records_are_plain_and_alike", "view of a larger tensor"),
    (faulty.Holds, "unload_frees_and_may_come_at_any_time", r"after unload\(\) the encoder still holds 36 bytes"),
    (faulty.Places, "settings_name_the_record_and_no_place", "settings hold a path"),
    (faulty.Blind, "different_sources_give_different_records", "it does not look at them"),
    (faulty.Coarser, "less_memory_gives_the_same_records", "changes the records but not the settings"),
]
FORMATS = [
    (faulty.ForgetsAlpha, "what_is_written_is_read_back", "another strength"),
    (faulty.TakesAll, "only_its_own_files_are_accepted", "it accepts a text file"),
    (faulty.Tells, "the_file_says_no_more_than_it_was_told", "holds the path"),
    (faulty.Widens, "numbers_keep_their_dtype", "comes back as"),
]
FAMILIES = [
    (
        faulty.HidesTable,
        "every_tensor_with_an_entry_per_token_is_listed",
        "tokens of 'video' in another order .* not in TokenStream.aligned",
    ),
    (faulty.Ungridded, "aligned_tensors_have_the_dimensions_they_claim", r"grid of 'video' is \(1, 1, 1\)"),
    (faulty.Overwrites, "blocks_are_pure_functions", "in place|other numbers the second time"),
    (faulty.Unlucky, "blocks_are_pure_functions", "other numbers the second time"),
    (faulty.Deaf, "what_is_missing_does_not_matter", "keep them out of attention by StreamBatch.present"),
    (faulty.Misnames, "names_go_both_ways", "another name for"),
    (faulty.Miscounts, "headers_tell_what_is_loaded", "parameters"),
    (faulty.Shrinks, "a_dummy_batch_has_the_shapes_of_a_real_one", "memory would be predicted for another model"),
    (faulty.LoadsAtOnce, "blocks_are_handed_over_one_by_one", r"hands over the blocks \[3, 2, 1, 0\]"),
]
TABLE = [
    *((testing.RegularizerConformance, *row) for row in REGULARIZERS), *((testing.LossTermConformance, *row) for row in TERMS),
    *((testing.MemoryStrategyConformance, *row) for row in STRATEGIES), *((testing.EncoderConformance, *row) for row in ENCODERS),
    *((testing.FormatConformance, *row) for row in FORMATS), *((testing.FamilyConformance, *row) for row in FAMILIES),
]  # fmt: skip
ZERO = {"zero": {"fault_weight": 0.0}}


@pytest.mark.parametrize(("base", "kind", "test", "message"), TABLE, ids=[f"{kind.__name__}-{test}" for _, kind, test, _ in TABLE])
def test_a_fault_is_found_and_named(base: type[Conformance], kind: type, test: str, message: str) -> None:
    broken = case(base, kind, **(ZERO if "zero" in test else {}))
    with pytest.raises(AssertionError, match=message):
        getattr(broken, f"test_{test}")()


@pytest.mark.parametrize(
    ("base", "kind", "attributes"),
    [
        (testing.RegularizerConformance, faulty.Fine, ZERO), (testing.LossTermConformance, faulty.FineTerm, ZERO),
        (testing.EncoderConformance, faulty.FineEncoder, {}), (testing.MemoryStrategyConformance, faulty.FaultyStrategy, {}),
    ],
    ids=["regularizer", "loss term", "encoder", "memory strategy"],
)  # fmt: skip
def test_nothing_is_found_where_nothing_is_wrong(base: type[Conformance], kind: type, attributes: dict[str, object]) -> None:
    fine = case(base, kind, **attributes)
    for name in dir(fine):
        if name.startswith("test_"):
            getattr(fine, name)()


def test_draws_that_are_written_in_place_may_be_replayed() -> None:
    case(testing.RegularizerConformance, faulty.InPlaceDraws).test_a_graph_may_replay_it_if_it_says_so()  # type: ignore[attr-defined]


def test_options_that_are_always_on() -> None:
    broken = case(testing.RegularizerConformance, faulty.Fine, faulty.AlwaysOptions, options={})
    with pytest.raises(AssertionError, match="would take part in every run of everybody"):
        broken.test_it_is_off_unless_its_keys_switch_it_on()  # type: ignore[attr-defined]


def test_places_outside_the_model() -> None:
    broken = case(testing.RegularizerConformance, faulty.Fine, options={**ON, "fault_block": 9})
    with pytest.raises(AssertionError, match=r"block 9 is outside 0..3.*: resolve indices in attach"):
        broken.test_what_it_attaches_is_within_the_model()  # type: ignore[attr-defined]


def test_settings_that_should_be_refused() -> None:
    broken = case(testing.RegularizerConformance, faulty.Fine, refused=[({"fault_block": 9}, "fault_block")])
    with pytest.raises(AssertionError, match=r"\{'fault_block': 9\} is not refused while planning"):
        broken.test_what_cannot_work_is_refused_while_planning()  # type: ignore[attr-defined]


def test_a_strategy_that_forbids_a_resume() -> None:
    broken = case(testing.MemoryStrategyConformance, faulty.FaultyStrategy, faulty.ChangingOptions)
    with pytest.raises(AssertionError, match="changes_numbers = False"):
        broken.test_changing_it_does_not_forbid_a_resume()  # type: ignore[attr-defined]


def test_a_component_that_is_not_there_and_a_plugin_that_is_broken() -> None:
    with pytest.raises(AssertionError, match=r"registers no regularizer 'other', but \['fine'\]"):
        case(testing.RegularizerConformance, faulty.Fine, component="other").record()
    broken = type("Broken", (), {"tuner_register_regularizers": lambda: []})()
    with pytest.raises(AssertionError, match=r"the plugin cannot be loaded: .*lacks the decorator"):
        testing.registry(broken)
