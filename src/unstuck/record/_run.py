"""A recorded run, read from its folder."""

import contextlib
import pickle
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Protocol

import torch

from unstuck.objective import Objective, Tape, TapeError, unpack
from unstuck.record._log import NAME, read_log
from unstuck.record._objective import of_run
from unstuck.record._state import State, unpack_state

TAPES = "tapes.pt"


@dataclass(frozen=True, eq=False)
class Memory:
    """What of a run can be replayed: its last tapes and the states that go with them."""

    names: tuple[str, ...]  # of the parameters
    tapes: tuple[Tape, ...]  # oldest first
    states: tuple[State, ...]  # the first, the latest finite ones and the last, by step


class Live(Protocol):
    """What a run needs of the watcher that still writes it."""

    @property
    def steps(self) -> int: ...
    @property
    def heard(self) -> int: ...
    @property
    def overhead(self) -> float: ...
    @property
    def facts(self) -> Sequence[dict[str, Any]]: ...
    def save(self) -> None: ...
    def paused(self) -> contextlib.AbstractContextManager[None]: ...


class Run:
    """What was recorded of a training, read from its folder: the log and, where there are any, tapes and states.

    While the training still goes on, every reading shows it as it stands.
    """

    diagnose: ClassVar[Callable[..., Any]]  # joined in `unstuck`, where both rooms are known

    def __init__(self, folder: str | Path, *, live: Live | None = None) -> None:
        self.folder = Path(folder)
        self._live = live
        self._events: list[dict[str, Any]] = []
        self._read = 0  # bytes
        if live is None and not (self.folder / NAME).is_file():
            raise ValueError(
                f"a run folder with a {NAME} was needed, got {self.folder}: `unstuck run SCRIPT` makes one"
            )

    @property
    def events(self) -> list[dict[str, Any]]:
        """All records of the log, in order."""
        path = self.folder / NAME
        if path.is_file() and path.stat().st_size > self._read:
            new, self._read = read_log(path, self._read)
            self._events += new
        return self._events

    def paused(self) -> contextlib.AbstractContextManager[None]:
        """What is computed inside is no part of the training, where that still goes on."""
        return contextlib.nullcontext() if self._live is None else self._live.paused()

    def of(self, kind: str) -> list[dict[str, Any]]:
        """The records of one kind."""
        return [e for e in self.events if e["kind"] == kind]

    @property
    def facts(self) -> list[dict[str, Any]]:
        """What needs no interpretation: a graph cut, gradients that nobody cleared, a loss that is not finite.

        Of a run that goes on they are read without its log, in the same short time at any length of it.
        """
        return self.of("fact") if self._live is None else list(self._live.facts)

    @property
    def header(self) -> Mapping[str, Any]:
        """What was run, with what: script, argv, started, versions."""
        return next((e for e in self.events if e["kind"] == "start"), {})

    @property
    def script(self) -> str:
        return str(self.header.get("script", ""))

    @property
    def steps(self) -> int:
        """How many optimiser steps were recorded."""
        return next((e["step"] for e in reversed(self.events) if e["kind"] == "step"), 0)

    @property
    def taken(self) -> int:
        """How many optimiser steps were taken: of a run that goes on without its log, else as many as were recorded."""
        return self.steps if self._live is None else self._live.steps

    @property
    def seconds(self) -> float:
        return float(next((e["time"] for e in reversed(self.events) if "time" in e), 0.0))

    @property
    def heard(self) -> int:
        """How many steps a recorder was on for; 0 where the run was killed."""
        if self._live is not None:
            return self._live.heard
        return next((e["heard"] for e in reversed(self.events) if "heard" in e), 0)

    @property
    def overhead(self) -> float:
        """The share of the run's time that watching took; NaN where the run was killed."""
        if self._live is not None:
            return self._live.overhead
        return float(next((e["overhead"] for e in reversed(self.events) if "overhead" in e), float("nan")))

    @property
    def outcome(self) -> str:
        """How it ended: "finished", "interrupted", "raised …", or "cut off" where no end was recorded."""
        return str(next((e["outcome"] for e in reversed(self.events) if e["kind"] == "end"), "cut off"))

    def series(self, name: str) -> tuple[list[int], list[float]]:
        """The steps at which a quantity was recorded, and its values: "loss", "grad_norm", "update_ratio", "lr"."""
        found = [(e["step"], float(e[name])) for e in self.events if e["kind"] == "step" and e.get(name) is not None]
        return [step for step, _ in found], [value for _, value in found]

    def objective(self) -> Objective:
        """The mean loss over the recorded steps at the last finite weights; it needs no script.

        Each step counts the same, as it did in the training, and steps that repeat one batch are computed once. Buffers
        and dropout masks are those of each step. ValueError where the run kept no step, or no finite weights.
        """
        return of_run(self)

    def memory(self) -> Memory | None:
        """The tapes and states, or None where the run left none."""
        if self._live is not None:
            self._live.save()
        path = self.folder / TAPES
        if not path.is_file():
            return None
        try:
            data = torch.load(path, map_location="cpu", weights_only=True)
            return Memory(tuple(data["names"]), tuple(unpack(data)), tuple(unpack_state(s) for s in data["states"]))
        except (RuntimeError, EOFError, OSError, pickle.UnpicklingError, LookupError, TapeError):
            return None  # damaged, or of another version: the log still stands
