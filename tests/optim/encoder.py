"""Fahlman's 10-5-10 encoder, many trials at once: each weight is a tensor with one row a trial."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn


class Encoder:
    """Sigmoid nets that must reproduce a single 1 among ten through five units (Fahlman 1988, section 2).

    `offset` is added to the derivative of each sigmoid, so that saturated units go on learning; errors smaller than
    `dead` count as none. The gradients are those of half the summed squares.
    """

    def __init__(self, trials: int, *, reach: float, offset: float = 0.0, dead: float = 0.0, seed: int = 0) -> None:
        own = torch.Generator().manual_seed(seed)
        self.offset, self.dead = offset, dead
        self.patterns = torch.eye(10, dtype=torch.float64)
        self.weights = [
            nn.Parameter(reach * (2 * torch.rand(trials, *shape, generator=own, dtype=torch.float64) - 1))
            for shape in ((5, 11), (10, 6))
        ]

    def backward(self) -> Tensor:
        """Puts the gradients into `.grad`; which trials have learnt all patterns: (trials,)."""
        first, second = (w.detach() for w in self.weights)
        x = _biased(self.patterns.expand(len(first), 10, 10))
        hidden = torch.sigmoid(x @ first.mT)
        h = _biased(hidden)
        outputs = torch.sigmoid(h @ second.mT)
        errors = outputs - self.patterns
        learnt = (errors.abs() < 0.4).all(-1).all(-1)
        errors = torch.where(errors.abs() < self.dead, 0.0, errors)
        out = errors * (outputs * (1 - outputs) + self.offset)
        inner = (out @ second[..., :-1]) * (hidden * (1 - hidden) + self.offset)
        self.weights[0].grad, self.weights[1].grad = inner.mT @ x, out.mT @ h
        return learnt

    def epochs(self, step: Callable[[], object], most: int) -> Tensor:
        """After how many epochs each trial has learnt, NaN where it has not: (trials,)."""
        found = torch.full((len(self.weights[0]),), float("nan"))
        for epoch in range(1, most + 1):
            learnt = self.backward() & found.isnan()
            found[learnt] = epoch
            if not found.isnan().any():
                break
            step()
        return found


def _biased(x: Tensor) -> Tensor:
    return torch.cat([x, torch.ones_like(x[..., :1])], -1)


def literal_rprop(weights: Sequence[Tensor], *, first: float = 0.1) -> Callable[[], None]:
    """ "Rprop (simplified)" as the slides print it: the sign of a step is set once and never looked at again."""
    moves: list[Tensor] = []
    before: list[Tensor] = []

    @torch.no_grad()
    def step() -> None:
        slopes = [w.grad.clone() for w in weights]
        if not moves:
            before.extend(slopes)
            moves.extend(first * s.sign() for s in slopes)
            for w, move in zip(weights, moves, strict=True):
                w.sub_(move)
            return
        for w, move, last, slope in zip(weights, moves, before, slopes, strict=True):
            same = last.sign() == slope.sign()
            w.add_(torch.where(same, 0.0, move))
            move.copy_(torch.where(same, (1.2 * move).clamp(max=50.0), (0.5 * move).clamp(min=1e-6)))
            last.copy_(torch.where(same, slope, last))
            w.sub_(move)

    return step
