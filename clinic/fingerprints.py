"""What a kept result depends on, in sixteen digits: where they have changed, it is measured again."""

import ast
import functools
import hashlib
import inspect
from collections.abc import Iterator
from pathlib import Path
from types import CodeType
from typing import Any

import torch

import unstuck
from clinic import data, programs, training
from clinic.cells import SCRIPTS, Case
from clinic.faults import FAULTS
from clinic.healthy import OPTIMISERS, RATES, VARIANTS
from unstuck import cli


def digits(*parts: str) -> str:
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]


def of_training(case: Case) -> str:
    """Of what a kept training depends on: its own sources, the rooms that record it, the command, torch."""
    return digits(of_case(case), of_room("record"), inspect.getsource(cli.run), torch.__version__)


def of_diagnosis() -> str:
    """Of what the diagnosis of a kept training depends on."""
    return digits(of_room("diagnosis"), torch.__version__)


@functools.cache
def of_room(room: str) -> str:
    """Of the code of a room of unstuck and of all that it imports; comments do not count."""
    found: dict[str, str] = {}
    todo = [room]
    while todo:
        name = todo.pop()
        if name not in found:
            trees = [ast.parse(path.read_text(encoding="utf-8")) for path in _files(name)]
            found[name] = digits(*map(ast.dump, trees))
            todo += [other for tree in trees for other in _imported(tree)]
    return digits(*(found[name] for name in sorted(found)))


def _files(room: str) -> list[Path]:
    house = Path(unstuck.__file__).parent
    return sorted((house / room).rglob("*.py")) or [house / f"{room}.py"]


def _imported(tree: ast.AST) -> Iterator[str]:
    """The rooms that a file imports from."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("unstuck."):
            yield str(node.module).split(".")[1]


def of_case(case: Case) -> str:
    """Of the sources of what is run."""
    if case.program in SCRIPTS:
        return digits(SCRIPTS[case.program].read_text())
    parts = [*_whole(data), *_whole(training), *_whole(inspect.getmodule(programs.PROGRAMS[case.program]))]
    if case.fault:
        fault = FAULTS[case.fault]
        parts += [*sources(fault.change), *sources(fault.value(case.program, case.strength))]
    if case.variant:
        parts += sources(VARIANTS[case.variant].change)
    if case.optimiser:
        parts += [*sources(OPTIMISERS[case.optimiser]), str(RATES[case.optimiser].get(case.program))]
    return digits(*parts)


@functools.cache
def _whole(module: Any) -> tuple[str, ...]:
    return (inspect.getsource(module),)


def sources(value: Any) -> list[str]:
    """The source of a function or class of the clinic, and of those that it names; of any other value what it shows."""
    found: dict[Any, str] = {}
    todo = [value]
    while todo:
        one = todo.pop()
        if _ours(one) and one not in found:
            found[one] = inspect.getsource(one)
            methods = vars(one).values() if inspect.isclass(one) else (one,)
            for f in filter(inspect.isfunction, methods):
                named = (f.__globals__.get(name) for name in _names(f.__code__))
                todo += [other for other in named if _ours(other)]
    return list(found.values()) or [repr(value)]


def _ours(value: Any) -> bool:
    is_source = inspect.isfunction(value) or inspect.isclass(value)
    return is_source and value.__module__.startswith("clinic.")


def _names(code: CodeType) -> Iterator[str]:
    """What the code and the functions inside it call by name."""
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _names(constant)
