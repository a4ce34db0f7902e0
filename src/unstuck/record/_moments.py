"""Moments on the way of a run: looks at it while it goes on, an end before its time, a signal that ends the process."""

import contextlib
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from types import FrameType

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


@contextlib.contextmanager
def on_sigterm(work: Callable[[], object]) -> Iterator[None]:
    """Does `work` before SIGTERM ends the process in the way that it would have ended it without us.

    A handler that the script puts in place afterwards is left alone, and so is a signal that was ignored. A forked
    process ends at once.
    """
    was, process = signal.getsignal(signal.SIGTERM), os.getpid()
    if threading.current_thread() is not threading.main_thread() or not (was is signal.SIG_DFL or callable(was)):
        yield
        return

    def end(number: int, frame: FrameType | None) -> None:
        signal.signal(number, was)  # first of all: a second signal does not wait
        try:
            if os.getpid() == process:
                work()
        finally:
            os.kill(os.getpid(), number)

    signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        if signal.getsignal(signal.SIGTERM) is end:
            signal.signal(signal.SIGTERM, was)
