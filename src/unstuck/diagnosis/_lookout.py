"""Looks at a run while it goes on: exact facts often, whole diagnoses seldom, both within a share of its time."""

import math
import time
from dataclasses import replace

from unstuck.diagnosis._blown import non_finite
from unstuck.diagnosis._case import Case
from unstuck.diagnosis._diagnose import diagnose
from unstuck.diagnosis._exact import told_findings
from unstuck.diagnosis._findings import PROVED, SHOWN, Diagnosis, Finding
from unstuck.diagnosis._trial import Progress
from unstuck.record import Run

SHARE = 0.02  # of the run's time, for exact facts
WHOLE_SHARE = 0.05  # for whole diagnoses, their trials included
FIRST = 20.0  # seconds before the first whole one: what it takes is not known before
WIDER = 1.25  # how much later each one is than the one before


class Lookout:
    """What is known of a run on its way, as of the last `look` at it.

    A look reads the exact facts: gradients that nobody cleared, a graph cut, parameters without an optimiser, a loss
    that is not finite. With `whole` it also diagnoses the run as `diagnose` does: once when the loss is no longer
    finite, else first after 20 s, each time a quarter later than the last and never for more than 5 % of the time.
    """

    def __init__(self, *, whole: bool = False, progress: Progress | None = None) -> None:
        self.exact: tuple[Finding, ...] = ()
        self.diagnosis: Diagnosis | None = None  # the latest whole one
        self._progress = progress
        self._told: set[str] = set()
        self._began = time.perf_counter()
        self._looking = 0.0  # seconds
        self._diagnosing = 0.0  # seconds
        self._next = FIRST if whole else math.inf  # seconds after the beginning
        self._whole = whole

    @property
    def findings(self) -> tuple[Finding, ...]:
        """The exact facts and, as of the latest whole diagnosis, what else was found or is suspected."""
        codes = {f.code for f in self.exact}
        soft = () if self.diagnosis is None else self.diagnosis.findings
        return (*self.exact, *(f for f in soft if f.code not in codes))

    def look(self, run: Run) -> list[Finding]:
        """The faults that are PROVED or SHOWN and were not told by an earlier look, causes before symptoms."""
        began = time.perf_counter()
        elapsed = began - self._began
        if self._looking <= SHARE * elapsed or not self._looking:
            self.exact = tuple(told_findings(Case(run, {})))
            blown = non_finite(run)
            if blown is not None and not self.exact:
                self.exact = (blown,)
                if self._whole and blown.code not in self._told:
                    self._next = 0.0
            self._looking += time.perf_counter() - began
        if elapsed >= self._next:
            self._diagnose(run, elapsed)
        found = [f for f in self.findings if f.word in (PROVED, SHOWN) and f.code not in self._told]
        self._told.update(f.code for f in found)
        return sorted(found, key=lambda f: f.code == "non-finite")

    def verdict(self, run: Run) -> Diagnosis | None:
        """The latest whole diagnosis where no step was taken since."""
        known = self.diagnosis
        if known is None or known.steps != run.steps:
            return None
        return replace(known, seconds=run.seconds, overhead=run.overhead)

    def _diagnose(self, run: Run, elapsed: float) -> None:
        began = time.perf_counter()
        self.diagnosis = diagnose(run, progress=self._progress)
        took = time.perf_counter() - began
        self._diagnosing += took
        self._next = max(WIDER * elapsed, (self._diagnosing + took) / WHOLE_SHARE)
