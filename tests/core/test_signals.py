"""Signals become requests; the second one of a kind ends the process."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator

import pytest

from tuner.train import signals
from tuner.train.signals import StopRequests, before_training

NUMBERS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)


@pytest.fixture(autouse=True)
def known_handlers() -> Iterator[None]:
    """A test run started in the background inherits an ignored SIGINT; start from one known state, and put it back."""
    before = {number: signal.getsignal(number) for number in NUMBERS}
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)])
def test_first_signal_asks_for_a_stop(number: signal.Signals, code: int, left: list[bool]) -> None:
    said: list[str] = []
    with StopRequests(said.append) as requests:
        assert requests.stop == 0
        signal.raise_signal(number)
        assert requests.stop == code
    assert len(said) == 1
    assert number.name in said[0] and len(left) == (number == signal.SIGHUP) != ("send it again" in said[0])


@pytest.fixture
def left(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """How often the terminal was left, which the one that the tests run in shall not be."""
    times: list[bool] = []
    monkeypatch.setattr(signals, "_leave_terminal", lambda: times.append(True))
    return times


def test_a_terminal_hangs_up_once_and_under_nohup_not_at_all(left: list[bool]) -> None:
    with StopRequests() as requests:
        signal.raise_signal(signal.SIGHUP)
        signal.raise_signal(signal.SIGHUP)  # of the shell, after that of the system
        assert requests.stop == 129 and len(left) == 1
        signal.raise_signal(signal.SIGTERM)  # whoever asks for more gets it
    assert signal.getsignal(signal.SIGHUP) is signal.SIG_DFL
    with pytest.raises(SystemExit) as ended, before_training(lambda text: None):
        signal.raise_signal(signal.SIGHUP)
    assert ended.value.code == 129 and signal.getsignal(signal.SIGHUP) is signal.SIG_DFL
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    with before_training(lambda text: None), StopRequests() as requests:
        signal.raise_signal(signal.SIGHUP)
        assert requests.stop == 0
    assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN


def test_second_interrupt_ends_now_and_the_third_needs_no_python() -> None:
    with StopRequests() as requests:
        signal.raise_signal(signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
        assert signal.getsignal(signal.SIGINT) is signal.SIG_DFL
    assert requests.stop == 130
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_second_termination_ends_now_with_143() -> None:
    with StopRequests():
        signal.raise_signal(signal.SIGTERM)
        with pytest.raises(SystemExit) as ended:
            signal.raise_signal(signal.SIGTERM)
    assert ended.value.code == 143


def test_signals_of_two_kinds_are_one_request_and_the_first_gives_the_code() -> None:
    with StopRequests() as requests:
        signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGINT)
        assert requests.stop == 143


def test_checkpoint_request_is_taken_once() -> None:
    with StopRequests() as requests:
        assert not requests.take_checkpoint_request()
        signal.raise_signal(signal.SIGUSR1)
        assert requests.checkpoint_now
        assert requests.take_checkpoint_request()
        assert not requests.take_checkpoint_request()
        assert requests.stop == 0


def test_handlers_come_back_after_an_error() -> None:
    before = [signal.getsignal(number) for number in NUMBERS]
    with pytest.raises(ZeroDivisionError), StopRequests():
        assert [signal.getsignal(number) for number in NUMBERS] != before
        raise ZeroDivisionError
    assert [signal.getsignal(number) for number in NUMBERS] == before


def test_other_threads_leave_signals_alone() -> None:
    before = [signal.getsignal(number) for number in NUMBERS]
    seen: list[object] = []

    def work() -> None:
        with StopRequests() as requests:
            seen.extend([[signal.getsignal(number) for number in NUMBERS], requests.stop])

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [before, 0]


def test_before_there_is_a_step_to_finish() -> None:
    said: list[str] = []
    with pytest.raises(SystemExit) as ended, before_training(said.append):
        signal.raise_signal(signal.SIGUSR1)
        assert len(said) == 1 and "nothing to save" in said[0]
        with StopRequests(said.append) as requests:
            signal.raise_signal(signal.SIGTERM)
            assert requests.stop == 143
        signal.raise_signal(signal.SIGTERM)
    assert ended.value.code == 143 and "SIGTERM: ending" in said[-1]
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL and signal.getsignal(signal.SIGUSR1) is signal.SIG_DFL
