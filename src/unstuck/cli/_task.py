"""What the arguments of the command name: a run, a share, an objective in a file or of a run."""

import contextlib
import importlib.util
import inspect
import math
import sys
import traceback
from collections.abc import Iterator
from importlib.machinery import SourceFileLoader
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

import typer

if TYPE_CHECKING:
    from unstuck.objective import Objective

LOG = "log.jsonl"
CANNOT = 2  # exit status: bad input, or nothing could be told


def share(text: str) -> float:
    """`2%` or `0.02` as a number between 0 and 1."""
    try:
        value = float(text.removesuffix("%")) / (100 if text.endswith("%") else 1)
    except ValueError:
        value = math.nan
    if not 0 <= value <= 1:
        raise ValueError(
            f"a share of the time such as 2% or 0.02 was needed, got {text!r}: give one between 0% and 100%"
        )
    return value


def found(run: str | None) -> Path:
    """The folder of a run: as given, below unstuck-runs, or that of the latest one."""
    from unstuck.record import FOLDER, runs

    if run is not None:
        return next((p for p in (Path(run), FOLDER / run) if (p / LOG).is_file()), Path(run))
    known = runs()
    if not known:
        raise ValueError(f"a run folder was needed, but there is none below {FOLDER}: `unstuck run SCRIPT` makes one")
    return known[0].folder


@contextlib.contextmanager
def loaded(task: str) -> Iterator[tuple["Objective", str]]:
    """The objective that `FILE:NAME` or a run stands for, and a title for it."""
    from unstuck.record import Run

    folder = found(task)
    if (folder / LOG).is_file():
        objective = Run(folder).objective()
        yield objective, f"{folder.name}: the mean over {round(objective.weight)} recorded steps"
    else:
        with from_file(task) as objective:
            yield objective, task


@contextlib.contextmanager
def from_file(task: str) -> Iterator["Objective"]:
    """The objective that `FILE:NAME` stands for; what is printed meanwhile goes to stderr.

    An error of ours is one sentence; one of the user's code is shown as a traceback from that code on.
    """
    file, _, name = task.rpartition(":") if ":" in task and not Path(task).is_file() else (task, "", "")
    path = Path(file)
    title = path.stem
    while title in sys.modules:  # a file may be called json.py
        title = f"_{title}"
    loader = SourceFileLoader(title, str(path))
    spec = importlib.util.spec_from_file_location(title, path, loader=loader)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    try:
        code = compile(path.read_bytes(), str(path), "exec", dont_inherit=True)  # without leaving a __pycache__
    except OSError as error:
        raise ValueError(f"a Python file or a run was needed, but {path} cannot be read: {error.strerror}") from None
    except (SyntaxError, ValueError) as error:
        raise ValueError(f"a Python file was needed, but {path} does not compile: {error}") from None
    was = sys.path[:]
    sys.path.insert(0, str(path.resolve().parent))
    sys.modules[title] = module  # where dataclasses and pickle look for it
    try:
        with contextlib.redirect_stdout(sys.stderr):
            exec(code, module.__dict__)
            yield _objective(module, path, name or "objective")
    except SystemExit as stop:
        raise ValueError(f"an objective was needed, but {path} called sys.exit({stop.code!r})") from None
    except Exception as error:
        raise _explained(error, path) from None
    finally:
        sys.path[:] = was
        sys.modules.pop(title, None)


def _objective(module: ModuleType, path: Path, name: str) -> "Objective":
    from unstuck.objective import Objective

    if not hasattr(module, name):
        known = [key for key, value in vars(module).items() if isinstance(value, Objective)]
        hint = f"it has {', '.join(known)}" if known else "build an unstuck.Objective under this name"
        raise ValueError(f"{path} needs an attribute {name!r}, got none: {hint}")
    found, what = getattr(module, name), name
    if inspect.isroutine(found):
        try:
            inspect.signature(found).bind()
        except TypeError:
            raise ValueError(
                f"{name} needs to be a function without arguments, got {name}{inspect.signature(found)}"
            ) from None
        found, what = found(), f"{name}()"
    if not isinstance(found, Objective):
        kind = type(found).__name__
        raise ValueError(
            f"{what} in {path} needs to be an unstuck.Objective, or a function that returns one, got {kind}"
        )
    return found


def _explained(error: Exception, path: Path) -> Exception:
    """What to raise for an error in the user's code or in ours; a traceback of the former is printed."""
    trace = error.__traceback__
    files = [(f.f_code.co_name, Path(f.f_code.co_filename).resolve()) for f, _ in traceback.walk_tb(trace)]
    beside = [file.parent == path.resolve().parent for _, file in files]  # the user's file, or one that it imports
    # torch calls ours between the user's code and its own, which may be C and leave no frame
    innermost = [file for name, file in files if name != "__torch_function__"][-1]
    ours = innermost.is_relative_to(Path(__file__).resolve().parents[1])
    if ours and (isinstance(error, ValueError) or (isinstance(error, RuntimeError | TypeError) and not any(beside))):
        return ValueError(str(error))
    for _ in range(beside.index(True) if any(beside) else 0):
        trace = trace.tb_next if trace else None
    sys.excepthook(type(error), error.with_traceback(trace), trace)
    return typer.Exit(CANNOT)
