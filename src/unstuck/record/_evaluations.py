"""What a script computes without gradients and compares with targets: its validations, as far as they can be heard."""

import contextlib
import functools
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from time import perf_counter
from types import CodeType
from typing import Any

import torch
from torch import Tensor

from unstuck.objective import Recorder
from unstuck.record._deck import Deck, anything_compiled
from unstuck.record._ear import Ear, joined
from unstuck.record._modes import insert, remove
from unstuck.record._rows import Rows

SHARE = 1 / 24  # of the promised share of time
FREE = 0.05  # seconds beyond it, for evaluations that come FURTHER times as many steps after the start as the last one
FURTHER = 1.15
KEPT = 12  # evaluations of one series
SERIES = 16
PARTS = 8  # of one place that are told apart between two steps: two sets of rows, or a few batches of one
TOTAL = 64 << 20  # bytes that are kept, about
TRIES = 3  # at a place, before it is known to be no evaluation

_CONTEXTS = (torch.no_grad, torch.inference_mode, torch.set_grad_enabled)
_DECORATED = "_contextlib.py"  # where torch calls what a decorator has turned gradients off for
_Spot = tuple[CodeType, int]


@dataclass(frozen=True, eq=False)
class Evaluation:
    """Rows that the network was asked about without gradients, and what the script compared its answers with.

    `kind` is the comparison: a loss of torch's by its name, "equal" where a class that was chosen by the outputs was
    compared, or "difference". `squashed` says what has been applied to the outputs: "sigmoid", "softmax" or "".
    `inputs` are candidates, of which the network's own may be one; only the latest evaluation of a series keeps them.
    """

    place: str  # file:line, and that of its caller
    part: int  # which one at this place since the last step: the same one each time is a series
    step: int  # that had been taken
    training: bool  # whether the network was in training mode
    drawn: list[str]  # what then behaved as in training: "dropout", "batch norm"
    kind: str
    inputs: list[Tensor]  # rows first
    outputs: Tensor  # rows first
    targets: Tensor
    squashed: str
    sizes: list[int]  # of the comparisons that the rows come from
    hashes: Tensor | None = None  # of the rows that the network was called with, as `Rows` has them; as `inputs` kept

    @property
    def nbytes(self) -> int:
        return sum(x.nbytes for x in (*self.inputs, self.outputs, self.targets))


class Evaluations:
    """Listens where a script turns gradients off, as often as a small share of the time allows.

    A place in the script where nothing is evaluated is left alone after a few tries. `kept` has what was heard, series
    by series: the first of each, the latest, and between them some whose steps grow by about the same factor. `rows` is
    what is trained on.
    """

    def __init__(self, leaves: Sequence[Tensor], deck: Deck, deaf: Callable[[], bool], budget: float) -> None:
        self.kept: dict[tuple[str, int], list[Evaluation]] = {}
        self._seconds = 0.0
        self._leaves = leaves
        self._deaf = deaf  # whether nothing is to be heard now
        self._share = SHARE * budget
        self._deck = deck
        self._lent: Recorder | None = None
        self.rows = Rows(deaf, budget)
        self.now: tuple[int, float] = (0, 0.0)  # the steps that have been taken, and the seconds
        self._ear: Ear | None = None
        self._inside: Any = None  # the context that it listens in
        self._since = self.now  # when it began to
        self._spot: _Spot | None = None
        self._place = ""
        self._parts: dict[str, tuple[int, int]] = {}  # by place, the last step and how many there were after it
        self._lifted = False
        self._fruitless: dict[_Spot, int] = {}
        self._ignored: set[_Spot] = set()
        self._last: dict[_Spot, int] = {}  # the steps that had been taken when it was heard
        self._thread = threading.get_ident()
        self._undo: list[Callable[[], None]] = []

    def put(self) -> None:
        """Listens from now on, unless part of the script is compiled: a mode would have it compile again."""
        if anything_compiled():
            return
        self.rows.put()
        for context in _CONTEXTS:
            self._listen_to(context)

    def stepped(self, step: int, elapsed: float) -> None:
        """So many steps have been taken, in so many seconds."""
        self.now = step, elapsed
        self.rows.listen(elapsed)

    @property
    def seconds(self) -> float:
        """That the listening has taken."""
        return self._seconds + self.rows.seconds

    def interrupt(self) -> None:
        """Does not hear the rest, as where a step is taken in a context that no script has left."""
        if self._ear is not None:
            self._stop()

    def remove(self) -> None:
        """Listens no more."""
        self._stop()
        self.rows.remove()
        while self._undo:
            self._undo.pop()()

    @contextlib.contextmanager
    def aside(self) -> Iterator[None]:
        """What runs inside is not heard."""
        ear = self._ear
        if ear is None or self._lifted or not remove(ear):
            yield
            return
        self._lifted = True
        try:
            yield
        finally:
            self._lifted = False
            if self._ear is ear:
                insert(ear)

    def _listen_to(self, context: Any) -> None:
        enter, leave = context.__enter__, context.__exit__

        @functools.wraps(enter)
        def entered(this: Any) -> Any:
            result = enter(this)
            if self._ear is None or self._since is not self.now:
                self._begin(this, sys._getframe(1))
            return result

        @functools.wraps(leave)
        def left(this: Any, *error: Any) -> Any:
            result = leave(this, *error)
            if self._inside is this:
                self._end()
            return result

        def undo() -> None:
            for name, ours, theirs in (("__enter__", entered, enter), ("__exit__", left, leave)):
                if getattr(context, name) is ours:  # else the script has wrapped it in turn
                    setattr(context, name, theirs)

        context.__enter__, context.__exit__ = entered, left
        self._undo.append(undo)

    def _begin(self, context: Any, frame: Any) -> None:
        if frame.f_code.co_name == "decorate_context" and frame.f_code.co_filename.endswith(_DECORATED):
            frame = frame.f_back
        spot = frame.f_code, frame.f_lasti
        if spot in self._ignored or not (self._leaves and self._due(spot)):
            return
        if self._deaf() or torch.is_grad_enabled() or threading.get_ident() != self._thread or self._deck.sharded:
            return
        if frame.f_globals.get("__name__", "").partition(".")[0] in ("torch", "unstuck"):
            self._ignored.add(spot)
            return
        began = perf_counter()
        self._stop()  # one whose context the script never left, as a generator may not
        self._spot, self._inside, self._since = spot, context, self.now
        self._lent = self._deck.lend()
        self._ear = Ear(self._leaves, self.rows, self._lent)
        frames = (frame, frame.f_back) if frame.f_back is not None else (frame,)
        self._place = " ".join(f"{f.f_code.co_filename}:{f.f_lineno}" for f in frames)
        self._ear.follow()
        insert(self._ear)
        self._seconds += perf_counter() - began

    def _due(self, spot: _Spot) -> bool:
        step, elapsed = self.now
        last, spare = self._last.get(spot, 0), self._share * elapsed - self._seconds
        return spare > 0 or (spare > -FREE and (step == last or step >= FURTHER * last))

    def _end(self) -> None:
        began = perf_counter()
        spot, ear = self._spot, self._stop()
        if ear is None or spot is None:
            return
        try:
            self._last[spot] = self.now[0]
            if self._heard(ear):
                self._fruitless[spot] = -TRIES  # it is an evaluation, though it may be empty at times
            elif ear.calls:
                self._fruitless[spot] = self._fruitless.get(spot, 0) + 1
                if self._fruitless[spot] >= TRIES:
                    self._ignored.add(spot)
        except Exception:  # ours: the script goes on
            self._ignored.add(spot)
        self._seconds += perf_counter() - began + ear.seconds + ear.calls * self._deck.dispatch

    def _stop(self) -> Ear | None:
        ear, self._ear, self._inside, self._spot = self._ear, None, None, None
        if ear is not None:
            ear.leave()
            if not self._lifted and not remove(ear):
                ear.deaf = True
            self._deck.take_back(self._lent)
            self._lent = None
        return ear

    def _heard(self, ear: Ear) -> bool:
        """Keeps what was heard, where outputs were compared at all: with a known loss if there was one."""
        kinds = sorted(ear.compared, key=lambda kind: (kind in ("equal", "difference"), kind == "difference"))
        kind = next((k for k in kinds if ear.compared[k]), None)
        if kind is None:
            return False
        outputs, targets = (joined(parts) for parts in zip(*ear.compared[kind], strict=True))
        if outputs is None or targets is None:
            return False
        step = self.now[0]
        last, part = self._parts.get(self._place, (step, -1))
        part = part + 1 if last == step else 0
        self._parts[self._place] = step, part
        if part >= PARTS:
            return True
        self._keep(
            Evaluation(
                place=self._place,
                part=part,
                step=step,
                training=ear.training,
                drawn=sorted(ear.drawn),
                kind=kind,
                inputs=ear.inputs_of(kind),
                hashes=ear.hashes_of(kind),
                outputs=outputs,
                targets=targets,
                squashed=ear.squashed,
                sizes=[len(o) for o, _ in ear.compared[kind]],
            )
        )
        return True

    def _keep(self, found: Evaluation) -> None:
        series = self.kept.get((found.place, found.part))
        total = sum(e.nbytes for s in self.kept.values() for e in s)
        if series is None:
            if len(self.kept) < SERIES and total + found.nbytes < TOTAL:
                self.kept[found.place, found.part] = [found]
            return
        series[-1] = replace(series[-1], inputs=[], hashes=None)
        series.append(found)
        if len(series) > 2 and (len(series) > KEPT or total > TOTAL):
            ratios = [(b.step + 1) / (a.step + 1) for a, b in zip(series, series[2:], strict=False)]
            del series[1 + ratios.index(min(ratios))]


def pack_evaluations(kept: Mapping[Any, Sequence[Evaluation]]) -> list[dict[str, Any]]:
    """The evaluations as values for torch.save and torch.load(weights_only=True)."""
    return [dict(vars(e)) for series in kept.values() for e in series]


def unpack_evaluations(data: Sequence[Mapping[str, Any]]) -> tuple[Evaluation, ...]:
    return tuple(Evaluation(**e) for e in data)
