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
        if shrunk or grown:
            return shown(
                "data-corrupted-in-place",
                w.program.place(0),
                f"The inputs change while the network is trained on them: their rms was {first:.3g} at step "
                f"{w.tapes[0].step} and is {last:.3g} at step {w.tapes[-1].step}.",
                "Look for a normalisation or an augmentation that writes into the data set itself (x *= …, x.mul_(), "
                "x -= mean): compute it into a new tensor.",
                Evidence.exact(
                    "size of the inputs", last / first if first else math.inf, "last over first rms", n=len(sizes)
                ),
            )
    return None


def _size(tape: Tape, k: int) -> float:
    return statistics.fmean(float(c[k].double().square().mean().sqrt()) for c in tape.of_shares(tape.constants))


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
    """What backward() is called on, over the mean of the known loss: near the number of rows it is a sum."""
    if not case.tapes or case.start is None:
        return None
    w = case.once(wires)[0]
    known = list(losses(w))
    if len(known) != 1:
        return None
    place, call, _, _ = known[0]
    tape = w.recent[-1]
    seen = [
        x for x in observed(tape, case.start.weights, lambda k, args, made: (made, args) if k == place else None) if x
    ]
    if not seen or not isinstance(seen[0][0], Tensor) or seen[0][0].numel() != 1:
        return None
    rows = next((len(a) for a in seen[0][1] if isinstance(a, Tensor) and a.dim()), 1)
    mean = float(seen[0][0]) / (rows if dict(call.kwargs).get("reduction", "mean") == "sum" else 1)
    with torch.no_grad():
        whole = float(tape.replay(case.start.weights))
    if not mean or rows < 3:  # of one or two rows sum and mean lie too near one another
        return None
    return Evidence.exact(
        "scale of the loss", whole / mean / rows, f"what is differentiated, over the sum of {rows} rows", n=rows
    )
