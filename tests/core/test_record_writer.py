"""Records are written beside the encoder, a few at a time, and nothing that goes wrong is lost."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest
import torch

from tuner.data import writer as writing
from tuner.data.cache import RecordCache
from tuner.data.records import Place
from tuner.data.writer import RecordWriter
from tuner.errors import DiskError
from tuner.interfaces.encoders import Record

PATIENCE = 30.0
"""Seconds after which a test gives up."""


class GatedCache(RecordCache):
    """Writes when the gate is open."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.gate = threading.Event()

    def write(self, key: str, record: Record) -> None:
        assert self.gate.wait(PATIENCE)
        super().write(key, record)


def key(number: int) -> str:
    return f"{number:064d}"


def record(number: int) -> Record:
    return Record({"value": torch.full((3,), float(number))}, {"number": str(number)})


def test_the_encoder_goes_on_while_the_disk_is_busy_and_leaving_waits(tmp_path: Path) -> None:
    cache = GatedCache(tmp_path)
    with RecordWriter() as writer:
        for number in range(writing.WAITING):
            writer.write(Place(cache, key(number)), record(number))
        assert not any(cache.has(key(number)) for number in range(writing.WAITING))
        cache.gate.set()
    for number in range(writing.WAITING):
        assert torch.equal(cache.read(key(number)).tensors["value"], record(number).tensors["value"])


def test_only_so_many_wait(tmp_path: Path) -> None:
    cache, taken = GatedCache(tmp_path), threading.Event()
    with RecordWriter() as writer:
        for number in range(writing.WAITING):
            writer.write(Place(cache, key(number)), record(number))

        def one_more() -> None:
            writer.write(Place(cache, key(writing.WAITING)), record(0))
            taken.set()

        thread = threading.Thread(target=one_more)
        thread.start()
        assert not taken.wait(0.05)
        cache.gate.set()
        assert taken.wait(PATIENCE)
        thread.join()
    assert cache.has(key(writing.WAITING))


def test_a_full_disk_is_told_by_the_next_write_or_on_leaving(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    place = Place(RecordCache(tmp_path / "file"), key(0))
    with pytest.raises(DiskError, match="the cache cannot be written"), RecordWriter() as writer:
        writer.write(place, record(0))
    with pytest.raises(DiskError, match="the cache cannot be written"), RecordWriter() as writer:
        for _ in range(2 * writing.WAITING):
            writer.write(place, record(0))
        raise AssertionError("every write was taken")


def test_what_was_made_before_an_error_is_kept_and_the_error_is_the_encoders(tmp_path: Path) -> None:
    cache = RecordCache(tmp_path)
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(ZeroDivisionError), RecordWriter() as writer:
        writer.write(Place(cache, key(1)), record(1))
        writer.write(Place(RecordCache(tmp_path / "file"), key(0)), record(0))
        raise ZeroDivisionError
    assert cache.has(key(1))
