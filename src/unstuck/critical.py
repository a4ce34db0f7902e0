"""Points where the gradient vanishes: what they are, and the way out of a saddle."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from unstuck.curvature import Eigenpairs, Operator, dense, eigenpairs, hessian
from unstuck.objective import Objective


@dataclass(frozen=True, eq=False)
class CriticalPoint:
    """What gradient and curvature tell of the point where the weights stand."""

    kind: str  # "minimum", "maximum", "saddle", "degenerate" or "not critical"
    loss: float
    gradient_norm: float
    relative_gradient: float  # ‖g‖‖θ‖ / |L|
    promise: float  # how much of |L| the best step along −g would take away, if L were its quadratic model
    promise_limit: float  # the point counts as critical up to here
    values: Tensor  # (k,), ascending: all eigenvalues of the Hessian where `complete`, otherwise its two ends
    errors: Tensor  # (k,)
    zero: float  # an eigenvalue of at most this magnitude counts as zero
    complete: bool
    converged: bool
    direction: Tensor  # (size,), the unit eigenvector of the smallest eigenvalue
    products: int

    @property
    def smallest(self) -> float:
        return float(self.values[0])

    @property
    def largest(self) -> float:
        return float(self.values[-1])

    @property
    def negative(self) -> int:
        """The index where `complete`; otherwise how many of the computed eigenvalues are negative."""
        return int((_signs(self.values, self.errors, self.zero) < 0).sum())

    @property
    def flat(self) -> int:
        """How many of the computed eigenvalues cannot be told from zero."""
        return int((_signs(self.values, self.errors, self.zero) == 0).sum())

    @property
    def rate_limit(self) -> float:
        """2/λmax: gradient descent with a larger rate moves away from here; infinite if no curvature is positive."""
        return 2 / self.largest if self.largest > self.zero else math.inf

    def __str__(self) -> str:
        return " ".join([_meaning(self), _slope(self), _curvature(self), _advice(self)]).rstrip()


def classify(values: Tensor, errors: Tensor | float = 0.0, *, zero: float = 0.0) -> str:
    """The kind of a critical point whose Hessian has the extreme (or all) eigenvalues `values`.

    Eigenvalues within their error or within `zero` of zero have no sign; unless both other signs occur, they make the
    point "degenerate": its second derivatives do not tell what it is.

    >>> classify(torch.tensor([-2.0, 2.0])), classify(torch.tensor([0.0, 4.0]))
    ('saddle', 'degenerate')
    """
    signs = set(_signs(values, errors, zero).tolist())
    if {-1, 1} <= signs:
        return "saddle"
    if 0 in signs:
        return "degenerate"
    return "minimum" if 1 in signs else "maximum"


def examine(
    objective: Objective,
    *,
    promise_limit: float = 1e-4,
    tol: float = 1e-3,
    dense_up_to: int = 500,
    max_products: int = 300,
    generator: torch.Generator | None = None,
) -> CriticalPoint:
    """What kind of point the weights stand at, with the numbers that show it.

    The point is critical if the best step along the gradient lowers the quadratic model, by ‖g‖⁴ / 2|gᵀHg|, by at most
    `promise_limit` of the loss: a measure free of the units of loss and weights. Up to `dense_up_to` weights all
    eigenvalues are computed, beyond it the two ends, to `tol` of the larger. An eigenvalue below √ulp of the largest
    counts as zero. Cost: a gradient, and as many Hessian products as there are weights, or as Lanczos needs.
    """
    loss, gradient = objective.value_and_gradient()
    if not (loss.isfinite() and gradient.isfinite().all()):
        raise ValueError(
            f"a critical point needs a finite loss and gradient, got loss {loss.item():.4g} and gradient norm "
            f"{gradient.norm().item():.4g}: look for the overflow first"
        )
    H = hessian(objective)
    spectrum = _spectrum(H, tol=tol, dense_up_to=dense_up_to, max_products=max_products, generator=generator)
    zero = _zero(spectrum)
    norm = gradient.norm().item()
    promise = _promise(H, gradient, zero) if norm else 0.0
    share = _ratio(promise, abs(loss.item()))
    critical = share <= promise_limit
    return CriticalPoint(
        kind=classify(spectrum.values, spectrum.errors, zero=zero) if critical else "not critical",
        loss=loss.item(),
        gradient_norm=norm,
        relative_gradient=_ratio(norm * objective.point.norm().item(), abs(loss.item())),
        promise=share,
        promise_limit=promise_limit,
        values=spectrum.values,
        errors=spectrum.errors,
        zero=zero,
        complete=len(spectrum.values) == objective.size,
        converged=spectrum.converged,
        direction=spectrum.vectors[0],
        products=spectrum.products + (norm > 0),
    )


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
        spectrum = _spectrum(H, tol=tol, dense_up_to=dense_up_to, max_products=max_products, generator=generator)
        if _signs(spectrum.values, spectrum.errors, _zero(spectrum))[0] >= 0:
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


def _spectrum(
    H: Operator, *, tol: float, dense_up_to: int, max_products: int, generator: torch.Generator | None
) -> Eigenpairs:
    """All eigenpairs of a small operator, the two ends of a large one."""
    if H.size > dense_up_to:
        return eigenpairs(H, tol=tol, max_products=max_products, generator=generator)
    values, vectors = torch.linalg.eigh(dense(H, memory=math.inf).double())
    values, vectors = values.to(H.dtype), vectors.T.to(H.dtype)
    scale = float(values.abs().max())
    rounding = torch.full_like(values, 100 * torch.finfo(H.dtype).eps * scale)  # as in eigenpairs
    return Eigenpairs(values, vectors, rounding, rounding, scale, converged=True, products=H.size)


def _zero(spectrum: Eigenpairs) -> float:
    return math.sqrt(torch.finfo(spectrum.values.dtype).eps) * spectrum.scale


def _signs(values: Tensor, errors: Tensor | float, zero: float) -> Tensor:
    """−1, 0 or 1 for each eigenvalue, 0 where the sign is not known."""
    known = (values.abs() > zero) & (values.abs() > errors)
    return values.sign().where(known, 0).int()


def _promise(H: Operator, gradient: Tensor, zero: float) -> float:
    """What the best step along −g takes off the quadratic model; where the line is concave, its mirror image's."""
    squared = float(H.dot(gradient, gradient))
    bend = abs(float(H.dot(gradient, H @ gradient))) / squared
    return _ratio(squared, 2 * max(bend, zero))


def _ratio(part: float, whole: float) -> float:
    if part == 0:
        return 0.0
    return part / whole if whole else math.inf


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


def _meaning(point: CriticalPoint) -> str:
    if point.kind == "not critical":
        return f"Not a critical point: the gradient is still large, at a loss of {point.loss:.6g}."
    reason = {
        "minimum": "a minimum: the loss curves upwards along every direction",
        "maximum": "a maximum: the loss curves downwards along every direction",
        "saddle": "a saddle: the loss curves upwards along some directions and downwards along others",
        "degenerate": "a degenerate point: some curvature is zero within its error, so second derivatives do not tell",
    }
    return f"The weights stand at {reason[point.kind]}. The loss is {point.loss:.6g}."


def _slope(point: CriticalPoint) -> str:
    return (
        f"The gradient has norm {point.gradient_norm:.3g}; the best step along it promises to lower the loss by "
        f"{100 * point.promise:.2g} % (critical: at most {100 * point.promise_limit:.2g} %)."
    )


def _curvature(point: CriticalPoint) -> str:
    count = len(point.values)
    positive = count - point.negative - point.flat
    which = f"The {count} eigenvalues" if point.complete else f"The {count} computed eigenvalues"
    text = (
        f"{which} of the Hessian go from {point.smallest:.4g} ± {float(point.errors[0]):.1g} to "
        f"{point.largest:.4g} ± {float(point.errors[-1]):.1g}: {point.negative} negative, {point.flat} zero "
        f"(within {point.zero:.1g} or the error), {positive} positive."
    )
    return text if point.converged else f"{text} They have not converged after {point.products} products."


def _advice(point: CriticalPoint) -> str:
    limit = f"Gradient descent needs a rate below {point.rate_limit:.4g}." if point.rate_limit < math.inf else ""
    way = f"A way out leads along the eigenvalue {point.smallest:.4g}." if point.negative else ""
    return " ".join(filter(None, [limit, way]))
