"""A decoder that hangs or dies costs its clip, and only its clip."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from core.jobs import act, has_torch, letters
from tuner.data.container import DecoderFailed
from tuner.data.prefetch import Prefetcher
from tuner.data.workers import DecodeWorkers, in_worker
from tuner.errors import DataError, EnvironmentProblem


@pytest.fixture(scope="module")
def workers() -> Iterator[DecodeWorkers]:
    with DecodeWorkers(2) as pool:
        yield pool


def test_results_keep_their_order_and_failures_their_clip(workers: DecodeWorkers) -> None:
    names = ["a", "bad", "ccc", "dd", "bad", "e"]
    results = list(workers.map(letters, [(Path(name),) for name in names]))
    assert [r if isinstance(r, int) else r.where for r in results] == [1, "bad", 3, 2, "bad", 1]
    assert in_worker(workers, letters, Path("four")) == 4
    with pytest.raises(DataError, match="is bad"):
        in_worker(workers, letters, Path("bad"))


def test_hang_and_death_are_named_and_the_others_go_on() -> None:
    tasks = [("one", "letters"), ("stuck", "hang"), ("three", "letters"), ("gone", "die"), ("fivefive", "letters"), ("vast", "hunger")]
    with DecodeWorkers(2, timeout=1.5) as workers:
        results = list(workers.map(act, [(Path(name), what) for name, what in tasks]))
    assert [results[i] for i in (0, 2, 4)] == [3, 5, 8]
    stuck, gone, vast = results[1], results[3], results[5]
    assert isinstance(vast, DecoderFailed) and vast.where == "vast" and "memory" in str(vast)
    assert isinstance(stuck, DecoderFailed) and stuck.where == "stuck" and "1.5 seconds" in str(stuck)
    assert isinstance(gone, DecoderFailed) and gone.where == "gone" and "41" in str(gone)


def test_a_decoder_that_loses_a_connection_of_its_own_is_not_taken_for_the_end(capfd: pytest.CaptureFixture[str]) -> None:
    with DecodeWorkers(1) as own:
        (found,) = own.map(act, [(Path("lost"), "lose")])
    assert isinstance(found, DecoderFailed) and "exit code 1" in str(found) and "ConnectionResetError" in capfd.readouterr().err


def test_a_consumer_that_stops_early_leaves_no_process() -> None:
    own = DecodeWorkers(2)
    stream = own.map(act, [(Path(what), what) for what in ("who", "who", "hang", "hang")])
    found = [next(stream), next(stream)]
    stream.close()  # type: ignore[attr-defined]
    own.close()
    for process in found:
        assert isinstance(process, int)
        with pytest.raises(ProcessLookupError):
            os.kill(process, 0)


def test_one_that_ended_while_it_had_nothing_to_do_is_replaced() -> None:
    with DecodeWorkers(1) as own:
        first = in_worker(own, act, Path("who"), "who")
        os.kill(first, signal.SIGKILL)
        while Path(f"/proc/{first}/stat").read_text().split()[2] != "Z":
            time.sleep(0.01)
        assert in_worker(own, act, Path("who"), "who") != first


def test_a_file_of_the_working_directory_is_no_part_of_a_worker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "signal.py").write_text("raise SystemExit('not this one')")
    monkeypatch.chdir(tmp_path)
    with DecodeWorkers(1) as own:
        assert in_worker(own, letters, Path("four")) == 4


def test_a_stop_before_the_first_result_is_asked_for_counts() -> None:
    with DecodeWorkers(1) as own:
        stream = own.map(letters, [(Path("four"),)])
        own.stop()
        assert list(stream) == [] and in_worker(own, letters, Path("four")) == 4


def test_a_main_program_without_a_guard_can_decode(tmp_path: Path) -> None:
    program = tmp_path / "program.py"
    program.write_text(
        "print('once')\n"
        "from pathlib import Path\n"
        "from core.jobs import letters\n"
        "from tuner.data.workers import DecodeWorkers, in_worker\n"
        "with DecodeWorkers(1) as workers:\n"
        "    print(in_worker(workers, letters, Path('four')))\n"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    ran = subprocess.run([sys.executable, str(program)], capture_output=True, text=True, env=environment)
    assert (ran.returncode, ran.stdout.split(), ran.stderr) == (0, ["once", "4"], "")


def test_an_interpreter_that_does_not_start_is_an_environment_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, said in (("/bin/false", "itself has said"), ("/nowhere/python", "No such file")):
        monkeypatch.setattr(sys, "executable", name)
        with DecodeWorkers(2) as own, pytest.raises(EnvironmentProblem, match="cannot start") as caught:
            in_worker(own, letters, Path("four"))
        assert said in f"{caught.value}{caught.value.remedy}"


def test_no_more_than_asked_for_is_made_ahead(workers: DecodeWorkers) -> None:
    begun: list[int] = []

    def tasks() -> Iterator[tuple[Path]]:
        for number in range(6):
            begun.append(number)
            yield (Path("x" * number),)

    for number, length in enumerate(workers.map(letters, tasks(), most=1)):
        assert length == number and len(begun) == number + 1
    begun.clear()
    for number, _ in enumerate(workers.map(letters, tasks(), most=3)):
        assert len(begun) <= number + 3


def test_another_thread_can_stop_what_hangs(workers: DecodeWorkers) -> None:
    begun = threading.Event()

    def tasks() -> Iterator[tuple[Path, str]]:
        begun.set()
        yield Path("stuck"), "hang"

    stream = workers.map(act, tasks())
    with Prefetcher(lambda _: next(stream)) as ahead:
        begun.wait()
        workers.stop()
        assert list(ahead) == []
    assert in_worker(workers, letters, Path("four")) == 4


def test_workers_do_not_import_torch(workers: DecodeWorkers) -> None:
    assert in_worker(workers, has_torch, Path()) is False
