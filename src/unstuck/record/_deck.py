"""Records steps as tapes, keeps the last ones and checks some of them against what really happened."""

import contextlib
import sys
from collections import deque
from collections.abc import Iterator, Sequence
from time import perf_counter
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from unstuck.objective import Names, Program, Recorder, Tape, TapeError, Vault
from unstuck.record._modes import insert, remove

KEPT = 120  # tapes: enough for a trial of 60 steps, 30 to cool down and 30 held out
BYTES = 512 << 20
LOSS_TOLERANCE = 1e-6  # relative: the attention kernel of the replay may differ
GRADIENT_TOLERANCE = 1e-4  # relative to the norm
PLACED = 4  # recordings at the start, and after each new program, that tell where in the script a call is
REASONS = 16  # different refusals that are told apart


class Deck:
    """The tapes of a run over `leaves`. `refusals` says why steps could not be recorded, and how often."""

    def __init__(self, leaves: list[Tensor], names: Names | None = None) -> None:
        self.tapes: deque[Tape] = deque(maxlen=KEPT)
        self.refusals: dict[str, int] = {}
        self.seconds = 0.0
        self.rescaled = 1.0  # of the gradient between backward and step, as last seen: clipping shows here
        self._leaves = leaves
        self._names = names  # of modules
        self._placed = PLACED
        self._recorder: Recorder | None = None
        self._lifted = False  # whether the recorder is aside
        self._stranded: Recorder | None = None  # one that could not be taken off the stack of modes
        self._programs: list[Program] = []
        self._vault = Vault()
        self._made = 0
        self._dispatch = _dispatch_seconds()

    def listen(self) -> None:
        """Starts to record, unless part of the script is compiled or a recorder is lost."""
        if self._recorder is not None or self._stranded is not None:
            return
        if anything_compiled():
            self.refuse("part of the script is compiled (torch.compile): its calls cannot be seen")
            return
        self._placed -= 1
        self._recorder = Recorder(self._leaves, names=self._names if self._placed >= 0 else None)
        insert(self._recorder)
        self._recorder.modules.follow()

    def silence(self) -> Recorder | None:
        """Stops to record; the recorder that was on."""
        recorder, self._recorder = self._recorder, None
        if recorder is None:
            return None
        recorder.modules.leave()
        self.seconds += recorder.seconds + recorder.calls * self._dispatch
        if self._lifted or remove(recorder):
            return recorder
        self.refuse("an optimiser steps inside backward(), or in another thread")
        self._stranded = recorder
        recorder.root([torch.zeros(2)])  # no loss: it stops to note what it still sees
        return None

    def renew(self) -> Recorder | None:
        """Records from here on, if it did before; the recorder that was on."""
        recorder = self.silence()
        if recorder is not None:
            self.listen()
        return recorder

    def close(self) -> None:
        """Stops to record for good."""
        for recorder in (self._recorder, self._stranded):
            if recorder is not None:
                recorder.modules.leave()
                remove(recorder)
        self._recorder = None

    @contextlib.contextmanager
    def aside(self) -> Iterator[None]:
        """What runs inside is not recorded."""
        recorder = self._recorder
        if self._lifted or recorder is None or not remove(recorder):
            yield
            return
        self._lifted = True
        try:
            yield
        finally:
            self._lifted = False
            if self._recorder is recorder:
                insert(recorder)

    def root(self, roots: Sequence[Tensor]) -> None:
        if self._recorder is not None:
            self._recorder.root(roots)

    def compiled(self, recorder: Recorder, step: int) -> Tape | None:
        """The tape of the step, or None where it is refused."""
        try:
            return recorder.finish(self._vault, step=step, like=self._programs)
        except TapeError as error:
            self.refuse(str(error))
            if error.doubted is not None:
                self.tapes = deque((t for t in self.tapes if t.program is not error.doubted), maxlen=KEPT)
            return None

    def check(self, tape: Tape, parameters: Sequence[Tensor]) -> bool:
        """Whether the replay gives the loss and the gradient that the step really had; also whether it was due."""
        self._made += 1
        new = not any(tape.program is p for p in self._programs)
        seldom = self._made.bit_count() == 1 and self._made.bit_length() % 2  # 1, 4, 16, 64 …
        if not (new and len(self._programs) < 16) and not seldom:
            return not new
        values = [p.detach().requires_grad_() for p in self._leaves]
        wanted = [k for k, p in enumerate(self._leaves) if any(p is q for q in parameters) and p.grad is not None]
        try:
            with torch.enable_grad():
                loss = tape.replay(values)
                found = torch.autograd.grad(
                    loss, [values[k] for k in wanted], allow_unused=True, materialize_grads=True
                )
        except Exception as error:
            self.refuse(f"the replay failed: {error}")
            return False
        if not _close(float(loss), tape.loss):
            self.refuse(f"the replay gives the loss {float(loss):.6g} where the step had {tape.loss:.6g}")
            return False
        if not self._same_gradient([self._leaves[k].grad for k in wanted], found):
            return False
        if new:
            self._programs.append(tape.program)
            self._placed = PLACED
        return True

    @property
    def bytes(self) -> float:
        """What the tapes take, about: batches that several of them share count for each."""
        return sum(t.bytes for t in (self.tapes[0], self.tapes[-1])) / 2 * len(self.tapes) if self.tapes else 0.0

    def keep(self, tape: Tape) -> None:
        self.tapes.append(tape)
        while len(self.tapes) > 2 and self.bytes > BYTES:
            self.tapes.popleft()

    def refuse(self, reason: str) -> None:
        if reason not in self.refusals and len(self.refusals) >= REASONS:
            reason = "other reasons"
        self.refusals[reason] = self.refusals.get(reason, 0) + 1

    def _same_gradient(self, had: Sequence[Tensor | None], found: Sequence[Tensor]) -> bool:
        pairs = [(h, f) for h, f in zip(had, found, strict=True) if h is not None and not h.is_sparse]
        g = torch.cat([_flat(h) for h, _ in pairs] or [torch.zeros(0)])
        r = torch.cat([_flat(f) for _, f in pairs] or [g])
        size, replayed = float(g.norm()), float(r.norm())
        if not (size > 0 and replayed > 0 and torch.isfinite(g).all()):
            return True
        scale = float(g @ r) / replayed**2  # clipping and loss scaling multiply the whole gradient
        if float((g - scale * r).norm()) > GRADIENT_TOLERANCE * size:
            self.refuse("the replayed gradient differs from the one that the step used")
            return False
        self.rescaled = scale
        return True


def _flat(x: Tensor) -> Tensor:
    x = x.detach()
    return (torch.view_as_real(x.resolve_conj()) if x.is_complex() else x).flatten().double()


def _close(a: float, b: float) -> bool:
    return a == b or (a != a and b != b) or abs(a - b) <= LOSS_TOLERANCE * max(abs(a), abs(b), 1e-12)


class _Idle(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


def _dispatch_seconds(calls: int = 200) -> float:
    """What torch takes to hand one call to a function mode, which the mode itself cannot see."""

    def timed() -> float:
        began = perf_counter()
        for _ in range(calls):
            torch.is_complex(tensor)
        return (perf_counter() - began) / calls

    tensor = torch.zeros(1)
    plain = timed()
    with _Idle():
        return max(timed() - plain, 0.0)


def anything_compiled() -> bool:
    """Whether torch.compile was called in this process."""
    frame = sys.modules.get("torch._dynamo.eval_frame")
    return any(callable(b) for b in getattr(frame, "cached_backends", {}).values())
