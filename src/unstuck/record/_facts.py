"""Facts of a step that need no interpretation."""

from collections.abc import Sequence

import torch
from torch import Tensor

from unstuck.objective import Recorder


class StaleGradients:
    """Notices gradients that one step used and the next step uses again, because nobody cleared them."""

    WATCHED = 3  # parameters of each optimiser: a missing zero_grad() concerns all of them

    def __init__(self) -> None:
        self.count = 0
        self._left: dict[int, list[tuple[Tensor, int, int]]] = {}  # by optimiser: parameter, its grad's id and version
        self._stale: dict[int, bool] = {}

    def note_step(self, optimizer: torch.optim.Optimizer) -> None:
        moved = (p for g in optimizer.param_groups for p in g["params"] if p.grad is not None)
        self._left[id(optimizer)] = [
            (p, id(p.grad), p.grad._version) for p, _ in zip(moved, range(self.WATCHED), strict=False)
        ]
        self._stale[id(optimizer)] = False

    def note_backward(self) -> None:
        """At the start of backward(): whether what the last step used is still there."""
        for key, left in self._left.items():
            if not (left and _untouched(*left[0])) and not self._stale[key]:
                continue  # cleared, as it should be
            here = [(p.grad, i, v) for p, i, v in left]
            if left and all(_untouched(*one) for one in left):
                self._stale[key] = any(bool(g.any()) for g, _, _ in here if g is not None)
            elif self._stale[key]:  # added to by an earlier backward of this step, or cleared since
                self._stale[key] = all(g is not None and bool(g.any()) for g, _, _ in here)

    def used_by(self, optimizer: torch.optim.Optimizer) -> Tensor | None:
        """A parameter whose old gradient is part of the one that the coming step uses."""
        if not self._stale.get(id(optimizer)):
            return None
        left = self._left[id(optimizer)]
        if any(p.grad is None or id(p.grad) != i for p, i, _ in left):
            return None
        self.count += 1
        return left[0][0]


def _untouched(parameter: Tensor, of: int, version: int) -> bool:
    """Whether the gradient is the one that was noted, and nobody wrote into it since."""
    gradient = parameter.grad
    return gradient is not None and id(gradient) == of and gradient._version == version


def cut_off(recorder: Recorder, optimizer: torch.optim.Optimizer) -> list[Tensor]:
    """Parameters that the step computed with and the optimiser moves, but that no gradient reaches."""
    if not recorder.cuts:
        return []
    moved = {id(p) for g in optimizer.param_groups for p in g["params"]}
    used = [recorder.leaves[k] for k in sorted(recorder.used)]
    return [p for p in used if id(p) in moved and p.requires_grad and p.grad is None]


def orphans(recorder: Recorder, optimizers: Sequence[torch.optim.Optimizer]) -> list[Tensor]:
    """Parameters that receive a gradient and that no optimiser moves."""
    moved = {id(p) for o in optimizers for g in o.param_groups for p in g["params"]}
    used = [recorder.leaves[k] for k in sorted(recorder.used)]
    return [p for p in used if p.requires_grad and p.grad is not None and id(p) not in moved]
