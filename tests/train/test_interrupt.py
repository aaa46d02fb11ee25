"""Signals: the first is noted, the second ends the program, what is ignored stays ignored."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator

import pytest

from gold.train.interrupt import NAMES, Interrupt, ended_by


@pytest.fixture(autouse=True)
def _own_signals() -> Iterator[None]:
    """Whoever started the tests may have had them ignore signals."""
    before = {number: signal.signal(number, signal.SIG_DFL) for number in NAMES}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("first", NAMES)
@pytest.mark.parametrize("second", NAMES)
def test_the_first_is_noted_and_the_second_ends_the_program(
    first: signal.Signals, second: signal.Signals, capfd: pytest.CaptureFixture[str]
) -> None:
    with Interrupt() as interrupt:
        assert interrupt.caught == 0
        os.kill(os.getpid(), first)
        assert interrupt.caught == first
        assert capfd.readouterr().err.count("\n") == 1
        with pytest.raises((KeyboardInterrupt, SystemExit)) as ended:
            os.kill(os.getpid(), second)
        assert interrupt.caught == first
    if second == signal.SIGINT:
        assert ended.type is KeyboardInterrupt
    else:
        assert ended.value.code == 128 + second  # type: ignore[union-attr]
    assert all(signal.getsignal(number) is signal.SIG_DFL for number in NAMES)


def test_of_several_processes_the_first_tells(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("RANK", "1")
    with Interrupt() as interrupt:
        os.kill(os.getpid(), signal.SIGINT)
        assert interrupt.caught == signal.SIGINT
    assert capfd.readouterr().err == ""


def test_what_the_process_was_started_to_ignore_stays_ignored() -> None:
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    with Interrupt() as interrupt:
        os.kill(os.getpid(), signal.SIGHUP)
        assert interrupt.caught == 0
    assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN


def test_a_closed_terminal_is_no_error_of_the_handler() -> None:
    kept = os.dup(2)
    try:
        with Interrupt() as interrupt:
            os.close(2)
            os.kill(os.getpid(), signal.SIGHUP)
            assert interrupt.caught == signal.SIGHUP
    finally:
        os.dup2(kept, 2)
        os.close(kept)


def test_an_exit_code_is_that_of_the_signal() -> None:
    codes = {number: getattr(ended_by(number), "code", 130) for number in NAMES}
    assert codes == {signal.SIGINT: 130, signal.SIGTERM: 143, signal.SIGHUP: 129}
