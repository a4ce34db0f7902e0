"""Remedies: what a hypothesis predicts to help, as a change to a copy of the run."""

import math
from collections.abc import Iterable, Sequence

import torch

from unstuck.diagnosis._findings import plain
from unstuck.diagnosis._trial import LEAST, Fork, Remedy
from unstuck.record import State

# What a cooled arm must gain before it tells a fault from a healthy run, as measured on both (ln of the losses' ratio)
SLIGHTLY = -0.03  # a lower rate: where nothing is wrong it loses by the end, for the control has cooled down as well
FAR = math.log(0.8)  # a larger batch, which sees more data than the control: at most 15 % where nothing is wrong


def rate(state: State | None, factor: float, *, least: float = LEAST) -> Remedy:
    """The learning rate of a state times `factor`, to two digits."""
    groups = () if state is None or state.optimizer is None else state.optimizer.groups
    old = float(groups[0]["lr"]) if groups and "lr" in groups[0] else 0.0
    if old:
        factor = float(f"{old * factor:.2g}") / old
    change = f"× {_round(factor)}" if factor > 1 else f"÷ {_round(1 / factor)}"
    name = f"learning rate {old * factor:.2g} ({change})" if old else f"learning rate {change}"
    return Remedy(name, lambda copy: copy.scale_rate(factor), least=least)


def _round(x: float) -> str:
    return plain(float(f"{x:.2g}"))


def larger_batch(times: int, *, proves: str = "") -> Remedy:
    """Several recorded batches to a step; `proves` is the cause that it speaks for where it alone wins."""

    def apply(copy: Fork) -> None:
        copy.together = times

    return Remedy(f"batch × {times}", apply, proves=proves, least=FAR)


def epsilon(value: float) -> Remedy:
    """Another ε for an adaptive optimiser."""

    def apply(copy: Fork) -> None:
        for group in copy.optimizer.param_groups:
            if "eps" in group:
                group["eps"] = value

    return Remedy(f"ε {value:g}", apply)


def randomise() -> Remedy:
    """Adds noise of half the usual initial scale: N(0, 1/4 fan-in) on every weight matrix."""

    def apply(copy: Fork) -> None:
        for k, w in enumerate(copy.weights):
            if w.dim() > 1:
                copy.set_weight(k, w.detach() + 0.5 * copy.noise(w) / math.sqrt(w[0].numel()))

    return Remedy("random weights added", apply)


def renew(parameters: Iterable[int], names: Sequence[str], label: str) -> Remedy:
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

    return Remedy(label, apply)


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
