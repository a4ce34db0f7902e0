"""Watches a live run and writes what it sees to a run folder. Nothing in the run changes, to the last bit."""

import contextlib
import datetime
import math
import os
import platform
import sys
import time
from collections import deque
from collections.abc import Iterator, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from unstuck.objective import Recorder, Tape, TapeError, caller, pack
from unstuck.record._deck import Deck
from unstuck.record._hooks import Hooks
from unstuck.record._log import NAME, Log, warn
from unstuck.record._models import models_alive, parameter_names
from unstuck.record._moments import Stopped, Tick, Ticks
from unstuck.record._pulses import Pulses, StaleGradients, cut_off, first_nonfinite, orphans
from unstuck.record._run import TAPES, Run
from unstuck.record._state import State, pack_state, snapshot

FOLDER = Path("unstuck-runs")
FREE_SECONDS = 2.0  # what watching may take before the promised share counts
SNAPSHOT_EVERY = 50  # steps
FIRST_BYTES = 256 << 20  # of the weights: where they are larger, those at the start are not kept


class Watch:
    """The watcher of one process: `start` it, and `stop` it whatever happens in between."""

    def __init__(
        self, folder: Path, *, models: Sequence[nn.Module] = (), budget: float = 0.02, tick: Tick | None = None
    ) -> None:
        if (folder / NAME).exists():
            raise ValueError(f"a folder without a run was needed, but {folder} holds one: name another or delete it")
        self.folder = folder
        self.steps = 0
        self._models = list(models)
        self._budget = budget
        self._log = Log(folder)
        self._hooks = Hooks(self)
        self._leaves: list[Tensor] = []
        self._names: list[str] = []  # of the leaves: kept, since a model may be gone before its run is written
        self._deck = Deck(self._leaves)
        self._optimizers: list[torch.optim.Optimizer] = []
        self._pulses = Pulses()
        self._stale = StaleGradients()
        self._losses: list[Tensor] = []  # what backward was called on since the last step
        self._record: dict[str, Any] = {}  # of the step being taken
        self._counts: dict[str, int] = {}
        self.facts: list[dict[str, Any]] = []  # as the log has them: few, since a count is told when it has doubled
        self.heard = 0  # steps that a recorder was on for
        self._ticks = None if tick is None else Ticks(tick, Run(self.folder, live=self))
        self._first: list[State] = []  # the weights at the start, unless they are too large to keep
        self._recent: deque[State] = deque(maxlen=2)
        self._saved = -1
        self._process = os.getpid()
        self._began = time.perf_counter()

    def start(self, script: str, argv: Sequence[str], optimizers: Sequence[torch.optim.Optimizer] = ()) -> None:
        self._log.write(
            "start",
            version=1,
            script=script,
            argv=list(argv),
            started=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            unstuck=version("unstuck"),
            torch=torch.__version__,
            python=platform.python_version(),
            processors=os.cpu_count(),
        )
        self._hooks.put()
        for optimizer in optimizers:
            self._meet(optimizer)
        if optimizers:
            self._deck.listen()

    def stop(self, outcome: str) -> None:
        """Removes everything that `start` put in place and writes what is left to write."""
        self._hooks.remove()
        self._deck.close()
        if os.getpid() != self._process:
            return  # a fork of the script that came this far: the run is its parent's
        self.save()
        end = {
            "time": self._elapsed(),
            "overhead": self.overhead,
            "heard": self.heard,
            "refusals": self._deck.refusals,
        }
        self._log.write("end", outcome=outcome, **end)
        self._log.close()

    def save(self) -> None:
        """Writes the tapes and states to the run folder, whole or not at all."""
        if not (self.folder / NAME).is_file():
            self._log.fail(f"{self.folder / NAME} is gone")
        if self._saved == self.steps or not self._deck.tapes or self._log.failed:
            return
        path = self.folder / TAPES
        part = path.with_suffix(".part")
        try:
            self._meet_again()
            with self._deck.aside(), torch.no_grad():
                torch.save(self._packed(), part)
            part.replace(path)
        except Exception as error:  # whatever it is, the training goes on
            with contextlib.suppress(OSError):
                part.unlink(missing_ok=True)
            self._fact("not-saved", because=str(error))
            warn(f"the recorded steps could not be saved: {error}; the diagnosis rests on the log alone")
        self._saved = self.steps

    def _packed(self) -> dict[str, Any]:
        self._learn_names()
        last = snapshot(self.steps, self._leaves, self._only())
        states = [*self._first, *(s for s in self._recent if s.step < self.steps), last]
        data = pack(self._packable())
        data["names"] = self._names
        data["states"] = [pack_state(s) for s in states if len(s.weights) == len(self._leaves)]
        data["rescaled"] = self._deck.rescaled
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

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """What is computed inside is no part of the run, and its time is not either."""
        was, self._hooks.paused = self._hooks.paused, True
        began = time.perf_counter()
        try:
            with self._deck.aside():
                yield
        finally:
            self._hooks.paused = was
            self._began += time.perf_counter() - began

    def aside(self) -> contextlib.AbstractContextManager[None]:
        """What runs inside is not recorded: torch asks there whether somebody listens, and then computes otherwise."""
        return self._deck.aside()

    def optimizer_made(self) -> None:
        if not self.steps:
            self._deck.listen()  # so that the first step is heard as well

    def compiling(self) -> None:
        self._deck.silence()

    def backward_called(self, roots: list[Tensor]) -> None:
        self._losses.extend(t.detach() for t in roots if t.numel() == 1)
        self._stale.note_backward()
        self._deck.root(roots)

    def before_step(self, optimizer: torch.optim.Optimizer) -> None:
        recorder = self._deck.silence()
        self._meet(optimizer)
        tape = None if recorder is None else self._deck.compiled(recorder, self.steps + 1)
        if self.steps == 0 and sum(p.nbytes for p in self._leaves) <= FIRST_BYTES:
            self._first = [snapshot(0, self._leaves, self._only())]
        stale = self._stale.used_by(optimizer)
        if stale is not None:
            self._counted("stale-gradient", of=self.steps + 1, where=self._name(stale), line=caller())
        if tape is not None and stale is None and not self._deck.check(tape, _moved(optimizer)):
            tape = None
        if tape is not None:
            self._deck.keep(tape)
        if recorder is not None:
            self._note_parameters(recorder, optimizer)
        self._record = self._pulses.before_step(optimizer)
        self._read_loss(tape)

    def after_step(self, optimizer: torch.optim.Optimizer) -> None:
        self.steps += 1
        if "loss" not in self._record and self._losses:  # the optimiser called backward itself, in a closure
            self._record["loss"] = float(self._losses[-1])
        self._record.update(self._pulses.after_step(optimizer))
        which = self._optimizers.index(optimizer)
        self._log.write("step", step=self.steps, time=self._elapsed(), optimizer=which, **self._record)
        self._stale.note_step(optimizer)
        self._losses.clear()
        if self.steps % SNAPSHOT_EVERY == 0 and math.isfinite(self._record.get("loss") or 0.0):
            self._recent.append(snapshot(self.steps, self._leaves, self._only()))
        if self._spent() < FREE_SECONDS + self._budget * self._elapsed():
            self._deck.listen()
        if self._ticks is not None:
            self._hooks.seconds -= self._ticks()  # which has its own share

    def gave_up(self, reason: str) -> None:
        self._deck.close()
        self._fact("watcher-failed", because=reason)
        warn(f"watching ended at step {self.steps + 1}: {reason}; the training goes on")

    def _meet(self, optimizer: torch.optim.Optimizer) -> None:
        """Makes the optimiser's parameters known, and names them by the models that own them."""
        known = {id(p) for p in self._leaves}
        new = [p for p in _moved(optimizer) if id(p) not in known]
        if new:
            self._deck.silence()  # a recorder counts the leaves that it began with
            self._leaves += new
        if len(self._leaves) != len(self._names):
            self._learn_names()
        if any(optimizer is o for o in self._optimizers):
            return
        self._optimizers.append(optimizer)
        groups = [{k: v for k, v in g.items() if isinstance(v, (bool, int, float))} for g in optimizer.param_groups]
        kind = f"{type(optimizer).__module__}.{type(optimizer).__qualname__}"
        self._log.write(
            "optimizer", index=len(self._optimizers) - 1, name=kind, groups=groups, parameters=len(_moved(optimizer))
        )

    def _meet_again(self) -> None:
        """Optimisers may have got parameters since their last step."""
        for optimizer in self._optimizers:
            self._meet(optimizer)

    def _note_parameters(self, recorder: Recorder, optimizer: torch.optim.Optimizer) -> None:
        self.heard += 1
        cut = cut_off(recorder, optimizer)
        if cut:
            function, line = recorder.cuts[0]
            self._counted("graph-cut", of=self.heard, names=[self._name(p) for p in cut], function=function, line=line)
        lost = orphans(recorder, self._optimizers)
        if lost:
            self._counted("orphan-gradient", of=self.heard, names=[self._name(p) for p in lost])

    def _read_loss(self, tape: Tape | None) -> None:
        if not self._losses:
            return
        loss = float(sum(self._losses[1:], self._losses[0]))
        self._record["loss"] = loss
        self._record["backwards"] = len(self._losses)
        if not math.isfinite(loss) and "non-finite" not in self._counts:
            self._counted("non-finite", of=self.steps + 1, loss=loss, **first_nonfinite(tape, self._leaves, self._name))

    def _counted(self, code: str, *, of: int, **values: Any) -> None:
        """Logs a fact that may hold at every one `of` the steps looked at: once, and when its count has doubled."""
        count = self._counts[code] = self._counts.get(code, 0) + 1
        if count & (count - 1) == 0:
            self._fact(code, count=count, of=of, **values)

    def _fact(self, code: str, **values: Any) -> None:
        fact = {"code": code, "step": self.steps + 1, **values}
        self.facts.append({"kind": "fact", **fact})
        self._log.write("fact", **fact)

    def _learn_names(self) -> None:
        self._names = parameter_names(self._leaves, self._models)
        if any(name.startswith("tensor[") for name in self._names):
            self._models = models_alive()
            self._names = parameter_names(self._leaves, self._models)

    def _name(self, leaf: Tensor) -> str:
        if len(self._leaves) != len(self._names):
            self._learn_names()
        return next((n for n, p in zip(self._names, self._leaves, strict=True) if p is leaf), "")

    def _only(self) -> torch.optim.Optimizer | None:
        return self._optimizers[0] if len(self._optimizers) == 1 else None

    def _spent(self) -> float:
        return self._hooks.seconds + self._deck.seconds

    def _elapsed(self) -> float:
        return time.perf_counter() - self._began

    @property
    def overhead(self) -> float:
        """The share of the time that watching takes, looks at the run included."""
        ticks = 0.0 if self._ticks is None else self._ticks.seconds
        return (self._spent() + ticks) / max(self._elapsed() + ticks, 1e-9)


@contextlib.contextmanager
def watch(
    model: nn.Module | None = None,
    optimizer: torch.optim.Optimizer | None = None,
    *,
    folder: str | Path | None = None,
    budget: float = 0.02,
    tick: Tick | None = None,
) -> Iterator[Run]:
    """Watches the training inside the block; the loop in it stays as it is.

    Model and optimiser are found by themselves where they are not given. The run is written to `folder` (by default a
    new one below `unstuck-runs`) and can be read at any time. `budget` is the share of the time that recording may
    take. `tick(run)` is called after a step, at most twice a second, and may raise `unstuck.record.Stopped` to end the
    run; any other error in it does the training no harm.
    """
    script = getattr(sys.modules.get("__main__"), "__file__", None) or "interactive session"
    place = Path(folder) if folder is not None else new_folder(Path(script).stem)
    watcher = Watch(place, models=[] if model is None else [model], budget=budget, tick=tick)
    watcher.start(script, sys.argv[1:], [] if optimizer is None else [optimizer])
    outcome = "finished"
    run = Run(place, live=watcher)
    try:
        yield run
    except KeyboardInterrupt:
        outcome = "interrupted"
        raise
    except Stopped as stop:
        outcome = str(stop)
        raise
    except BaseException as error:
        outcome = f"raised {type(error).__name__}"
        raise
    finally:
        watcher.stop(outcome)


def new_folder(name: str) -> Path:
    """Makes a folder for a run, named after the time and the script; no other run has it."""
    stamp = datetime.datetime.now(datetime.UTC).strftime("%Y%m%d-%H%M%S")
    folder = FOLDER / f"{stamp}-{name}"
    for k in range(2, 1000):
        try:
            folder.mkdir(parents=True)
            break
        except FileExistsError:
            folder = FOLDER / f"{stamp}-{name}-{k}"
        except OSError:
            break  # the log will say so
    return folder


def _moved(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    return [p for g in optimizer.param_groups for p in g["params"]]
