"""TREAD: its key, its rules, and which tokens it draws."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tuner.config.resolve import resolve
from tuner.config.schema import json_schema
from tuner.errors import ConfigError
from tuner.interfaces.blocks import Aligned, BlockSet, BlockState, TokenStream
from tuner.interfaces.family import Batch, BuildContext, ClipShape, Noise, Sample, StreamBatch
from tuner.interfaces.losses import TrainingFacts
from tuner.model.selection import with_counts
from tuner.plugins.loader import load_plugins
from tuner.testing.blocks import MixingModel
from tuner.train.placement import to_device
from tuner_regularizers.routes import Route
from tuner_regularizers.tread import Tread
from tuner_regularizers.tread_options import TreadConfig, TreadOptions

HALF = {"selection_ratio": 0.5, "start_layer_idx": 2, "end_layer_idx": -2}
ROUTES = {"routes": [HALF]}
NOTHING = Noise({})
FIXTURE = Path(__file__).parents[1] / "integration" / "quickstart" / "tread.json"


# --- the key -----------------------------------------------------------------------------------------------------
def resolved(value: object) -> TreadConfig | None:
    return resolve([TreadOptions], flags={"tread_config": value}).get(TreadOptions).tread_config


def test_routes_are_an_object_or_text_or_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("config").mkdir()
    Path("config/tread.json").write_text(FIXTURE.read_text())
    Path("routes.json").write_text(json.dumps(ROUTES))
    expected = resolved(ROUTES)
    assert expected is not None and expected.model_dump() == ROUTES
    files = ["config/tread.json", "routes.json", str(tmp_path / "routes.json")]
    assert [resolved(value) for value in (json.dumps(ROUTES), json.dumps({"tread_config": ROUTES}), *files)] == [expected] * 5
    assert resolve([TreadOptions], environ={"TUNER_TREAD_CONFIG": "routes.json"}).get(TreadOptions).tread_config == expected
    assert resolve([TreadOptions], config_file=FIXTURE).get(TreadOptions).tread_config == expected  # a configuration with this one key


def test_what_was_resolved_is_kept_as_an_object_whatever_it_was_given_as(tmp_path: Path) -> None:
    (tmp_path / "routes.json").write_text(json.dumps(ROUTES))
    settings = resolve([TreadOptions], flags={"tread_config": str(tmp_path / "routes.json")})
    assert settings.resolved()["tread_config"] == {"value": ROUTES, "origin": "flag"}
    assert settings.get(TreadOptions).enabled() and not resolve([TreadOptions]).get(TreadOptions).enabled()


WRONG: Mapping[str, tuple[object, list[str]]] = {
    "no file": ("config/none.json", ["tread_config: config/none.json: there is no such file"]),
    "no JSON": ('{"routes": [', ["tread_config: is not valid JSON", "column"]),
    "no object": (3, ["tread_config: must be an object", "got 3"]),
    "a list": ([HALF], ["tread_config: must be an object"]),
    "no routes": ({}, ["tread_config.routes: is missing"]),
    "an empty list": ({"routes": []}, ["tread_config.routes: holds no route", "leave the key out"]),
    "no list": ({"routes": HALF}, ["tread_config.routes: must be a list"]),
    "no route": ({"routes": [0.5]}, ["tread_config.routes[0]: must be an object", "got 0.5"]),
    "another word": ({"route": [HALF]}, ["tread_config: has no field 'route'; did you mean routes?"]),
    "an unknown field": (
        {"routes": [HALF, {**HALF, "select_ratio": 0.5}]},
        ["tread_config.routes[1]: has no field 'select_ratio'; did you mean selection_ratio?"],
    ),
    "nothing like it": ({"routes": [{**HALF, "x": 1}]}, ["has no field 'x'; it has selection_ratio, start_layer_idx, end_layer_idx"]),
    "a missing field": ({"routes": [{"selection_ratio": 0.5, "start_layer_idx": 2}]}, ["tread_config.routes[0].end_layer_idx: is missing"]),
    "everything": ({"routes": [{**HALF, "selection_ratio": 1}]}, ["tread_config.routes[0].selection_ratio: must be less than 1 (got 1)"]),
    "more than everything": ({"routes": [{**HALF, "selection_ratio": 1.5}]}, ["selection_ratio: must be less than 1 (got 1.5)"]),
    "less than nothing": ({"routes": [{**HALF, "selection_ratio": -0.1}]}, ["selection_ratio: must be at least 0 (got -0.1)"]),
    "text for a ratio": ({"routes": [{**HALF, "selection_ratio": "half"}]}, ["selection_ratio: must be a number (got 'half')"]),
    "half a block": ({"routes": [{**HALF, "start_layer_idx": 2.5}]}, ["start_layer_idx: must be a whole number (got 2.5)"]),
    "true for a block": ({"routes": [{**HALF, "end_layer_idx": True}]}, ["end_layer_idx: must be a whole number (got True)"]),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG)
def test_what_is_no_configuration_is_refused(case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    value, words = WRONG[case]
    with pytest.raises(ConfigError) as caught:
        resolved(value)
    assert [word for word in words if word not in str(caught.value)] == [], caught.value


def test_the_schema_takes_objects_and_text() -> None:
    schema = json_schema([TreadOptions])
    assert schema["properties"]["tread_config"]["anyOf"] == [{"$ref": "#/$defs/TreadConfig"}, {"type": "string"}, {"type": "null"}]
    assert schema["$defs"]["TreadRoute"]["required"] == ["selection_ratio", "start_layer_idx", "end_layer_idx"]


def test_the_component_is_found_and_off_by_default() -> None:
    registry = load_plugins({"TUNER_PLUGINS": "regularizers"})
    component = registry.component("regularizer", "tread")
    assert component.load() is Tread and resolve(registry.option_types).notices == ()


# --- rules while planning ----------------------------------------------------------------------------------------
CONTEXT = BuildContext(torch.device("cpu"), torch.float32, 0, 0, Path())


def tread(*routes: tuple[float, int, int], context: BuildContext = CONTEXT) -> Tread:
    """By ratio, first and last block."""
    names = ("selection_ratio", "start_layer_idx", "end_layer_idx")
    given = {"routes": [dict(zip(names, route, strict=True)) for route in routes]}
    return Tread(TreadOptions(tread_config=given), context)  # type: ignore[arg-type]


def facts(blocks: int = 48, streams: tuple[str, ...] = ("video", "audio"), learned: tuple[str, ...] | None = None) -> TrainingFacts:
    shape = ClipShape(64, 64, 17, 25.0, 0.68)
    return TrainingFacts(blocks, tuple(range(blocks)), streams, learned or streams, (shape,), False, ("voices",))


REFUSED: Mapping[str, tuple[list[tuple[float, int, int]], TrainingFacts, list[str]]] = {
    "a block too far": (
        [(0.5, 2, 48)], facts(), ["tread_config.routes[0].end_layer_idx: is no block of this model (got 48)", "0 to 47, or -48 to -1"],
    ),
    "too far from the end": ([(0.5, -49, 4)], facts(), ["tread_config.routes[0].start_layer_idx: is no block", "-49"]),
    "both ends": ([(0.5, 60, 70)], facts(), ["routes[0].start_layer_idx", "routes[0].end_layer_idx"]),
    "backwards": (
        [(0.5, 10, 4)], facts(), ["tread_config.routes[0]: holds no block: it begins before block 10 and ends after block 4"],
    ),
    "backwards from the end": ([(0.5, 3, -3)], facts(blocks=4), ["holds no block: it begins before block 3 and ends after block 1"]),
    "overlap": (
        [(0.5, 2, 10), (0.3, 20, 30), (0.3, 8, 12)], facts(), ["tread_config.routes[0], tread_config.routes[2]: both hold blocks 8 to 10"],
    ),
    "the same block": ([(0.5, 2, -4), (0.3, 44, 46)], facts(), ["tread_config.routes[0], tread_config.routes[1]: both hold block 44"]),
    "sound alone": (
        [(0.5, 2, -2)], facts(streams=("audio",)),
        ["tread_config, data_backend_config: routes tokens of the picture, and what is trained on has none (got 'voices')"],
    ),
    "a given picture": ([(0.5, 2, -2)], facts(learned=("audio",)), ["tread_config: ", "the whole picture is given clean"]),
    "all at once": (
        [(0.5, 60, 61), (0.5, 9, 8)], facts(streams=("audio",)), ["routes[0].start_layer_idx", "routes[1]: holds no block", "has none"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_routes_that_this_model_or_dataset_does_not_have_are_refused(case: str) -> None:
    routes, known, words = REFUSED[case]
    shown = "\n".join(str(problem) for problem in tread(*routes).check(known))
    assert [word for word in words if word not in shown] == [], shown


@pytest.mark.parametrize("routes", [[(0.5, 2, -2)], [(0.0, 0, -1)], [(0.9, 0, 3), (0.1, 4, 47)], [(0.5, -1, -1), (0.5, 0, 0)]])
def test_routes_that_can_be_taken_are(routes: list[tuple[float, int, int]]) -> None:
    assert tread(*routes).check(facts()) == []


def test_the_plan_says_what_is_skipped() -> None:
    assert tread((0.5, 2, -2)).describe(facts()) == "50% of the video tokens skip blocks 2 to 46, of 48 blocks"
    two = tread((0.25, 30, 30), (0.5, 2, 10))
    assert two.describe(facts()) == "50% of the video tokens skip blocks 2 to 10; 25% of the video tokens skip block 30, of 48 blocks"


@pytest.mark.parametrize(
    ("ratio", "free", "leaving"), [(0.5, 10, 5), (0.5, 11, 5), (0.29, 100, 29), (0.0, 10, 0), (0.5, 1, 0), (0.999, 3, 2), (0.5, 0, 0)]
)
def test_the_share_of_those_that_may_leave_is_rounded_down_and_one_stays(ratio: float, free: int, leaving: int) -> None:
    assert Route(ratio, 0, 0).leaving(free) == leaving


# --- what is drawn -----------------------------------------------------------------------------------------------
def batch(tokens: int = 12, conditioned: Tensor | None = None, *, clean: bool = False, count: int = 2, device: str = "cpu") -> Batch:
    sample = Sample("k", "d", 0, 0, 25.0, 17, 64, 64, {})
    stream = StreamBatch(torch.zeros(count, tokens, 3), (1, 1, tokens), conditioned=conditioned, clean=clean)
    return to_device(with_counts(Batch((sample,) * count, {"video": stream}, {}, ())), torch.device(device))


def attached(*routes: tuple[float, int, int], device: str = "cpu") -> Tread:
    context = BuildContext(torch.device(device), torch.float32, 0, 0, Path())
    made = tread(*routes, context=context)
    made.attach(blocks(6), context)
    return made


def blocks(count: int) -> BlockSet:
    return MixingModel(count).block_set()


def ids(regularizer: Tread, given: Batch, seed: int = 0, step: int = 0) -> list[Tensor]:
    """Of each route, as drawn for this batch."""
    regularizer.begin_step(step, given, NOTHING, torch.Generator().manual_seed(seed))
    return [each.clone() for each in regularizer._ids]


def test_each_sample_keeps_the_same_number_of_tokens_in_their_order() -> None:
    (drawn,) = ids(attached((0.25, 1, 3)), batch(12, count=3))
    assert drawn.shape == (3, 9) and drawn.dtype == torch.int64
    assert (drawn.diff(dim=1) > 0).all() and drawn.min() >= 0 and drawn.max() < 12
    assert len({tuple(row) for row in drawn.tolist()}) == 3


def test_draws_depend_on_the_generator_alone() -> None:
    regularizer = attached((0.5, 1, 3), (0.25, 4, 5))
    first = ids(regularizer, batch(), seed=1, step=0)
    ids(regularizer, batch(20), seed=2, step=1)
    again = ids(attached((0.5, 1, 3), (0.25, 4, 5)), batch(), seed=1, step=7)
    assert all(torch.equal(one, other) for one, other in zip(first, again, strict=True))
    assert not torch.equal(first[0], ids(regularizer, batch(), seed=3)[0])
    assert [each.shape[1] for each in first] == [6, 9] and regularizer.state_dict() == {}


def test_the_draw_is_uniform() -> None:
    """Each of 8 tokens stays with probability 1/2: of 2,000 samples 1,000, with a standard deviation of 22."""
    (drawn,) = ids(attached((0.5, 0, 0)), batch(8, count=2000))
    counts = torch.bincount(drawn.flatten(), minlength=8)
    assert counts.sum() == 8000 and ((counts - 1000).abs() < 110).all()
    stays = torch.zeros(2000, 8).scatter(1, drawn, 1.0)
    apart = (stays.T @ stays)[~torch.eye(8, dtype=torch.bool)]  # both of two: 15 of the 70 choices, 429 with a deviation of 18
    assert ((apart - 429).abs() < 92).all()


GIVEN = torch.tensor([[True, True, True] + [False] * 9, [False] * 11 + [True]])


def test_given_tokens_stay_and_the_share_is_of_the_others() -> None:
    """3 of 12 are given at most, so half of 9, rounded down, leaves."""
    (drawn,) = ids(attached((0.5, 1, 3)), batch(12, GIVEN, count=2))
    assert drawn.shape == (2, 8)
    assert drawn[0, :3].tolist() == [0, 1, 2] and drawn[1, -1] == 11


def test_given_tokens_are_drawn_as_often_as_they_must_and_others_uniformly() -> None:
    given = torch.zeros(4000, 8, dtype=torch.bool)
    given[:, 2] = True
    (drawn,) = ids(attached((0.5, 0, 0)), batch(8, given, count=4000))
    counts = torch.bincount(drawn.flatten(), minlength=8)
    assert counts[2] == 4000 and drawn.shape[1] == 5  # 3 of 7 leave; each of the others stays with 4/7: 2,286
    others = torch.cat([counts[:2], counts[3:]])
    assert ((others - 2286).abs() < 160).all()


@pytest.mark.parametrize("given", [11, 12])
def test_where_nearly_everything_is_given_nothing_leaves(given: int) -> None:
    regularizer = attached((0.9, 1, 3))
    conditioned = torch.arange(12).expand(2, 12) < given
    assert ids(regularizer, batch(12, conditioned)) == [] and regularizer.graph_key() == ()


def test_batches_without_a_picture_to_learn_and_single_tokens_are_left_alone() -> None:
    regularizer = attached((0.5, 1, 3))
    state = object()
    sound = Batch(batch().samples, {"audio": StreamBatch(torch.zeros(2, 4, 3), (4, 1, 1))}, {}, ())
    for given in (sound, batch(clean=True), batch(tokens=1)):
        assert len(ids(regularizer, batch())) == 1
        assert ids(regularizer, given) == [] and regularizer.graph_key() == ()
        assert all(transform.apply(state) is state for transform in regularizer.transforms())  # type: ignore[arg-type]


def test_a_batch_that_nobody_counted_is_counted_here() -> None:
    counted = batch(12, GIVEN)
    bare = Batch(counted.samples, counted.streams, {}, ())
    regularizer = attached((0.5, 1, 3))
    assert torch.equal(ids(regularizer, bare)[0], ids(regularizer, counted)[0])


def test_a_ratio_of_zero_attaches_nothing() -> None:
    regularizer = attached((0.0, 1, 3), (0.0, 4, 5))
    assert regularizer.transforms() == [] and ids(regularizer, batch()) == []
    assert [(t.block, t.when) for t in attached((0.0, 0, 0), (0.5, -4, -2)).transforms()] == [(2, "before"), (4, "after")]


# --- what a CUDA graph needs -------------------------------------------------------------------------------------
def test_ids_are_written_where_the_last_batch_of_that_shape_had_them() -> None:
    regularizer = attached((0.5, 1, 3), (0.25, 4, 5))
    assert regularizer.capturable

    def places(given: Batch, seed: int) -> tuple[object, list[int], list[Tensor]]:
        drawn = ids(regularizer, given, seed)
        return regularizer.graph_key(), [each.data_ptr() for each in regularizer._ids], drawn

    first, more, fewer = places(batch(), 0), places(batch(16), 1), places(batch(12, GIVEN), 2)
    again = places(batch(), 3)
    assert first[:2] == again[:2] and first[0] == (6, 9)
    assert not torch.equal(first[2][0], again[2][0])
    assert set(first[1]).isdisjoint(more[1]) and more[0] == (8, 12)
    assert fewer[0] == (8, 10)  # as many tokens, but fewer may leave: another graph
    assert all(each.is_contiguous() for each in regularizer._ids)
    tokens = TokenStream(torch.randn(2, 12, 3), grid=(1, 1, 12))
    inside = regularizer.transforms()[0].apply(BlockState({"video": tokens})).streams["video"]
    held = inside.token_ids
    assert held is not None and held.data_ptr() == first[1][0]
    ids(regularizer, batch(), 9)  # what was captured reads the next batch's ids there
    assert torch.equal(held, regularizer._ids[0])


def test_nothing_waits_for_the_device() -> None:
    """The meta device has no values: whoever reads one there fails."""
    regularizer = attached((0.5, 1, 3), device="meta")
    regularizer.begin_step(0, batch(12, GIVEN, device="meta"), NOTHING, torch.Generator().manual_seed(0))
    (drawn,) = regularizer._ids
    assert drawn.device.type == "meta" and drawn.shape == (2, 8)
    scale = Aligned(torch.empty(2, 12, 1, device="meta"), (1,))
    state = BlockState({"video": TokenStream(torch.empty(2, 12, 3, device="meta"), {"scale": scale})})
    for transform in regularizer.transforms():
        state = transform.apply(state)
    assert state.streams["video"].hidden.shape == (2, 12, 3)
