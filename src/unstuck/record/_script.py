"""Runs a script as `python SCRIPT` would, watched."""

import builtins
import contextlib
import os
import sys
from collections.abc import Iterator, Sequence
from importlib.machinery import SourceFileLoader
from pathlib import Path
from types import CodeType, ModuleType, TracebackType
from typing import NamedTuple

from unstuck.record._log import NAME
from unstuck.record._moments import Stopped, Tick, on_sigterm
from unstuck.record._run import Run
from unstuck.record._watch import Watch, new_folder

WATCHER = tuple(str(Path(__file__).parents[1] / room) for room in ("record", "objective"))  # whose frames are ours


class Outcome(NamedTuple):
    """How a watched script ended."""

    run: Run | None  # None where the run folder could not be written
    status: int  # the exit status that Python would have given it
    interrupted: bool


def run_script(
    script: str | Path,
    argv: Sequence[str] = (),
    *,
    folder: Path | None = None,
    budget: float = 0.02,
    tick: Tick | None = None,
) -> Outcome:
    """Runs `script` with `argv` in this process as the main program, watched, and gives back what was recorded.

    An exception in the script is printed as Python prints it. ValueError where it cannot be read or does not compile.
    `tick(run)` is called after a step, at most twice a second; where it raises Stopped, the status is 1.
    """
    path = Path(script)
    file = str(script) if path.is_absolute() else f"{Path.cwd()}/{script}"  # as Python calls it, `./` and all
    code = _compiled(path, file)
    process = os.getpid()
    place = new_folder(path.stem) if folder is None else folder
    watcher = Watch(place, budget=budget, tick=tick)
    watcher.start(str(script), argv)
    outcome, status = "finished", 0
    terminated = on_sigterm(lambda: watcher.stop("terminated"))
    with terminated, _as_main(file, [str(script), *argv]) as main:
        try:
            exec(code, main.__dict__)
        except SystemExit as stop:
            status = _status(stop)
            outcome = f"left with status {status}" if status else outcome
        except KeyboardInterrupt:
            outcome, status = "interrupted", 130
        except Stopped as stop:
            outcome, status = str(stop), 1
        except BaseException as error:
            outcome, status = f"raised {type(error).__name__}", 1
            _print(error, code)
        finally:
            watcher.stop(outcome)
    if os.getpid() != process:
        raise SystemExit(status)  # a fork of the script ends where the script ends
    with contextlib.suppress(OSError, ValueError):
        sys.stdout.flush()
    return Outcome(Run(place) if (place / NAME).is_file() else None, status, outcome == "interrupted")


def _compiled(path: Path, file: str) -> CodeType:
    try:
        return compile(path.read_bytes(), file, "exec", dont_inherit=True)
    except OSError as error:
        raise ValueError(f"a Python script was needed, but {path} cannot be read: {error.strerror}") from None
    except (SyntaxError, ValueError) as error:
        raise ValueError(f"a Python script was needed, but {path} does not compile: {error}") from None


@contextlib.contextmanager
def _as_main(file: str, argv: list[str]) -> Iterator[ModuleType]:
    """The module that the script runs in, in place as the main program."""
    was = sys.argv, sys.path[:], sys.modules["__main__"]
    main = ModuleType("__main__")
    loader = SourceFileLoader("__main__", file)
    main.__dict__.update(__file__=file, __builtins__=builtins, __annotations__={}, __cached__=None, __loader__=loader)
    sys.argv, sys.modules["__main__"] = argv, main
    sys.path[0] = str(Path(file).resolve().parent)
    try:
        yield main
    finally:
        sys.argv, sys.path[:], sys.modules["__main__"] = was


def _status(stop: SystemExit) -> int:
    if stop.code is None:
        return 0
    if isinstance(stop.code, int):
        return stop.code
    sys.stderr.write(f"{stop.code}\n")
    return 1


def _print(error: BaseException, code: CodeType) -> None:
    """The traceback as Python prints it: from the script on, without the watcher's frames."""
    trace = error.__traceback__
    while trace is not None and trace.tb_frame.f_code is not code:
        trace = trace.tb_next
    error.__traceback__ = trace
    todo: list[BaseException | None] = [error]
    seen: set[int] = set()
    while todo:
        one = todo.pop()
        if one is not None and id(one) not in seen:
            seen.add(id(one))
            one.__traceback__ = _cleaned(one.__traceback__)
            todo += [one.__cause__, one.__context__]
    sys.excepthook(type(error), error, error.__traceback__)


def _cleaned(trace: TracebackType | None) -> TracebackType | None:
    """A traceback without the watcher's frames, and without the detour that torch takes to come to them."""
    kept: list[TracebackType] = []
    while trace is not None:
        if not trace.tb_frame.f_code.co_filename.startswith(WATCHER):
            kept.append(trace)
        elif kept and kept[-1].tb_frame.f_code.co_name == "handle_torch_function":
            kept[-2:] = []  # and the function that asked for it: it comes again, below ours
        trace = trace.tb_next
    clean: TracebackType | None = None
    for one in reversed(kept):
        clean = TracebackType(clean, one.tb_frame, one.tb_lasti, one.tb_lineno)
    return clean
