"""Records steps as tapes, keeps the last ones and checks some of them against what really happened.

A replay must give the loss of the step, and the gradient that backward() made of it, of which what the step uses is
mostly a multiple: clipped as a whole, or unscaled. Where it is not (ranks average it, each number is clipped), the
gradient is heard as backward() makes it, at a step that is due for a check or at the next one of its kind; that takes
copies of it.
"""

import contextlib
import math
import sys
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from time import perf_counter
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from unstuck.objective import Names, Program, Recorder, Tape, TapeError, Vault
from unstuck.record._heard import Heard
from unstuck.record._modes import insert, remove
from unstuck.record._pulses import together
from unstuck.record._ranks import in_pieces, ranks

KEPT = 120  # tapes: enough for a trial of 60 steps, 30 to cool down and 30 held out
BYTES = 512 << 20
LOSS_TOLERANCE = 1e-6  # relative: a kernel of the replay may differ
GRADIENT_TOLERANCE = 1e-4  # relative to the norm; in a coarse type its last digit, since a GPU adds in any order
PLACED = 4  # recordings at the start, and after each new program, that tell where in the script a call is
REASONS = 16  # different refusals that are told apart
TINY = 2.0**-24  # the smallest number of float16
PIECE = 1 << 20  # numbers of a gradient that are compared at a time
PROGRAMS = 16  # different programs that are checked
PATIENCE = 32  # recorded steps that are listened to until a program comes again that could not be checked


class Deck:
    """The tapes of a run over `leaves`. `refusals` says why steps could not be recorded, and how often."""

    def __init__(self, leaves: list[Tensor], names: Names | None = None) -> None:
        self.tapes: deque[Tape] = deque(maxlen=KEPT)
        self.refusals: dict[str, int] = {}
        self.seconds = 0.0
        self.lost = 0.0  # share of the last gradient that was 0 where its replay is tiny: half precision ends there
        self.rescaled = 1.0  # of the gradient between backward and step, as last seen: clipping; NaN for another change
        self._leaves = leaves
        self._looked_at = 0  # leaves, for `sharded`
        self._sharded = False
        self._names = names  # of modules
        self._placed = PLACED
        self._recorder: Recorder | None = None
        self._lifted = False  # whether the recorder is aside
        self._stranded: Recorder | None = None  # one that could not be taken off the stack of modes
        self._programs: list[Program] = []  # that were found right
        self._vault = Vault()
        self._made = 0
        self._changed = ranks() > 1  # whether what steps use is no multiple of what backward() makes
        self._heard: Heard | None = None
        self._awaited = 0  # steps still to be listened to, since a program could not be checked
        self.dispatch = _dispatch_seconds()

    @property
    def listening(self) -> bool:
        return self._recorder is not None

    def listen(self) -> None:
        """Starts to record, unless part of the script is compiled or a recorder is lost."""
        if self._recorder is not None or self._stranded is not None:
            return
        self._heard = None
        if self.sharded:
            self.refuse("the parameters are sharded over ranks: each has a piece, and the whole exists at times only")
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
        if self._heard is not None:
            self._heard.stop()
            self.seconds += self._heard.seconds
        recorder.modules.leave()
        self.seconds += recorder.seconds + recorder.calls * self.dispatch
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
        if self._heard is not None:
            self._heard.stop()
        self._recorder = self._heard = None

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

    def lend(self) -> Recorder | None:
        """The recorder, if it is on, for another mode to hand it each call, until `take_back`."""
        recorder = self._recorder
        if self._lifted or recorder is None or not remove(recorder):
            return None
        self._lifted = True
        return recorder

    def take_back(self, recorder: Recorder | None) -> None:
        """Has a lent recorder see the calls by itself again."""
        if recorder is not None:
            self._lifted = False
            if self._recorder is recorder:
                insert(recorder)

    @property
    def looked(self) -> bool:
        """Whether the script has looked at a gradient of the step that is being recorded."""
        return self._recorder is not None and self._recorder.looked

    def root(self, roots: Sequence[Tensor], *, cleared: bool = False) -> None:
        """A backward() begins; `cleared` is as of `Recorder.root`."""
        if self._recorder is None:
            return
        self._recorder.root(roots, cleared=cleared)
        due = self._changed and (not self._programs or _seldom(self._made + 1))
        if self._heard is None and (due or self._awaited):
            self._heard = Heard()
            self._awaited = max(self._awaited - 1, 0)
        if self._heard is not None:
            self._heard.listen(self._leaves)

    def compiled(self, recorder: Recorder, step: int) -> Tape | None:
        """The tape of the step, or None where it is refused."""
        self.lost = 0.0
        try:
            return recorder.finish(self._vault, step=step, like=self._programs)
        except TapeError as error:
            self._heard = None
            self.refuse(str(error))
            if error.doubted is not None:
                self.tapes = deque((t for t in self.tapes if t.program is not error.doubted), maxlen=KEPT)
            return None

    def check(self, tape: Tape, parameters: Sequence[Tensor]) -> bool:
        """Whether the replay gives the loss and the gradient that the step really had, where that is due.

        `.grad` of the parameters is what the step uses. There are none where it holds more than the step's own: then
        only what was heard can tell.
        """
        heard, self._heard = self._heard, None
        if heard is not None and heard.failed:
            heard = None
        if heard is None and not parameters:
            return True
        self._made += 1
        new = not any(tape.program is p for p in self._programs)
        if heard is None and not (new and len(self._programs) < PROGRAMS) and not _seldom(self._made):
            return not new
        moved = {id(p) for p in parameters}
        used = {k: p.grad for k, p in enumerate(self._leaves) if id(p) in moved and p.grad is not None}
        slots = sorted(used if heard is None else heard.slots)
        values = [p.detach().requires_grad_() for p in self._leaves]
        try:
            with torch.enable_grad():
                loss = tape.replay(values)
                found = torch.autograd.grad(loss, [values[k] for k in slots], allow_unused=True, materialize_grads=True)
        except Exception as error:
            self.refuse(f"the replay failed: {error}")
            return False
        if not _close(float(loss), tape.loss):
            self.refuse(f"the replay gives the loss {float(loss):.6g} where the step had {tape.loss:.6g}")
            return False
        tolerance = max(GRADIENT_TOLERANCE, _grain(tape, self._leaves))
        if not self._same_gradient(dict(zip(slots, found, strict=True)), used, heard, tolerance):
            return False
        if new:
            self._programs.append(tape.program)
            self._awaited = 0
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

    @property
    def sharded(self) -> bool:
        """Whether a leaf is a piece of a parameter."""
        new, self._looked_at = self._leaves[self._looked_at :], len(self._leaves)
        self._sharded = self._sharded or any(map(in_pieces, new))
        return self._sharded

    def _same_gradient(
        self, found: Mapping[int, Tensor], used: Mapping[int, Tensor], heard: Heard | None, tolerance: float
    ) -> bool:
        """Whether the replayed gradient is the one that was heard; else whether what the step uses is a multiple."""
        if heard is None:
            scale = _scale(used, found, tolerance)
            if scale == 0:
                self.lost = _lost(used, found)
            if scale is None:
                self._changed, self._awaited = True, PATIENCE
                self.refuse("a step of a new kind used a gradient that was averaged or changed: its like is waited for")
                return False
        else:
            made = {k: heard.gradients.get(k, torch.zeros_like(g)) for k, g in found.items()}
            differs = _scale(made, found, tolerance)
            if differs is None or abs(differs - 1) > tolerance:
                self.lost = _lost(made, found)
                self.refuse("the replayed gradient differs from the one that backward() made")
                return False
            scale = _scale(used, heard.stored, tolerance)
        if scale is None or not math.isnan(scale):
            self.rescaled = math.nan if scale is None else scale
        return True


def _scale(had: Mapping[int, Tensor], found: Mapping[int, Tensor], tolerance: float) -> float | None:
    """The number by which `found` gives `had`; None where there is none, NaN where they do not tell."""
    slots = [k for k in had if k in found and not (had[k].is_sparse or found[k].is_sparse)]
    if not slots:
        return math.nan
    size, length, product = together([_products(had[k], found[k]) for k in slots]).sum(0).tolist()
    if not math.isfinite(size) or size == length == 0:
        return math.nan
    scale = product / length if length else 0.0
    # in float64 this difference of sums resolves 1e-8 of the norm
    return None if size - scale * product > tolerance**2 * size else scale


def _lost(made: Mapping[int, Tensor], found: Mapping[int, Tensor]) -> float:
    """The share of a replayed gradient's numbers that are 0 in the real one; 0 where any such number is not tiny."""
    gone, there = 0, 0
    for k, g in found.items():
        if not g.is_sparse:
            missing = (made[k] == 0) & (g != 0)
            if bool((g[missing].abs() > TINY).any()):
                return 0.0
            gone, there = gone + int(missing.sum()), there + int((g != 0).sum())
    return gone / max(there, 1)


def _products(a: Tensor, b: Tensor) -> Tensor:
    """‖a‖², ‖b‖² and a·b in float64, piece by piece: the whole gradient may be too large to be copied."""
    a, b = (torch.view_as_real(x.resolve_conj()) if x.is_complex() else x for x in (a.detach(), b.detach()))
    pairs = ((x.double(), y.double()) for x, y in zip(a.flatten().split(PIECE), b.flatten().split(PIECE), strict=True))
    return torch.stack([torch.stack([x @ x, y @ y, x @ y]) for x, y in pairs]).sum(0)


def _grain(tape: Tape, leaves: Sequence[Tensor]) -> float:
    """The relative distance of two numbers in the coarsest type that the step computes in."""
    types = {call.autocast[1] for call in tape.program.instructions if call.autocast is not None}
    types |= {x.dtype for x in (*tape.constants, *leaves) if x.is_floating_point()}
    return max((torch.finfo(dtype).eps for dtype in types), default=0.0)


def _close(a: float, b: float) -> bool:
    return a == b or (a != a and b != b) or abs(a - b) <= LOSS_TOLERANCE * max(abs(a), abs(b), 1e-12)


def _seldom(count: int) -> bool:
    """1, 4, 16, 64 …"""
    return count.bit_count() == 1 and bool(count.bit_length() % 2)


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
