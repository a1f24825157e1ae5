"""Batches: every item repeats + 1 times an epoch or its share of that, one group a batch, from (seed, epoch) alone. And the prefetcher."""

from __future__ import annotations

import threading
from collections import Counter
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from core.encoders import GEOMETRY, Pictures, Sounds, Words
from tuner.data.buckets import Bucket
from tuner.data.cache import MissingRecord
from tuner.data.dataset import TrainingSet
from tuner.data.epochs import plan_epoch
from tuner.data.items import Companion, Item, Kind, Verdict
from tuner.data.manifest import Manifest
from tuner.data.prefetch import Prefetcher
from tuner.data.randomness import uniform
from tuner.data.records import RecordPlaces
from tuner.errors import DataError
from tuner.interfaces.encoders import Record


def item(number: int, *, width: int = 64, rate: float = 25.0, repeats: int = 0, sound: bool = False, cache: Path = Path("cache")) -> Item:
    caption = f"clip {number}"
    return Item("clips", Path(f"{number}.mp4"), f"{number:064x}", caption, Bucket(width, 64, 9), rate, sound, False, False, repeats, cache)


def manifest(items: list[Item], cache: Path = Path("cache")) -> Manifest:
    return Manifest(tuple(Verdict(i.dataset, i.path, "used", item=i) for i in items), (), cache, GEOMETRY)


def varied(number: int, width: int, kind: Kind, sound: bool, reference: int, repeats: int, entry: tuple[str, float]) -> Item:
    """A clip, picture or sound of one of several entries, each with a probability."""
    bucket = Bucket(0, 0, 0, width / 32) if kind == "audio" else Bucket(width, 64, 1 if kind == "image" else 9)
    beside = (Companion("reference", Path("r"), "0" * 64, bucket._replace(width=width // reference)),) if reference else ()
    if sound and kind == "video":
        beside = (Companion("sound", Path("s"), "1" * 64, bucket), *beside)
    return Item(
        entry[0], Path(f"{number}.mp4"), f"{number:064x}", "", bucket, 25.0, sound or kind == "audio", False, False, repeats, Path("cache"),
        kind=kind, companions=beside, probability=entry[1],
    )  # fmt: skip


mixed = st.lists(
    st.tuples(
        st.sampled_from([32, 64]), st.sampled_from(["video", "image", "audio"]), st.booleans(), st.sampled_from([0, 0, 1, 2]),
        st.integers(0, 3), st.sampled_from([("a", 1.0), ("b", 1.0), ("c", 0.5), ("d", 0.3)]),
    ), min_size=1, max_size=12,
)  # fmt: skip


@given(mixed, st.integers(1, 5), st.integers(0, 3))
def test_every_item_comes_repeats_plus_one_times_or_its_share_of_that(shapes: list[tuple], batch_size: int, epoch: int) -> None:  # type: ignore[type-arg]
    items = [varied(number, *shape) for number, shape in enumerate(shapes)]
    dataset = TrainingSet(manifest(items), [], batch_size, seed=7)
    plan = dataset.epoch_plan(epoch)
    drawn = Counter((d.item, d.repeat) for batch in plan for d in batch)
    possible = {(n, k) for n, i in enumerate(items) for k in range(i.repeats + 1)}
    assert set(drawn.values()) == {1} and drawn.keys() <= possible
    assert {turn for turn in possible if items[turn[0]].probability == 1} <= drawn.keys()
    for share in {(i.dataset, i.probability, i.group) for i in items}:
        own = {turn for turn in possible if (items[turn[0]].dataset, items[turn[0]].probability, items[turn[0]].group) == share}
        assert len(own & drawn.keys()) == max(1, round(share[1] * len(own)))
    assert [d.position for batch in plan for d in batch] == list(range(len(drawn)))
    assert all(len({items[d.item].group for d in batch}) == 1 and len(batch) <= batch_size for batch in plan)
    smaller = Counter(items[batch[0].item].group for batch in plan if len(batch) < batch_size)
    assert all(count == 1 for count in smaller.values())
    assert len(plan) == dataset.steps_per_epoch == manifest(items).batches_per_epoch(batch_size)


KINDS: tuple[tuple[Kind, int], ...] = (("image", 0), ("audio", 0), ("video", 1), ("video", 2))


def test_what_shares_a_batch() -> None:
    """Clips with and without sound do; pictures, sounds, and clips with another reference do not."""
    plain = varied(0, 64, "video", False, 0, 0, ("a", 1.0))
    assert varied(1, 64, "video", True, 0, 2, ("b", 0.5)).group == plain.group
    others = [varied(2, 64, kind, True, r, 0, ("a", 1.0)) for kind, r in KINDS]
    assert len({i.group for i in (plain, *others)}) == 5 and sorted(i.group for i in (plain, *others))


@given(st.integers(1, 7), st.integers(0, 2), st.floats(0.05, 0.95), st.integers(0, 5))
def test_a_share_takes_all_in_turn(count: int, repeats: int, probability: float, first: int) -> None:
    items = [varied(n, 64, "video", False, 0, repeats, ("a", probability)) for n in range(count)]
    total = count * (repeats + 1)
    taken = max(1, round(probability * total))
    epochs = [[(d.item, d.repeat) for batch in plan_epoch(items, 2, 3, first + e) for d in batch] for e in range(-(-total // taken))]
    assert all(len(set(turns)) == len(turns) == taken for turns in epochs)
    assert len({turn for turns in epochs for turn in turns}) == total
    counts = Counter(turn for turns in epochs for turn in turns)
    assert max(counts.values()) - min(counts.values()) <= 1


def test_order_is_a_function_of_seed_and_epoch() -> None:
    items = [item(n, repeats=1) for n in range(10)]
    one, two = (TrainingSet(manifest(items), [], 2, seed=1) for _ in range(2))
    late = two.epoch_plan(5)  # asked for out of order
    assert [one.epoch_plan(e) for e in range(6)][5] == late
    assert one.epoch_plan(0) != one.epoch_plan(1)
    assert TrainingSet(manifest(items), [], 2, seed=2).epoch_plan(0) != one.epoch_plan(0)
    assert [one.locate(step) for step in (0, 9, 10, 25)] == [(0, 0), (0, 9), (1, 0), (2, 5)]


def test_a_clip_more_leaves_the_others_in_their_order() -> None:
    few, more = ([item(n) for n in range(count)] for count in (9, 10))
    orders = [[d.item for batch in TrainingSet(manifest(i), [], 100, seed=3).epoch_plan(0) for d in batch] for i in (few, more)]
    assert [n for n in orders[1] if n != 9] == orders[0]


def fill(dataset: Manifest, cache: Path) -> list[Pictures | Sounds | Words]:
    encoders: list[Pictures | Sounds | Words] = [Pictures(), Sounds(), Words()]
    places = RecordPlaces(encoders, GEOMETRY, cache)
    for i in dataset.items:
        for name in ("video", "audio"):
            if place := places.clip(i, name):
                place.cache.write(place.key, Record({"latents": torch.tensor(float(i.path.stem))}))
    for text in {i.caption for i in dataset.items} | {""}:
        place = places.caption(text, "text")
        place.cache.write(place.key, Record({"letters": torch.tensor(len(text))}))
    return encoders


def test_samples_carry_their_records(tmp_path: Path) -> None:
    found = manifest([item(n, sound=n % 2 == 0, cache=tmp_path) for n in range(4)], tmp_path)
    dataset = TrainingSet(found, fill(found, tmp_path), 4, seed=0)
    samples = dataset.load(2, dataset.epoch_plan(2)[0])
    for sample, draw in zip(samples, dataset.epoch_plan(2)[0], strict=True):
        number = draw.item
        assert set(sample.records) == ({"video", "audio", "text"} if number % 2 == 0 else {"video", "text"})
        assert sample.records["video"].tensors["latents"] == number and sample.caption == f"clip {number}"
        assert (sample.epoch, sample.draw, sample.frames, sample.height, sample.width) == (2, draw.position, 9, 64, 64)
    assert len({sample.key for sample in samples}) == 4
    with pytest.raises(MissingRecord):
        TrainingSet(found, [Pictures(scale=2.0)], 4, seed=0).load(0, dataset.epoch_plan(0)[0])
    with pytest.raises(DataError, match="empty"):
        TrainingSet(manifest([]), [], 1, seed=0)


def test_caption_dropout_is_drawn_per_turn(tmp_path: Path) -> None:
    found = manifest([item(n, repeats=24, cache=tmp_path) for n in range(4)], tmp_path)
    encoders = fill(found, tmp_path)

    def dropped(batch_size: int, probability: float) -> set[tuple[int, int]]:
        dataset = TrainingSet(found, encoders, batch_size, seed=5, caption_dropout=probability)
        turns = [(draw, sample) for batch in dataset.epoch_plan(1) for draw, sample in zip(batch, dataset.load(1, batch), strict=True)]
        assert all(sample.records["text"].tensors["letters"] == len(sample.caption) for _, sample in turns)
        return {(draw.item, draw.repeat) for draw, sample in turns if sample.caption == ""}

    expected = {(i, r) for i in range(4) for r in range(25) if uniform(5, "caption dropout", 1, i, r) < 0.3}
    assert dropped(1, 0.3) == dropped(7, 0.3) == expected and 15 < len(expected) < 45
    assert dropped(3, 0.0) == set() and len(dropped(3, 1.0)) == 100


@pytest.mark.parametrize("depth", [0, 1, 3])
def test_prefetcher_keeps_order_and_ends(depth: int) -> None:
    with Prefetcher(lambda step: step * step, 3, depth, stop_step=8) as feed:
        assert list(feed) == [9, 16, 25, 36, 49]
    with pytest.raises(RuntimeError, match="closed"):
        next(feed)


@pytest.mark.parametrize("depth", [0, 2])
def test_prefetcher_raises_where_the_step_is_asked_for(depth: int) -> None:
    def make(step: int) -> int:
        if step == 2:
            raise DataError("no such record", where="step 2")
        return step

    feed = Prefetcher(make, 0, depth)
    assert [next(feed), next(feed)] == [0, 1]
    with pytest.raises(DataError, match="step 2"):
        next(feed)
    feed.close()


def test_prefetcher_works_ahead_in_a_thread_and_stops_it() -> None:
    reached = threading.Event()

    def make(step: int) -> str:
        if step == 2:
            reached.set()
        return threading.current_thread().name

    feed = Prefetcher(make, 0, 2)
    assert reached.wait(30)  # nothing was asked for yet
    assert next(feed) == "prefetch"
    feed.close()
    assert not any(thread.name == "prefetch" for thread in threading.enumerate())
