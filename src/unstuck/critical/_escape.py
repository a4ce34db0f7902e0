"""The way out of a saddle."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from unstuck.critical._spectrum import signs, spectrum_of, zero_width
from unstuck.curvature import hessian
from unstuck.objective import Objective


@dataclass(frozen=True, eq=False)
class Escape:
    """A line search from a point along a direction of negative curvature, to both sides."""

    direction: Tensor  # (size,), of length 1
    curvature: float  # dᵀHd
    loss: float  # before
    steps: tuple[float, float]  # how far along +direction and along −direction; 0 where no step lowers the loss
    losses: tuple[float, float]  # after each of them
    point: Tensor  # (size,), where the lower of the two ends
    evaluations: int

    @property
    def decrease(self) -> float:
        """By how much the loss falls; 0 if neither side led down."""
        return self.loss - min(self.losses)

    def __str__(self) -> str:
        if not self.decrease > 0:
            return (
                f"No way out found: along the curvature {self.curvature:.4g} no step to either side lowers "
                f"the loss of {self.loss:.6g}."
            )
        (ahead, back), (loss_ahead, loss_back) = self.steps, self.losses
        return (
            f"The loss falls from {self.loss:.6g} to {min(self.losses):.6g} along the curvature {self.curvature:.4g}: "
            f"{loss_ahead:.6g} at step {ahead:.4g} to the one side, {loss_back:.6g} at step {back:.4g} to the other."
        )


def escape(
    objective: Objective,
    *,
    along: Tensor | None = None,
    tol: float = 1e-3,
    dense_up_to: int = 500,
    max_products: int = 300,
    generator: torch.Generator | None = None,
) -> Escape:
    """The way out of a saddle: a line search to both sides of the eigenvector with the most negative eigenvalue.

    Along a unit vector d of curvature dᵀHd = λ < 0 a step t lowers the loss by |λ|t²/2 to second order, to both sides
    where the gradient is zero. The loss is followed in steps that double until it rises again, then minimised by
    Brent's method. `along` gives another direction, as `examine(objective).direction` if that is at hand.
    """
    H = hessian(objective)
    if along is None:
        spectrum = spectrum_of(H, tol=tol, dense_up_to=dense_up_to, max_products=max_products, generator=generator)
        if signs(spectrum.values, spectrum.errors, zero_width(spectrum))[0] >= 0:
            raise ValueError(
                "escape needs a direction of negative curvature, got "
                f"{float(spectrum.values[0]):.4g} ± {float(spectrum.errors[0]):.1g} as the smallest eigenvalue: "
                "this point is not a saddle"
            )
        along = spectrum.vectors[0]
    direction = along / along.norm()
    curvature = float(H.dot(direction, H @ direction))
    if not curvature < 0:
        raise ValueError(f"escape needs a direction of negative curvature, got dᵀHd = {curvature:.4g} along this one")
    start, loss = objective.point, objective.value().item()
    first = math.sqrt(0.02 * (abs(loss) or 1.0) / -curvature)  # lowers the quadratic model by a hundredth of the loss
    ends, evaluations = [], 0
    for side in (direction, -direction):
        step, after, evaluated = _descend(
            lambda t, side=side: objective.at(start + t * side).value().item(), loss, first
        )
        ends.append((after, step, start + step * side))
        evaluations += evaluated
    return Escape(
        direction=direction,
        curvature=curvature,
        loss=loss,
        steps=(ends[0][1], ends[1][1]),
        losses=(ends[0][0], ends[1][0]),
        point=min(ends, key=lambda end: end[0])[2],
        evaluations=evaluations + 1,
    )


def _descend(phi: Callable[[float], float], before: float, first: float) -> tuple[float, float, int]:
    """A minimum (t, φ(t)) for t > 0, and how often φ was asked; t = 0 if no step lowers φ below `before` = φ(0)."""
    known = {0.0: before}

    def asked(t: float) -> float:
        if t not in known:
            value = phi(t)
            known[t] = value if math.isfinite(value) else math.inf
        return known[t]

    step = first
    while asked(step) >= before and step > 1e-9 * first:  # beyond the valley
        step /= 4
    left, middle, right = 0.0, step, 2 * step
    for _ in range(30):  # a loss without lower bound would have no end
        if asked(middle) >= before or asked(right) >= asked(middle):
            break
        left, middle, right = middle, right, 2 * right
    if asked(middle) < before:
        _brent(asked, left, middle, right)
    best = min(known, key=lambda t: known[t])
    return best, known[best], len(known) - 1


def _brent(phi: Callable[[float], float], left: float, middle: float, right: float, *, tol: float = 1e-6) -> None:
    """Asks φ ever closer to its minimum: parabolas, or golden sections where they mislead (Brent 1973, ch. 5)."""
    best = second = third = middle
    step = previous = right - left
    for _ in range(60):
        centre, resolution = (left + right) / 2, tol * abs(best)
        if abs(best - centre) + (right - left) / 2 <= 2 * resolution:
            return
        p, q = _parabola(phi, best, second, third)
        if abs(p) < abs(q * previous) / 2 and left < best + p / q < right:
            previous, step = step, p / q
        else:
            previous = (right if best < centre else left) - best
            step = 0.381966 * previous
        new = best + (step if abs(step) >= resolution else math.copysign(resolution, step))
        if phi(new) <= phi(best):
            left, right = (best, right) if new > best else (left, best)
            best, second, third = new, best, second
        else:
            left, right = (left, new) if new > best else (new, right)
            if phi(new) <= phi(second) or second == best:
                second, third = new, second
            elif phi(new) <= phi(third) or third in (best, second):
                third = new


def _parabola(phi: Callable[[float], float], a: float, b: float, c: float) -> tuple[float, float]:
    """p, q such that a + p/q is the vertex of the parabola through φ at a, b, c; q = 0 where there is none."""
    if not all(map(math.isfinite, (phi(a), phi(b), phi(c)))):
        return 0.0, 0.0
    r, s = (a - b) * (phi(a) - phi(c)), (a - c) * (phi(a) - phi(b))
    return (a - c) * s - (a - b) * r, -2 * (s - r)
