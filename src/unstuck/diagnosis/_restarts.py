"""Whether the run's network gets further from other first weights: then it lies in a minimum that is no good."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from unstuck.diagnosis._case import Case
from unstuck.diagnosis._findings import Evidence
from unstuck.diagnosis._remedies import without_dropout
from unstuck.diagnosis._structure import mean_loss
from unstuck.objective import Tape, TapeError

STARTS, STEPS = 16, 120  # other first weights, and Adam's steps from each of them
RATES = (0.1, 0.03, 0.01)  # from the run's own start; the one that goes furthest is that of the others
HALF = 0.5  # of the present loss: another start that gets there is enough


def own_start(case: Case) -> Evidence | None:
    """What Adam leaves of the loss from the run's own first weights, at the best of a few rates."""
    found = case.once(_from_its_start)
    if found is None:
        return None
    meaning = "loss after a few steps of Adam from its own first weights, over the present one"
    return Evidence.exact("what its own start reaches", found[0], meaning, n=len(RATES))


def other_starts(case: Case) -> Evidence | None:
    """What it leaves from other first weights; the first that gets to half ends the search."""
    own = case.once(_from_its_start)
    if own is None or case.start is None:
        return None
    generator, reached = torch.Generator().manual_seed(0), []
    while len(reached) < STARTS and min(reached, default=1.0) > HALF:
        reached.append(_left(case, [_other(w, generator) for w in case.start.weights], own[1]))
    meaning = "loss after a few steps of Adam from other first weights, the best of them, over the present one"
    return Evidence("what another start reaches", min(reached), min(reached), max(reached), len(reached), meaning)


def _from_its_start(case: Case) -> tuple[float, float] | None:
    """The share of the present loss that is left, and the rate."""
    if case.state is None or case.start is None or case.start.step or not case.tapes:
        return None
    return min((_left(case, case.start.weights, rate), rate) for rate in RATES)


def _other(w: Tensor, generator: torch.Generator) -> Tensor:
    """A matrix of as large random numbers; others by a factor each, about from a third to three."""
    if not w.is_floating_point():
        return w
    drawn = torch.randn(w.shape, generator=generator).to(w)
    return drawn * w.square().mean().sqrt() if w.dim() > 1 else w * drawn.exp()


def _left(case: Case, start: Sequence[Tensor], rate: float) -> float:
    """The loss after Adam's steps over the present one, on tapes to judge by."""
    train, judge = ([without_dropout(t) for t in tapes] for tapes in case.split)
    assert case.state is not None
    now = mean_loss(case.state.weights, judge)
    return learned(start, train, judge, rate) / now if now > 0 else math.inf


def learned(
    start: Sequence[Tensor], train: Sequence[Tape], judge: Sequence[Tape], rate: float, *, steps: int = STEPS
) -> float:
    """The loss on the tapes to judge by after some cooled steps of Adam; infinite where one cannot be taken."""
    weights = [w.detach().clone().requires_grad_(w.is_floating_point()) for w in start]
    optimizer = torch.optim.Adam([weights[k] for k in sorted({k for t in train for k in t.program.reads()})], lr=rate)
    try:
        for k in range(steps):
            optimizer.param_groups[0]["lr"] = rate * min(1.0, 3 * (steps - k) / steps)
            optimizer.zero_grad()
            train[k % len(train)].replay(weights).backward()
            optimizer.step()
        end = mean_loss(weights, judge)
    except TapeError:
        return math.inf
    return end if math.isfinite(end) else math.inf
