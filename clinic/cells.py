"""One cell of the clinic: what is run, and a process of its own to run it in."""

import contextlib
import os
import signal
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

import unstuck.report  # so that a process begins warm
from clinic import train  # noqa: F401  for the same reason

HERE = Path(__file__).parent
SCRIPTS = {f"heldout/{path.stem}": path for path in sorted((HERE / "heldout").glob("[a-z]*.py"))}
LONGEST = 300  # seconds, after which a cell is given up


@dataclass(frozen=True)
class Case:
    """What is run: a program of the clinic, or a script of its held-out folder."""

    program: str
    fault: str = ""
    strength: str = ""
    variant: str = ""
    optimiser: str = ""
    seed: int = 0

    @property
    def name(self) -> str:
        parts = (self.program, self.fault, self.strength, self.variant, self.optimiser, str(self.seed))
        return " ".join(part for part in parts if part)

    @property
    def command(self) -> list[str]:
        """What `unstuck run` is given."""
        if self.program in SCRIPTS:
            choice = ["--fault", self.fault] if self.fault else []
            return [str(SCRIPTS[self.program]), "--seed", str(self.seed), *choice]
        words = ("fault", "strength", "variant", "optimiser", "seed")
        options = [word for key in words if (value := getattr(self, key)) != "" for word in (f"--{key}", str(value))]
        return ["-m", "clinic.train", self.program, *options]


def forked(work: Callable[[], object], folder: str | Path) -> tuple[int, str, float]:
    """Runs `work` in a fork: its exit status, what it printed on either stream, and the seconds that it took."""
    _warm()
    place = Path(folder, "printed")
    began = time.perf_counter()
    file = os.open(place, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that of forks in a process with threads: torch's are idle
        pid = os.fork()
    if not pid:
        _child(work, file)
    os.close(file)
    status = _wait(pid)
    return status, place.read_text(errors="replace"), time.perf_counter() - began


def _child(work: Callable[[], object], file: int) -> None:
    status = 1
    try:
        os.setpgid(0, 0)
        for stream in (1, 2):
            os.dup2(file, stream)
        sys.stdin = Path(os.devnull).open()  # noqa: SIM115
        sys.stdout, sys.stderr = os.fdopen(1, "w"), os.fdopen(2, "w", buffering=1, errors="backslashreplace")
        work()
        status = 0
    except SystemExit as stop:
        status = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    except BaseException as error:
        sys.excepthook(type(error), error, error.__traceback__)
    finally:
        with contextlib.suppress(OSError, ValueError):
            sys.stdout.flush()
        os._exit(status % 256)


def _wait(pid: int) -> int:
    end = time.monotonic() + LONGEST
    while time.monotonic() < end:
        ended, status = os.waitpid(pid, os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.01)
    with contextlib.suppress(OSError):
        os.killpg(pid, signal.SIGKILL)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def _warm() -> None:
    """Has everything imported that torch imports at the first step and unstuck at its first verdict."""
    torch.set_num_threads(1)
    if "torch._dynamo" not in sys.modules:
        w = torch.zeros(1, requires_grad=True)
        torch.optim.SGD([w], lr=0.1).step()
    assert unstuck.report
