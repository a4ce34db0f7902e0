"""A recorded run, read from its folder."""

import contextlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar, Protocol

from unstuck.objective import Objective
from unstuck.record._log import NAME, blocks, loose, placed, read_facts, read_log
from unstuck.record._memory import MOST, Memory, read_memory, whole
from unstuck.record._objective import of_run
from unstuck.record._ranks import logs_of_ranks, ranked, wait_for_ends
from unstuck.record._series import Series

TAPES = "tapes.pt"


class Live(Protocol):
    """What a run needs of the watcher that still writes it."""

    @property
    def steps(self) -> int: ...
    @property
    def heard(self) -> int: ...
    @property
    def looked(self) -> int: ...
    @property
    def overhead(self) -> float: ...
    @property
    def facts(self) -> Sequence[dict[str, Any]]: ...
    def flush(self) -> None: ...
    def save(self) -> None: ...
    def paused(self) -> contextlib.AbstractContextManager[None]: ...


class Run:
    """What was recorded of a training, read from its folder: the log and, where there are any, tapes and states.

    While the training still goes on, every reading shows it as it stands. Where several ranks trained together, this
    is what the first one recorded, with the facts that the others have told; `ranks` has the rest.
    """

    diagnose: ClassVar[Callable[..., Any]]  # joined in `unstuck`, where both rooms are known

    def __init__(self, folder: str | Path, *, live: Live | None = None, rank: int | None = None) -> None:
        self.folder = Path(folder)
        self.rank = rank or 0
        name = ranked(NAME, rank)
        self._log = placed(self.folder) / name
        self._tapes = self._log.with_name(ranked(TAPES, rank))
        self._live = live
        self._series = Series()
        self._told: list[dict[str, Any]] = []  # the records that are no steps
        self._read = 0  # bytes
        self._others: dict[int, Run] = {}
        self._waited = False  # for them
        self._elsewhere: dict[int, tuple[list[dict[str, Any]], int]] = {}  # facts of other ranks, and the bytes read
        if live is None and not self._log.is_file():
            raise ValueError(
                f"a run folder with a {name} was needed, got {self.folder}: `unstuck run SCRIPT` makes one"
            )

    def _up_to_date(self) -> None:
        """Reads on from where the log was read to."""
        if self._live is not None:
            self._live.flush()
        if self._log.is_file() and self._log.stat().st_size > self._read:
            for records, end in blocks(self._log, self._read):
                self._read = end
                self._series.extend([r for r in records if r["kind"] == "step"])
                self._told += [loose(r) for r in records if r["kind"] != "step"]

    @property
    def events(self) -> list[dict[str, Any]]:
        """All records of the log, in order. They are read anew: `series` is quicker and takes less memory."""
        if self._live is not None:
            self._live.flush()
        return read_log(self._log)[0] if self._log.is_file() else []

    @property
    def ranks(self) -> dict[int, "Run"]:
        """What each rank recorded, by its number, this one among them."""
        for rank in logs_of_ranks(self._log.parent):
            if rank != self.rank and rank not in self._others:
                self._others[rank] = Run(self.folder, rank=rank)
        return dict(sorted({**self._others, self.rank: self}.items()))

    def paused(self) -> contextlib.AbstractContextManager[None]:
        """What is computed inside is no part of the training, where that still goes on."""
        return contextlib.nullcontext() if self._live is None else self._live.paused()

    def of(self, kind: str) -> list[dict[str, Any]]:
        """The records of one kind.

        The first rank's facts come with those of the others that it has not told itself, in the order of the steps;
        these have a `rank`.
        """
        if kind == "step":
            return [e for e in self.events if e["kind"] == "step"]
        self._up_to_date()
        own = [e for e in self._told if e["kind"] == kind]
        return own if self.rank or kind != "fact" else self._joined(own)

    def _joined(self, facts: list[dict[str, Any]]) -> list[dict[str, Any]]:
        others = {rank: path for rank, path in logs_of_ranks(self._log.parent).items() if rank}
        if not others:
            return facts
        self._wait()
        joined = {(e["code"], e["step"]): e for e in facts}
        for rank, path in others.items():
            told, end = self._elsewhere.get(rank, ([], 0))
            new, end = read_facts(path, end)
            told += new
            self._elsewhere[rank] = told, end
            joined = {**{(e["code"], e["step"]): {**e, "rank": rank} for e in told}, **joined}
        return sorted(joined.values(), key=lambda e: e["step"])

    def _wait(self) -> None:
        """A run that has ended here may still go on, for a moment, on other ranks."""
        if not self._waited and any(e["kind"] == "end" for e in self._told):
            self._waited = True
            wait_for_ends([path for rank, path in logs_of_ranks(self._log.parent).items() if rank != self.rank])

    def _last(self, name: str) -> Any:
        """What the last record has under a name that steps do not have, or None."""
        self._up_to_date()
        return next((e[name] for e in reversed(self._told) if name in e), None)

    @property
    def facts(self) -> list[dict[str, Any]]:
        """What needs no interpretation: a graph cut, gradients that nobody cleared, a loss that is not finite.

        Of a run that goes on they are read without its log, in the same short time at any length of it.
        """
        return self.of("fact") if self._live is None else list(self._live.facts)

    @property
    def header(self) -> Mapping[str, Any]:
        """What was run, with what: script, argv, started, versions."""
        return next(iter(self.of("start")), {})

    @property
    def script(self) -> str:
        return str(self.header.get("script", ""))

    @property
    def steps(self) -> int:
        """How many optimiser steps were recorded."""
        self._up_to_date()
        return int(self._series.last("step") or 0)

    @property
    def taken(self) -> int:
        """How many optimiser steps were taken: of a run that goes on without its log, else as many as were recorded."""
        return self.steps if self._live is None else self._live.steps

    @property
    def seconds(self) -> float:
        """The time of the last record."""
        return float(max(self._last("time") or 0.0, self._series.last("time") or 0.0))

    @property
    def heard(self) -> int:
        """How many steps a recorder was on for; 0 where the run was killed."""
        if self._live is not None:
            return self._live.heard
        return self._last("heard") or 0

    @property
    def looked(self) -> int:
        """How many steps were looked at for gradients that the step before had left; 0 where the run was killed."""
        if self._live is not None:
            return self._live.looked
        return self._last("looked") or 0

    @property
    def skipped(self) -> int:
        """How many steps a GradScaler left out, as far as that was told."""
        return int(max(self._last("skipped") or 0, self._series.last("skipped") or 0))

    @property
    def overhead(self) -> float:
        """The share of the run's time that watching took; NaN where the run was killed."""
        if self._live is not None:
            return self._live.overhead
        found = self._last("overhead")
        return float("nan") if found is None else float(found)

    @property
    def outcome(self) -> str:
        """How it ended: "finished", "interrupted", "raised …", or "cut off" where no end was recorded."""
        ends = self.of("end")
        return str(ends[-1]["outcome"]) if ends else "cut off"

    def series(self, name: str) -> tuple[list[int], list[float]]:
        """The steps at which a quantity was recorded, and its values: "loss", "grad_norm", "update_ratio", "lr"."""
        self._up_to_date()
        return self._series.get(name)

    def objective(self) -> Objective:
        """The mean loss over the recorded steps at the last finite weights; it needs no script.

        Each step counts the same, as it did in the training, and steps that repeat one batch are computed once. Buffers
        and dropout masks are those of each step. ValueError where the run kept no step, or no finite weights.
        """
        return of_run(self)

    def memory(self) -> Memory | None:
        """The tapes and states, or None where the run left none.

        They lie on the devices that they were recorded on, where these are here and have room; else on the CPU. Of the
        first of several ranks they are those of all, joined step by step, where that can be; else `apart` says why not.
        """
        if self._live is not None:
            self._live.save()
        own = read_memory(self._tapes, self.rank)
        ranks = int(self.header.get("ranks") or 1)
        if own is None or self.rank or ranks == 1:
            return own
        self._wait()
        if ranks > MOST:
            return replace(own, apart=f"{ranks} ranks are more than one process replays")
        places = [self._tapes.with_name(ranked(TAPES, rank)) for rank in range(1, ranks)]
        return whole(own, [read_memory(place, rank) for rank, place in enumerate(places, 1)])
