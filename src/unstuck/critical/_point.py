"""What gradient and curvature tell of the point where the weights stand."""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from unstuck.critical._json import plain_values
from unstuck.critical._noise import Noise, gradient_noise
from unstuck.critical._spectrum import signs, spectrum_of, zero_width
from unstuck.critical._words import gist, told
from unstuck.curvature import Eigenpairs, Operator, Share, density, draws, hessian
from unstuck.objective import Objective

_NEAR = 1e-5  # of ‖θ‖: a best step as short as this leads nowhere
_STEPS = 30  # products of one run of the quadrature

Progress = Callable[[str, float], None]


@dataclass(frozen=True, eq=False)
class CriticalPoint:
    """What gradient and curvature tell of the point where the weights stand."""

    kind: str  # "minimum", "maximum", "saddle", "degenerate", "gradient-flat" or "not critical"
    loss: float
    gradient_norm: float
    noise: Noise | None  # of the gradient over the batches; None where there is only one
    relative_gradient: float  # ‖g‖‖θ‖ / |L|
    promise: float  # how much of |L| the best step along −g would take away, if L were its quadratic model
    promise_limit: float  # the point counts as critical up to here
    reach: float  # the length of that step / ‖θ‖; up to 1e-5 the point counts as critical too
    flatness: float  # ‖Hg‖ / (‖H‖‖g‖), small where the gradient lies in directions without curvature; NaN for g = 0
    values: Tensor  # (k,), ascending: all eigenvalues of the Hessian where `complete`, otherwise its two ends
    errors: Tensor  # (k,)
    zero: float  # an eigenvalue of at most this magnitude counts as zero
    complete: bool
    converged: bool
    missed: float  # the odds that the random start has hidden an eigenvalue beyond the ends; 0 where `complete`
    positive: Share | None  # the share of positive eigenvalues; None where it was not asked for
    direction: Tensor  # (size,), the unit eigenvector of the smallest eigenvalue
    products: int

    @property
    def name(self) -> str:
        """The kind with what qualifies it."""
        if self.kind == "not critical" and self.within_noise:
            return "critical within noise"
        if self.kind in ("minimum", "maximum") and self.flat:
            return f"{self.kind} ({self.flat} flat direction{'s' * (self.flat > 1)})"
        return self.kind

    @property
    def within_noise(self) -> bool:
        """Whether the gradient is no larger than its sampling error explains."""
        return self.noise is not None and self.noise.explains(self.gradient_norm)

    @property
    def smallest(self) -> float:
        return float(self.values[0])

    @property
    def largest(self) -> float:
        return float(self.values[-1])

    @property
    def negative(self) -> int:
        """The index where `complete`; otherwise how many of the computed eigenvalues are negative."""
        return int((signs(self.values, self.errors, self.zero) < 0).sum())

    @property
    def flat(self) -> int:
        """How many of the computed eigenvalues cannot be told from zero."""
        return int((signs(self.values, self.errors, self.zero) == 0).sum())

    @property
    def condition(self) -> float:
        """λmax/λmin of a positive Hessian; infinite where eigenvalues are zero, NaN where some are negative."""
        if self.negative:
            return math.nan
        return math.inf if self.flat else self.largest / self.smallest

    def rate_limit(self, *, momentum: float = 0.0) -> float:
        """2(1+β)/λmax: gradient descent with a larger rate moves away from here; infinite without positive curvature.

        For heavy-ball momentum β as in torch.optim.SGD without dampening.
        """
        if not 0 <= momentum < 1:
            raise ValueError(f"momentum lies between 0 and 1, got {momentum}")
        return 2 * (1 + momentum) / self.largest if self.largest > self.zero else math.inf

    def to_json(self) -> dict[str, Any]:
        """The point as strict JSON values, without `direction`: version 1, laid down in docs/curvature.md."""
        return plain_values(self)

    @property
    def gist(self) -> str:
        """What the point is and what follows from it, without the numbers that show it."""
        return gist(self)

    def __str__(self) -> str:
        return told(self)


def classify(values: Tensor, errors: Tensor | float = 0.0, *, zero: float = 0.0) -> str:
    """The kind of a critical point whose Hessian has the extreme (or all) eigenvalues `values`.

    Eigenvalues within their error or within `zero` of zero have no sign; unless both other signs occur, they make the
    point "degenerate": its second derivatives do not tell what it is.

    >>> classify(torch.tensor([-2.0, 2.0])), classify(torch.tensor([0.0, 4.0]))
    ('saddle', 'degenerate')
    """
    found = set(signs(values, errors, zero).tolist())
    if {-1, 1} <= found:
        return "saddle"
    if 0 in found:
        return "degenerate"
    return "minimum" if 1 in found else "maximum"


def examine(  # noqa: PLR0913 each with a default that is right most of the time
    objective: Objective,
    *,
    promise_limit: float = 1e-4,
    tol: float = 1e-3,
    dense_up_to: int = 500,
    max_products: int = 300,
    samples: int = 2,
    generator: torch.Generator | None = None,
    progress: Progress | None = None,
) -> CriticalPoint:
    """What kind of point the weights stand at, with the numbers that show it.

    The point is critical if the best step along the gradient lowers the quadratic model, by ‖g‖⁴ / 2|gᵀHg|, by at most
    `promise_limit` of the loss, or is at most 10⁻⁵ of the length of θ (which tells where the loss tends to 0): measures
    free of the units of loss and weights. A point that is not, with a gradient that lies where there is no curvature
    (‖Hg‖ ≤ 10⁻³ ‖H‖‖g‖), is gradient-flat: methods that minimise ‖g‖ stop there though the loss still falls (Frye et
    al. 2021).

    Up to `dense_up_to` weights all eigenvalues are computed, beyond it the two ends, to `tol` of the larger, and the
    share of positive ones by quadrature, from `samples` runs of thirty products (none for 0). An eigenvalue below √ulp
    of the largest counts as zero. Where some are zero and the others of one sign, the loss is followed along the flat
    directions: a minimum with flat directions is one that it does not fall below there, to the widths that were tried.
    Cost: two gradients, and as many Hessian products as there are weights, or as Lanczos and the quadrature need. All
    that is random is the same each time, unless a generator is given. `progress(text, share)` is told before each
    product what share of the most that there may be is done.
    """
    loss, gradient = objective.value_and_gradient()
    if not (loss.isfinite() and gradient.isfinite().all()):
        raise ValueError(
            f"a critical point needs a finite loss and gradient, got loss {loss.item():.4g} and gradient norm "
            f"{gradient.norm().item():.4g}: look for the overflow first"
        )
    H, generator = hessian(objective), draws(generator, objective.device)
    quadrature = _STEPS * max(2, samples) if samples and objective.size > dense_up_to else 0
    first = objective.size if objective.size <= dense_up_to else max_products
    watched = _telling(H, progress, "spectrum", before=0, most=first + quadrature)
    spectrum = spectrum_of(watched, tol=tol, dense_up_to=dense_up_to, max_products=max_products, generator=generator)
    zero = zero_width(spectrum)
    complete = len(spectrum.values) == objective.size
    norm = gradient.norm().item()
    promise, step, flatness = _along_gradient(H, gradient, spectrum.scale, zero) if norm else (0.0, 0.0, math.nan)
    length = objective.point.norm().item()
    share, reach = _ratio(promise, abs(loss.item())), _ratio(step, length)
    kind = classify(spectrum.values, spectrum.errors, zero=zero)
    if share > promise_limit and reach > _NEAR:
        kind = "gradient-flat" if flatness <= 1e-3 else "not critical"
    elif kind == "degenerate" and complete:
        kind = _by_walking(objective, spectrum, zero, generator)
    before = spectrum.products
    watched = _telling(H, progress, "share of positive eigenvalues", before=before, most=before + quadrature)
    positive = _positive(watched, spectrum, zero, samples, generator)
    return CriticalPoint(
        kind=kind,
        loss=loss.item(),
        gradient_norm=norm,
        noise=gradient_noise(objective, gradient),
        relative_gradient=_ratio(norm * length, abs(loss.item())),
        promise=share,
        promise_limit=promise_limit,
        reach=reach,
        flatness=flatness,
        values=spectrum.values,
        errors=spectrum.errors,
        zero=zero,
        complete=complete,
        converged=spectrum.converged,
        missed=min(1.0, spectrum.missed),
        positive=positive[0],
        direction=spectrum.vectors[0],
        products=spectrum.products + (norm > 0) + positive[1],
    )


def _telling(H: Operator, progress: Progress | None, text: str, *, before: int, most: int) -> Operator:
    """H, whose products tell how many came before them, as a share of `most`."""
    if progress is None:
        return H
    done = before

    def matvec(v: Tensor) -> Tensor:
        nonlocal done
        progress(f"{text}, product {done + 1}", done / most)
        done += 1
        return H @ v

    return replace(H, matvec=matvec)


def _along_gradient(H: Operator, gradient: Tensor, scale: float, zero: float) -> tuple[float, float, float]:
    """What the best step along −g takes off the quadratic model, its length, and ‖Hg‖/(‖H‖‖g‖).

    Where the line is concave the step is that of its mirror image.
    """
    squared = float(H.dot(gradient, gradient))
    bent = H @ gradient
    bend = abs(float(H.dot(gradient, bent))) / squared
    flatness = float(H.dot(bent, bent)) ** 0.5 / (squared**0.5 * scale) if scale else 0.0
    bend = max(bend, zero)
    return _ratio(squared, 2 * bend), _ratio(squared**0.5, bend), flatness


def _by_walking(objective: Objective, spectrum: Eigenpairs, zero: float, generator: torch.Generator) -> str:
    """A minimum or maximum, if along its flat directions the loss goes nowhere beyond it; otherwise degenerate."""
    signed = signs(spectrum.values, spectrum.errors, zero)
    flat = spectrum.vectors[signed == 0]
    if len(flat) == len(signed):
        return "degenerate"
    drawn = torch.randn(8, len(flat), generator=generator, dtype=flat.dtype, device=generator.device)
    mixed = drawn.to(flat.device) @ flat
    ways = torch.cat([flat[:50], mixed / mixed.norm(dim=1, keepdim=True)])
    start, here = objective.point, objective.value().item()
    width = start.norm().item() or 1.0
    slack = 100 * torch.finfo(objective.dtype).eps * abs(here)
    sign = int(signed[signed != 0][0])
    for way in ways:
        for step in (1e-3, -1e-3, 1e-2, -1e-2, 1e-1, -1e-1):
            if sign * (objective.at(start + step * width * way).value().item() - here) < -slack:
                return "degenerate"
    return "minimum" if sign > 0 else "maximum"


def _positive(
    H: Operator, spectrum: Eigenpairs, zero: float, samples: int, generator: torch.Generator
) -> tuple[Share | None, int]:
    """The share of positive eigenvalues and the products it took."""
    if len(spectrum.values) == H.size:
        count = int((signs(spectrum.values, spectrum.errors, zero) > 0).sum())
        return Share(count / H.size, 0.0, 0.0), 0
    if not samples:
        return None, 0
    found = density(H, steps=_STEPS, samples=max(2, samples), generator=generator)
    return found.above(zero), found.products


def _ratio(part: float, whole: float) -> float:
    if part == 0:
        return 0.0
    return part / whole if whole else math.inf
