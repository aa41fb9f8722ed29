"""Ctrl-C, SIGTERM and a closed terminal: the first ends a verb in good order, the second at once."""

from __future__ import annotations

import contextlib
import os
import select
import signal
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, wait
from types import FrameType
from typing import Any, TypeVar

T = TypeVar("T")
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
GROUPS: set[int] = set()
"""Process groups that who started them has not ended yet: they go with the process at its second signal."""
IMPORT_LOCKED = {("<frozen importlib._bootstrap>", name) for name in ("_get_module_lock", "cb")}
"""(file, function) of Python's import that take the lock of all imports. Raised there, Stopped would leave it
taken, and in "cb", which runs when a lock of a module goes, Python drops it: the verb would go on, until it
waits for another thread that imports."""


class Stopped(KeyboardInterrupt):
    """A signal came. Who knows where the work stands says it in a note (`add_note`)."""

    def __init__(self, signum: int) -> None:
        super().__init__(signum)
        self.exit_code = 128 + signum
        """130 for Ctrl-C, 143 for SIGTERM, 129 for SIGHUP, as shells count."""

    def __str__(self) -> str:
        signum = self.exit_code - 128
        name = "Ctrl-C" if signum == signal.SIGINT else signal.Signals(signum).name
        return " ".join([f"stopped by {name}.", *getattr(self, "__notes__", [])])


def exit_code(error: KeyboardInterrupt) -> int:
    """Of the signal that came; Ctrl-C's where it is not known."""
    return error.exit_code if isinstance(error, Stopped) else 128 + signal.SIGINT


@contextlib.contextmanager
def stoppable() -> Iterator[None]:
    """The signals raise Stopped in the block; the second of them ends the process without a word. A closed
    terminal is never the second: kernel and shell both tell of it. Under `nohup` nothing does."""
    came = 0

    def stop(signum: int, frame: FrameType | None) -> None:
        nonlocal came
        if frame and (frame.f_code.co_filename, frame.f_code.co_name) in IMPORT_LOCKED:
            main = threading.main_thread().ident
            assert main
            threading.Timer(0.02, signal.pthread_kill, (main, signum)).start()
            return
        if came and signum == signal.SIGHUP:
            return
        if came:
            for group in tuple(GROUPS):
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(group, signal.SIGKILL)
            os._exit(128 + signum)
        came = signum
        time.sleep(0.1)  # a `tee` ends by the same signal
        leave_closed_outputs()
        raise Stopped(signum)

    with contextlib.ExitStack() as restored:
        if threading.current_thread() is threading.main_thread():
            for which in SIGNALS:
                if which != signal.SIGHUP or signal.getsignal(which) != signal.SIG_IGN:
                    restored.callback(signal.signal, which, signal.signal(which, stop))
        try:
            yield
        except KeyboardInterrupt as error:
            # ray.get hands on a KeyboardInterrupt of its own, which does not say which signal it was.
            if isinstance(error, Stopped) or not came:
                raise
            raise Stopped(came) from None


def leave_closed_outputs() -> None:
    """What is still said goes nowhere where nobody can read it (a terminal that is closed, a `tee` that the
    same Ctrl-C ended): a verb must come to its end all the same."""
    outputs = select.poll()
    for stream in (1, 2):
        outputs.register(stream, 0)  # what is asked for is only whether it is gone
    for stream, _ in outputs.poll(0):
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream)


@contextlib.contextmanager
def held() -> Iterator[None]:
    """A signal that comes in the block is heard at its end. For what forks with Python in the child
    (`preexec_fn`): raised in a function that runs after a fork, as logging's, which gives its lock back,
    Stopped would be dropped by Python. The verb would go on, and wait for that lock for ever."""
    came: list[int] = []
    try:
        with contextlib.ExitStack() as restored:
            if threading.current_thread() is threading.main_thread():
                for which in SIGNALS:
                    if callable(signal.getsignal(which)):
                        before = signal.signal(which, lambda signum, frame: came.append(signum))
                        restored.callback(signal.signal, which, before)
            yield
    finally:
        if came:
            signal.raise_signal(came[0])


@contextlib.contextmanager
def handlers_kept() -> Iterator[None]:
    """What the block puts in place of the handlers of these signals is undone: Ray takes them for itself. Its
    own end the process, with 15 or 1; here that is Stopped, as everywhere."""
    before = {which: signal.getsignal(which) for which in SIGNALS}
    try:
        yield
    except SystemExit:
        raise Stopped(signal.SIGTERM) from None
    finally:
        if threading.current_thread() is threading.main_thread():
            for which, handler in before.items():
                signal.signal(which, handler)


def begun(work: Callable[[], T]) -> Future[T]:
    """`work` in a thread that ends with the process, whoever waits for it (`waited`). Also for what takes
    Ctrl-C for itself where it runs in the main thread, which then only waits; stopped, it leaves the work."""
    done: Future[T] = Future()

    def run() -> None:
        try:
            done.set_result(work())
        except BaseException as error:
            done.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    return done


def waited(done: Future[T], *beside: Future[Any] | None) -> T:
    """The result of `done`, or its exception; that of one of `beside` as soon as it has one."""
    while not done.done():
        wait([done], 0.2)  # a signal that another thread was given wakes nobody
        for other in beside:
            if other and other.done():
                other.result()
    return done.result()
