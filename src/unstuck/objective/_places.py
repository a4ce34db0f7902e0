"""Where a script makes a call: in which module, and in which line."""

import sys
import threading
import weakref
from collections.abc import Callable, Iterable, Sequence
from types import CodeType
from typing import Any

import torch
from torch import nn
from torch.nn.modules import module as torch_module
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook

Inside = tuple[weakref.ref[nn.Module], type[nn.Module]]  # a module that may be gone when its name is asked for
Spot = tuple[CodeType, int]  # a place in somebody's code, whose line is looked up later
Names = Callable[[Sequence[nn.Module]], Sequence[str]]

_is_compiling = torch.compiler.is_compiling
_OURS = ("torch", "unstuck", "contextlib")
_PASS, _FOUND, _END = range(3)
_files: dict[str, int] = {str(torch_module.__file__): _END}  # what a search for the line of a call does there


class Modules:
    """The modules that one thread is calling, from `follow()` to `leave()`, where there is somebody to name them.

    A global pair of hooks tells. An exception ends a module's call as a return does; after one that is no `Exception`
    (an interrupt that the script survives) the modules in which it was raised count until an outer one returns.
    """

    def __init__(self, names: Names | None) -> None:
        self.names = names
        self._stack: list[Inside] = []
        self._handles: list[Any] = []

    @property
    def innermost(self) -> Inside | None:
        return self._stack[-1] if self._stack else None

    def name_of(self, inside: Inside) -> str:
        return names_of([inside], self.names)[id(inside)]

    def follow(self) -> None:
        """Begins, in the thread that calls it."""
        if self._handles or self.names is None:
            return
        stack, thread, here, ref = self._stack, threading.get_ident(), threading.get_ident, weakref.ref

        def enter(module: nn.Module, _: Any) -> None:
            if not _is_compiling() and here() == thread:
                stack.append((ref(module), type(module)))

        def end(module: nn.Module, *_: Any) -> None:
            if _is_compiling() or here() != thread:
                return
            for k in range(len(stack) - 1, -1, -1):  # the last but for what an interrupt has left
                if stack[k][0]() is module:
                    del stack[k:]
                    return

        self._handles = [
            register_module_forward_pre_hook(enter),
            register_module_forward_hook(end, always_call=True),
        ]

    def leave(self) -> None:
        """Takes the hooks away."""
        while self._handles:
            self._handles.pop().remove()
        self._stack.clear()


def spot() -> Spot | None:
    """Where outside torch and this package the current call of a recorder was made, down to the innermost module.

    None where that module is one of torch's own: its name tells as much.
    """
    frame = sys._getframe(3)
    while frame is not None:
        code = frame.f_code
        file = _files.get(code.co_filename)
        if file is None:
            file = _learn(code.co_filename, frame.f_globals.get("__name__", ""))
        if file != _PASS:
            return (code, frame.f_lasti) if file == _FOUND else None
        frame = frame.f_back
    return None


def _learn(file: str, module: str) -> int:
    found = _PASS if module.partition(".")[0] in _OURS else _FOUND
    if not file.startswith("<"):  # what is made on the fly may be anybody's
        _files[file] = found
    return found


def line_of(place: Spot | None) -> str:
    """A place as file:line."""
    if place is None:
        return ""
    code, at = place
    line = next((line for start, end, line in code.co_lines() if start <= at < end), None)
    return code.co_filename if line is None else f"{code.co_filename}:{line}"


def names_of(inside: Iterable[Inside | None], names: Names | None) -> dict[int, str]:
    """The names of modules by the id of their `Inside`: their class's name where they have none, or are gone."""
    found = {id(x): x for x in inside if x is not None}
    alive = {key: module for key, x in found.items() if (module := x[0]()) is not None}
    named = dict(zip(alive, names(list(alive.values())), strict=True)) if names is not None else {}
    return {key: named.get(key) or x[1].__name__ for key, x in found.items()}
