"""Errors that a training loop's calls give away: their order, and who writes into the weights."""

from collections.abc import Callable, Sequence

import torch

from unstuck.objective import Recorder, caller
from unstuck.record._facts import cut_off, orphans
from unstuck.record._hooks import Hooks
from unstuck.record._models import Leaves
from unstuck.record._state import moved
from unstuck.record._stepped import Stepped
from unstuck.record._store import Store

SAMPLED = 256  # numbers of a parameter
COMPARED = 3  # parameters of an optimiser: a load of weights concerns all of them


class Loop:
    """Notices errors from one step to the next. `tell(code, of=steps looked at, **values)` is called at each."""

    def __init__(self, hooks: Hooks, leaves: Leaves, store: Store, tell: Callable[..., None]) -> None:
        self._hooks = hooks
        self._leaves = leaves
        self._store = store
        self._tell = tell
        self._norms = 0  # steps of which the gradient's norm was read
        self._ends = 0  # steps whose end was looked at
        self._thrown = 0  # backward() calls of this step whose gradients nobody used
        self._throws = False
        self._then: list[torch.Tensor] = []  # some weights at the last one
        self.last: Stepped | None = None  # who took the step before

    def backward(self, *, looked: bool) -> bool:
        """A backward() of a recorded step begins: whether the gradients of the one before were cleared meanwhile.

        They were thrown away where nobody had `looked` at any, none is left, and the weights are what they were then:
        some methods ask at two places for two gradients, or of two losses for the size of each.
        """
        calls = "".join(self._hooks.order)[:-1]
        since = calls[calls.rfind("b") :] if "b" in calls else ""
        cleared = "z" in since and "u" not in since  # of gradients that a scaler looked at a step may be left out
        now = [p.detach().flatten()[:SAMPLED].clone() for p in self._leaves.tensors[:COMPARED]]
        if "b" not in calls:
            self._thrown = 0
            self._trace("z", wanted=self._throws)
        elif cleared and not looked and all(torch.equal(a, b) for a, b in zip(now, self._then, strict=False)):
            self._thrown += all(p.grad is None or not bool(p.grad.any()) for p in self._leaves.tensors)
        self._then = now
        return cleared

    def reads(self, norm: object) -> None:
        """The gradient of the coming step was looked at: its norm, if that was read and is no longer on a device."""
        if not isinstance(norm, float):
            return
        self._norms += 1
        calls = "".join(self._hooks.order)
        if norm == 0 and 0 <= calls.rfind("b") < calls.rfind("z"):
            self._tell("cleared-before-step", of=self._norms, order=f"{calls}s", line=self._hooks.places.get("z", ""))
            self._trace("z")

    def looks(self, stepped: Stepped) -> None:
        """A step ends that is looked at."""
        self._ends += 1
        calls = "".join(self._hooks.order)
        if 0 <= calls.rfind("b") < calls.rfind("c") < calls.rfind("u"):
            self._tell("clipped-scaled", of=self._ends, order=f"{calls}s", line=self._hooks.places.get("c", ""))
            self._trace("c")
        last = self.last
        if last is not None and not {"b", "z"} & set(self._hooks.order) and _share(last, stepped):
            other = last is not stepped
            self._tell("stepped-again", of=self._ends, line=caller(), other=other)
        start = self._start(stepped)
        if start and not stepped.moved:
            stepped.moved = not torch.equal(*start[0])

    def graph(self, recorder: Recorder, optimizer: torch.optim.Optimizer, known: Sequence[Stepped], heard: int) -> None:
        """A recorded step: parameters that no gradient reaches, or no optimiser moves."""
        calls = "".join(self._hooks.order)
        if self._thrown and self._thrown == calls.count("b") - 1:
            self._throws = True
            self._tell("gradient-thrown-away", of=heard, order=f"{calls}s", line=self._hooks.places.get("z", ""))
        self._thrown = 0
        cut = cut_off(recorder, optimizer)
        if cut:
            function, line = recorder.cuts[0]
            told = {"function": function, "line": line, "module": recorder.cut_in}
            self._tell("graph-cut", of=heard, names=[self._leaves.name(p) for p in cut], **told)
        lost = orphans(recorder, [stepped.optimizer for stepped in known])
        if lost:
            self._tell("orphan-gradient", of=heard, names=[self._leaves.name(p) for p in lost])

    def _trace(self, call: str, *, wanted: bool = True) -> None:
        """The place of the next such call is wanted, if none is known."""
        if wanted and call not in self._hooks.places:
            self._hooks.traces = call

    def written_between(self, stepped: Stepped) -> None:
        """Somebody wrote into the weights since the last step: looked at when that has happened twice as often."""
        stepped.writes += 1
        if stepped.writes & (stepped.writes - 1) or not stepped.moved:
            return
        start = self._start(stepped)
        if start and all(torch.equal(now, then) for now, then in start):
            self._tell("weights-reset", of=stepped.writes, optimizer=stepped.number)

    def _start(self, stepped: Stepped) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """A few weights beside what they were before the first step; none where that lies on the disk."""
        state = next((s for s in self._store.states if s.step == 0), None)
        if state is None:
            return []
        places = {id(p): k for k, p in enumerate(self._leaves.tensors[: len(state.weights)])}
        known = [(p, places[id(p)]) for p in moved(stepped.optimizer) if id(p) in places]
        return [(p.detach(), state.weights[k]) for p, k in known[:COMPARED]]


def _share(one: Stepped, other: Stepped) -> bool:
    return one is other or bool(set(map(id, moved(one.optimizer))) & set(map(id, moved(other.optimizer))))
