"""Facts of a step that need no interpretation."""

import weakref
from collections.abc import Sequence
from itertools import islice

import torch
from torch import Tensor

from unstuck.objective import Recorder
from unstuck.record._pulses import together
from unstuck.record._ranks import in_pieces
from unstuck.record._state import moved

_Left = tuple[Tensor, "weakref.ref[Tensor]", int]  # a parameter, its gradient and the version of that


class StaleGradients:
    """Notices gradients that one step used and the next step uses again, because nobody cleared them."""

    WATCHED = 3  # parameters of each optimiser: a missing zero_grad() concerns all of them

    def __init__(self) -> None:
        self.looked = 0  # steps of which the one before was noted
        self.left: dict[int, list[_Left]] = {}  # by optimiser
        self._stale: dict[int, Tensor | None] = {}  # by optimiser: whether they are, 0-d, read only where it matters

    def note_step(self, optimizer: torch.optim.Optimizer) -> None:
        used = ((p, p.grad) for p in moved(optimizer) if p.grad is not None)
        self.left[id(optimizer)] = [(p, weakref.ref(g), g._version) for p, g in islice(used, self.WATCHED)]
        self._stale[id(optimizer)] = None

    def forget(self, optimizer: torch.optim.Optimizer) -> None:
        """The coming step is not looked at."""
        self.left.pop(id(optimizer), None)
        self._stale.pop(id(optimizer), None)

    def note_backward(self) -> None:
        """At the start of backward(): whether what the last step used is still there."""
        for key, left in self.left.items():
            stale = self._stale[key]
            if not (left and _untouched(*left[0])) and stale is None:
                continue  # cleared, as it should be
            here = [p.grad for p, _, _ in left]
            if left and all(_untouched(*one) for one in left):
                self._stale[key] = _holds([g for g in here if g is not None]).any()
            elif stale is not None:  # added to by an earlier backward of this step, or cleared since
                still = None if any(g is None for g in here) else _holds([g for g in here if g is not None]).all()
                self._stale[key] = None if still is None else stale & still.to(stale.device)

    def used_by(self, optimizer: torch.optim.Optimizer) -> Tensor | None:
        """A parameter whose old gradient is part of the one that the coming step uses."""
        if id(optimizer) not in self.left:
            return None
        self.looked += 1
        left, stale = self.left[id(optimizer)], self._stale[id(optimizer)]
        if stale is None or any(p.grad is None or p.grad is not noted() for p, noted, _ in left) or not bool(stale):
            return None
        return left[0][0]


def _holds(gradients: Sequence[Tensor]) -> Tensor:
    """Whether each gradient has an entry that is not zero; of a DTensor the piece that is here, without a word to
    other ranks."""
    here = [getattr(g, "_local_tensor", g) for g in gradients]
    return together([(g.coalesce().values() if g.is_sparse else g).any() for g in here]).bool()


def _untouched(parameter: Tensor, noted: "weakref.ref[Tensor]", version: int) -> bool:
    """Whether the gradient is the one that was noted, and nobody wrote into it since."""
    gradient = parameter.grad
    return gradient is not None and gradient is noted() and gradient._version == version


def cut_off(recorder: Recorder, optimizer: torch.optim.Optimizer) -> list[Tensor]:
    """Parameters that the step computed with and the optimiser moves, but that no gradient reaches."""
    if not recorder.cuts:
        return []
    own = {id(p) for p in moved(optimizer)}
    used = [recorder.leaves[k] for k in sorted(recorder.used)]
    return _whole([p for p in used if id(p) in own and p.requires_grad and p.grad is None], recorder)


def orphans(recorder: Recorder, optimizers: Sequence[torch.optim.Optimizer]) -> list[Tensor]:
    """Parameters that receive a gradient and that no optimiser moves."""
    own = {id(p) for o in optimizers for p in moved(o)}
    used = [recorder.leaves[k] for k in sorted(recorder.used)]
    return _whole([p for p in used if p.requires_grad and p.grad is not None and id(p) not in own], recorder)


def _whole(found: list[Tensor], recorder: Recorder) -> list[Tensor]:
    """Nothing where parameters are sharded: the network computes with others than the optimiser moves."""
    return [] if found and any(map(in_pieces, recorder.leaves)) else found
