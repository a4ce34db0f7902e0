"""Newton's method and its kin: one optimiser, made of a curvature, a direction in its eigenvectors and a search.

A step asks the closure for the loss, takes the curvature A there (the Hessian, or the Gauss–Newton matrix) apart into
eigenvalues λ and unit eigenvectors v, and goes −Σ v (v·g)/d(λ), with g the gradient. The *direction* is the function
that gives the denominators d: λ itself is Newton's, |λ| + μ the saddle-free one. The *search* decides on the damping μ.
"""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from unstuck.curvature import Krylov, Operator, dense, gauss_newton, hessian
from unstuck.objective import Objective
from unstuck.optim._closure import Closure, objective_of, write
from unstuck.optim._elementwise import Group, refuse_complex

_SETTLED = 0.01  # a Krylov space is large enough where the step is known to this part of its length

Direction = Callable[[Tensor, float], Tensor]  # eigenvalues (k,), damping -> what to divide the slopes along them by


@dataclass(frozen=True, eq=False)
class Trial:
    """A step that a damping leads to."""

    move: Tensor  # (size,)
    promise: float  # by how much the quadratic model falls; not what the loss does


@dataclass(frozen=True)
class Damping:
    """What a search keeps from step to step."""

    value: float  # the last one
    scale: float  # the largest |λ| now
    growth: float = 2.0  # of the damping at the next refusal


Search = Callable[[Callable[[float], Trial], Callable[[Tensor], float], float, Damping], tuple[Tensor | None, Damping]]


# Directions


def newton(values: Tensor, damping: float) -> Tensor:
    """λ: the step to where the quadratic model is stationary, be it a saddle; nothing along λ = 0."""
    flat = values.abs() <= 1e-12 * values.abs().max()
    return torch.where(flat, math.inf, values)


def damped(values: Tensor, damping: float) -> Tensor:
    """λ + μ, raised so far that the smallest is μ: the classical cure of a Hessian that is not positive."""
    return values - values.min().clamp(max=0) + damping


def saddle_free(values: Tensor, damping: float) -> Tensor:
    """|λ| + μ: away from the stationary point along negative curvature (Dauphin et al. 2014)."""
    return values.abs() + damping


# Searches


def whole(
    trial: Callable[[float], Trial], loss_after: Callable[[Tensor], float], loss: float, damping: Damping
) -> tuple[Tensor | None, Damping]:
    """The undamped step, wherever it leads."""
    return trial(0.0).move, damping


def by_gain(
    trial: Callable[[float], Trial], loss_after: Callable[[Tensor], float], loss: float, damping: Damping
) -> tuple[Tensor | None, Damping]:
    """The first step that lowers the loss, with a damping that adapts to how well the quadratic model foretold it.

    ρ is what the loss fell by over what the model promised. A step with ρ ≤ 10⁻⁴ is refused and the damping raised,
    ever faster; otherwise it is multiplied by max(⅓, 1 − (2ρ − 1)³) (Nielsen 1999, eq. 2.5). None where no step lowers
    the loss.
    """
    now = damping
    for _ in range(12):
        tried = trial(now.value)
        gained = loss - loss_after(tried.move)
        ratio = gained / tried.promise if tried.promise > 0 else -math.inf
        if gained > 0 and ratio > 1e-4:
            return tried.move, Damping(now.value * max(1 / 3, 1 - (2 * ratio - 1) ** 3), damping.scale)
        now = replace(now, value=now.value * now.growth, growth=2 * now.growth)
    return None, damping


def by_best(
    trial: Callable[[float], Trial], loss_after: Callable[[Tensor], float], loss: float, damping: Damping
) -> tuple[Tensor | None, Damping]:
    """The step that lowers the loss most, of those with the dampings 1, 10⁻¹, … 10⁻⁷ times the largest |λ|.

    The choice of Dauphin et al. 2014; eight losses a step are few next to the products that the curvature has cost. If
    none of these steps lowers it, the damping is raised until one does. None where no step does.
    """

    def at(mu: float) -> tuple[float, float, Tensor]:
        move = trial(mu).move
        after = loss_after(move)
        return after if math.isfinite(after) else math.inf, mu, move

    after, mu, move = min((at(damping.scale * 10.0**-k) for k in range(8)), key=lambda tried: tried[0])
    raised = damping.scale
    while not after < loss and raised < 1e16 * damping.scale:
        raised *= 10
        after, mu, move = at(raised)
    return (move, replace(damping, value=mu)) if after < loss else (None, damping)


# The optimiser


class SecondOrder(torch.optim.Optimizer):
    """An optimiser made of a `curvature`, a `direction` and a `search`; those below are given ones.

    `step(closure)` needs a closure that returns the loss with its graph, and does *not* call backward(). The closure is
    asked several times a step, so it must hold the data of the step, the whole batch at best. Random masks are the same
    for all calls within a step; `.grad` is neither read nor written.

    Up to `dense_up_to` weights the curvature is taken apart exactly, with as many products as there are weights.
    Beyond, it is seen from the Krylov space that starts at the gradient, of at most `products` dimensions, fewer where
    the step is settled. That keeps as many vectors of the size of the parameters. On digits
    saddle-free Newton gets furthest in a given time with 10 to 20 of them, Levenberg–Marquardt with some hundred.
    """

    def __init__(
        self,
        params: Iterable[Any],
        *,
        direction: Direction,
        search: Search = by_best,
        curvature: Callable[[Objective], Operator] = hessian,
        products: int = 50,
        dense_up_to: int = 500,
    ) -> None:
        if products < 1 or dense_up_to < 0:
            raise ValueError(f"a step needs products to see curvature, got products={products}, {dense_up_to=}")
        self._parts = (curvature, direction, search, products, dense_up_to)
        super().__init__(params, {})

    def add_param_group(self, param_group: Group) -> None:
        """Adds a group of parameters; all groups are moved together."""
        super().add_param_group(param_group)
        try:
            refuse_complex(self, self.param_groups[-1]["params"])
        except ValueError:
            del self.param_groups[-1]
            raise

    def step(self, closure: Closure | None = None) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        """One step down the loss that the closure returns; the loss before it."""
        if closure is None:
            raise TypeError(
                f"{type(self).__name__} needs a closure, got none: step(closure), where closure() returns the loss "
                "with its graph and does not call backward()"
            )
        curvature, direction, search, products, dense_up_to = self._parts
        params = [p for group in self.param_groups for p in group["params"]]
        objective, used = objective_of(self._loss_of(closure), params)
        loss, gradient = objective.value_and_gradient()
        memory = self.state[params[0]]
        if not gradient.any():
            return loss

        def scale_of(values: Tensor) -> float:
            return float(values.abs().max()) or float(gradient.norm())  # without curvature, a step of length 1

        def damping_at(values: Tensor) -> float:
            return memory.get("damping", 1e-3 * scale_of(values))

        def bend(values: Tensor) -> Tensor:
            return direction(values, damping_at(values))

        model = _model(curvature(objective), gradient, bend, products=products, dense_up_to=dense_up_to)
        start, scale = objective.point, scale_of(model.values)
        move, damping = search(
            lambda mu: model.step(direction(model.values, mu)),
            lambda move: objective.at(start + move).value().item(),
            loss.item(),
            Damping(damping_at(model.values), scale, memory.get("growth", 2.0)),
        )
        least = torch.finfo(gradient.dtype).eps * scale
        memory.update(damping=max(damping.value, least), growth=damping.growth)
        if move is not None:
            write(objective, start + move, used)
        return loss

    def _loss_of(self, closure: Closure) -> Closure:
        return closure

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_parts": self._parts}


class Newton(SecondOrder):
    """Newton's method as printed, θ ← θ − H⁻¹g: to the nearest stationary point, which may be a saddle.

    For demonstration. DampedNewton and SaddleFreeNewton are for use.

    >>> w = torch.nn.Parameter(torch.tensor([3.0, 1.0]))
    >>> loss = Newton([w]).step(lambda: 5 * w[0] ** 2 - w[1] ** 2)
    >>> w.detach().round(decimals=5)
    tensor([0., 0.])
    """

    def __init__(self, params: Iterable[Any], *, products: int = 50, dense_up_to: int = 500) -> None:
        super().__init__(params, direction=newton, search=whole, products=products, dense_up_to=dense_up_to)


class DampedNewton(SecondOrder):
    """Newton's method on a Hessian made positive by adding to all its eigenvalues: λ − min(λmin, 0) + μ.

    Of several μ a step takes the best. Steps along the other eigenvectors are as if their curvature were larger by
    |λmin|, and so too short near a saddle.
    """

    def __init__(self, params: Iterable[Any], *, products: int = 20, dense_up_to: int = 500) -> None:
        super().__init__(params, direction=damped, products=products, dense_up_to=dense_up_to)


class SaddleFreeNewton(SecondOrder):
    """Newton's method with the eigenvalues' magnitudes, |λ| + μ: it is repelled by saddles, as gradient descent is.

    Of several μ a step takes the best. A start without any gradient along the negative curvature, as
    on the stable line of a saddle, still ends there: NegativeCurvatureEscape gets off. (Dauphin et al. 2014; there the
    Krylov space is searched anew for each of several dampings.)
    """

    def __init__(self, params: Iterable[Any], *, products: int = 20, dense_up_to: int = 500) -> None:
        super().__init__(params, direction=saddle_free, products=products, dense_up_to=dense_up_to)


class LevenbergMarquardt(SecondOrder):
    """Least squares: the Gauss–Newton step damped, −(G + μ)⁻¹g, with μ adapted by the gain ratio.

    The closure returns the *residuals*, a tensor of any shape but a single number, with their graph and without
    backward(). What falls, and is returned, is the mean of their squares. G = 2JᵀJ/N with J their derivatives; it is
    never negative. Best where the residuals can be made small. (Levenberg 1944; Nielsen 1999.)
    """

    def __init__(self, params: Iterable[Any], *, products: int = 200, dense_up_to: int = 500) -> None:
        shape = {"products": products, "dense_up_to": dense_up_to}
        super().__init__(params, direction=damped, search=by_gain, curvature=gauss_newton, **shape)

    def _loss_of(self, closure: Closure) -> Closure:
        def loss() -> Tensor:
            residuals = closure()
            if not isinstance(residuals, Tensor) or residuals.ndim == 0:
                raise TypeError(
                    "LevenbergMarquardt needs a closure that returns the residuals, as model(x) - y, got "
                    f"{'a single number' if isinstance(residuals, Tensor) else repr(residuals)}: leave the mean of "
                    "their squares to the optimiser"
                )
            return F.mse_loss(residuals, torch.zeros_like(residuals))

        return loss


# The quadratic model


@dataclass(frozen=True, eq=False)
class _Model:
    """g·d + dᵀAd/2 in eigenvectors of A, or in Ritz vectors."""

    values: Tensor  # (k,), float64
    slopes: Tensor  # (k,), float64: v·g
    lift: Callable[[Tensor], Tensor]  # coordinates (k,) -> (size,)

    def step(self, denominators: Tensor) -> Trial:
        y = -self.slopes / denominators
        return Trial(self.lift(y), -float(self.slopes @ y + self.values @ y.square() / 2))


def _model(
    A: Operator, gradient: Tensor, bend: Callable[[Tensor], Tensor], *, products: int, dense_up_to: int
) -> _Model:
    if A.size <= dense_up_to:
        values, vectors = torch.linalg.eigh(dense(A).double().cpu())
        return _Model(values, gradient.double().cpu() @ vectors, lambda y: (vectors @ y).to(gradient))
    krylov, length = Krylov(A, rows=products, start=gradient), float(gradient.double().norm())
    last = torch.zeros(0, dtype=torch.float64)
    while True:
        krylov.grow()
        ritz = krylov.ritz()
        slopes = length * ritz.vectors[0]
        y = slopes / bend(ritz.values)
        # the residual of the step, where the denominators are A's own; elsewhere how far it still moves must tell
        outside = float((ritz.links @ y).abs())
        before, last = F.pad(last, (0, 1)), ritz.vectors @ y
        settled = outside <= _SETTLED * length and float((last - before).norm()) <= _SETTLED * float(last.norm())
        if settled or krylov.closed or krylov.full:
            break
    return _Model(ritz.values, slopes, lambda y: krylov.combine((ritz.vectors @ y)[:, None])[0])
