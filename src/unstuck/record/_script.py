"""Runs a script as `python SCRIPT` would, or a module as `python -m MODULE` would, watched."""

import atexit
import builtins
import contextlib
import importlib.util
import os
import signal
import sys
import warnings
from collections.abc import Iterator, Sequence
from importlib.machinery import ModuleSpec, SourceFileLoader
from pathlib import Path
from types import CodeType, ModuleType, TracebackType
from typing import Any, NamedTuple

import torch

from unstuck.record._log import NAME, placed
from unstuck.record._moments import Stopped, Tick, on_sigterm
from unstuck.record._ranks import ranked
from unstuck.record._run import Run
from unstuck.record._runs import new_folder
from unstuck.record._traces import direct
from unstuck.record._watch import Watch

WATCHER = tuple(str(Path(__file__).parents[1] / room) for room in ("record", "objective"))  # whose frames are ours


class Outcome(NamedTuple):
    """How a watched script ended."""

    run: Run | None  # None where the run folder could not be written
    status: int  # the exit status that Python would have given it
    interrupted: bool


class _NoModule(ValueError):
    """There is no such module, or it cannot be run: no error of the user's code."""


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
    place = new_folder(path.stem) if folder is None else folder
    watcher = Watch(placed(place), budget=budget, tick=tick)  # the script may change the working directory
    with _as_main([str(script), *argv], str(Path(file).resolve().parent)) as main:
        loader = SourceFileLoader("__main__", file)
        main.__dict__.update(__file__=file, __cached__=None, __loader__=loader)
        ending, status = _watched(watcher, str(script), main, code)
    return _outcome(place, watcher.rank, ending, status)


def run_module(
    module: str,
    argv: Sequence[str] = (),
    *,
    folder: Path | None = None,
    budget: float = 0.02,
    tick: Tick | None = None,
) -> Outcome:
    """Runs `module` with `argv` as `python -m MODULE` would, watched: like `run_script`, whose errors it shares.

    ValueError where there is no such module or it cannot be run. What a package does when it is imported on the way
    to the module is not watched; where that fails, SystemExit carries the status.
    """
    with _as_main(["-m", *argv], str(Path.cwd())) as main:
        spec, code = _found(module)
        place = new_folder(module) if folder is None else folder
        watcher = Watch(placed(place), budget=budget, tick=tick)
        main.__dict__.update(__spec__=spec, __package__=spec.parent, __loader__=spec.loader)
        main.__dict__.update(__file__=spec.origin, __cached__=spec.cached)
        sys.argv[0] = str(spec.origin)
        ending, status = _watched(watcher, module, main, code)
    return _outcome(place, watcher.rank, ending, status)


def _watched(watcher: Watch, name: str, main: ModuleType, code: CodeType) -> tuple[str, int]:
    """Runs the code in the main module: how it ended, in words and as the status."""
    process = os.getpid()
    ending, status = "finished", 0
    watcher.start(name, sys.argv[1:])
    try:
        with on_sigterm(lambda: watcher.stop("terminated")):
            exec(code, main.__dict__)
    except SystemExit as stop:
        status = _status(stop)
        ending = f"left with status {status}" if status else ending
    except KeyboardInterrupt:
        ending, status = "interrupted", 130
    except Stopped as stop:
        ending, status = str(stop), 1
    except BaseException as error:
        ending, status = f"raised {type(error).__name__}", 1
        status = _print(error)
    finally:
        watcher.stop(ending)
    if os.getpid() != process:
        raise SystemExit(status)  # a fork of the script ends where the script ends
    return ending, status


def _outcome(place: Path, rank: int | None, ending: str, status: int) -> Outcome:
    log = place / ranked(NAME, rank)
    return Outcome(Run(place, rank=rank) if log.is_file() else None, status, ending == "interrupted")


def _compiled(path: Path, file: str) -> CodeType:
    try:
        return compile(path.read_bytes(), file, "exec", dont_inherit=True)
    except OSError as error:
        raise ValueError(f"a Python script was needed, but {path} cannot be read: {error.strerror}") from None
    except (SyntaxError, ValueError) as error:
        raise ValueError(f"a Python script was needed, but {path} does not compile: {error}") from None


def _found(module: str) -> tuple[ModuleSpec, CodeType]:
    """The module that `python -m` would run, and its code; the packages that it lies in are imported."""
    try:
        return _looked_up(module)
    except (_NoModule, SystemExit, KeyboardInterrupt):
        raise
    except BaseException as error:  # a package of the user's fails
        raise SystemExit(_print(error)) from None


def _looked_up(module: str) -> tuple[ModuleSpec, CodeType]:
    package = module.rpartition(".")[0]
    try:
        if package and not module.startswith("."):
            __import__(package)
        spec = None if module.startswith(".") else importlib.util.find_spec(module)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{module}.".startswith(f"{error.name}."):
            raise  # something else is missing
        raise _NoModule(f"a module was needed, but there is none called {module}: {error}") from None
    except ValueError:  # no name, or a module that has no spec
        spec = None
    if spec is None:
        raise _NoModule(f"a module was needed, but there is none called {module}: look at its name and the folder")
    if spec.submodule_search_locations is not None:
        __import__(module)
        if module.endswith(".__main__") or importlib.util.find_spec(f"{module}.__main__") is None:
            raise _NoModule(f"a module that can be run was needed, but the package {module} has no __main__")
        return _looked_up(f"{module}.__main__")
    try:
        code = getattr(spec.loader, "get_code", lambda _: None)(spec.name)
    except SyntaxError as error:
        raise _NoModule(f"a Python module was needed, but {module} does not compile: {error}") from None
    if code is None:
        raise _NoModule(f"a Python module was needed, but {module} has no code of Python")
    return spec, code


class _Place(NamedTuple):
    """Where a program finds itself, as far as the one that runs it and the one that is run must not share it."""

    main: ModuleType
    argv: list[str]
    path: list[str]
    folder: str | None
    streams: tuple[Any, Any, Any]
    on_interrupt: Any
    filters: list[Any]  # of warnings
    torch: tuple[bool, torch.dtype, torch.device]


def _here() -> _Place:
    folder = None
    with contextlib.suppress(OSError):  # it may have been deleted
        folder = str(Path.cwd())
    return _Place(
        sys.modules["__main__"],
        sys.argv,
        sys.path[:],
        folder,
        (sys.stdin, sys.stdout, sys.stderr),
        signal.getsignal(signal.SIGINT),
        [*warnings.filters],
        (torch.is_grad_enabled(), torch.get_default_dtype(), torch.get_default_device()),
    )


def _go(place: _Place) -> None:
    sys.modules["__main__"], sys.argv, sys.path[:] = place.main, place.argv, place.path
    sys.stdin, sys.stdout, sys.stderr = place.streams
    with contextlib.suppress(OSError):
        os.chdir(place.folder or ".")
    if place.on_interrupt is not signal.getsignal(signal.SIGINT):
        with contextlib.suppress(ValueError, TypeError):  # outside the main thread; a handler that is not Python's
            signal.signal(signal.SIGINT, place.on_interrupt)
    with warnings.catch_warnings():
        warnings.resetwarnings()  # so that Python notices the change
    filters: Any = warnings.filters
    filters[:] = place.filters
    grad, dtype, device = place.torch
    torch.set_grad_enabled(grad)
    torch.set_default_dtype(dtype)
    if torch.get_default_device() != device:
        torch.set_default_device(None if device.type == "cpu" else device)


@contextlib.contextmanager
def _as_main(argv: list[str], folder: str) -> Iterator[ModuleType]:
    """The module that the script runs in, in place as the main program; afterwards all is as it was.

    What the script has registered to run at exit finds its own place again then.
    """
    was, registered = _here(), atexit._ncallbacks()  # noqa: SLF001
    main = ModuleType("__main__")
    main.__dict__.update(__builtins__=builtins, __annotations__={})
    sys.argv, sys.modules["__main__"] = argv, main
    if not sys.flags.safe_path:
        sys.path[0] = folder
    try:
        yield main
    finally:
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError, ValueError, AttributeError):
                stream.flush()
        left = _here()
        _go(was)
        if atexit._ncallbacks() > registered:  # noqa: SLF001
            atexit.register(_go, left)


def _status(stop: SystemExit) -> int:
    if stop.code is None:
        return 0
    if isinstance(stop.code, int):
        return stop.code
    sys.stderr.write(f"{stop.code}\n")
    return 1


def _print(error: BaseException) -> int:
    """Prints the traceback as Python does, without the watcher's frames; the exit status."""
    todo: list[BaseException | None] = [error]
    seen: set[int] = set()
    while todo:
        one = todo.pop()
        if one is not None and id(one) not in seen:
            seen.add(id(one))
            one.__traceback__ = _cleaned(one.__traceback__)
            todo += [one.__cause__, one.__context__]
    try:
        sys.excepthook(type(error), error, error.__traceback__)
    except SystemExit as stop:
        return _status(stop)
    except Exception as failure:  # so Python has it where the hook of a script fails
        sys.stderr.write("Error in sys.excepthook:\n")
        failure.__traceback__ = _cleaned(failure.__traceback__)
        if failure.__context__ is error:
            failure.__context__ = None
        sys.__excepthook__(type(failure), failure, failure.__traceback__)
        sys.stderr.write("\nOriginal exception was:\n")
        sys.__excepthook__(type(error), error, error.__traceback__)
    return 1


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
    for place in reversed(list(direct(kept))):
        clean = TracebackType(clean, *place)
    return clean
