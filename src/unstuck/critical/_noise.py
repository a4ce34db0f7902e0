"""How far the gradient over some batches may be from the gradient over all there could be."""

from dataclasses import dataclass

import torch
from torch import Tensor

from unstuck.objective import Objective


@dataclass(frozen=True, eq=False)
class Noise:
    """The standard error of a gradient, from its spread over batches taken as independent samples."""

    stderr: float  # the root of E‖g − G‖², with G the gradient over the population
    batches: int

    def explains(self, norm: float) -> bool:
        """Whether a gradient of this norm is no sign of a slope: ‖g‖ ≤ 2·stderr."""
        return norm <= 2 * self.stderr


def gradient_noise(objective: Objective, gradient: Tensor | None = None) -> Noise | None:
    """The standard error of ∇L over the objective's batches, from one more gradient; None for a single batch.

    Σ w_b² ‖g_b − g‖² / (Σ w_b)² · B/(B−1) for B batches of weights w_b. Batches that are few, or sorted by class, say
    little; the terms of one rank speak for that rank.
    """
    terms = objective.terms
    if len(terms) < 2:
        return None
    gradient = objective.gradient() if gradient is None else gradient
    values = dict(zip(objective.names, objective.unflatten(objective.point), strict=True))
    total = sum(term.weight for term in terms)
    squares = torch.zeros((), dtype=torch.float64)
    for term in terms:
        if term.weight:
            apart = Objective.of_terms([term], values).gradient() - gradient
            squares += (term.weight / total) ** 2 * float(apart.square().sum())
    return Noise(float(squares * len(terms) / (len(terms) - 1)) ** 0.5, len(terms))
