"""Where the watcher listens: torch's optimiser hooks, and a few calls wrapped for as long as the run is watched."""

import contextlib
import functools
import os
import time
from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor
from torch._compile import _disable_dynamo
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

CALLS = (  # whose order tells how a loop is built: a letter, and where the call lives
    ("z", torch.optim.Optimizer, "zero_grad"),
    ("z", torch.nn.Module, "zero_grad"),
    ("c", torch.nn.utils, "clip_grad_norm_"),
    ("c", torch.nn.utils, "clip_grad_value_"),
    ("c", torch.nn.utils.clip_grad, "clip_grad_norm_"),
    ("c", torch.nn.utils.clip_grad, "clip_grad_value_"),
    ("l", torch.optim.lr_scheduler.LRScheduler, "step"),
    ("l", torch.optim.lr_scheduler.ReduceLROnPlateau, "step"),
)


LONGEST = 64  # calls of a step whose order is told


class Listener(Protocol):
    """What the hooks call."""

    def optimizer_made(self, optimizer: torch.optim.Optimizer) -> None: ...
    def scaled(self, loss: Any, result: Any) -> None: ...
    def scale_updated(self) -> None: ...
    def backward_called(self, roots: list[Tensor]) -> None: ...
    def before_step(self, optimizer: torch.optim.Optimizer) -> None: ...
    def after_step(self, optimizer: torch.optim.Optimizer) -> None: ...
    def compiling(self) -> None: ...
    def gave_up(self, reason: str) -> None: ...
    def aside(self) -> contextlib.AbstractContextManager[None]: ...


class Hooks:
    """Puts the hooks in place and removes every one of them.

    A listener that fails costs the watcher, never the run: it is told, by `gave_up`, and not called again. A forked
    process (a loader's worker) is not listened to, nor is what happens while `paused`. `seconds` is the time spent in
    the listener.
    """

    def __init__(self, listener: Listener) -> None:
        self.seconds = 0.0
        self.paused = False
        self._listener = listener
        self._process = os.getpid()
        self._failed = False
        self._undo: list[Callable[[], None]] = []
        self._order: list[str] = []

    def put(self) -> None:
        before, after = self._guarded(self._listener.before_step), self._guarded(self._listener.after_step)
        self._undo = [
            register_optimizer_step_pre_hook(lambda optimizer, *_: before(optimizer)).remove,
            register_optimizer_step_post_hook(lambda optimizer, *_: after(optimizer)).remove,
            self._wrap(torch.autograd, "backward", before=self._roots),
            self._wrap(
                torch.optim.Optimizer, "__init__", after=lambda given, _: self._listener.optimizer_made(given[0])
            ),
            self._wrap(torch, "compile", before=lambda *_, **__: self._listener.compiling()),
            self._wrap(torch.amp.GradScaler, "scale", after=self._scaled),
            self._wrap(torch.amp.GradScaler, "update", after=lambda *_: self._listener.scale_updated()),
            self._around(torch.overrides, "has_torch_function", self._listener.aside),
            *(self._noted(owner, name, what) for what, owner, name in CALLS),
        ]

    def remove(self) -> None:
        self.paused = True  # for whoever holds on to a wrapped call
        while self._undo:
            self._undo.pop()()

    def taken_order(self) -> str:
        """The letters of the calls that led to a step, and s for the step."""
        order = "".join(self._order)
        self._order.clear()
        return order + "s"

    def _roots(self, roots: Any = None, *_: Any, tensors: Any = None, **__: Any) -> None:
        given = roots if roots is not None else tensors
        self._note("b")
        self._listener.backward_called([given] if isinstance(given, Tensor) else list(given or ()))

    def _scaled(self, given: tuple[Any, ...], result: Any) -> None:
        if len(given) > 1:
            self._listener.scaled(given[1], result)

    def _note(self, what: str) -> None:
        if not self.paused and len(self._order) < LONGEST:
            self._order.append(what)

    def _wrap(
        self,
        owner: Any,
        name: str,
        *,
        before: Callable[..., None] | None = None,
        after: Callable[[tuple[Any, ...], Any], None] | None = None,
    ) -> Callable[[], None]:
        """Calls `before` with what the call is given, and `after` with that and with its result."""
        original = getattr(owner, name)
        first = None if before is None else self._guarded(before)
        last = None if after is None else self._guarded(after)

        @functools.wraps(original)
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            if first is not None:
                first(*args, **kwargs)
            result = original(*args, **kwargs)
            if last is not None:
                last(args, result)
            return result

        return _exchange(owner, name, original, wrapped)

    def _around(
        self, owner: Any, name: str, around: Callable[[], contextlib.AbstractContextManager[None]]
    ) -> Callable[[], None]:
        original = getattr(owner, name)

        @functools.wraps(original)
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            with around():
                return original(*args, **kwargs)

        return _exchange(owner, name, original, wrapped)

    def _noted(self, owner: Any, name: str, what: str) -> Callable[[], None]:
        original = getattr(owner, name)

        @functools.wraps(original)
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            self._note(what)
            return original(*args, **kwargs)

        return _exchange(owner, name, original, wrapped)

    def _guarded(self, hook: Callable[..., None]) -> Callable[..., None]:
        def run(*args: Any, **kwargs: Any) -> None:
            if self._failed or self.paused or os.getpid() != self._process:
                return
            began = time.perf_counter()
            try:
                hook(*args, **kwargs)
            except Exception as error:
                self._failed = True
                self._listener.gave_up(f"{type(error).__name__}: {error}")
            self.seconds += time.perf_counter() - began

        return _disable_dynamo(run)  # where the script compiles its whole step, it is not to compile ours


def _exchange(owner: Any, name: str, original: Any, wrapped: Any) -> Callable[[], None]:
    def undo() -> None:
        if getattr(owner, name) is wrapped:  # else the script has wrapped it in turn
            setattr(owner, name, original)

    setattr(owner, name, wrapped)
    return undo
