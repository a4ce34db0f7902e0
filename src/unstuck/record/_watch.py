"""Watches a live run and writes what it sees to a run folder. Nothing in the run changes, to the last bit."""

import contextlib
import datetime
import math
import os
import platform
import time
from collections import deque
from collections.abc import Iterator, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from unstuck.objective import Recorder, Tape, TapeError, caller, pack
from unstuck.record._deck import KEPT, Deck, anything_compiled
from unstuck.record._facts import StaleGradients, cut_off, orphans
from unstuck.record._governor import Alarm, Clock
from unstuck.record._hooks import Hooks
from unstuck.record._journal import Journal
from unstuck.record._log import NAME, Log, placed, warn
from unstuck.record._models import Called, models_alive, module_names, parameter_names
from unstuck.record._moments import Tick, Ticks
from unstuck.record._nonfinite import first_nonfinite, first_nonfinite_gradient, met_again
from unstuck.record._pulses import Pulses
from unstuck.record._ranks import own_rank, ranked
from unstuck.record._run import TAPES, Run
from unstuck.record._state import Shelf, State, pack_state, snapshot

FIRST_TAPES = 16  # that need not wait for the promised share
FRUITLESS = 8  # refusals in a row, after which tapes wait for the promised share
FREE_SECONDS = 2.0  # what they, and those after an alarm, may take at once; later tapes wait until it is made up for
MARGIN = 0.7  # of the promised share: the rest is for what we cannot time, as the caches that we use
FIRST_STEPS = 4  # in which all models are called, some of them in a closure of the first step
SNAPSHOT_EVERY = 50  # steps, at the least
STATE_BYTES = 16 << 20  # of the weights: where they are larger, states go to the disk at once
SAFE_BYTES = 64 << 20  # of tapes that are written on the way as well, lest a kill takes them
SAFE_SECONDS = 30.0  # when that happens first; then at twice the time, and so on


class Watch:
    """The watcher of one process: `start` it, and `stop` it whatever happens in between."""

    def __init__(
        self, folder: Path, *, models: Sequence[nn.Module] = (), budget: float = 0.02, tick: Tick | None = None
    ) -> None:
        self.rank = own_rank()
        name = ranked(NAME, self.rank)
        if (folder / name).exists():
            raise ValueError(f"a folder without a run was needed, but {folder} holds one: name another or delete it")
        self.folder = placed(folder)
        self.steps = 0
        self._models = list(models)
        self._budget = budget
        self._log = Log(folder, name)
        self._journal = Journal(self._log, self._look)
        self._hooks = Hooks(self)
        self._leaves: list[Tensor] = []
        self._names: list[str] = []  # of the leaves: kept, since a model may be gone before its run is written
        self._deck = Deck(self._leaves, lambda modules: module_names(modules, self._leaves, self._models))
        self._optimizers: list[torch.optim.Optimizer] = []
        self._sizes: list[int] = []  # how many parameters each of them has
        self._pulses: list[Pulses] = []  # of each optimiser
        self._stale = StaleGradients()
        self._losses: list[Tensor] = []  # what backward was called on since the last step
        self._scaled: list[tuple[Tensor, Tensor]] = []  # losses that a GradScaler has multiplied, and what they were
        self._record: dict[str, Any] = {}  # of the step being taken
        self._skipped = 0  # steps that a GradScaler left out
        self._finite = True  # whether the last loss was
        self._refused = 0  # tapes in a row
        self._unexplained = False  # whether a loss that was not may be the fault of a batch
        self._counts: dict[str, int] = {}
        self.facts: list[dict[str, Any]] = []  # as the log has them: few, since a count is told when it has doubled
        self.heard = 0  # steps that a recorder was on for
        self._called: Called | None = None
        self._searched = False
        self._ticks = None if tick is None else Ticks(tick, Run(self.folder, live=self, rank=self.rank))
        self._wanted = FIRST_TAPES  # tapes that need not wait for the promised share
        self._alarm = Alarm()
        self._pace = 0.0  # seconds of a step without us, the latest counting most
        self._last = (0.0, 0.0)  # the time and what had been spent after the last step
        self._snapshots = Clock(budget / 8, SNAPSHOT_EVERY)
        self._safe_at = SAFE_SECONDS
        self._first: list[State] = []  # the weights at the start, unless they are large
        self._recent: deque[State] = deque(maxlen=2)
        self._shelf: Shelf | None = Shelf(self.folder, self.rank)
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
        if not (self._models or anything_compiled()):  # which would have to compile again
            self._called = Called()
        for optimizer in optimizers:
            self._meet(optimizer)
        if optimizers:
            self._deck.listen()

    def stop(self, outcome: str) -> None:
        """Removes everything that `start` put in place and writes what is left to write."""
        self._hooks.remove()
        self._found_models()
        self._deck.close()
        if os.getpid() != self._process:
            return  # a fork of the script that came this far: the run is its parent's
        self.flush()
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
        self._log.flush()  # which notices that the folder is gone
        if self._saved == self.steps or not self._deck.tapes or self._log.failed:
            return
        path = self.folder / ranked(TAPES, self.rank)
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

    def flush(self) -> None:
        """Has the log show the run as it stands."""
        self._journal.settle()
        self._log.flush()

    def _packed(self) -> dict[str, Any]:
        self._learn_names(thoroughly=True)
        last = snapshot(self.steps, self._leaves, self._only(), copy=False)
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
        self._found_models()

    def scaled(self, loss: Any, result: Any) -> None:
        if isinstance(loss, Tensor) and isinstance(result, Tensor):
            self._scaled.append((result, loss.detach()))

    def scale_updated(self) -> None:
        if self._losses:  # the step was left out: its gradients were not finite
            self._skipped += 1
            self._forget_losses()
            recorder = self._deck.renew()  # what comes now is another step
            if recorder is not None and self._skipped.bit_count() == 1:  # now and then: where the gradients went wrong
                with self._deck.aside():
                    tape = self._deck.compiled(recorder, self.steps + 1)
                    slope = first_nonfinite_gradient(tape, self._leaves, self._name)
                if slope is not None:
                    self._fact("step-left-out", count=self._skipped, **slope)

    def backward_called(self, roots: list[Tensor]) -> None:
        for root in roots:
            if root.numel() == 1:
                original = next((loss for result, loss in self._scaled if result is root), root.detach())
                self._losses.append(original if original.device.type == "cpu" else original.clone())
        self._stale.note_backward()
        self._deck.root(roots)

    def before_step(self, optimizer: torch.optim.Optimizer) -> None:
        recorder = self._deck.silence()
        pulses = self._pulses[self._meet(optimizer)]
        stale = self._stale.used_by(optimizer)
        if stale is not None:
            self._counted("stale-gradient", of=self.steps + 1, where=self._name(stale), line=caller())
        if self.steps == 0:
            self._remember()
        tape = None
        if recorder is not None:
            with torch.no_grad():
                tape = self._heard_step(recorder, optimizer, fit=stale is None)
        self._record = pulses.before_step(self._pace)
        if self._losses:
            self._read_loss(tape)

    def after_step(self, optimizer: torch.optim.Optimizer) -> None:
        self.steps += 1
        which = self._meet(optimizer)
        elapsed, spent = self._elapsed(), self._spent()
        record, self._record = self._record, {}
        record["step"], record["time"], record["optimizer"] = self.steps, round(elapsed, 6), which
        if self._losses and "loss" not in record:  # the optimiser called backward itself, in a closure
            loss = self._losses[-1]
            record["loss"] = float(loss) if loss.device.type == "cpu" else loss
        if self._pulses[which].measures:
            with torch.no_grad():  # what an outer watch sees of it is then no part of a step
                record |= self._pulses[which].after_step(self._pace)
        record["order"], record["skipped"] = self._hooks.taken_order(), self._skipped
        if self._models:
            record["training"] = all(m.training for m in self._models)
        self._stale.note_step(optimizer)
        self._forget_losses()
        self._journal.add(record)
        if self._snapshots.due(self.steps):
            with torch.no_grad():
                self._remember()
        if elapsed > self._safe_at:
            self._safe_at = 2 * elapsed
            if self._deck.bytes <= SAFE_BYTES:
                self.save()
        pace = (elapsed - self._last[0]) - (spent - self._last[1])
        self._last = elapsed, spent
        self._pace += (pace - self._pace) * (0.1 if self._pace else 1.0)
        over = spent - MARGIN * self._budget * elapsed
        if over < 0 or (self._wanted > 0 and over < FREE_SECONDS and self._refused < FRUITLESS):  # the next one too
            self._wanted -= 1
            self._deck.listen()
        if self._called is not None and (self.steps >= FIRST_STEPS or not self._nameless()):
            self._found_models()
        if self._ticks is not None:
            self._hooks.seconds -= self._ticks()  # which has its own share

    def _heard_step(self, recorder: Recorder, optimizer: torch.optim.Optimizer, *, fit: bool) -> Tape | None:
        """The tape of the step that was recorded, if it can be trusted."""
        self.heard += 1
        tape = self._deck.compiled(recorder, self.steps + 1)
        self._refused = 0 if tape is not None else self._refused + 1
        if tape is not None and fit and not self._deck.check(tape, _moved(optimizer)):
            tape = None
        if tape is not None:
            self._deck.keep(tape)
            again = (
                met_again(tape, self._models, [*self._first, *self._recent], self._leaves)
                if self._unexplained
                else None
            )
            if again is not None:  # the step at which it did the harm was not recorded, but it has come again
                self._unexplained = False
                self._fact(again[0], **again[1])
        cut = cut_off(recorder, optimizer)
        if cut:
            told = dict(zip(("function", "line"), recorder.cuts[0], strict=True), module=recorder.cut_in)
            self._counted("graph-cut", of=self.heard, names=[self._name(p) for p in cut], **told)
        lost = orphans(recorder, self._optimizers)
        if lost:
            self._counted("orphan-gradient", of=self.heard, names=[self._name(p) for p in lost])
        return tape

    def _look(self, step: int, loss: float) -> None:
        """Is told the loss of each step, a little later."""
        if self._alarm.rings(loss):
            self._wanted = KEPT
        self._finite = math.isfinite(loss)
        if not self._finite and "non-finite" not in self._counts:  # else it was seen while the weights were its own
            tape = next((t for t in self._deck.tapes if t.step == step), None)
            self._blew_up(step, loss, tape)

    def _blew_up(self, step: int, loss: float, tape: Tape | None) -> None:
        with self._deck.aside():
            memory = {"tapes": self._deck.tapes, "states": [*self._first, *self._recent]}
            where = first_nonfinite(tape, self._leaves, self._name, step=step, **memory)
        self._unexplained = where["origin"] in ("unknown", "parameter") and "cause" not in where
        self._wanted = KEPT  # at once: the batch that did it may come again soon
        self._counted("non-finite", of=step, step=step, loss=loss, **where)

    def _remember(self) -> None:
        """Keeps the weights as they stand, if they are finite: the first, and of the later ones the last two."""
        began = time.perf_counter()
        if self._finite and self._bytes() <= STATE_BYTES:
            (self._recent if self.steps else self._first).append(snapshot(self.steps, self._leaves, self._only()))
        elif self._finite and self._shelf is not None:
            try:
                self._shelf.put(snapshot(self.steps, self._leaves, self._only(), copy=False))
            except (OSError, RuntimeError) as error:
                self._shelf = None
                self._fact("not-saved", because=str(error))
        self._snapshots.took(self.steps, time.perf_counter() - began, self._pace)

    def gave_up(self, reason: str) -> None:
        self._deck.close()
        self._fact("watcher-failed", because=reason)
        warn(f"watching ended at step {self.steps + 1}: {reason}; the training goes on")

    def _meet(self, optimizer: torch.optim.Optimizer) -> int:
        """Makes the optimiser's parameters known, and names them by the models that own them; its number."""
        count = sum([len(g["params"]) for g in optimizer.param_groups])
        for k, known in enumerate(self._optimizers):
            if known is optimizer and self._sizes[k] == count:
                return k
        known = {id(p) for p in self._leaves}
        new = [p for p in _moved(optimizer) if id(p) not in known]
        if new:
            self._deck.silence()  # a recorder counts the leaves that it began with
            self._leaves += new
        if len(self._leaves) != len(self._names):
            self._learn_names()
        for k, known in enumerate(self._optimizers):
            if known is optimizer:
                self._sizes[k] = count
                return k
        self._optimizers.append(optimizer)
        self._sizes.append(count)
        self._pulses.append(Pulses(optimizer, self._budget))
        groups = [{k: v for k, v in g.items() if isinstance(v, (bool, int, float))} for g in optimizer.param_groups]
        kind = f"{type(optimizer).__module__}.{type(optimizer).__qualname__}"
        number = len(self._optimizers) - 1
        self._log.write("optimizer", index=number, name=kind, groups=groups, parameters=count)
        return number

    def _meet_again(self) -> None:
        """Optimisers may have got parameters since their last step."""
        self._sizes = [-1] * len(self._optimizers)
        for optimizer in self._optimizers:
            self._meet(optimizer)

    def _read_loss(self, tape: Tape | None) -> None:
        self._record["backwards"] = len(self._losses)
        if any(loss.device.type != "cpu" for loss in self._losses):  # to be read later
            device = next(loss.device for loss in self._losses if loss.device.type != "cpu")
            self._record["loss"] = torch.stack([loss.to(device, torch.float64) for loss in self._losses]).sum()
            return
        self._record["loss"] = loss = sum([float(loss) for loss in self._losses])
        self._finite = math.isfinite(loss)
        told = "non-finite" in self._counts
        if not (self._finite or told):  # now, while the weights are still those of the loss
            self._blew_up(self.steps + 1, loss, tape)
        elif not told and isinstance(norm := self._record.get("grad_norm"), float) and not math.isfinite(norm):
            slope = first_nonfinite_gradient(tape, self._leaves, self._name)
            if slope is not None:
                self._counted("non-finite", of=self.steps + 1, loss=loss, **slope)

    def _forget_losses(self) -> None:
        self._losses.clear()
        self._scaled.clear()

    def _counted(self, code: str, *, of: int, **values: Any) -> None:
        """Logs a fact that may hold at every one `of` the steps looked at: once, and when its count has doubled."""
        count = self._counts[code] = self._counts.get(code, 0) + 1
        if count & (count - 1) == 0:
            self._fact(code, count=count, of=of, **values)

    def _fact(self, code: str, **values: Any) -> None:
        self._journal.settle()  # the steps before it come first
        fact = {"code": code, "step": self.steps + 1, **values}
        self.facts.append({"kind": "fact", **fact})
        self._log.write("fact", **fact)

    def _learn_names(self, *, thoroughly: bool = False) -> None:
        self._names = parameter_names(self._leaves, self._models)
        if self._nameless() and self._called is not None:
            self._models = self._called.models() or self._models
            self._names = parameter_names(self._leaves, self._models)
        if self._nameless() and thoroughly:
            self._models = models_alive() or self._models
            self._names = parameter_names(self._leaves, self._models)

    def _nameless(self) -> bool:
        return any(name.startswith("tensor[") for name in self._names)

    def _found_models(self) -> None:
        """Looks for models no longer."""
        if self._called is not None:
            self._learn_names()
            self._called.close()
            self._called = None

    def _name(self, leaf: Tensor) -> str:
        if len(self._leaves) != len(self._names) or self._nameless():
            self._learn_names(thoroughly=not self._searched)
            self._searched = True  # which takes its time, and is worth it once
        return next((n for n, p in zip(self._names, self._leaves, strict=True) if p is leaf), "")

    def _only(self) -> torch.optim.Optimizer | None:
        return self._optimizers[0] if len(self._optimizers) == 1 else None

    def _bytes(self) -> int:
        return sum([p.nbytes for p in self._leaves])

    def _spent(self) -> float:
        return self._hooks.seconds + self._deck.seconds

    def _elapsed(self) -> float:
        return time.perf_counter() - self._began

    @property
    def overhead(self) -> float:
        """The share of the time that watching takes, looks at the run included."""
        ticks = 0.0 if self._ticks is None else self._ticks.seconds
        return (self._spent() + ticks) / max(self._elapsed() + ticks, 1e-9)


def _moved(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    return [p for g in optimizer.param_groups for p in g["params"]]
