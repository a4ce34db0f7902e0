"""Runs a script as `python SCRIPT` would, watched."""

import builtins
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

from unstuck.record._run import Run
from unstuck.record._watch import Watch, new_folder


class Outcome(NamedTuple):
    """How a watched script ended."""

    run: Run
    status: int  # the exit status that Python would have given it
    interrupted: bool


def run_script(
    script: str | Path, argv: Sequence[str] = (), *, folder: Path | None = None, budget: float = 0.02
) -> Outcome:
    """Runs `script` with `argv` in this process as the main program, watched, and gives back what was recorded.

    An exception in the script is printed as Python prints it. ValueError where it cannot be read or does not compile.
    """
    path = Path(script)
    try:
        code = compile(path.read_bytes(), str(path), "exec")
    except OSError:
        raise ValueError(f"a Python script was needed, got {path}, which cannot be read: check the path") from None
    except (SyntaxError, ValueError) as error:
        raise ValueError(f"the script {path} does not compile: {error}") from None
    place = new_folder(path.stem) if folder is None else folder
    watcher = Watch(place, budget=budget)
    watcher.start(str(path), argv)
    outcome, status, interrupted = "finished", 0, False
    was = sys.argv, sys.path[0], sys.modules["__main__"]
    main = ModuleType("__main__")
    main.__dict__.update(__file__=str(path), __builtins__=builtins)
    sys.argv, sys.path[0], sys.modules["__main__"] = [str(path), *argv], str(path.resolve().parent), main
    try:
        exec(code, main.__dict__)
    except SystemExit as stop:
        status = _status(stop)
        outcome = "finished" if status == 0 else f"left with status {status}"
    except KeyboardInterrupt:
        outcome, status, interrupted = "interrupted", 130, True
    except BaseException as error:
        outcome, status = f"raised {type(error).__name__}", 1
        _print(error, path)
    finally:
        watcher.stop(outcome)
        sys.argv, sys.path[0], sys.modules["__main__"] = was
    return Outcome(Run(place), status, interrupted)


def _status(stop: SystemExit) -> int:
    if stop.code is None:
        return 0
    if isinstance(stop.code, int):
        return stop.code
    sys.stderr.write(f"{stop.code}\n")
    return 1


def _print(error: BaseException, path: Path) -> None:
    """The traceback as Python prints it, without the frames of the watcher."""
    trace = error.__traceback__
    while trace is not None and trace.tb_frame.f_code.co_filename != str(path):
        trace = trace.tb_next
    traceback.print_exception(error.with_traceback(trace or error.__traceback__))
