"""How far the gradient over some batches may be from the gradient over all there could be."""

import math
from dataclasses import dataclass

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
    little. With ranks, these are the batches of all.
    """
    count = round(objective.over_ranks(lambda: len(objective.terms)))
    if count < 2:
        return None
    gradient = objective.gradient() if gradient is None else gradient
    values = dict(zip(objective.names, objective.unflatten(objective.point), strict=True))

    def spread() -> float:
        apart = (
            (term.weight / objective.weight, Objective.of_terms([term], values).gradient() - gradient)
            for term in objective.terms
            if term.weight
        )
        return math.fsum(share**2 * float(a.double().square().sum()) for share, a in apart)

    stderr = (objective.over_ranks(spread) * count / (count - 1)) ** 0.5
    if not math.isfinite(stderr):
        raise ValueError(f"the noise of a gradient needs finite ones, got {stderr}: look at the loss here first")
    return Noise(stderr, count)
