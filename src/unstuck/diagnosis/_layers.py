"""What the recorded layers are set to, and what that makes of them."""

import math
import statistics
from collections.abc import Sequence

import torch
from torch import Tensor

from unstuck.diagnosis._case import Case
from unstuck.diagnosis._findings import Evidence, Finding
from unstuck.diagnosis._start import batches, equal_rows
from unstuck.diagnosis._steering import DROPOUTS
from unstuck.diagnosis._wires import argument, losses, observed, shown, wires
from unstuck.objective import Tape

HALF = 0.5  # of a layer's units that are copies of another
TRAINED = 30  # steps after which copies that still are some will stay so
SLOW = 0.02  # momentum of a norm's statistics, whose default is 0.1
STRAY = 0.3  # spreads of a batch by which a running mean may be off
FEW = 4  # recorded steps at either end
SHARED, MOST = 8, 1000  # rows that an early and a late step share, of so many at either end that are compared,
WIDE, WIDEST = 4, 1 << 14  # and their columns
SAME, MOVED = 1e-6, 0.97  # distance of two rows of length 1 that are one; a factor beside which it is another
SHRUNK = 0.2  # times which the inputs are as large as at first


def constant_init(case: Case) -> Finding | None:
    """Units that began as copies of one another and still are: nothing tells them apart."""
    if case.start is None or case.state is None or case.start.step or case.state.step < TRAINED:
        return None
    layers = []
    for k in sorted({k for t in case.fixed for k in t.program.reads()}):
        then, now = case.start.weights[k], case.state.weights[k]
        if then.dim() > 1 and min(equal_rows(then), equal_rows(now)) > HALF and not torch.equal(then, now):
            layers.append((k, equal_rows(now)))
    if not layers:
        return None
    names = ", ".join(case.names[k] for k, _ in layers[:3]) + (" …" if len(layers) > 3 else "")
    share = max(share for _, share in layers)
    return shown(
        "constant-init",
        names,
        f"{share:.0%} of a layer's units began with the same weights as another one ({names}), and after "
        f"{case.state.step} steps they still do: they compute the same, get the same gradient, and stay so.",
        "Use the layers' own initialisation, which draws each weight at random (Kaiming or Xavier).",
        Evidence.exact("twin units", share, "share of a layer's units whose weights equal another's, then and now"),
    )


def batchnorm_stale(case: Case) -> Finding | None:
    """Running statistics that hardly move, and are far from those of the batches they should describe."""
    w = case.once(wires)[0]
    slow = [
        (k, call)
        for k, call in w.calls(("batch_norm",))
        if argument(call, 5, "training") is True
        and type(momentum := argument(call, 6, "momentum", 0.1)) is float  # else a plain mean, by another one each time
        and 0 < momentum <= SLOW
    ]
    if not slow or case.state is None:
        return None
    places = {k for k, _ in slow}

    def strays(k: int, args: Sequence[object], made: object) -> float | None:
        if k not in places or not isinstance(args[0], Tensor) or not isinstance(args[1], Tensor):
            return None
        x = args[0].detach().movedim(1, -1).flatten(0, -2).double()
        spread = x.std(0, correction=0).clamp_min(1e-12)
        return float(((x.mean(0) - args[1].double()).abs() / spread).median())

    found = [x for tape in w.recent for x in observed(tape, case.state.weights, strays) if x is not None]
    if not found or statistics.median(found) < STRAY:
        return None
    k, call = slow[0]
    momentum = argument(call, 6, "momentum", 0.1)
    middle = statistics.median(found)
    return shown(
        "batchnorm-stale",
        w.program.place(k),
        f"With a momentum of {momentum:g} the running mean of the batch norm has not followed its inputs: in the "
        f"median channel it is {middle:.2g} spreads of a batch away. In eval mode the network normalises by it.",
        "Leave the momentum of batch norm at its default of 0.1, or gather the statistics anew before evaluating "
        "(torch.optim.swa_utils.update_bn).",
        Evidence(
            "running mean off", middle, min(found), max(found), len(found), "spreads of a batch, in the median channel"
        ),
    )


def data_corrupted(case: Case) -> Finding | None:
    """Inputs that have become a fraction, or a multiple, of what they were at the first steps."""
    w = case.once(wires)[0]
    found = batches(w)
    if found is None or len(w.tapes) < 2 * FEW:
        return None
    _, _, places, _ = found
    for k in w.entering.intersection(places):  # not an advantage or a weight of the loss, which may well shrink
        sizes = [_size(tape, k) for tape in w.tapes]
        first, last = statistics.median(sizes[:FEW]), statistics.median(sizes[-FEW:])
        shrunk = last <= SHRUNK * first and max(sizes[-FEW:]) < min(sizes[:FEW])
        grown = first <= SHRUNK * last and min(sizes[-FEW:]) > max(sizes[:FEW])
        told = f"their rms was {first:.3g} at step {w.tapes[0].step} and is {last:.3g} at step {w.tapes[-1].step}"
        meaning, ratio, n = "last over first rms", last / first if first else math.inf, len(sizes)
        if not (shrunk or grown):
            again = _met_again(w.tapes, k)
            if not len(again) or bool((again > 1 / MOVED).any() and (again < MOVED).any()):
                continue
            meaning, ratio, n = "of the same rows, now over then", float(again.median()), len(again)
            told = f"{n} rows came at two steps, number for number but for a factor of {ratio:.3g}"
        return shown(
            "data-corrupted-in-place",
            w.program.place(0),
            f"The inputs change while the network is trained on them: {told}.",
            "Look for a normalisation or an augmentation that writes into the data set itself (x *= …, x.mul_(), "
            "x -= mean): compute it into a new tensor.",
            Evidence.exact("size of the inputs", ratio, meaning, n=n),
        )
    return None


def _size(tape: Tape, k: int) -> float:
    """The rms of the median row: a few far out say nothing of the others."""
    given = (c[k].double() for c in tape.of_shares(tape.constants))
    rows = (x.flatten(1) if x.dim() > 1 else x[:, None] for x in given)
    return statistics.fmean(float(x.square().mean(1).sqrt().median()) for x in rows)


def _met_again(tapes: Sequence[Tape], k: int) -> Tensor:
    """How many times as long rows are that an early and a late step share but for a factor; none where few are.

    Of rows that are never the same, as where an augmentation moves each by a factor of its own, nothing is told: most
    of those that lie in one direction must differ, and by about as much.
    """
    ends = [[t.constants[k][: MOST // FEW] for t in part] for part in (tapes[:FEW], tapes[-FEW:])]
    shapes = {x.shape[1:] for part in ends for x in part}
    if len(shapes) > 1 or not WIDE <= shapes.pop().numel() <= WIDEST or ends[0][0].dim() < 2:
        return torch.empty(0)
    early, late = (torch.cat(part).double().flatten(1) for part in ends)
    lengths = early.norm(dim=1).clamp_min(1e-30), late.norm(dim=1).clamp_min(1e-30)
    apart = torch.cdist(early / lengths[0][:, None], late / lengths[1][:, None])
    there = (apart < SAME).nonzero()
    ratios = lengths[1][there[:, 1]] / lengths[0][there[:, 0]]
    moved = ratios[(ratios < MOVED) | (ratios > 1 / MOVED)]
    alike = len(moved) >= SHARED and len(moved) >= 0.9 * len(ratios) and float(moved.log().std()) < 0.5
    return moved if alike else torch.empty(0)


def dropout_rate(case: Case) -> Evidence | None:
    """The highest probability of dropout among the recorded calls that are on."""
    if not case.tapes:
        return None
    w = case.once(wires)[0]
    rates = [
        argument(call, 1, "p", 0.5)
        for _, call in w.calls(DROPOUTS)
        if argument(call, 2, "training", True) is True and call.grad
    ]
    known = [float(p) for p in rates if type(p) in (int, float)]  # others follow a schedule of their own
    return Evidence.exact("dropout", max(known, default=0.0), "the highest probability of a layer")


def rows_per_norm(case: Case) -> Evidence | None:
    """How many numbers the batch norm with the fewest normalises together."""
    if not case.tapes or case.state is None:
        return None
    w = case.once(wires)[0]
    places = {k for k, call in w.calls(("batch_norm",)) if argument(call, 5, "training") is True}
    if not places:
        return Evidence.exact(
            "numbers to a norm", math.inf, "that a channel is normalised over (there is no batch norm)"
        )
    found = [
        x
        for tape in w.recent
        for x in observed(
            tape,
            case.state.weights,
            lambda k, args, _: args[0].numel() / args[0].shape[1] if k in places else None,
        )
        if x is not None
    ]
    return Evidence.exact("numbers to a norm", min(found), "that a channel of batch norm is normalised over")


def loss_scale(case: Case) -> Evidence | None:
    """What backward() is called on, over the mean of the known loss: near the number of rows it is a sum.

    Of several losses of one kind, as of the parts of a batch, over their mean: near their number it is their sum.
    """
    if not case.tapes or case.start is None:
        return None
    w = case.once(wires)[0]
    known = {place: call for place, call, _, _ in losses(w)}
    if not known or len({call.name for call in known.values()}) > 1:
        return None
    tape, weights = w.recent[-1], case.start.weights
    seen = [x for x in observed(tape, weights, lambda k, args, made: (k, made, args) if k in known else None) if x]
    if not seen or any(not isinstance(made, Tensor) or made.numel() != 1 for _, made, _ in seen):
        return None
    rows = [next((len(a) for a in args if isinstance(a, Tensor) and a.dim()), 1) for *_, args in seen]
    sums = [dict(known[k].kwargs).get("reduction", "mean") == "sum" for k, *_ in seen]
    mean = statistics.fmean(float(made) / (n if s else 1) for (_, made, _), n, s in zip(seen, rows, sums, strict=True))
    parts, what = (rows[0], "rows") if len(seen) == 1 else (len(seen), "losses")
    with torch.no_grad():
        whole = float(tape.replay(weights))
    if not mean or parts < 3:  # of one or two rows sum and mean lie too near one another
        return None
    meaning = f"what is differentiated, over the sum of {parts} {what}"
    return Evidence.exact("scale of the loss", whole / mean / parts, meaning, n=parts)
