"""Processes of their own for the tests: forks of this one, so that torch is not imported once more for each."""

import functools
import json
import os
import signal
import sys
import tempfile
import textwrap
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import distributed

import unstuck
import unstuck.report
from unstuck import cli


@dataclass
class Process:
    """A process that runs. Its output lies in two files."""

    pid: int
    out: Path
    err: Path

    def wait(self, seconds=100):
        """The exit status as Python's subprocess gives it: that of a killed process is negative."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                return os.waitstatus_to_exitcode(status)
            time.sleep(0.005)
        self.send(signal.SIGKILL)
        os.waitpid(self.pid, 0)
        raise AssertionError(f"still running after {seconds} s: {self.stderr}")

    def until(self, text, seconds=60):
        """Waits for a text on stdout or stderr."""
        end = time.monotonic() + seconds
        while text not in self.stdout + self.stderr:
            assert time.monotonic() < end, self.stdout + self.stderr
            time.sleep(0.002)

    def send(self, number):
        os.kill(self.pid, number)

    @property
    def stdout(self):
        return self.out.read_text()

    @property
    def stderr(self):
        return self.err.read_text()


def fork(work: Callable[[], object]) -> Process:
    """Runs `work` in a process of its own, which ends with the status that `work` gives to sys.exit."""
    _warm()
    folder = Path(tempfile.mkdtemp(dir=Path.cwd(), prefix="process-"))
    out, err = folder / "stdout", folder / "stderr"
    files = [os.open(path, os.O_WRONLY | os.O_CREAT) for path in (out, err)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pid = os.fork()
    if pid:
        for file in files:
            os.close(file)
        return Process(pid, out, err)
    status = 1
    try:
        for file, stream in zip(files, (1, 2), strict=True):
            os.dup2(file, stream)
        sys.stdin = Path(os.devnull).open()  # noqa: SIM115
        sys.stdout, sys.stderr = os.fdopen(1, "w"), os.fdopen(2, "w", buffering=1, errors="backslashreplace")
        warnings.resetwarnings()
        warnings.showwarning = lambda *said: sys.stderr.write(warnings.formatwarning(*said[:4]))
        work()
        status = 0
    except SystemExit as stop:
        status = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    except BaseException as error:
        sys.excepthook(type(error), error, error.__traceback__)
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status % 256)


def together(work: Callable[[int], object], ranks=2) -> list[Process]:
    """Runs `work(rank)` in a gloo group of processes, in the environment that torchrun gives them."""
    place = Path(tempfile.mkdtemp(dir=Path.cwd(), prefix="group-")).absolute() / "meet"

    def of_rank(rank):
        os.environ.update(WORLD_SIZE=str(ranks), RANK=str(rank))
        distributed.init_process_group("gloo", init_method=place.as_uri(), rank=rank, world_size=ranks)
        work(rank)
        distributed.barrier()
        distributed.destroy_process_group()

    running = [fork(functools.partial(of_rank, rank)) for rank in range(ranks)]
    for one in running:
        assert one.wait() == 0, one.stderr
    return running


def _warm():
    """Has everything imported that torch imports at the first step and unstuck at its first verdict."""
    if "torch._dynamo" not in sys.modules:
        w = torch.zeros(1, requires_grad=True)
        torch.optim.SGD([w], lr=0.1).step()
    assert unstuck.report


def start(*args):
    """A process that runs `unstuck ARGS`."""

    def work():
        sys.argv = ["unstuck", *map(str, args)]
        cli.main()

    return fork(work)


def command(*args):
    """The exit status, stdout and stderr of `unstuck ARGS`."""
    running = start(*args)
    return running.wait(), running.stdout, running.stderr


def write(name, text):
    path = Path(name)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(textwrap.dedent(text))
    return path


def one_sentence(stderr):
    """What a user reads when something is wrong with what he gave."""
    lines = stderr.strip().splitlines()
    assert len(lines) == 1, stderr
    assert lines[0].startswith("unstuck: ")
    assert "Traceback" not in stderr
    return lines[0]


def strictly(text):
    def refuse(word):
        raise AssertionError(f"{word} is no JSON")

    return json.loads(text, parse_constant=refuse)
