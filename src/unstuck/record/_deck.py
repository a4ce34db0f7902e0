"""Records steps as tapes, keeps the last ones and checks some of them against what really happened."""

import contextlib
import math
import sys
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import replace
from time import perf_counter
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from unstuck.objective import Program, Recorder, Tape, TapeError, Vault
from unstuck.record._modes import insert, remove
from unstuck.record._pulses import together

KEPT = 120  # tapes: enough for a trial of 60 steps, 30 to cool down and 30 held out
BYTES = 512 << 20
LOSS_TOLERANCE = 1e-6  # relative: a kernel of the replay may differ
GRADIENT_TOLERANCE = 1e-4  # relative to the norm; in a coarse type its last digit, since a GPU adds in any order
REASONS = 16  # different refusals that are told apart


class Deck:
    """The tapes of a run over `leaves`. `refusals` says why steps could not be recorded, and how often."""

    def __init__(self, leaves: list[Tensor]) -> None:
        self.tapes: deque[Tape] = deque(maxlen=KEPT)
        self.refusals: dict[str, int] = {}
        self.seconds = 0.0
        self.rescaled = 1.0  # of the gradient between backward and step, as last seen: clipping shows here
        self._leaves = leaves
        self._recorder: Recorder | None = None
        self._lifted = False  # whether the recorder is aside
        self._stranded: Recorder | None = None  # one that could not be taken off the stack of modes
        self._programs: list[Program] = []
        self._vault = Vault()
        self._made = 0
        self._dispatch = _dispatch_seconds()

    @property
    def listening(self) -> bool:
        return self._recorder is not None

    def listen(self) -> None:
        """Starts to record, unless part of the script is compiled or a recorder is lost."""
        if self._recorder is not None or self._stranded is not None:
            return
        if anything_compiled():
            self.refuse("part of the script is compiled (torch.compile): its calls cannot be seen")
            return
        self._recorder = Recorder(self._leaves)
        insert(self._recorder)

    def silence(self) -> Recorder | None:
        """Stops to record; the recorder that was on."""
        recorder, self._recorder = self._recorder, None
        if recorder is None:
            return None
        self.seconds += recorder.seconds + recorder.calls * self._dispatch
        if self._lifted or remove(recorder):
            return recorder
        self.refuse("an optimiser steps inside backward(), or in another thread")
        self._stranded = recorder
        recorder.root([torch.zeros(2)])  # no loss: it stops to note what it still sees
        return None

    def close(self) -> None:
        """Stops to record for good."""
        for recorder in (self._recorder, self._stranded):
            if recorder is not None:
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
        known = self._programs[-1] if self._programs else None
        try:
            tape = recorder.finish(self._vault, step=step, like=known)
        except TapeError as error:
            self.refuse(str(error))
            return None
        if tape.program is not known:
            same = next((p for p in self._programs if p == tape.program), None)
            if same is not None:
                tape = replace(tape, program=same)
        return tape

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
        tolerance = max(GRADIENT_TOLERANCE, _grain(tape, self._leaves))
        if not self._same_gradient([self._leaves[k].grad for k in wanted], found, tolerance):
            return False
        if new:
            self._programs.append(tape.program)
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

    def _same_gradient(self, had: Sequence[Tensor | None], found: Sequence[Tensor], tolerance: float) -> bool:
        pairs = [(h, f) for h, f in zip(had, found, strict=True) if h is not None and not h.is_sparse]
        if not pairs:
            return True
        whole, replayed, product = together([_products(h, f) for h, f in pairs]).sum(0).tolist()
        if not (0 < whole < math.inf and 0 < replayed < math.inf):
            return True
        scale = product / replayed  # clipping and loss scaling multiply the whole gradient
        # in float64 this difference of sums resolves 1e-8 of the norm
        if whole - scale * product > tolerance**2 * whole:
            self.refuse("the replayed gradient differs from the one that the step used")
            return False
        self.rescaled = scale
        return True


def _products(a: Tensor, b: Tensor) -> Tensor:
    """‖a‖², ‖b‖² and a·b in float64, one parameter at a time: the whole gradient may be too large to be copied."""
    a, b = (torch.view_as_real(x.resolve_conj()) if x.is_complex() else x for x in (a.detach(), b.detach()))
    a, b = a.flatten().double(), b.flatten().double()
    return torch.stack([a @ a, b @ b, a @ b])


def _grain(tape: Tape, leaves: Sequence[Tensor]) -> float:
    """The relative distance of two numbers in the coarsest type that the step computes in."""
    types = {call.autocast[1] for call in tape.program.instructions if call.autocast is not None}
    types |= {x.dtype for x in (*tape.constants, *leaves) if x.is_floating_point()}
    return max((torch.finfo(dtype).eps for dtype in types), default=0.0)


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
