"""Whether the network is too small for its data: what a wide one leaves of the loss, and how far it gets itself.

The wide network learns some of the recorded rows and is judged on the others. Where it leaves far less than the run,
the data hold more than the run's network says; where that one, trained anew, does not get there, it cannot say it.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from unstuck.diagnosis._case import Case, distinct
from unstuck.diagnosis._findings import Evidence
from unstuck.diagnosis._held_out import Answers, answers_for, input_place
from unstuck.diagnosis._remedies import without_dropout
from unstuck.diagnosis._restarts import learned
from unstuck.diagnosis._structure import mean_loss
from unstuck.diagnosis._wires import losses, wires
from unstuck.objective import Constant

LEARNED = 0.75  # of the rows: what the wide network learns, to be judged on the rest
FEWEST, MOST = 200, 6000  # rows
COLUMNS = 4096  # of an input, or of an output: beyond that a wide layer is dear
UNITS, STEPS, BATCH, RATE, DECAY = 128, 300, 64, 3e-3, 1e-2  # of the wide network
ANEW, RATES = 300, (0.1, 0.03)  # steps, and Adam's rates, of the run's own network
ENOUGH = 0.25  # of the way to the wide network's loss: what goes further than this needs no more width


@dataclass(frozen=True, eq=False)
class Compared:
    """Recorded rows that a wide network has not learned: the loss that it leaves of them, and the run's network."""

    wide: Tensor  # (rows,)
    own: Tensor  # (rows,)

    @property
    def ratio(self) -> float:
        return float(self.wide.mean() / self.own.mean().clamp_min(1e-30))

    @property
    def error(self) -> float:
        """Of the ratio, by the spread of what it leaves unexplained of each row."""
        spread = float((self.wide - self.ratio * self.own).std()) / math.sqrt(len(self.own))
        return spread / float(self.own.mean().clamp_min(1e-30))


def compared(case: Case) -> Compared:
    """Both networks on the same rows; ValueError where there are none to compare them by."""
    x, own = case.once(_rows)
    cut = int(LEARNED * len(x))
    learned, rest = torch.arange(cut), torch.arange(cut, len(x))
    x = x.reshape(len(x), -1).float()
    spread = x.std(0)
    x = (x - x.mean(0)) / torch.where(spread > 1e-6 * spread.max(), spread, 1.0)
    answer = _wide(x[learned], own.of(learned))
    return Compared(replace(own.of(rest), outputs=answer(x[rest])).losses, own.of(rest).losses)


def _rows(case: Case) -> tuple[Tensor, Answers]:
    """The inputs of the recorded steps, each row once and in random order, with the network's answers."""
    x, y = _pairs(case)
    if y.shape == x.shape and y[0].numel() > 1:
        raise ValueError("a network that gives back its inputs is narrow on purpose")
    if x[0].numel() > COLUMNS:
        raise ValueError(f"a row has more than {COLUMNS} numbers: a wide network beside it is too dear")
    _, at = x.reshape(len(x), -1).unique(dim=0, return_inverse=True)
    first = torch.full_like(at, len(x)).scatter_reduce(0, at, torch.arange(len(x), device=at.device), "amin")
    first = first[first < len(x)].cpu()
    kept = first[torch.randperm(len(first), generator=torch.Generator().manual_seed(0))[:MOST]]
    if len(kept) < FEWEST:
        raise ValueError(f"a comparison with a wide network needs {FEWEST} different rows, {len(kept)} were recorded")
    own = answers_for(case, x[kept], y[kept])
    if own is None:
        raise ValueError("its outputs are compared with its targets in an unknown way")
    if own.outputs[0].numel() > COLUMNS:
        raise ValueError(f"a row is answered by more than {COLUMNS} numbers: a wide network beside it is too dear")
    return x[kept].cpu(), replace(own, outputs=own.outputs.cpu(), targets=own.targets.cpu())


def _pairs(case: Case) -> tuple[Tensor, Tensor]:
    """Inputs and targets of the recorded steps, row by row."""
    place, w = case.once(input_place), case.once(wires)[0] if case.tapes else None
    aims = [] if w is None else [y.at for *_, y in losses(w) if type(y) is Constant]
    if place is None or w is None or len(aims) != 1:
        raise ValueError("which of its tensors are inputs, and which targets, cannot be told")
    if not _matrices(case):
        raise ValueError("it has no weight matrix that could be wider")
    pairs = [(t.constants[place], t.constants[aims[0]]) for t in distinct(w.tapes) if t.shares == 1]
    x, y = (torch.cat([pair[k] for pair in pairs]) for k in (0, 1))
    if len(x) != len(y) or not x.is_floating_point():
        raise ValueError("its inputs are not rows of numbers, one for each target")
    return x, y


def _wide(x: Tensor, own: Answers) -> Callable[[Tensor], Tensor]:
    """A network of one wide layer that has learned some rows: its outputs for others."""
    g = torch.Generator().manual_seed(0)
    y, width = own.targets, own.outputs[0].numel()
    shift, scale = torch.zeros(()), torch.ones(())
    if own.kind == "values":
        shift, scale = y.float().mean(0), y.float().std().clamp_min(1e-12)
        y = (y - shift) / scale
    into = torch.randn(x.shape[1], UNITS, generator=g) * math.sqrt(2 / x.shape[1])
    out = torch.randn(UNITS, width, generator=g) * math.sqrt(1 / UNITS)
    bends = torch.randn(UNITS, generator=g)  # spread over the rows, which matters where these have few columns
    weights = [w.requires_grad_() for w in (into, bends, out, torch.zeros(width))]

    def answer(rows: Tensor) -> Tensor:
        return ((rows @ into + bends).relu() @ out + weights[3]).view(len(rows), *own.outputs.shape[1:])

    optimizer = torch.optim.AdamW(weights, lr=RATE, weight_decay=DECAY)
    for k in range(STEPS):
        optimizer.param_groups[0]["lr"] = RATE * min(1.0, 3 * (STEPS - k) / STEPS)
        batch = torch.randint(len(x), (BATCH,), generator=g)
        optimizer.zero_grad()
        Answers(own.kind, answer(x[batch]), y[batch]).losses.mean().backward()
        optimizer.step()
    return lambda rows: answer(rows).detach() * scale + shift


def left(case: Case) -> Evidence | None:
    _, own = case.once(_rows)
    if not case.guess:
        return None
    return Evidence.exact(
        "loss of the same rows", own.loss / case.guess, "of the run's network, over chance", n=len(own.losses)
    )


def wide(case: Case) -> Evidence:
    found = case.once(compared)
    meaning = "loss of a wide network on recorded rows that it did not learn, over that of the run's network"
    low, high = found.ratio - 2 * found.error, found.ratio + 2 * found.error
    return Evidence("what a wide network leaves", found.ratio, low, high, len(found.own), meaning)


def gained(case: Case) -> Evidence | None:
    """How far the run's own network gets towards the wide one's loss, from its start and from two fresh ones.

    By Adam, cooled down and without dropout: the share of the way as ln of the loss, of the best of them. What gets far
    enough ends the search.
    """
    found = case.once(compared)
    if case.state is None or case.start is None or not 0 < found.ratio < 1:
        return None
    train, judge = ([without_dropout(t) for t in tapes] for tapes in case.split)
    now, first = mean_loss(case.state.weights, judge), case.start.weights
    share = -math.inf
    for start, rate in ((first, RATES[0]), (_fresh(case, first, 0), RATES[1]), (_fresh(case, first, 1), RATES[0])):
        end = learned(start, train, judge, rate, steps=ANEW)
        if now > 0 and 0 < end < math.inf:
            share = max(share, math.log(now / end) / math.log(1 / found.ratio))
        if share > ENOUGH:
            break
    if share == -math.inf:
        raise ValueError("its own network could not be trained anew")
    meaning = "of the way to the wide network's loss (as ln): the best of three new trainings of the run's network"
    return Evidence.exact("what its own network gains", share, meaning, n=len(judge))


def _fresh(case: Case, like: Sequence[Tensor], seed: int) -> list[Tensor]:
    """N(0, 2 / fan-in) for matrices (He et al. 2015), 1 for scales, 0 for biases."""
    g = torch.Generator().manual_seed(seed)

    def anew(k: int, w: Tensor) -> Tensor:
        if not w.is_floating_point():
            return w
        if w.dim() > 1:
            return torch.randn(w.shape, generator=g).to(w) * math.sqrt(2 / w[0].numel())
        return torch.ones_like(w) if case.names[k].endswith("weight") else torch.zeros_like(w)

    return [anew(k, w) for k, w in enumerate(like)]


def narrowest(case: Case) -> str:
    """Where the fewest numbers pass, in words: nothing where no layer is narrower than what it is asked for."""
    found, widths = case.once(_rows), _matrices(case)
    if found is None or not widths:
        return ""
    k = min(widths, key=lambda k: widths[k])
    if widths[k] >= min(found[0][0].numel(), found[1].outputs[0].numel()):
        return ""
    return f"{case.names[k]} lets only {widths[k]} number{'s' * (widths[k] != 1)} pass"


def _matrices(case: Case) -> dict[int, int]:
    """The weight matrices in use, and the highest rank that one of such a shape can have."""
    if case.state is None:
        return {}
    used = ((k, case.state.weights[k]) for k in sorted({k for t in case.fixed for k in t.program.reads()}))
    return {k: min(w.shape[0], w[0].numel()) for k, w in used if w.dim() > 1}
