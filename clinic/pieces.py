"""A kept run diagnosed with pieces of the diagnosis taken away, without computing again what they do not touch.

A piece is a hypothesis's trial, a quantity, an exact check, a check of the validation, a series of the log, or a part
of what can be replayed. Whatever is computed notes the pieces that it has asked for, and is taken from an earlier
diagnosis of the same run where none of them is away.
"""

import functools
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

from unstuck.diagnosis import (
    HYPOTHESES,
    MEASURES,
    Case,
    Diagnosis,
    Finding,
    Hypothesis,
    Remedy,
    Trial,
    diagnose,
    run_trial,
)
from unstuck.diagnosis import _diagnose as steps
from unstuck.diagnosis import _validation as validation
from unstuck.diagnosis._exact import EXACT, exact_findings
from unstuck.diagnosis._validation import CHECKS
from unstuck.objective import Tape
from unstuck.record import Evaluation, Memory, Run, State

Piece = tuple[str, str]  # kind and name
NONE: frozenset[Piece] = frozenset()
SERIES = ("grad_norm", "lr", "clips", "schedules", "unchanged", "training")  # without the loss there is no symptom
STEPS, EVALUATED, BEGAN = ("kept", "recorded steps"), ("kept", "evaluations"), ("kept", "weights at the start")
KINDS: dict[str, frozenset[Piece]] = {
    "trial": frozenset(("trial", h.code) for h in HYPOTHESES),
    "quantity": frozenset(("quantity", name) for name in MEASURES),
    "exact": frozenset(("exact", code) for code in EXACT),
    "validation": frozenset(("validation", code) for code in CHECKS),
    "series": frozenset(("series", name) for name in SERIES),
    "kept": frozenset((STEPS, EVALUATED, BEGAN)),
}
ALL = {("trial", "all"): KINDS["trial"], ("exact", "all"): KINDS["exact"], ("validation", "all"): KINDS["validation"]}
PIECES: dict[Piece, frozenset[Piece]] = {
    **{piece: frozenset((piece,)) for kind in KINDS.values() for piece in sorted(kind)},
    **ALL,
}


@dataclass(frozen=True, eq=False)
class Computed:
    """A value, or the error instead of it, and the pieces that it rests on."""

    value: Any
    error: RuntimeError | ValueError | None
    used: frozenset[Piece]


class Notes:
    """What was computed of one run, and what is being computed."""

    def __init__(self, known: dict[Any, Computed]) -> None:
        self.known = known
        self.stack: list[set[Piece]] = [set()]

    def use(self, *pieces: Piece) -> None:
        self.stack[-1].update(pieces)

    def recall(self, key: Any, work: Callable[[], Any], without: frozenset[Piece]) -> Any:
        """What `work` gives or raises, computed where it is not known of this run without those pieces."""
        found = self.known.get(key)
        if found is None or found.used & without:
            found = self._compute(work)
            if not found.used & without:
                self.known[key] = found
        self.use(*found.used)
        if found.error is not None:
            raise found.error
        return found.value

    def _compute(self, work: Callable[[], Any]) -> Computed:
        self.stack.append(set())
        value, error = None, None
        try:
            value = work()
        except (RuntimeError, ValueError) as raised:
            error = raised
        finally:
            used = self.stack.pop()
        return Computed(value, error, frozenset(used))


class Part(Run):
    """A run whose log or memory lacks some pieces; the memory is read once."""

    def __init__(self, folder: Path, memory: Callable[[], Memory | None], notes: Notes, without: frozenset[Piece]):
        super().__init__(folder)
        self._whole = memory
        self._notes = notes
        self._without = without

    def series(self, name: str) -> tuple[list[int], list[float]]:
        if name in SERIES:
            self._notes.use(("series", name))
        return ([], []) if ("series", name) in self._without else super().series(name)

    def memory(self) -> Any:
        whole = self._whole()
        if whole is None:
            return None
        self._notes.use(STEPS)
        return None if STEPS in self._without else Remembered(whole, self._notes, self._without)


class Remembered:
    """What of a run can be replayed, some pieces apart."""

    def __init__(self, whole: Memory, notes: Notes, without: frozenset[Piece]) -> None:
        self._whole = whole
        self._notes = notes
        self._without = without

    def __getattr__(self, name: str) -> Any:
        return getattr(self._whole, name)

    @property
    def evaluations(self) -> tuple[Evaluation, ...]:
        if self._whole.evaluations:
            self._notes.use(EVALUATED)
        return () if EVALUATED in self._without else self._whole.evaluations

    @property
    def states(self) -> tuple[State, ...]:
        states = self._whole.states
        if len(states) > 1:
            self._notes.use(BEGAN)
        return states[1:] if BEGAN in self._without and len(states) > 1 else states


class Noted(Case):
    """A case that notes which pieces are asked for, and has none of those that are away."""

    def __init__(self, run: Run, measures: Mapping[str, Any], *, notes: Notes, without: frozenset[Piece]) -> None:
        super().__init__(run, measures)
        self.notes = notes
        self.without = without

    def __getitem__(self, name: str) -> Any:
        piece = ("quantity", name)
        self.notes.use(piece)
        if piece in self.without:
            self.reasons[name] = "it was taken away"
            return None
        try:
            return self.recall(piece, lambda: self._measures[name](self))
        except (RuntimeError, ValueError) as error:
            self.reasons[name] = str(error)
            return None

    def once(self, function: Callable[[Case], Any]) -> Any:
        return self.recall(function, lambda: function(self))

    def recall(self, key: Any, work: Callable[[], Any]) -> Any:
        return self.notes.recall(key, work, self.without)


def _property(name: str) -> property:
    work = vars(Case)[name].func
    if name in ("_kept", "memory"):  # which notes by itself what is asked of it
        return property(work)
    return property(lambda case: case.recall(("case", name), lambda: work(case)))


for _name in [name for name, kept in vars(Case).items() if isinstance(kept, functools.cached_property)]:
    setattr(Noted, _name, _property(_name))  # else the first who asks would be the only one to note what it rests on


class Kept:
    """A kept run that is diagnosed many times."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._known: dict[Any, Computed] = {}
        self._memory = functools.cache(lambda: Run(folder).memory())

    def diagnosed(self, without: frozenset[Piece] = NONE) -> tuple[Diagnosis, frozenset[Piece]]:
        """The diagnosis without some pieces, and the pieces that it has asked for."""
        notes = Notes(self._known)
        case = functools.partial(Noted, notes=notes, without=without)
        with patch.multiple(
            steps, Case=case, exact_findings=_exact, run_trial=_trial, validation_findings=_validation_findings
        ):
            run = Part(self._folder, self._memory, notes, without)
            found = diagnose(run, hypotheses=[_noted(h) for h in HYPOTHESES])
        return found, frozenset(notes.stack[0])


# The steps of a diagnosis, each of which tells what it has used


def _noted(h: Hypothesis) -> Hypothesis:
    """The hypothesis, with remedies only where its trial is not away."""
    piece = ("trial", h.code)

    def remedies(case: Noted) -> tuple[Remedy, ...]:
        found = case.recall(("remedies", h.code), lambda: tuple(h.remedies(case)))
        if found:
            case.notes.use(piece)
        return () if piece in case.without else found

    return replace(h, remedies=remedies)


def _trial(
    case: Noted,
    remedies: Sequence[Remedy],
    *,
    state: State | None = None,
    unseen: Sequence[Tape] = (),
    progress: object = None,
) -> Trial:
    key = ("trial", tuple(remedies), state, unseen)
    return case.recall(key, lambda: run_trial(case, remedies, state=state, unseen=unseen))


def _exact(case: Noted) -> list[Finding]:
    found = case.recall("exact", lambda: exact_findings(case))
    case.notes.use(*(("exact", f.code) for f in found))
    return [f for f in found if ("exact", f.code) not in case.without]


def _validation_findings(case: Noted, codes: Collection[str] = tuple(CHECKS)) -> list[Finding]:
    """The first error that the checks show that are not away; those that find nothing change nothing."""
    left = {code: CHECKS[code] for code in CHECKS if code in codes and ("validation", code) not in case.without}

    def first() -> list[Finding]:
        with patch.object(validation, "CHECKS", left):
            return validation.validation_findings(case)

    found = case.recall(("validation", *left), first)
    case.notes.use(*(("validation", f.code) for f in found))
    return found
