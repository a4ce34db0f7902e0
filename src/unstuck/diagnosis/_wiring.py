"""Errors that the recorded program gives away: what is wired to what, whatever the numbers are."""

import itertools
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from unstuck.diagnosis._case import Case
from unstuck.diagnosis._findings import Evidence, Finding
from unstuck.diagnosis._layers import batchnorm_stale, constant_init, data_corrupted
from unstuck.diagnosis._steering import eval_while_training, inputs_empty, wrong_sign
from unstuck.diagnosis._wires import SAME, WITH_WEIGHT, Wires, argument, losses, observed, shown, wires
from unstuck.objective import Constant, Instruction, Slot, TapeError, tensors

WIRING = (
    "silent-broadcast",
    "softmax-before-cross-entropy",
    "wrong-logits-pair",
    "output-out-of-range",
    "wrong-loss",
    "wrong-sign",
    "eval-while-training",
    "inputs-empty",
    "constant-init",
    "batchnorm-stale",
    "data-corrupted-in-place",
)
OUTSIDE = 0.2  # the least share of the targets that the outputs cannot reach
ROUNDING = 1e-4  # of the sum of a row of probabilities, in half precision some 1e-3
SOFTMAX = frozenset(("softmax", "special_softmax", "softmin"))
SIGMOID = frozenset(("sigmoid", "sigmoid_", "hardsigmoid", "hardsigmoid_"))
NARROW = SIGMOID | {"tanh", "tanh_"}  # others may bound logits widely, for safety
RANGES = {  # of an activation's outputs
    **dict.fromkeys((*SIGMOID, *SOFTMAX), (0.0, 1.0)),
    **dict.fromkeys(("tanh", "tanh_", "hardtanh", "hardtanh_"), (-1.0, 1.0)),
    **dict.fromkeys(("relu", "relu_"), (0.0, float("inf"))),
    **dict.fromkeys(("relu6", "relu6_"), (0.0, 6.0)),
}
SQUARED = ("mse_loss", "l1_loss", "smooth_l1_loss", "huber_loss")


def wiring_findings(case: Case) -> list[Finding]:
    """The errors that the recorded steps show, each named once; none where no step can be replayed."""
    if case.state is None or not case.tapes:
        return []
    found: list[Finding] = []
    checks = (
        silent_broadcast,
        softmax_before_cross_entropy,
        wrong_logits_pair,
        output_out_of_range,
        wrong_loss,
        wrong_sign,
        eval_while_training,
        inputs_empty,
        constant_init,
        batchnorm_stale,
        data_corrupted,
    )
    for check in checks:
        try:
            one = check(case)
        except (TapeError, torch.OutOfMemoryError):  # the others may still tell
            continue
        if one is not None:
            found.append(one)
    return found


# What enters a loss


def softmax_before_cross_entropy(case: Case) -> Finding | None:
    """A softmax in front of the one that cross_entropy takes itself; log_softmax there changes nothing."""
    for w in case.once(wires):
        for k, _, outputs, _ in losses(w, ("cross_entropy",)):
            source = w.source(outputs)
            if source is not None and source.name in SOFTMAX:
                return _softmax_twice(w, k, f"{source.name}()")
            exp = source is not None and source.name in ("div", "true_divide", "__truediv__", "mul", "div_")
            if exp and _all_probabilities(case, w, k):
                return _softmax_twice(w, k, "a softmax written by hand")
    return None


def _softmax_twice(w: Wires, k: int, what: str) -> Finding:
    n = len(w.tapes)
    return shown(
        "softmax-before-cross-entropy",
        w.program.place(k),
        f"cross_entropy() takes the softmax itself, but what it is given has been through {what} already: the loss "
        "cannot come near 0, and the gradient is weak where the network is sure and wrong.",
        "Give the loss the outputs of the last layer; take the softmax only to read probabilities.",
        Evidence.exact("steps with a second softmax", n, "of the recorded ones with this program", n=n),
    )


def _all_probabilities(case: Case, w: Wires, k: int) -> bool:
    """Whether all rows that enter a cross-entropy are probabilities of two classes or more, and not always the same."""
    assert case.state is not None

    def look(j: int, args: Any, _: Any) -> Any:
        return args[0].double() if j == k and args and isinstance(args[0], Tensor) else None

    entering = [observed(tape, case.state.weights, look)[k] for tape in w.recent]
    rows = [x.movedim(min(1, x.dim() - 1), -1).flatten(0, -2) for x in entering if x is not None and x.dim() > 1]
    x = torch.cat(rows) if rows else torch.empty(0, 0)
    right = x.numel() > 0 and x.shape[1] > 1 and bool((x >= 0).all()) and bool((x.sum(1) - 1).abs().max() < ROUNDING)
    return right and not bool((x == x[0]).all())


PAIRS = {  # the activations that must not come before a loss, and what it wants
    "binary_cross_entropy_with_logits": (SIGMOID | SOFTMAX, "takes the sigmoid itself", "the last layer's outputs"),
    "nll_loss": (
        SIGMOID | SOFTMAX,
        "wants log-probabilities",
        "log_softmax in place of it, or use cross_entropy on logits",
    ),
    "kl_div": (SIGMOID | SOFTMAX, "wants log-probabilities as its first argument", "log_softmax in place of it"),
}


def wrong_logits_pair(case: Case) -> Finding | None:
    """Probabilities where the loss wants logits or log-probabilities, by the call that made them."""
    for w in case.once(wires):
        for k, call, outputs, _ in losses(w, PAIRS):
            wrong, wants, cure = PAIRS[call.name]
            source = w.source(outputs)
            if source is not None and source.name in wrong:
                n = len(w.tapes)
                return shown(
                    "wrong-logits-pair",
                    w.program.place(k),
                    f"{call.name}() {wants}, but it is given probabilities: the output of {source.name}().",
                    f"Give it {cure}.",
                    Evidence.exact("steps with the wrong pair", n, "of the recorded ones with this program", n=n),
                )
    return None


def output_out_of_range(case: Case) -> Finding | None:
    """Targets that the last activation cannot reach, or logits that it keeps in a narrow range."""
    for w in case.once(wires):
        for _, call, outputs, targets in losses(w, (*SQUARED, "cross_entropy")):
            source = w.source(outputs)
            if source is None or source.name not in RANGES or type(targets) is not Constant:
                continue
            low, high = RANGES[source.name]
            if source.name.startswith("hardtanh"):
                low, high = argument(source, 1, "min_val", -1.0), argument(source, 2, "max_val", 1.0)
            each = [c[targets.at] for t in w.recent for c in t.of_shares(t.constants)]
            if call.name == "cross_entropy":
                if not _bounded_logits(call, source, each):
                    continue
                claim = (
                    f"cross_entropy() wants logits of any size, but {source.name}() keeps them in {low:g} to {high:g}"
                )
                share = Evidence.exact("width of the logits", high - low, "the largest difference between two of them")
            else:
                y = torch.cat([y.double().flatten() for y in each])
                outside = float(((y < low) | (y > high)).double().mean())
                if outside < OUTSIDE:
                    continue
                claim = f"{source.name}() gives {low:g} to {high:g}, and {outside:.0%} of the targets lie outside"
                share = Evidence.exact("targets out of reach", outside, "share outside the output's range", n=len(y))
            return shown(
                "output-out-of-range",
                w.program.place(w.maker[source.outputs[0]]),
                f"{claim}: the network cannot get there, whatever it learns.",
                f"Take the {source.name}() away from the output, or bring the targets into its range.",
                share,
            )
    return None


def _bounded_logits(call: Instruction, source: Instruction, targets: Sequence[Tensor]) -> bool:
    """Whether a narrow activation feeds a loss of hard classes, which asks for differences without a bound."""
    hard = all(not y.is_floating_point() for y in targets) and not argument(call, 7, "label_smoothing", 0.0)
    return hard and source.name in NARROW


def wrong_loss(case: Case) -> Finding | None:
    """Class numbers that one output of many is to match as a quantity, while the others are left alone."""
    for w in case.once(wires):
        for k, call, outputs, targets in losses(w, SQUARED):
            width = _one_of(case, w, outputs)
            if width is None or type(targets) is not Constant:
                continue
            y = torch.cat([c[targets.at].double().flatten() for t in w.recent for c in t.of_shares(t.constants)])
            classes = y.unique()
            if (
                len(classes) < 3
                or bool((classes != classes.round()).any())
                or not 0 <= classes[0] <= classes[-1] < width
            ):
                continue
            return shown(
                "wrong-loss",
                w.program.place(k),
                f"{call.name}() compares one of {width} outputs with class numbers, as if class 2 lay between 1 and 3; "
                f"no gradient reaches the other {width - 1} outputs.",
                "Give all outputs and the classes, as whole numbers, to cross_entropy().",
                Evidence.exact("outputs without a gradient", width - 1, f"of {width}", n=len(w.tapes)),
            )
    return None


def _one_of(case: Case, w: Wires, x: Any) -> int | None:
    """How many outputs the last layer has, where a loss sees one of them and nothing else sees any."""
    calls, picked = w.program.instructions, False
    while type(x) is Slot and x.at in w.maker:
        call = calls[w.maker[x.at]]
        if call.name == "linear":
            weight = argument(call, 1, "weight")
            if not picked or type(weight) is not Slot or weight.at >= w.program.parameters or case.state is None:
                return None
            width = case.state.weights[weight.at].shape[0]
            return width if width > 2 else None
        index = call.args[1] if call.name == "__getitem__" and len(call.args) == 2 else None
        picked = picked or (type(index) is tuple and type(index[-1]) is int)
        if call.name not in SAME or not call.args or w.users.get(getattr(call.args[0], "at", -1)) != [w.maker[x.at]]:
            return None
        x = call.args[0]
    return None


# Shapes

PAIRWISE = frozenset(("sub", "__rsub__", "mul", *SQUARED))
ELEMENTWISE = frozenset("pow square abs mul add sub neg __rsub__ div where sqrt clamp".split())


def silent_broadcast(case: Case) -> Finding | None:
    """Outputs (N, 1) against targets (N,): every output meets every target."""
    for w in case.once(wires):
        program = w.program
        starts = [
            k for k, c in w.calls(PAIRWISE) if c.grad and len(_sides(c)) == 2 and not w.live.isdisjoint(c.outputs)
        ]
        starts = [k for k in starts if _may_cross(w, program.instructions[k])]
        if not starts or case.state is None:
            continue
        seen = observed(w.tapes[-1], case.state.weights, _shapes)
        for k in starts:
            call = program.instructions[k]
            small, large = sorted((*seen[k][0], (), ())[:2], key=len)
            if len(seen[k][0]) != 2 or len(small) != 1 or large != (*small, 1) or small == (1,):
                continue
            n = small[0]
            if (_reduces(call) if call.name in SQUARED else False) or _only_averaged(w, k, seen):
                return shown(
                    "silent-broadcast",
                    program.place(k),
                    f"Shapes ({n}, 1) and ({n},) meet in {call.name}(): torch pairs every row with every other, "
                    f"{n} × {n} numbers, and their average no longer tells which target belongs to which output.",
                    "Give outputs and targets the same shape, with squeeze(1) on the one or unsqueeze(1) on the other.",
                    Evidence.exact("pairs compared", n * n, f"where {n} rows have {n} targets", n=n),
                )
    return None


def _sides(call: Instruction) -> list[Any]:
    args = (argument(call, 0, "input"), argument(call, 1, "target" if call.name in SQUARED else "other"))
    return [x for x in args if type(x) in (Slot, Constant)]


def _may_cross(w: Wires, call: Instruction) -> bool:
    """Whether a constant meets what depends on parameters, or a loss two of any kind."""
    if len(_sides(call)) != 2 or w.live.isdisjoint(call.outputs):
        return False
    sides = _sides(call)
    if call.name in SQUARED:
        return True
    return {type(x) for x in sides} == {Slot, Constant} and all(
        x.at >= w.program.parameters if type(x) is Slot else _differs(w, x) for x in sides
    )


def _differs(w: Wires, x: Constant) -> bool:
    """Whether a constant is of the batch: a grid, or thresholds, are the same at every step."""
    first, *others = [t.constants[x.at] for t in w.recent]
    return not others or any(y.shape != first.shape or not torch.equal(y, first) for y in others)


def _reduces(call: Instruction) -> bool:
    return argument(call, 4, "reduction", "mean") != "none"


def _shapes(_: int, args: Any, made: Any) -> tuple[list[tuple[int, ...]], tuple[int, ...] | None]:
    """Of the tensors that a call takes, and of the one that it makes."""
    return [tuple(x.shape) for x in tensors(args)], tuple(made.shape) if isinstance(made, Tensor) else None


def _only_averaged(w: Wires, k: int, seen: Sequence[tuple[Any, Any]]) -> bool:
    """Whether a square of pairs is used number by number and then averaged as a whole to the loss, with nothing else.

    A distance between two clouds is such an average too; it comes with another square of pairs.
    """
    calls, shape = w.program.instructions, seen[k][1]
    if shape is None or len(shape) != 2 or shape[0] != shape[1]:
        return False
    chain, left, ends = {k}, [k], 0
    while left:
        for j in itertools.chain.from_iterable(w.users.get(s, ()) for s in calls[left.pop()].outputs):
            name, made = calls[j].name, seen[j][1]
            if name in ("mean", "sum") and made == ():
                ends += 1
            elif made != shape or not {name, name.rstrip("_")} & ELEMENTWISE:
                return False
            elif j not in chain:
                chain.add(j)
                left.append(j)
    others = (j for j in range(len(calls)) if j not in chain and calls[j].grad and _crosses(seen[j], shape))
    return ends > 0 and all(_crosses_like(calls[j]) for j in others)


def _crosses(seen: tuple[Any, Any], shape: tuple[int, ...]) -> bool:
    """Whether a call makes a square of pairs out of less."""
    return seen[1] == shape and all(math.prod(x) < math.prod(shape) for x in seen[0])


def _crosses_like(call: Instruction) -> bool:
    """The other half of a cross-entropy written by hand is a product of the same kind; a layer makes no pairs."""
    kinds = {type(x) for x in _sides(call)}
    return call.name in WITH_WEIGHT or (call.name == "mul" and kinds == {Slot, Constant})
