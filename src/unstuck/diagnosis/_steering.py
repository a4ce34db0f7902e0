"""Where the recorded program shows that a training steers wrongly: uphill, in the wrong mode, or on empty inputs."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from unstuck.diagnosis._case import LOSSES, Case
from unstuck.diagnosis._findings import Evidence, Finding
from unstuck.diagnosis._wires import MOST, SAME, WITH_WEIGHT, Wires, argument, losses, observed, shown, wires
from unstuck.objective import Constant, Instruction, Number, Slot

NORMS = frozenset(("batch_norm", "instance_norm"))
DROPOUTS = frozenset("dropout dropout1d dropout2d dropout3d alpha_dropout feature_alpha_dropout".split())


# The sign of the loss

RISING = frozenset((*SAME, "mean", "sum", "stack", "cat", "sqrt", "log", "exp", "log1p", "expm1"))
GOALS = tuple(name for name in LOSSES if name != "kl_div")  # which some maximise, to keep two networks apart


def wrong_sign(case: Case) -> Finding | None:
    """A known loss that the only optimiser drives up, by the signs that the script itself has written."""
    upwards = _upwards(case)
    moved = _moved(case)
    if upwards is None or moved is None:
        return None
    place, name, number = "", "", 0
    for w in case.once(wires):
        known = list(losses(w, GOALS))
        signs = _signs(w, {slot for _, call, *_ in known for slot in call.outputs})
        if any(w.calls(("kl_div",))) or not _alone(case, w, moved):
            return None
        for k, call, _, targets in known:
            if type(targets) is not Constant or {signs[s] for s in call.outputs} != {1 if upwards else -1}:
                return None
            place, name, number = place or w.program.place(k), name or call.name, number + len(w.tapes)
    levels = _levels(case) if place else None
    if levels is None or not levels[1] >= levels[0]:
        return None
    how = "the optimiser has maximize=True" if upwards else "backward() is called on minus the loss"
    cure = "Build the optimiser without maximize=True." if upwards else "Call backward() on the loss itself."
    return shown(
        "wrong-sign",
        place,
        f"Each step makes {name}() larger, since {how}: it was {levels[0]:.3g} at the start and is {levels[1]:.3g}.",
        cure,
        Evidence.exact("steps uphill", number, "of the recorded ones", n=number),
        Evidence.exact("rise of the loss", levels[1] - levels[0], "from the first weights to the last", n=MOST),
    )


def _upwards(case: Case) -> bool | None:
    """Whether the only optimiser maximises; None where there are several, or its groups differ."""
    optimizers = case.run.of("optimizer")
    found = {bool(g.get("maximize", False)) for o in optimizers for g in o.get("groups", ())}
    return found.pop() if len(optimizers) == 1 and len(found) == 1 else None


def _moved(case: Case) -> set[int] | None:
    """The parameters that the only optimiser moves, where they all belong to a model."""
    if case.state is None or case.state.optimizer is None:
        return None
    found = {k for members in case.state.optimizer.members for k in members}
    return None if any(case.names[k].startswith("tensor[") for k in found) else found


def _alone(case: Case, w: Wires, moved: set[int]) -> bool:
    """Whether nothing but the network that is trained takes part: no other one is fooled, or used as a measure."""
    foreign = any(type(argument(c, 1, "weight")) is Constant for _, c in w.calls(WITH_WEIGHT))
    return not foreign and w.program.reads() <= moved


def _signs(w: Wires, sources: set[int]) -> dict[int, int]:
    """Whether what backward() is called on rises (1) or falls (-1) with each scalar; 0 where that is not certain."""
    calls, after = w.program.instructions, set(sources)
    path = [c for c in calls if not after.isdisjoint(c.slots()) and not after.update(c.outputs)]
    found = {slot: {1} if slot in w.program.roots else set[int]() for slot in after}
    for call in reversed(path):
        ways = {s for out in call.outputs for s in found[out]}
        for slot in {s for s in call.slots() if s in after} if ways else ():
            found[slot] |= {_step_sign(w, call, slot) * s for s in ways}
    return {slot: next(iter(signs)) if len(signs) == 1 else 0 for slot, signs in found.items()}


def _step_sign(w: Wires, call: Instruction, slot: int) -> int:
    name = call.name.strip("_").removesuffix("_")
    name = name.removeprefix("i") if call.name.startswith("__i") else name
    first = bool(call.args) and call.args[0] == Slot(slot) and type(call.args[0]) is Slot
    if name in RISING or call.name in RISING:
        return 1
    if name in ("neg", "negative"):
        return -1
    if len(call.args) != 2 or call.kwargs or call.args[0] == call.args[1]:
        return 0
    other = call.args[1] if first else call.args[0]
    if name in ("add", "radd"):
        return 1
    if name in ("sub", "subtract"):
        return 1 if first else -1
    if name == "rsub":
        return -1 if first else 1
    if name in ("mul", "multiply", "rmul") or (first and name in ("div", "true_divide", "truediv")):
        return _sign_of(w, other)
    return 0


def _sign_of(w: Wires, x: Any) -> int:
    """The sign of a factor: one that the script computes anew must be positive throughout, or may be a reward."""
    if type(x) in (int, float):
        return (x > 0) - (x < 0)
    if type(x) is Number:
        return int(all(v[x.at] > 0 for t in w.tapes for v in t.of_shares(t.numbers)))
    if type(x) is Constant:
        return int(all(bool((c[x.at] > 0).all()) for t in w.tapes for c in t.of_shares(t.constants)))
    return 0


def _levels(case: Case) -> tuple[float, float] | None:
    """The mean of the known loss over a few recorded batches, at the first weights and at the present ones."""
    w = case.once(wires)[0]
    places = [k for k, *_ in losses(w, GOALS)]
    if case.start is None or case.state is None or not places:
        return None
    scalar = {torch.Size([])}
    sums = []
    for weights in (case.start.weights, case.state.weights):
        made = [observed(tape, weights, lambda k, _, made: made if k in places else None) for tape in w.recent]
        values = [x for each in made for x in each if x is not None]
        if {getattr(x, "shape", None) for x in values} != scalar:
            return None
        sums.append(sum(float(x) for x in values) / len(w.recent))
    return sums[0], sums[1]


# The mode of the model


def eval_while_training(case: Case) -> Finding | None:
    """Dropout and batch norm that are off at every step, since the whole model is in eval mode."""
    modes = case.run.series("training")[1]
    moved = _moved(case)
    if not modes or any(modes) or moved is None:
        return None
    off: dict[str, str] = {}
    for w in case.once(wires):
        here = _switched_off(case, w, moved)
        if not here:
            return None
        off = off or here
    n = len(case.tapes)
    kinds = " and ".join(sorted({"batch norm" if c in NORMS else "dropout" for c in off.values()}))
    return shown(
        "eval-while-training",
        next(iter(off)),
        f"The whole model is in eval mode while it is trained: its {kinds} is off at every step that was looked at.",
        "Call model.train() at the beginning of each epoch, after the validation that calls model.eval(); to freeze "
        "batch norm on purpose, put only these modules into eval mode.",
        Evidence.exact("steps in eval mode", n, "of the recorded ones", n=n),
    )


def _switched_off(case: Case, w: Wires, moved: set[int]) -> dict[str, str]:
    """The calls that eval mode has switched off, by place; none where one of the program is in train mode."""
    off: dict[str, str] = {}
    alone = _alone(case, w, moved)
    for k, call in enumerate(w.program.instructions):
        if not call.grad or not (call.name in NORMS or call.name in DROPOUTS):
            continue
        training = argument(call, 5 if call.name in NORMS else 2, "training", None)
        if training is True or (call.name == "instance_norm"):
            return {}
        weight = argument(call, 3, "weight")
        if call.name in NORMS:
            own = type(weight) is Slot and weight.at in moved
        else:
            own = alone and argument(call, 1, "p", 0.0) > 0
        if training is False and own:
            off[w.program.place(k)] = call.name
    return off


# The inputs


def inputs_empty(case: Case) -> Finding | None:
    """Inputs that are the same in every row of every batch, while the targets differ."""
    w = case.once(wires)[0]
    found = batches(w)
    if found is None:
        return None
    rows, shares, places, others = found
    if not places or not all(torch.equal(x[k], shares[0][k][:1].expand_as(x[k])) for x in shares for k in places):
        return None
    for k in others:
        values = [x[k] for x in shares]
        first = values[0]
        if not all(torch.equal(x, first) for x in values) or (
            len(values) == 1 and bool((first != first.flatten()[:1]).any())
        ):
            return None
    n = rows * len(shares)
    dependence = case["input dependence"]
    return shown(
        "inputs-empty",
        w.program.place(0),
        f"The inputs are the same in all {n} rows of the last {len(shares)} batches, though the targets differ: there "
        "is nothing in them to learn from.",
        "Look at one batch as it enters the network, and follow it back to the file: a wrong column or path, a crop "
        "or a mask that leaves nothing, a scale that rounds all to 0.",
        Evidence.exact("rows that differ", 0.0, "of the inputs, from the first one", n=n),
        *(() if dependence is None else (dependence,)),
    )


def batches(w: Wires) -> tuple[int, list[tuple[Tensor, ...]], list[int], list[int]] | None:
    """The rows of a batch, the constants of the latest ones, which of these are inputs, and which neither.

    None where the targets do not differ, or what is an input cannot be told.
    """
    program = w.program
    targets = [y for *_, y in losses(w)]
    if not targets or program.moves or not all(type(y) is Constant for y in targets):
        return None
    shares = [c for t in w.recent for c in t.of_shares(t.constants)]
    shares = [c for c in shares if [x.shape for x in c] == [x.shape for x in shares[-1]]]
    at = targets[0].at
    rows = _rows([c[at] for t in w.tapes for c in t.of_shares(t.constants)])  # in a few of them rare ones may lack
    if rows is None or any(x.layout is not torch.strided or x.is_complex() for c in shares for x in c):
        return None
    aims = {y.at for y in targets}
    read = {x.at for call in program.instructions for x in call.leaves() if type(x) is Constant}
    inputs, others = [], []
    for k in sorted(read - aims - _statistics(w)):
        first = shares[0][k]
        batch = first.dim() and rows in (first.shape[0], first.shape[:2].numel())
        (inputs if batch and first.shape[0] > 1 and first.numel() > 1 else others).append(k)
    return rows, shares, inputs, others


def _rows(targets: Sequence[Tensor]) -> int | None:
    """How many rows the last ones have; None where no two of all differ."""
    last = targets[-1]
    if last.dim() == 0 or len(last) < 2:
        return None
    same = all(y.shape[1:] == last.shape[1:] and bool((y == last[:1]).all()) for y in targets)
    return None if same else len(last)


def _statistics(w: Wires) -> set[int]:
    """The constants that are a norm's running mean and variance."""
    norms = {k for k, _ in w.calls(NORMS)}
    found: set[int] = set()
    for k, call in enumerate(w.program.instructions):
        only = call.name == "as_strided" and norms >= {j for s in call.outputs for j in w.users.get(s, ())}
        if only or k in norms:
            found |= {x.at for x in call.args[0 if only else 1 :] if type(x) is Constant}
    return found
