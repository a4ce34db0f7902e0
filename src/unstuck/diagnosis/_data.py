"""What the recorded batches hold: rows far out, and targets that come sorted."""

import math
import statistics
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from unstuck.diagnosis._case import HELD_OUT, Case, distinct
from unstuck.diagnosis._findings import Evidence
from unstuck.diagnosis._held_out import batches_trained_on, distinct_rows
from unstuck.diagnosis._start import batches
from unstuck.diagnosis._wires import Wires, exchanged, losses, wires
from unstuck.objective import Constant, Tape

ROWS, NEAREST = 1500, 5  # rows that neighbours are looked for among, and how many of each
MANY = 100  # classes up to which targets are counted
LARGE, AGAIN = 0.25, 1.7  # of the data in a batch; how often a row must come for most to be known
REACH = 5.0  # median lengths of a row at which what lies further out is cut off


def outlying(case: Case) -> Evidence | None:
    """How far out the longest row lies, in median lengths, of the inputs or of targets that are numbers."""
    rows = [_lengths(t.constants[k]) for t in _latest(case) for k in case.once(_numbers)]
    far = [float(x.max() / x.median()) for x in rows if len(x) > 3 and float(x.median()) > 0]
    if not far:
        return None
    return Evidence.exact("longest row", max(far), "of inputs or targets, in median lengths of its batch", n=len(far))


def _latest(case: Case) -> tuple[Tape, ...]:
    return distinct(case.once(wires)[0].tapes)[-HELD_OUT:] if case.tapes else ()


def _numbers(case: Case) -> tuple[int, ...]:
    """The constants of the usual program that are inputs or targets with a point, a row for each example."""
    w = case.once(wires)[0]
    found = batches(w)
    if found is None:
        return ()
    _, shares, places, _ = found
    aims = [y.at for *_, y in losses(w) if type(y) is Constant]
    return tuple(k for k in (*places, *aims) if shares[0][k].is_floating_point() and shares[0][k].dim())


def _lengths(rows: Tensor) -> Tensor:
    x = rows.double()
    return x.flatten(1).square().mean(1).sqrt() if x.dim() > 1 else x.abs()


def cut_off(case: Case) -> Callable[[Tape], Tape]:
    """Changes a step to one whose rows of inputs and targets are no longer than a few median lengths."""
    w = case.once(wires)[0]

    def shortened(x: Tensor, _: int) -> Tensor:
        length = _lengths(x)
        share = (REACH * length.median() / length.clamp_min(1e-30)).clamp_max(1.0)
        return x * share.view(-1, *[1] * (x.dim() - 1)).to(x)

    return exchanged(w.program, case.once(_numbers), shortened)


def mixed(case: Case) -> Evidence | None:
    """The spread of the targets within a batch, over that within all of them: 1 where batches are drawn at random."""
    if not case.tapes:
        return None
    w = case.once(wires)[0]
    parts = [y for t in _latest(case) if (y := _aims(w, t)) is not None]
    if len(parts) < 8 or len({y.shape[1] for y in parts}) > 1 or min(map(len, parts)) < 8:
        return None
    whole = torch.cat(parts).var(0, correction=0).sum()
    if not float(whole):
        return None
    shares = sorted(float(y.var(0).sum() / whole) for y in parts)
    meaning = "spread of the targets within a batch over that of all; 1 where they are drawn at random"
    return Evidence("mixture of a batch", statistics.fmean(shares), shares[0], shares[-1], len(shares), meaning)


def share_of_the_data(case: Case) -> Evidence | None:
    """The rows of a batch over all rows that the run trains on, where the recorded steps show nearly all of them."""
    steps = case.once(batches_trained_on) if case.tapes else ()
    if not steps:
        return None
    known = len(distinct_rows(torch.cat(steps)))
    size = statistics.median_high(map(len, steps))  # the last one of an epoch may be smaller
    share, drawn = size / known, len(case.once(wires)[0].tapes) * size
    if share >= LARGE and drawn < AGAIN * known:
        raise ValueError("how many rows there are does not show: the recorded steps hardly repeat any")
    return Evidence.exact("batch over the data", share, "share of the rows that one step uses", n=known)


def varying(case: Case) -> Evidence | None:
    """The share of the columns of the inputs in which the recorded rows differ."""
    steps = case.once(batches_trained_on) if case.tapes else ()
    if not steps or steps[0].dim() < 2:
        return None
    rows = torch.cat(steps).flatten(1)
    share = float((rows != rows[:1]).any(0).double().mean())
    return Evidence.exact("columns that vary", share, "share of the numbers of a row that differ at all", n=len(rows))


def parted(case: Case, parts: int) -> Callable[[Tape], tuple[Tape, ...]]:
    """Turns a recorded step into several of as many parts of its batch."""
    w = case.once(wires)[0]
    found = batches(w)
    assert found is not None
    aims = [y.at for *_, y in losses(w) if type(y) is Constant]
    rows, places = found[0], (*found[2], *aims)

    def part(k: int, c: Tensor) -> Tensor:
        each = len(c) // parts
        return c[k * each : (k + 1) * each]

    def split(tape: Tape) -> tuple[Tape, ...]:
        if tape.program is not w.program or rows < parts:
            return (tape,)
        return tuple(exchanged(w.program, places, lambda c, _, k=k: part(k, c))(tape) for k in range(parts))

    return split


def _aims(w: Wires, tape: Tape) -> Tensor | None:
    """The targets of a step by (rows, columns), classes one-hot."""
    aims = [y.at for *_, y in losses(w) if type(y) is Constant]
    if len(aims) != 1 or tape.program is not w.program:
        return None
    y = tape.constants[aims[0]]
    if y.is_floating_point():
        return y.double().reshape(len(y), -1) if y.dim() else None
    if y.dim() != 1 or not bool(((y >= 0) & (y < MANY)).all()):
        return None
    return F.one_hot(y, MANY).double()


def neighbours(case: Case) -> Evidence | None:
    """How much better than guessing the nearest recorded rows tell a row's target: 0 not at all, 1 always.

    Of classes it is the share of neighbours with the same one, of numbers the share of their variance that the mean of
    the neighbours explains. Rows lie near one another by their columns, each over its spread.
    """
    if not case.tapes:
        return None
    w = case.once(wires)[0]
    found = batches(w)
    places = [] if found is None else [k for k in found[2] if found[1][0][k].is_floating_point()]
    if len(places) != 1:
        return None
    pairs = [(t.constants[places[0]], y) for t in _latest(case) if t.shares == 1 and (y := _aims(w, t)) is not None]
    pairs = [(x.double().flatten(1), y) for x, y in pairs if x.dim() > 1 and len(x) == len(y)]
    if not pairs or len({(x.shape[1], y.shape[1]) for x, y in pairs}) > 1:
        return None
    x, y = (torch.cat([pair[k] for pair in pairs]) for k in (0, 1))
    x, y = _once(x, y)
    if len(x) < 100:
        return None
    x = (x - x.mean(0)) / x.std(0).clamp_min(1e-12)
    distance = torch.cdist(x, x).fill_diagonal_(math.inf)
    near = y[distance.topk(NEAREST, largest=False).indices]  # (rows, NEAREST, columns)
    if y.shape[1] == MANY:  # classes
        chance = float(y.mean(0).square().sum())
        told = (float((near * y[:, None]).sum(-1).mean()) - chance) / max(1 - chance, 1e-12)
    else:
        told = 1 - float((near.mean(1) - y).square().mean() / y.var(0, correction=0).mean().clamp_min(1e-30))
        told += 1 / NEAREST  # which the mean of so many costs where they tell nothing
    return Evidence.exact("what neighbours tell", told, "of a row's target, beyond guessing", n=len(x))


def _once(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Each row once, at most ROWS of them."""
    _, first = x.unique(dim=0, return_inverse=True)
    kept = torch.full_like(first, len(x)).scatter_reduce(0, first, torch.arange(len(x), device=x.device), "amin")
    kept = kept[kept < len(x)][:ROWS]
    return x[kept], y[kept]
