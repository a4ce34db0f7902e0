"""What of a run is kept to be replayed later: its tapes, and the weights and optimiser at a few steps."""

import contextlib
import time
from collections import deque
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from unstuck.objective import Tape, TapeError, pack
from unstuck.record._deck import Deck
from unstuck.record._evaluations import Evaluations, pack_evaluations
from unstuck.record._governor import PART, Clock
from unstuck.record._models import Leaves
from unstuck.record._ranks import ranked
from unstuck.record._run import TAPES
from unstuck.record._state import Shelf, State, pack_state, snapshot

SNAPSHOT_EVERY = 50  # steps, at the least
STATE_BYTES = 16 << 20  # of the weights: where they are larger, states go to the disk at once
PASSED = 8  # earlier weights, as many as fit into as many bytes together


class Store:
    """Keeps the weights at the start and at the last two moments that had their turn; `write` has the folder hold all.

    Of the moments between them the weights alone are kept, at a few steps that grow by about the same factor.

    Errors of the disk pass: OSError, RuntimeError.
    """

    def __init__(
        self, folder: Path, rank: int | None, leaves: Leaves, deck: Deck, heard: Evaluations, budget: float
    ) -> None:
        self._path = folder / ranked(TAPES, rank)
        self._leaves = leaves
        self._deck = deck
        self._heard = heard
        self._clock = Clock(2 * PART * budget, SNAPSHOT_EVERY)
        self._first: list[State] = []  # unless it is large
        self._recent: deque[State] = deque(maxlen=2)
        self._passed: list[State] = []
        self._shelf: Shelf | None = Shelf(folder, rank)
        self._written = -1

    @property
    def states(self) -> list[State]:
        """The states that are held in memory, by step."""
        return [*self._first, *self._recent]

    def due(self, step: int) -> bool:
        return self._clock.due(step)

    def remember(self, step: int, optimizer: torch.optim.Optimizer | None, pace: float) -> None:
        """Keeps the weights, finite ones, as they stand after `step` steps of `pace` seconds."""
        began = time.perf_counter()
        try:
            with torch.no_grad():
                if self._leaves.nbytes <= STATE_BYTES:
                    state = snapshot(step, self._leaves.tensors, optimizer)
                    if len(self._recent) == self._recent.maxlen:
                        self._pass(self._recent[0])
                    (self._recent if step else self._first).append(state)
                elif self._shelf is not None:
                    self._shelf.put(snapshot(step, self._leaves.tensors, optimizer, copy=False))
        except (OSError, RuntimeError):
            self._shelf = None
            raise
        finally:
            self._clock.took(step, time.perf_counter() - began, pace)

    def _pass(self, state: State) -> None:
        """Keeps the weights of one that is no longer among the last, in the place of the one that is missed least."""
        self._passed.append(replace(state, optimizer=None))
        if len(self._passed) > min(PASSED, STATE_BYTES // max(self._leaves.nbytes, 1)):
            steps = [0, *(s.step for s in self._passed)]
            ratios = [(b + 1) / (a + 1) for a, b in zip(steps, steps[2:], strict=False)]
            del self._passed[ratios.index(min(ratios)) if ratios else 0]

    def write(self, step: int, optimizer: torch.optim.Optimizer | None) -> None:
        """Writes the tapes and the states to the run folder, whole or not at all, unless nothing has come since."""
        if self._written == step or not self._deck.tapes:
            return
        self._written = step
        part = self._path.with_suffix(".part")
        try:
            with self._deck.aside(), torch.no_grad():
                torch.save(self._packed(step, optimizer), part)
            part.replace(self._path)
        except BaseException:
            with contextlib.suppress(OSError):
                part.unlink(missing_ok=True)
            raise

    def _packed(self, step: int, optimizer: torch.optim.Optimizer | None) -> dict[str, Any]:
        self._leaves.learn(thoroughly=True)
        last = snapshot(step, self._leaves.tensors, optimizer, copy=False)
        states = [*(s for s in self.states if s.step < step or not s.step), last]
        data = pack(self._packable())
        data["names"] = self._leaves.names
        data["states"] = [pack_state(s) for s in states if len(s.weights) == len(self._leaves.tensors)]
        data["passed"] = [pack_state(s) for s in self._passed if len(s.weights) == len(self._leaves.tensors)]
        data["rescaled"] = self._deck.rescaled
        data["evaluations"] = pack_evaluations(self._heard.kept)
        data["rows"] = self._heard.rows.all()
        return data

    def _packable(self) -> list[Tape]:
        """The tapes whose programs can be written to disk."""
        fit: dict[int, bool] = {}
        for tape in self._deck.tapes:
            if id(tape.program) not in fit:
                try:
                    pack([tape])
                    fit[id(tape.program)] = True
                except TapeError as error:
                    fit[id(tape.program)] = False
                    self._deck.refuse(str(error))
        return [t for t in self._deck.tapes if fit[id(t.program)]]
