"""The cache: names that follow content and settings, files that are whole or not there."""

from __future__ import annotations

import logging
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from core.encoders import GEOMETRY
from tuner.data.buckets import Bucket
from tuner.data.cache import MissingRecord, RecordCache, record_key
from tuner.data.manifest import Item
from tuner.data.records import SourceFile, audio_source, source_key, video_source
from tuner.errors import DiskError
from tuner.interfaces.encoders import Record

KEY = "ab" + "0" * 62
values = st.one_of(st.integers(), st.booleans(), st.text(max_size=8), st.floats(allow_nan=False, allow_infinity=False))
settings = st.dictionaries(st.text(max_size=8), values, max_size=4)
FIELDS = ("content", "frame_rate", "frames", "width", "height", "start", "mono", "caption", "path", "dataset", "repeats", "cache_dir")
ITEM = Item("clips", Path("a.mp4"), "c0ffee", "a cat", Bucket(96, 64, 17), 25.0, True, False, False, 0, Path("cache"))


def record(seed: int = 0) -> Record:
    generator = torch.Generator().manual_seed(seed)
    latents = torch.randn(4, 3, 2, 2, generator=generator)
    return Record({"latents": latents.bfloat16(), "mask": torch.ones(5), "count": torch.tensor(3), "none": torch.zeros(0, 2)}, {"cut": "7"})


def key(source: SourceFile | None) -> dict:
    assert source is not None
    return source_key(source, GEOMETRY)


@given(settings, settings, st.sampled_from(["video", "text"]))
def test_key_is_a_function_of_the_values_alone(one: dict, two: dict, encoder: str) -> None:
    """Equal keys exactly where all values are equal; the order in which settings are written does not matter."""
    source = {"content": "abc", "frames": 17}
    reordered = dict(reversed(one.items()))
    assert record_key(source, encoder, one) == record_key(dict(reversed(source.items())), encoder, reordered)
    same = {k: (type(v), v) for k, v in one.items()} == {k: (type(v), v) for k, v in two.items()}
    if not same and repr(sorted(one.items())) != repr(sorted(two.items())):
        assert record_key(source, encoder, one) != record_key(source, encoder, two)


@pytest.mark.parametrize("field", FIELDS)
def test_exactly_the_changes_that_matter_change_the_name(field: str) -> None:
    changed = {
        "content": replace(ITEM, content="beef"), "frame_rate": replace(ITEM, frame_rate=24.0), "mono": replace(ITEM, mono=True),
        "frames": replace(ITEM, bucket=Bucket(96, 64, 9)), "width": replace(ITEM, bucket=Bucket(64, 64, 17)),
        "height": replace(ITEM, bucket=Bucket(96, 32, 17)), "caption": replace(ITEM, caption="a dog"),
        "path": replace(ITEM, path=Path("b.mp4")), "start": replace(ITEM, start=0.5),
        "dataset": replace(ITEM, dataset="other"), "repeats": replace(ITEM, repeats=3), "cache_dir": replace(ITEM, cache_dir=Path("x")),
    }[field]  # fmt: skip
    assert (key(video_source(changed)) != key(video_source(ITEM))) == (field in FIELDS[:6])
    assert (key(audio_source(changed)) != key(audio_source(ITEM))) == (field in ("content", "frame_rate", "frames", "start", "mono"))
    assert (changed.key != ITEM.key) == (field not in ("path", "dataset", "repeats", "cache_dir"))


def test_round_trip_keeps_bits_dtypes_and_facts(tmp_path: Path) -> None:
    cache = RecordCache(tmp_path)
    assert not cache.has(KEY)
    cache.write(KEY, record())
    assert cache.has(KEY)
    back = cache.read(KEY)
    assert back.facts == {"cut": "7"}
    for name, tensor in record().tensors.items():
        assert back.tensors[name].dtype == tensor.dtype and torch.equal(back.tensors[name], tensor)
    assert [p.name for p in tmp_path.rglob("*") if p.is_file()] == [f"{KEY}.safetensors"]


def test_views_and_shared_storage_can_be_written(tmp_path: Path) -> None:
    whole = torch.arange(12.0).view(3, 4)
    RecordCache(tmp_path).write(KEY, Record({"a": whole.T, "b": whole[1:], "c": whole}))
    assert torch.equal(RecordCache(tmp_path).read(KEY).tensors["a"], whole.T)


@pytest.mark.parametrize("damage", ["truncated", "empty", "flipped", "garbage"])
def test_damage_is_reported_and_treated_as_missing(tmp_path: Path, damage: str, caplog: pytest.LogCaptureFixture) -> None:
    cache = RecordCache(tmp_path)
    cache.write(KEY, record())
    path = cache.path(KEY)
    data = bytearray(path.read_bytes())
    if damage == "flipped":
        data[-20] ^= 1
    content = {"truncated": bytes(data[:-5]), "empty": b"", "flipped": bytes(data), "garbage": b"x" * 300}[damage]
    path.write_bytes(content)
    with caplog.at_level(logging.WARNING):
        if damage != "flipped":  # only reading all bytes shows a flipped one
            assert not cache.has(KEY)
        else:
            with pytest.raises(MissingRecord, match="checksum"):
                cache.read(KEY)
    assert "damaged" in caplog.text and not path.exists()
    with pytest.raises(MissingRecord, match="not in the cache"):
        cache.read(KEY)


def test_damage_met_when_reading_is_named_and_removed(tmp_path: Path) -> None:
    cache = RecordCache(tmp_path)
    cache.write(KEY, record())
    cache.path(KEY).write_bytes(b"short")
    with pytest.raises(MissingRecord, match="start again"):
        cache.read(KEY)
    assert not cache.path(KEY).exists()


def test_parallel_writers_leave_one_whole_entry(tmp_path: Path) -> None:
    cache = RecordCache(tmp_path)

    def work(number: int) -> None:
        cache.write(KEY, record(number % 3))
        assert cache.read(KEY).tensors["mask"].sum() == 5

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(work, range(64)))
    assert len([p for p in tmp_path.rglob("*") if p.is_file()]) == 1
    assert any(torch.equal(cache.read(KEY).tensors["latents"], record(i).tensors["latents"]) for i in range(3))


def test_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(DiskError, match="cannot be written") as caught:
        RecordCache(tmp_path / "file").write(KEY, record())
    assert caught.value.exit_code == 9
