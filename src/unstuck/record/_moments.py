"""Moments on the way of a run: looks at it while it goes on, an end before its time, a signal that ends the process."""

import contextlib
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

import torch

from unstuck.record._log import warn
from unstuck.record._run import Run

APART = 0.5  # seconds between two looks, at least

Tick = Callable[[Run], None]


class Stopped(BaseException):
    """A tick raises it to end the run; a script that goes on after any Exception does not catch it."""

    def __init__(self, code: str) -> None:
        super().__init__(f"stopped by unstuck: {code}")
        self.code = code


class Ticks:
    """Calls `tick(run)` at most twice a second, outside the run's own time. `seconds` is what that took.

    An error in it ends the ticks and not the run. Only `Stopped`, and an interrupt, pass.
    """

    def __init__(self, tick: Tick, run: Run) -> None:
        self.seconds = 0.0
        self._tick = tick
        self._run = run
        self._due = 0.0

    def __call__(self) -> float:
        """Ticks where it is due; the seconds that it took."""
        began = time.perf_counter()
        if began < self._due:
            return 0.0
        try:
            with self._run.paused(), torch.enable_grad():
                self._tick(self._run)
            self._due = time.perf_counter() + APART
        except Exception as error:
            self._due = float("inf")
            warn(f"looking at the run while it goes on ended: {type(error).__name__}: {error}; the training goes on")
        took = time.perf_counter() - began
        self.seconds += took
        return took


class _Ending:
    """A handler of SIGTERM that does some work and then ends the process as the handler before it would have."""

    def __init__(self, work: Callable[[], object], was: Any) -> None:
        self.was = was
        self.mask: set[Any] = set()  # of the signals that were blocked before a fork
        self._work = work

    def __call__(self, number: int, frame: FrameType | None) -> None:
        signal.signal(number, self.was)  # first of all: a second signal does not wait
        try:
            self._work()
        finally:
            os.kill(os.getpid(), number)


@contextlib.contextmanager
def on_sigterm(work: Callable[[], object]) -> Iterator[None]:
    """Does `work` before SIGTERM ends the process in the way that it would have ended it without us.

    A handler that the script puts in place afterwards is left alone, and so is a signal that was ignored. A forked
    process has the handler that it would have had.
    """
    was = signal.getsignal(signal.SIGTERM)
    if threading.current_thread() is not threading.main_thread() or not (was is signal.SIG_DFL or callable(was)):
        yield
        return
    ending = _Ending(work, was)
    signal.signal(signal.SIGTERM, ending)
    try:
        yield
    finally:
        if signal.getsignal(signal.SIGTERM) is ending:
            signal.signal(signal.SIGTERM, was)


def _before_fork() -> None:
    # Python forgets a signal that comes between the fork and its own first steps in the child. Without a handler the
    # child would have died of it, and whoever sent it (a pool that is closed) waits for that: so it is held back.
    ending = signal.getsignal(signal.SIGTERM)
    if isinstance(ending, _Ending):
        ending.mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})


def _in_parent() -> None:
    ending = signal.getsignal(signal.SIGTERM)
    if isinstance(ending, _Ending):
        signal.pthread_sigmask(signal.SIG_SETMASK, ending.mask)


def _in_child() -> None:
    ending = was = signal.getsignal(signal.SIGTERM)
    while isinstance(was, _Ending):
        was = was.was
    if isinstance(ending, _Ending):
        signal.signal(signal.SIGTERM, was)
        signal.pthread_sigmask(signal.SIG_SETMASK, ending.mask)


if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=_before_fork, after_in_parent=_in_parent, after_in_child=_in_child)
