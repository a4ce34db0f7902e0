"""Watches a live run and writes what it sees to a run folder. Nothing in the run changes, to the last bit."""

import contextlib
import datetime
import math
import os
import platform
import time
from collections.abc import Iterator, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from unstuck.objective import Recorder, Tape, caller
from unstuck.record._deck import KEPT, Deck, anything_compiled
from unstuck.record._devices import wait
from unstuck.record._evaluations import Evaluations
from unstuck.record._facts import StaleGradients
from unstuck.record._governor import Alarm, Allowance
from unstuck.record._hooks import Hooks
from unstuck.record._journal import Journal
from unstuck.record._log import NAME, Log, placed, warn
from unstuck.record._loop import Loop
from unstuck.record._models import Leaves
from unstuck.record._moments import Tick, Ticks
from unstuck.record._nonfinite import first_nonfinite, first_nonfinite_gradient, met_again
from unstuck.record._pulses import number, summed
from unstuck.record._ranks import own_rank, ranked, ranks, sharded
from unstuck.record._run import Run
from unstuck.record._state import moved
from unstuck.record._stepped import Stepped, stepping
from unstuck.record._store import Store
from unstuck.record._turns import Turns

FIRST_TAPES = 16  # that need not wait for the promised share, whatever they cost
FRUITLESS = 8  # refusals in a row, after which tapes wait for the promised share
MARGIN = 0.7  # of the promised share: the rest is for what we cannot time, as the caches that we use
FIRST_STEPS = 4  # in which all models are called, some of them in a closure of the first step
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
        self._budget = budget
        self._log = Log(folder, name)
        self._journal = Journal(self._log, self._look)
        self._hooks = Hooks(self)
        self._leaves = Leaves(models)
        self._deck = Deck(self._leaves.tensors, self._leaves.modules)
        self._evaluations = Evaluations(self._leaves.tensors, self._deck, self._hooks.deaf, budget)
        self._store = Store(self.folder, self.rank, self._leaves, self._deck, self._evaluations, budget)
        self._loop = Loop(self._hooks, self._leaves, self._store, self._counted)
        self._stepped: dict[int, Stepped] = {}  # the optimisers, by identity
        self._outer: torch.optim.Optimizer | None = None  # whose step is being taken
        self._stale = StaleGradients()
        self._losses: list[float | Tensor] = []  # what backward was called on since the last step
        self._scaled: list[tuple[Tensor, Tensor]] = []  # losses that a GradScaler has multiplied, and what they were
        self._rate: Any = None  # of the step being taken
        self._loss: float | Tensor | None = None
        self._backwards = 0  # that had been called by then
        self._record: dict[str, Any] = {}  # where it is looked at
        self._closely = False  # whether it is looked at
        self._cost = 0.0  # seconds of looking at it so far
        self._skipped = 0  # steps that a GradScaler left out
        self._finite = True  # whether the last loss was
        self._waited = 0.0  # seconds, for devices to do what the script had asked of them
        self._refused = 0  # tapes in a row
        self._unexplained = False  # whether a loss that was not may be the fault of a batch
        self._counts: dict[str, int] = {}
        self.facts: list[dict[str, Any]] = []  # as the log has them: few, since a count is told when it has doubled
        self.heard = 0  # steps that a recorder was on for
        self._ticks = None if tick is None else Ticks(tick, Run(self.folder, live=self, rank=self.rank))
        self._wanted = KEPT // 2  # tapes that need not wait for the promised share
        self._hurry = False  # whether they are wanted at once
        self._turns = Turns(ranks())
        self._alarm, self._allowance = Alarm(), Allowance()
        self._pace = 0.0  # seconds of a step without us, the latest counting most
        self._last = (0, 0.0, 0.0)  # the last step that was looked at, its time, and what had been spent by then
        self._safe_at = SAFE_SECONDS
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
            ranks=ranks(),
        )
        self._hooks.put()
        self._evaluations.put()
        if not (self._leaves.models or anything_compiled()):  # which would have to compile again
            self._leaves.look_out()
        for optimizer in optimizers:
            self._meet(optimizer)
        if optimizers:
            self._deck.listen()

    def stop(self, outcome: str) -> None:
        """Removes everything that `start` put in place and writes what is left to write."""
        self._hooks.remove()
        self._evaluations.remove()
        self._leaves.found()
        self._deck.close()
        if os.getpid() != self._process:
            return  # a fork of the script that came this far: the run is its parent's
        self.flush()
        self.save()
        counts = {"heard": self.heard, "looked": self.looked, "skipped": self._skipped}
        end = {"time": self._elapsed(), "overhead": self.overhead, **counts, "refusals": self._deck.refusals}
        self._log.write("end", outcome=outcome, **end)
        self._log.close()

    def save(self) -> None:
        """Writes the tapes and states to the run folder, whole or not at all."""
        self._log.flush()  # which notices that the folder is gone
        if self._log.failed:
            return
        try:
            self._meet_again()
            self._store.write(self.steps, self._only())
        except Exception as error:  # whatever it is, the training goes on
            self._fact("not-saved", because=str(error))
            if not self._log.failed:  # which has been told
                warn(f"the recorded steps could not be saved: {error}; the diagnosis rests on the log alone")

    def flush(self) -> None:
        """Has the log show the run as it stands."""
        self._journal.settle()
        self._log.flush()

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """What is computed inside is no part of the run, and its time is not either."""
        was, self._hooks.paused = self._hooks.paused, True
        order = tuple(self._hooks.order)
        began = time.perf_counter()
        try:
            with self.aside():
                yield
        finally:
            self._hooks.order.clear()
            self._hooks.order.extend(order)
            self._hooks.paused = was
            self._began += 0.0 if was else time.perf_counter() - began  # a pause within a pause counts once

    @contextlib.contextmanager
    def aside(self) -> Iterator[None]:
        """What runs inside is not recorded: torch asks there whether somebody listens, and then computes otherwise."""
        with self._deck.aside(), self._evaluations.aside():
            yield

    def optimizer_made(self, optimizer: torch.optim.Optimizer) -> None:
        if not (self.steps or sharded(optimizer)):
            self._deck.listen()  # so that the first step is heard as well

    def compiling(self) -> None:
        self._deck.silence()
        self._evaluations.remove()
        self._leaves.found()

    def scaled(self, loss: Any, result: Any) -> None:
        if isinstance(loss, Tensor) and isinstance(result, Tensor):
            self._scaled.append((result, loss.detach()))

    def scale_updated(self) -> None:
        if self._losses:  # the step was left out: its gradients were not finite
            self._skipped += 1
            self._losses.clear()
            self._scaled.clear()
            recorder = self._deck.renew()  # what comes now is another step
            if recorder is not None and self._skipped in (4, 16, 64, 256):  # the first few are by design
                self._tell_left_out(recorder)

    def _tell_left_out(self, recorder: Recorder) -> None:
        with self._deck.aside():
            tape = self._deck.compiled(recorder, self.steps + 1)
            slope = first_nonfinite_gradient(tape, self._leaves.tensors, self._leaves.name)
        if slope is not None:
            self._fact("step-left-out", count=self._skipped, **slope)

    def backward_called(self, roots: tuple[Tensor, ...]) -> None:
        self._evaluations.rows.trained()
        listening = self._deck.listening
        for root in roots:
            if root.numel() == 1:
                loss = self._unscaled(root) if self._scaled else root
                if not loss.is_cpu:  # to be read later
                    loss = loss.detach().clone()
                self._losses.append(loss.item() if loss.is_cpu and not listening else loss.detach())
        if self._stale.left:
            self._stale.note_backward()
        self._deck.root(roots, cleared=listening and self._loop.backward(looked=self._deck.looked))

    def _unscaled(self, root: Tensor) -> Tensor:
        return next((loss for result, loss in self._scaled if result is root), root)

    def before_step(self, optimizer: torch.optim.Optimizer) -> None:
        if self._outer is not None and self._outer is not optimizer and stepping(self._outer):
            return  # one that steps within the step of another is a part of that
        self._outer = optimizer
        stepped = self._stepped.get(id(optimizer))
        if stepped is not None and stepped.first is not None and stepped.first._version != stepped.left:
            self._loop.written_between(stepped)
        self._rate = optimizer.param_groups[0].get("lr")
        self._loss, self._backwards = None, len(self._losses)
        if self._losses:
            self._loss = loss = summed(self._losses)
            if type(loss) is float:  # else it is read later
                self._finite = math.isfinite(loss)
        first = not self._finite and "non-finite" not in self._counts
        self._closely = stepped is None or stepped.closely or self._deck.listening or first
        if self._closely:
            self._look_before(optimizer)

    def _look_before(self, optimizer: torch.optim.Optimizer) -> None:
        began = time.perf_counter()
        self._record = {"lr": number(self._rate)}
        if self._loss is not None:
            self._record |= {"backwards": self._backwards, "loss": self._loss}
        self._evaluations.interrupt()
        recorder = self._deck.silence()
        stepped = self._meet(optimizer)
        stale = self._stale.used_by(optimizer)
        if stale is not None:
            self._counted("stale-gradient", of=self.looked, where=self._leaves.name(stale), line=caller())
        if self.steps == 0:
            self._remember()
        tape = None
        if recorder is not None:
            with torch.no_grad():
                tape = self._heard_step(recorder, optimizer, fit=stale is None)
                self._loop.graph(recorder, optimizer, list(self._stepped.values()), self.heard)
        if not self._finite and "non-finite" not in self._counts:  # now, while the weights are still those of the loss
            self._blew_up(self.steps + 1, self._record["loss"], tape)
        self._cost = time.perf_counter() - began if recorder is None else 0.0  # which has its own share
        self._record |= stepped.pulses.before_step(stepped.steps + 1, self._pace)
        norm = self._record.get("grad_norm")
        if isinstance(norm, float) and not math.isfinite(norm) and "non-finite" not in self._counts:
            self._blew_up_backward(tape)
        self._loop.reads(norm)

    def after_step(self, optimizer: torch.optim.Optimizer) -> None:
        if self._outer is not optimizer:
            return
        self._outer = None
        self.steps += 1
        elapsed, loss = self._elapsed(), self._loss
        stepped = self._stepped.get(id(optimizer)) or self._meet(optimizer)
        if self._losses and loss is None:  # the optimiser called backward itself, in a closure
            loss = summed(self._losses[-1:])
        self._losses.clear()
        self._scaled.clear()
        if self._closely:
            self._look_after(stepped, elapsed, {} if loss is None else {"loss": loss})
            stepped.was_looked_at(self._cost, self._pace)
        else:
            if self._hurry or not self._turns.alone:  # turns come at steps of their own
                self._plan()
            self._journal.note(self.steps, elapsed, stepped.number, self._rate, loss, self._backwards)
            stepped.passed()
        self._loop.last = stepped
        self._evaluations.stepped(self.steps, elapsed)
        self._hooks.order.clear()
        if stepped.closely or self._deck.listening:
            self._stale.note_step(optimizer)
        elif self._stale.left:
            self._stale.forget(optimizer)
        if self._ticks is not None:
            self._hooks.seconds -= self._ticks()  # which has its own share

    def _look_after(self, stepped: Stepped, elapsed: float, loss: dict[str, Any]) -> None:
        record = self._record | loss | {"step": self.steps, "time": elapsed, "optimizer": stepped.number}
        if stepped.pulses.measures:
            with torch.no_grad():  # what an outer watch sees of it is then no part of a step
                record |= stepped.pulses.after_step(self._pace)
        began = time.perf_counter()
        self._loop.looks(stepped)
        record["order"], record["skipped"] = "".join((*self._hooks.order, "s")), self._skipped
        record["clips"], record["schedules"] = self._hooks.order.count("c"), self._hooks.order.count("l")
        if self._leaves.models:
            record["training"] = all(m.training for m in self._leaves.models)
        self._plan()
        if self._cost:
            self._cost += time.perf_counter() - began
        if self._store.due(self.steps):
            if isinstance(record.get("loss"), Tensor):  # whether it is finite still lies on a device
                self.flush()
            self._remember()
        self._journal.add(record)

    def _plan(self) -> None:
        """Whether the next step is recorded, and whether the run is saved as it stands."""
        self._hurry = False
        elapsed, spent = self._elapsed(), self._spent()
        steps, time_then, spent_then = self._last
        pace = (elapsed - time_then - (spent - spent_then)) / (self.steps - steps)
        self._last = self.steps, elapsed, spent
        self._pace += (pace - self._pace) * (0.1 if self._pace else 1.0)
        if elapsed > self._safe_at:
            self._safe_at = 2 * elapsed
            if self._deck.bytes <= SAFE_BYTES:
                self.save()
        allowed = MARGIN * self._budget * elapsed
        needed = self.heard < FIRST_TAPES or "non-finite" in self._counts
        free = self._wanted > 0 and self._refused < FRUITLESS and self._allowance.covers(spent, allowed, needed=needed)
        if self._turns.due(self.steps + 1, spent, allowed) or free:
            self._wanted -= 1
            self._deck.listen()
        if self._leaves.looks_out and (self.steps >= FIRST_STEPS or not self._leaves.nameless):
            self._leaves.found()

    def _heard_step(self, recorder: Recorder, optimizer: torch.optim.Optimizer, *, fit: bool) -> Tape | None:
        """The tape of the step that was recorded, if it can be trusted."""
        self.heard += 1
        self._waited += wait({loss.device for loss in self._losses if isinstance(loss, Tensor)})
        tape = self._deck.compiled(recorder, self.steps + 1)
        self._refused = 0 if tape is not None else self._refused + 1
        if tape is not None and not self._deck.check(tape, moved(optimizer) if fit else ()):
            tape = None
        if self._deck.lost:
            self._counted("gradient-lost", of=self.heard, share=self._deck.lost)
        if tape is not None:
            self._deck.keep(tape)
            known = self._leaves.models, self._store.states, self._leaves.tensors
            again = met_again(tape, *known) if self._unexplained else None
            if again is not None:  # the step at which it did the harm was not recorded, but it has come again
                self._unexplained = False
                self._fact(again[0], **again[1])
        return tape

    def _look(self, step: int, loss: float) -> None:
        """Is told the loss of each step, a little later."""
        if self._alarm.rings(loss):  # a step's batch stays one of the run's: those of late need not come anew
            self._wanted, self._hurry = KEPT - sum(4 * t.step > step for t in self._deck.tapes), True
            self._allowance.grants(self._spent(), self._elapsed())
        self._finite = math.isfinite(loss)
        if not self._finite and "non-finite" not in self._counts:  # else it was seen while the weights were its own
            tape = next((t for t in self._deck.tapes if t.step == step), None)
            self._blew_up(step, loss, tape)

    def _blew_up(self, step: int, loss: float, tape: Tape | None) -> None:
        with self._deck.aside():
            memory = {"tapes": self._deck.tapes, "states": self._store.states}
            where = first_nonfinite(tape, self._leaves.tensors, self._leaves.name, step=step, **memory)
        self._unexplained = where["origin"] in ("unknown", "parameter") and "cause" not in where
        self._wanted, self._hurry = KEPT, True  # the batch that did it may come again soon
        self._counted("non-finite", of=step, step=step, loss=loss, **where)

    def _blew_up_backward(self, tape: Tape | None) -> None:
        with self._deck.aside():
            where = first_nonfinite_gradient(tape, self._leaves.tensors, self._leaves.name)
        if where is not None:
            step = self.steps + 1
            self._counted("non-finite", of=step, step=step, loss=self._record.get("loss", math.nan), **where)

    def _remember(self) -> None:
        if not self._finite or self._deck.sharded:
            return
        try:
            self._store.remember(self.steps, self._only(), self._pace)
        except (OSError, RuntimeError) as error:
            self._fact("not-saved", because=str(error))

    def gave_up(self, reason: str) -> None:
        self._deck.close()
        self._fact("watcher-failed", because=reason)
        warn(f"watching ended at step {self.steps + 1}: {reason}; the training goes on")

    def _meet(self, optimizer: torch.optim.Optimizer) -> Stepped:
        """Makes the optimiser and its parameters known, and names them by the models that own them."""
        stepped = self._stepped.get(id(optimizer))
        parameters = moved(optimizer)
        if stepped is not None and stepped.size == len(parameters):
            return stepped
        known = {id(p) for p in self._leaves.tensors}
        new = [p for p in parameters if id(p) not in known]
        if new:
            self._deck.silence()  # a recorder counts the leaves that it began with
            self._leaves.tensors += new
        if len(self._leaves.tensors) != len(self._leaves.names):
            self._leaves.learn()
        if stepped is None:
            number = len(self._stepped)
            stepped = self._stepped[id(optimizer)] = Stepped(optimizer, number, self._budget)
            groups = [{k: v for k, v in g.items() if isinstance(v, (bool, int, float))} for g in optimizer.param_groups]
            kind = f"{type(optimizer).__module__}.{type(optimizer).__qualname__}"
            self._log.write("optimizer", index=number, name=kind, groups=groups, parameters=len(parameters))
        stepped.meets(parameters)
        return stepped

    def _meet_again(self) -> None:
        """Optimisers may have got parameters since their last step."""
        for stepped in self._stepped.values():
            stepped.size = -1
            self._meet(stepped.optimizer)

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

    def _only(self) -> torch.optim.Optimizer | None:
        known = list(self._stepped.values())
        return known[0].optimizer if len(known) == 1 else None

    @property
    def looked(self) -> int:
        """How many steps were looked at for gradients that the step before had left."""
        return self._stale.looked

    def _spent(self) -> float:
        ours = self._hooks.seconds + self._deck.seconds + self._evaluations.seconds
        return ours - self._waited - self._journal.waited

    def _elapsed(self) -> float:
        return time.perf_counter() - self._began

    @property
    def overhead(self) -> float:
        """The share of the time that watching takes, looks at the run included."""
        ticks = 0.0 if self._ticks is None else self._ticks.seconds
        return (self._spent() + ticks) / max(self._elapsed() + ticks, 1e-9)
