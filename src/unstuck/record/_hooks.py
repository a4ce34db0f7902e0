"""Where the watcher listens: torch's optimiser hooks, and a few calls wrapped for as long as the run is watched."""

import contextlib
import functools
import os
import weakref
from collections import deque
from collections.abc import Callable
from time import perf_counter
from typing import Any, Protocol

import torch
from torch import Tensor
from torch._compile import _disable_dynamo
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from unstuck.objective import caller

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


LONGEST = 64  # calls of a step whose order is told: the last ones
_is_traced = torch.compiler.is_dynamo_compiling
_CUDA = torch.backends.cuda.is_built()
_PUT: "weakref.WeakSet[Hooks]" = weakref.WeakSet()


class Listener(Protocol):
    """What the hooks call."""

    def optimizer_made(self, optimizer: torch.optim.Optimizer) -> None: ...
    def scaled(self, loss: Any, result: Any) -> None: ...
    def scale_updated(self) -> None: ...
    def backward_called(self, roots: tuple[Tensor, ...]) -> None: ...
    def before_step(self, optimizer: torch.optim.Optimizer) -> None: ...
    def after_step(self, optimizer: torch.optim.Optimizer) -> None: ...
    def compiling(self) -> None: ...
    def gave_up(self, reason: str) -> None: ...
    def aside(self) -> contextlib.AbstractContextManager[None]: ...


class Hooks:
    """Puts the hooks in place and removes every one of them.

    A listener that fails costs the watcher, never the run: it is told, by `gave_up`, and not called again. A forked
    process (a loader's worker) is not listened to, nor is what happens while `paused`. `seconds` is the time spent in
    the listener. `order` has a letter for each call since it was last cleared.
    """

    def __init__(self, listener: Listener) -> None:
        self.seconds = 0.0
        self.order: deque[str] = deque(maxlen=LONGEST)
        self.paused = False
        self.traces = ""  # the letter of the call whose place is wanted when it comes next
        self.places: dict[str, str] = {}  # those found, as file:line, by letter
        self._listener = listener
        self._failed = False  # or forked: the listener is not called any more
        self._undo: list[Callable[[], None]] = []

    def put(self) -> None:
        _PUT.add(self)
        self._undo = [
            register_optimizer_step_pre_hook(self._guarded(self._listener.before_step)).remove,
            register_optimizer_step_post_hook(self._guarded(self._listener.after_step)).remove,
            self._backward(),
            self._wrap(
                torch.optim.Optimizer, "__init__", after=lambda given, _: self._listener.optimizer_made(given[0])
            ),
            self._wrap(torch, "compile", before=lambda _: self._listener.compiling()),
            self._wrap(torch.amp.GradScaler, "scale", after=self._scaled),
            self._wrap(torch.amp.GradScaler, "update", after=lambda *_: self._listener.scale_updated()),
            self._wrap(torch.amp.GradScaler, "unscale_", before=self._unscaled),
            self._around(torch.overrides, "has_torch_function", self._listener.aside),
            *(self._noted(owner, name, what) for what, owner, name in CALLS),
        ]

    def remove(self) -> None:
        self.paused = True  # for whoever holds on to a wrapped call
        while self._undo:
            self._undo.pop()()

    def forget(self) -> None:
        """Listens no more."""
        self._failed = True

    def deaf(self) -> bool:
        """Whether nothing is listened to now."""
        return self.paused or self._failed or (_CUDA and _capturing())

    def _backward(self) -> Callable[[], None]:
        original, note, listener = torch.autograd.backward, self.order.append, self._listener

        def called(roots: Any) -> None:
            note("b")
            listener.backward_called((roots,) if isinstance(roots, Tensor) else tuple(roots or ()))

        seen = self._guarded(called)

        @functools.wraps(original)
        def backward(*args: Any, **kwargs: Any) -> Any:
            seen(args[0] if args else kwargs.get("tensors"))
            return original(*args, **kwargs)

        return _exchange(torch.autograd, "backward", original, backward)

    def _scaled(self, given: tuple[Any, ...], result: Any) -> None:
        if len(given) > 1:
            self._listener.scaled(given[1], result)

    def _unscaled(self, given: tuple[Any, ...]) -> None:
        if given[0].is_enabled():
            self.order.append("u")

    def _wrap(
        self,
        owner: Any,
        name: str,
        *,
        before: Callable[[tuple[Any, ...]], None] | None = None,
        after: Callable[[tuple[Any, ...], Any], None] | None = None,
    ) -> Callable[[], None]:
        """Calls `before` with what the call is given by position, and `after` with that and with its result."""
        original = getattr(owner, name)
        first = None if before is None else self._guarded(before)
        last = None if after is None else self._guarded(lambda both: after(*both))

        @functools.wraps(original)
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            if first is not None:
                first(args)
            result = original(*args, **kwargs)
            if last is not None:
                last((args, result))
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
        original, note = getattr(owner, name), self.order.append

        @functools.wraps(original)
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            note(what)
            if self.traces == what:
                self.places[what], self.traces = caller(), ""
            if what != "z":
                return original(*args, **kwargs)
            with self._listener.aside():  # it looks at gradients to clear them, and not for what they are
                return original(*args, **kwargs)

        return _exchange(owner, name, original, wrapped)

    def _guarded(self, hook: Callable[[Any], None]) -> Callable[..., None]:
        """Calls the hook with the first argument; in most steps this is most of what we do, so it does little."""

        def run(given: Any, *_: Any) -> None:
            if _is_traced():  # a script that compiles its whole step is not to compile ours
                unseen(given)
            elif not (self.paused or self._failed or (_CUDA and _capturing())):  # as `deaf`, without a call
                began = perf_counter()
                try:
                    hook(given)
                except Exception as error:
                    self._failed = True
                    self._listener.gave_up(f"{type(error).__name__}: {error}")
                self.seconds += perf_counter() - began

        unseen = _disable_dynamo(run)
        return run


def _in_child() -> None:
    for hooks in _PUT:
        hooks.forget()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_in_child)


def _capturing() -> bool:
    """Whether the script captures a CUDA graph, which a look at a number would break, and our work become part of."""
    return torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing()


def _exchange(owner: Any, name: str, original: Any, wrapped: Any) -> Callable[[], None]:
    def undo() -> None:
        if getattr(owner, name) is wrapped:  # else the script has wrapped it in turn
            setattr(owner, name, original)

    setattr(owner, name, wrapped)
    return undo
