"""Ctrl-C, SIGTERM and SIGHUP: where Ray comes between them and us, and the second of them."""

from __future__ import annotations

import contextlib
import importlib
import os
import signal
import subprocess
import sys
import time
import weakref
from typing import Any

import pytest

from pipelines.process import stop
from pipelines.process.stop import SIGNALS, Stopped, handlers_kept, stoppable


@pytest.mark.parametrize(
    ("which", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)]
)
def test_a_signal_that_ray_hands_on_as_its_own_keyboard_interrupt_is_still_known(
    which: signal.Signals, code: int
) -> None:
    def ray_get() -> None:
        """Ray's C++ notes that a handler raised KeyboardInterrupt, and raises a bare one."""
        try:
            os.kill(os.getpid(), which)
            time.sleep(10)
        except KeyboardInterrupt:
            raise KeyboardInterrupt from None

    before = [signal.getsignal(one) for one in SIGNALS]
    with pytest.raises(KeyboardInterrupt, match=r"^stopped by ") as stopped, stoppable():
        ray_get()
    assert isinstance(stopped.value, Stopped)
    assert stopped.value.exit_code == code
    assert [signal.getsignal(one) for one in SIGNALS] == before


def test_a_signal_that_comes_while_python_has_the_lock_of_all_imports_is_heard_after_that() -> None:
    """Python calls it for a reference that has died, and drops what it raises."""
    code = importlib._bootstrap._get_module_lock.__code__  # type: ignore[attr-defined]
    inner = {one.co_name for one in code.co_consts if isinstance(one, type(code))}
    assert {(code.co_filename, "_get_module_lock"), (code.co_filename, "cb")} == stop.IMPORT_LOCKED
    assert "cb" in inner
    names: dict[str, Any] = {"os": os, "signal": signal}
    exec(compile("def cb(died): os.kill(os.getpid(), signal.SIGTERM)", code.co_filename, "exec"), names)

    def work() -> None:
        thing = {1}
        reference = weakref.ref(thing, names["cb"])
        del thing
        time.sleep(5)
        assert reference() is None

    with pytest.raises(Stopped, match="SIGTERM"), stoppable():
        work()


def test_a_keyboard_interrupt_without_a_signal_is_left_as_it_is() -> None:
    with pytest.raises(KeyboardInterrupt) as raised, stoppable():
        raise KeyboardInterrupt
    assert not isinstance(raised.value, Stopped)


@pytest.mark.parametrize("code", [15, 1])  # of ray.init before its node runs, and after
def test_sigterm_while_ray_starts_is_told_and_ends_with_143(code: int) -> None:
    def ray_init() -> None:
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(code))
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(10)

    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises((SystemExit, KeyboardInterrupt)) as stopped, stoppable(), handlers_kept():
        ray_init()
    assert isinstance(stopped.value, Stopped)
    assert str(stopped.value) == "stopped by SIGTERM."
    assert stopped.value.exit_code == 143
    assert signal.getsignal(signal.SIGTERM) == before


@pytest.mark.parametrize(("again", "codes"), [("SIGINT", [130]), ("SIGTERM", [143]), ("SIGHUP", [])])
def test_the_second_signal_ends_at_once_but_for_a_closed_terminal_of_which_two_tell(
    again: str, codes: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    ended: list[int] = []
    monkeypatch.setattr(stop, "GROUPS", set())
    monkeypatch.setattr(os, "_exit", lambda code: ended.append(code) or sys.exit())
    with stoppable():
        with pytest.raises(Stopped):
            os.kill(os.getpid(), signal.SIGTERM)
        with contextlib.suppress(SystemExit):
            os.kill(os.getpid(), getattr(signal, again))
    assert ended == codes


def test_what_was_started_in_groups_of_its_own_ends_with_the_second_signal(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    started = subprocess.Popen(
        [sys.executable, "-c", "input()"], stdin=subprocess.PIPE, start_new_session=True
    )
    monkeypatch.setattr(stop, "GROUPS", {started.pid})
    monkeypatch.setattr(os, "_exit", lambda code: sys.exit())
    with stoppable():
        with pytest.raises(Stopped):
            os.kill(os.getpid(), signal.SIGTERM)
        assert started.poll() is None
        with pytest.raises(SystemExit):
            os.kill(os.getpid(), signal.SIGTERM)
    assert started.wait(60) == -signal.SIGKILL


def test_under_nohup_a_closed_terminal_ends_nothing() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with stoppable():
            os.kill(os.getpid(), signal.SIGHUP)
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)
