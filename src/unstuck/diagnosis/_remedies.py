"""Remedies: what a hypothesis predicts to help, as a change to a copy of the run."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch

from unstuck.diagnosis._case import Case, comparison
from unstuck.diagnosis._findings import plain
from unstuck.diagnosis._settings import setting
from unstuck.diagnosis._steering import DROPOUTS
from unstuck.diagnosis._structure import squashing
from unstuck.diagnosis._trial import LEAST, Fork, Remedy
from unstuck.diagnosis._wires import wires
from unstuck.objective import Instruction, Program, Tape
from unstuck.record import State

# What a cooled arm must gain before it tells a fault from a healthy run, as measured on both (ln of the losses' ratio)
SLIGHTLY = -0.03  # a lower rate where the step is far beyond what the curvature bears
FAR = math.log(0.8)  # one elsewhere: where nothing is wrong but a short run is not done yet it gains up to 16 %
BY_HALF = math.log(0.5)  # where the premise alone says little
FARTHER = math.log(0.7)  # a larger batch, which sees more data than the control: up to 24 % where nothing is wrong


def rate(state: State | None, factor: float, *, least: float = LEAST) -> Remedy:
    """The learning rate of a state times `factor`, to two digits."""
    groups = () if state is None or state.optimizer is None else state.optimizer.groups
    old = float(groups[0]["lr"]) if groups and "lr" in groups[0] else 0.0
    if old:
        factor = float(f"{old * factor:.2g}") / old
    change = f"× {_round(factor)}" if factor > 1 else f"÷ {_round(1 / factor)}"
    name = f"learning rate {old * factor:.2g} ({change})" if old else f"learning rate {change}"
    return Remedy(name, lambda copy: copy.scale_rate(factor), least=least)


def together(*both: Remedy) -> Remedy:
    """Several remedies at once, named after all; as much is asked of them as of the first."""

    def apply(copy: Fork) -> None:
        for remedy in both:
            remedy.apply(copy)

    return replace(both[0], name=" and ".join(r.name for r in both), apply=apply)


def rate_at(height: float) -> Remedy:
    """The learning rate of the first group at `height`, those of the others in proportion."""

    def apply(copy: Fork) -> None:
        lead = copy.optimizer.param_groups[0]["lr"]
        for group in copy.optimizer.param_groups:
            group["lr"] = height * (group["lr"] / lead if lead else 1.0)

    return Remedy(f"learning rate {height:.2g}", apply)


def _round(x: float) -> str:
    return plain(float(f"{x:.2g}"))


def larger_batch(times: int, *, proves: str = "") -> Remedy:
    """Several recorded batches to a step; `proves` is the cause that it speaks for where it alone wins."""

    def apply(copy: Fork) -> None:
        copy.together = times

    return Remedy(f"batch × {times}", apply, proves=proves, least=FARTHER)


def smaller_batch(parts: int, split: Callable[[Tape], Sequence[Tape]]) -> Remedy:
    """Each recorded batch as several steps of its parts; all arms pass over the data as often."""

    def apply(copy: Fork) -> None:
        copy.parted = split

    return Remedy(f"batch ÷ {parts}", apply, least=FARTHER, once=True)


def option(name: str, value: float, label: str, *, least: float = LEAST) -> Remedy:
    """Another value for one of the optimiser's options, in all groups that have it."""
    change = setting(name, value)
    return Remedy(label, lambda copy: change(copy.optimizer), least=least)


def less_momentum(beta: float) -> Remedy:
    """Another momentum, or β₁, where it was higher; what has gathered by then is dropped."""

    def apply(copy: Fork) -> None:
        for group in copy.optimizer.param_groups:
            if "betas" in group:
                group["betas"] = (min(beta, group["betas"][0]), *group["betas"][1:])
            elif "momentum" in group:
                group["momentum"] = min(beta, group["momentum"])
        for kept in copy.optimizer.state.values():
            for name in ("momentum_buffer", "exp_avg"):
                if isinstance(kept.get(name), torch.Tensor):
                    kept[name].zero_()

    return Remedy(f"momentum {beta:g}", apply, least=SLIGHTLY)


def unclipped(*, least: float = LEAST) -> Remedy:
    """Gradients at their full length."""

    def apply(copy: Fork) -> None:
        copy.clip = math.inf

    return Remedy("no clipping", apply, least=least)


def looser_clip(norm: float, *, least: float = LEAST) -> Remedy:
    """Gradients shortened to a larger norm."""

    def apply(copy: Fork) -> None:
        copy.clip = norm

    return Remedy(f"clipping at {norm:.2g}", apply, least=least)


def altered(label: str, change: Callable[[Tape], Tape], *, least: float = LEAST) -> Remedy:
    """Other steps than the recorded ones: their data changed, or their program."""

    def apply(copy: Fork) -> None:
        copy.altered = change

    return Remedy(label, apply, least=least)


def less_dropout(p: float) -> Remedy:
    """Dropout at another probability, in all layers that had more; all arms are judged without any."""

    def at(limit: float) -> Callable[[Tape], Tape]:
        made: dict[int, Program] = {}

        def change(tape: Tape) -> Tape:
            program = made.setdefault(id(tape.program), _with_dropout(tape.program, limit))
            return replace(tape, program=program)

        return change

    return replace(altered(f"dropout {p:g}", at(p), least=FAR), judged=at(0.0))


def without_dropout(tape: Tape) -> Tape:
    """The step with all dropout at 0."""
    return replace(tape, program=_with_dropout(tape.program, 0.0))


def _with_dropout(program: Program, limit: float) -> Program:
    def at_most(p: Any) -> Any:
        return min(p, limit) if type(p) in (int, float) else p

    def changed(call: Instruction) -> Instruction:
        if call.name not in DROPOUTS:
            return call
        args = tuple(at_most(a) if k == 1 else a for k, a in enumerate(call.args))
        kwargs = tuple((name, at_most(x) if name == "p" else x) for name, x in call.kwargs)
        return replace(call, args=args, kwargs=kwargs)

    return replace(program, instructions=tuple(map(changed, program.instructions)))


def rectified(case: Case, *, least: float = LEAST) -> Remedy:
    """Rectified units in the place of those of tanh or sigmoid between the layers, and weights of a size for them."""
    made: dict[int, Program] = {}

    def change(tape: Tape) -> Tape:
        program = made.setdefault(id(tape.program), _rectified(tape.program))
        return replace(tape, program=program)

    every = sorted({k for t in case.fixed for k in t.program.reads()})
    swap = altered("ReLU in the place of tanh or sigmoid", change, least=least)
    return together(swap, renew(every, case.names, "weights initialised afresh"))


def _rectified(program: Program) -> Program:
    places = set(squashing(program))
    calls = (
        replace(c, function=torch.relu, name="relu", kwargs=()) if k in places else c
        for k, c in enumerate(program.instructions)
    )
    return replace(program, instructions=tuple(calls))


def without_outliers(change: Callable[[Tape], Tape]) -> Remedy:
    """Steps whose furthest rows are drawn in; all arms are judged on such."""
    return replace(altered("rows far out drawn in", change, least=FAR), judged=change)


def no_constant(case: Case) -> Remedy:
    """The bias of the last layer set to 0."""
    w = case.once(wires)[0]
    found = comparison(w.program)
    maker = None if found is None else w.source(found.call.args[found.outputs])
    known = () if maker is None else [s for s in maker.slots() if s < w.program.parameters]
    last = [k for k in known if case.state is not None and case.state.weights[k].dim() == 1]
    return renew(last, ["bias"] * (max(last, default=0) + 1), "the output's bias at 0", least=FAR)


def randomise() -> Remedy:
    """Adds noise of half the usual initial scale: N(0, 1/4 fan-in) on every weight matrix."""

    def apply(copy: Fork) -> None:
        for k, w in enumerate(copy.weights):
            if w.dim() > 1:
                copy.set_weight(k, w.detach() + 0.5 * copy.noise(w) / math.sqrt(w[0].numel()))

    return Remedy("random weights added", apply)


def renew(parameters: Iterable[int], names: Sequence[str], label: str, *, least: float = LEAST) -> Remedy:
    """Initialises parameters afresh: N(0, 2 / fan-in) for matrices (He et al. 2015), 1 for scales, 0 for biases."""
    chosen = tuple(parameters)

    def fresh(copy: Fork, k: int) -> torch.Tensor:
        w = copy.weights[k].detach()
        if w.dim() > 1:
            return copy.noise(w) * math.sqrt(2 / w[0].numel())
        return torch.ones_like(w) if names[k].endswith("weight") else torch.zeros_like(w)

    def apply(copy: Fork) -> None:
        for k in chosen:
            copy.set_weight(k, fresh(copy, k))

    return Remedy(label, apply, least=least)


def revive(dead: Mapping[int, torch.Tensor], *, least: float = LEAST) -> Remedy:
    """Initialises some units of layers afresh: rows of matrices as above, the other numbers of theirs at 0."""

    def apply(copy: Fork) -> None:
        for k, rows in dead.items():
            w = copy.weights[k].detach()
            fresh = copy.noise(w) * math.sqrt(2 / w[0].numel()) if w.dim() > 1 else torch.zeros_like(w)
            copy.set_weight(k, torch.where(rows.view(-1, *[1] * (w.dim() - 1)), fresh, w))

    return Remedy("dead units initialised afresh", apply, least=least)


def along(direction: torch.Tensor, parameters: Iterable[int]) -> Remedy:
    """A step in weight space, given as one flat direction over `parameters`."""
    chosen = tuple(parameters)

    def apply(copy: Fork) -> None:
        place = 0
        for k in chosen:
            w = copy.weights[k]
            copy.set_weight(k, w.detach() + direction[place : place + w.numel()].view_as(w).to(w))
            place += w.numel()

    return Remedy("a step along the negative curvature", apply)
