"""A decoder that hangs or dies costs its clip, and only its clip."""

from __future__ import annotations

import multiprocessing
from pathlib import Path

import pytest

from core.jobs import act, has_torch, letters
from tuner.data.container import DecoderFailed
from tuner.data.workers import DecodeWorkers, in_worker
from tuner.errors import DataError


def test_results_keep_their_order_and_failures_their_clip() -> None:
    names = ["a", "bad", "ccc", "dd", "bad", "e"]
    with DecodeWorkers(2) as workers:
        results = list(workers.map(letters, [(Path(name),) for name in names]))
        assert [r if isinstance(r, int) else r.where for r in results] == [1, "bad", 3, 2, "bad", 1]
        assert in_worker(workers, letters, Path("four")) == 4
        with pytest.raises(DataError, match="is bad"):
            in_worker(workers, letters, Path("bad"))


def test_hang_and_death_are_named_and_the_others_go_on() -> None:
    tasks = [("one", "letters"), ("stuck", "hang"), ("three", "letters"), ("gone", "die"), ("fivefive", "letters")]
    with DecodeWorkers(2, timeout=3.0) as workers:
        results = list(workers.map(act, [(Path(name), what) for name, what in tasks]))
    assert [results[i] for i in (0, 2, 4)] == [3, 5, 8]
    stuck, gone = results[1], results[3]
    assert isinstance(stuck, DecoderFailed) and stuck.where == "stuck" and "3 seconds" in str(stuck)
    assert isinstance(gone, DecoderFailed) and gone.where == "gone" and "41" in str(gone)


def test_a_consumer_that_stops_early_leaves_no_process() -> None:
    workers = DecodeWorkers(2)
    stream = workers.map(act, [(Path(str(i)), "hang" if i else "letters") for i in range(4)])
    assert next(stream) == 1
    stream.close()  # type: ignore[attr-defined]
    workers.close()
    assert multiprocessing.active_children() == []


def test_workers_do_not_import_torch() -> None:
    with DecodeWorkers(1) as workers:
        assert in_worker(workers, has_torch, Path()) is False
