"""Descent on L(w) = ½(w − w*)ᵀH(w − w*), where every question about rate and momentum has an exact answer.

In the basis of the eigenvectors of H the coordinates do not meet: each is a problem of its own with a curvature λ. So
most functions here take the eigenvalues, as a 1-D tensor, a sequence, the two ends (λmin, λmax), or whatever holds them
in `.values`, as Eigenpairs and CriticalPoint do. Near a minimum of any smooth loss the answers hold to first order.

Rates are learning rates η, in units of weight² per loss, so that ηλ has none; steps count from 0 at the start.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

__all__ = [
    "Regimes",
    "Tuned",
    "Whitening",
    "condition",
    "gradient_descent",
    "heavy_ball",
    "momentum_weights",
    "nesterov",
    "optimal_rates",
    "rate_limit",
    "regimes",
    "semi_axes",
    "smooth_bound",
    "smooth_steps",
    "spectral_radius",
    "strongly_convex_bound",
    "whiten",
]


class _HasValues(Protocol):
    """A result that holds eigenvalues."""

    @property
    def values(self) -> Tensor: ...


_Spectrum = Tensor | Sequence[float] | _HasValues


# One rate, coordinate by coordinate


@dataclass(frozen=True, eq=False)
class Regimes:
    """What gradient descent does along each eigenvector at one rate: w ← (1 − ηλ)w each step."""

    eigenvalues: Tensor  # (n,), as given
    rate: float
    factors: Tensor  # (n,), 1 − ηλ
    names: tuple[str, ...]  # (n,), "monotone", "optimal", "oscillating", "cycling", "divergent" or "flat"

    @property
    def converges(self) -> bool:
        """Whether every coordinate tends to the minimum."""
        return not {"cycling", "divergent", "flat"} & set(self.names)

    def after(self, steps: int) -> Tensor:
        """(n,): what is left of each coordinate of w − w* after so many steps, as a signed share of its start."""
        return self.factors**steps


def regimes(spectrum: _Spectrum, rate: float) -> Regimes:
    """What gradient descent at this rate does along each eigenvector.

    With η* = 1/λ: η < η* is "monotone", η = η* "optimal" (one step lands on the minimum), η* < η < 2η* "oscillating",
    η = 2η* "cycling" between two points, η > 2η* "divergent". λ = 0 is "flat", and a negative λ always "divergent".
    Equal means within four units of rounding.

    LeCun, Bottou, Orr and Müller (1998), Efficient BackProp, §5; lecture 004, slides 41-53.

    >>> regimes([1.0, 3.0], rate=0.4).names
    ('monotone', 'oscillating')
    """
    values = _eigenvalues(spectrum)
    _check_rate(rate)
    factors = 1 - rate * values
    slack = 4 * torch.finfo(factors.dtype).eps
    named = tuple(
        _regime(value, factor, slack) for value, factor in zip(values.tolist(), factors.tolist(), strict=True)
    )
    return Regimes(values, rate, factors, named)


def _regime(value: float, factor: float, slack: float) -> str:
    if value == 0:
        return "flat"
    if abs(factor) <= slack:
        return "optimal"
    if abs(factor + 1) <= 2 * slack:
        return "cycling"
    if factor < -1 or value < 0:
        return "divergent"
    return "monotone" if factor > 0 else "oscillating"


def optimal_rates(spectrum: _Spectrum) -> Tensor:
    """(n,): 1/λ, the rate at which one step lands on the minimum along each eigenvector; infinite where λ = 0.

    Lecture 004, slides 41-49: η_opt = E''⁻¹. A negative curvature leads to no minimum and is refused.
    """
    return 1 / _convex(spectrum)


def rate_limit(spectrum: _Spectrum, *, momentum: float = 0.0, nesterov: bool = False) -> float:
    """The end of the admissible range: every rate 0 < η < limit converges along all eigenvectors with λ > 0.

    Without momentum 2/λmax, twice the smallest of the optimal rates (lecture 004, slide 50); from half of it on some
    coordinate oscillates. Heavy ball: 2(1+β)/λmax; Nesterov: 2(1+β)/((1+2β)λmax). Infinite where H = 0.
    """
    top = float(_convex(spectrum).max())
    _check_momentum(momentum)
    factor = 2 * (1 + momentum) / (1 + 2 * momentum) if nesterov else 2 * (1 + momentum)
    return factor / top if top else math.inf


def condition(spectrum: _Spectrum) -> float:
    """κ = λmax/λmin, 1 for a round bowl; infinite where λmin = 0.

    The largest optimal rate over the smallest. Lecture 004 (slides 54, 65) gives the name to its inverse.
    """
    values = _convex(spectrum)
    low, high = float(values.min()), float(values.max())
    return high / low if low else math.inf


# The best rate and momentum for all coordinates


@dataclass(frozen=True, eq=False)
class Tuned:
    """The rate and momentum that are best for the worst coordinate, as torch.optim.SGD takes them."""

    rate: float
    momentum: float
    nesterov: bool
    factor: float  # ‖w − w*‖ shrinks by it a step in the long run, the loss by its square
    condition: float

    @property
    def sgd(self) -> dict[str, float | bool]:
        """Arguments for `torch.optim.SGD(params, **tuned.sgd)`."""
        return {"lr": self.rate, "momentum": self.momentum, "nesterov": self.nesterov and self.momentum > 0}

    def steps(self, error: float) -> int:
        """Steps that take ‖w − w*‖ to `error` times its start, log(error)/log(factor).

        Exact for gradient descent; momentum needs some more at first, as its factor^k comes with a multiple of k.
        """
        if not 0 < error < 1:
            raise ValueError(f"the error is a share of that at the start between 0 and 1, got {error}")
        if self.factor == 0:
            return 1
        return math.ceil(math.log(error) / math.log(self.factor) - 1e-9)  # a whole number may come out just above


def gradient_descent(spectrum: _Spectrum) -> Tuned:
    """The best single rate 2/(λmin+λmax); its factor is (κ−1)/(κ+1).

    Both ends shrink by the same factor, λmin monotone and λmax oscillating. Goh (2017), Why momentum really works;
    lecture 004, slides 50-54.
    """
    low, high = _ends(spectrum)
    return Tuned(2 / (low + high), 0.0, False, (high - low) / (high + low), high / low)


def heavy_ball(spectrum: _Spectrum) -> Tuned:
    """The best rate (2/(√λmin+√λmax))² and momentum ((√κ−1)/(√κ+1))²; the factor is (√κ−1)/(√κ+1).

    Polyak (1964); Goh (2017). All coordinates shrink by √β.
    """
    low, high = _ends(spectrum)
    root = math.sqrt(low), math.sqrt(high)
    factor = (root[1] - root[0]) / (root[1] + root[0])
    return Tuned((2 / (root[0] + root[1])) ** 2, factor**2, False, factor, high / low)


def nesterov(spectrum: _Spectrum) -> Tuned:
    """The best rate 4/(3λmax+λmin) and momentum (√(3κ+1)−2)/(√(3κ+1)+2); the factor is 1 − 2/√(3κ+1).

    Lessard, Recht and Packard (2016), Proposition 1. The rate 1/λmax with momentum (√κ−1)/(√κ+1), which is proved for
    every strongly convex function, has the factor 1 − 1/√κ on a quadratic.
    """
    low, high = _ends(spectrum)
    root = math.sqrt(3 * high / low + 1)
    return Tuned(4 / (3 * high + low), (root - 2) / (root + 2), True, 1 - 2 / root, high / low)


def spectral_radius(spectrum: _Spectrum, rate: float, *, momentum: float = 0.0, nesterov: bool = False) -> Tensor:
    """(n,): the factor by which each coordinate shrinks (or, above 1, grows) a step in the long run.

    The largest root in magnitude of z² − (1+β−ηλ)z + β, or with Nesterov's momentum of z² − (1+β)(1−ηλ)z + β(1−ηλ):
    torch.optim.SGD without dampening. Where it is √β the coordinate swings; a momentum of (1−√(ηλ))² is the least that
    does (critical damping).
    """
    values = _eigenvalues(spectrum)
    _check_rate(rate)
    _check_momentum(momentum)
    kept = 1 - rate * values
    middle, last = ((1 + momentum) * kept, momentum * kept) if nesterov else (kept + momentum, 0 * kept + momentum)
    inside = middle**2 - 4 * last
    real = (middle.abs() + inside.clamp(min=0).sqrt()) / 2
    return torch.where(inside < 0, last.clamp(min=0).sqrt(), real)


def momentum_weights(steps: int, rate: float, momentum: float) -> Tensor:
    """(steps,): the weights of the gradients g⁰ … in the movement mᵗ after so many steps, −ηβ^(t−1−j) for gʲ.

    Their sum is the gain on a constant gradient, which tends to −η/(1−β); on one of alternating sign it is η/(1+β).
    Lecture 000, "Momentum"; lecture 004, slides 123-126. It is torch.optim.SGD's too while the rate stays; a schedule
    there rescales the whole sum.
    """
    if steps < 1:
        raise ValueError(f"a movement needs at least one step, got steps={steps}")
    _check_rate(rate)
    _check_momentum(momentum)
    return -rate * momentum ** torch.arange(steps - 1, -1, -1, dtype=torch.float64)


# The bowl made round


@dataclass(frozen=True, eq=False)
class Whitening:
    """ŵ = S w with S = H^½, in which L = ½‖ŵ − ŵ*‖²: one rate is right for all coordinates."""

    root: Tensor  # (n, n), S, symmetric
    inverse: Tensor  # (n, n), S⁻¹

    def whitened(self, w: Tensor) -> Tensor:
        """S w, for a point or for the rows of a matrix."""
        return w @ self.root

    def restored(self, whitened: Tensor) -> Tensor:
        """S⁻¹ŵ, for a point or for the rows of a matrix."""
        return whitened @ self.inverse


def whiten(H: Tensor) -> Whitening:
    """The change of coordinates S = H^½ = EΛ^½Eᵀ that makes the quadratic of a positive definite matrix (n, n) round.

    A linear term bᵀw becomes b̂ = S⁻¹b. Gradient descent on ŵ at rate η is w ← w − ηH⁻¹∇L: at η = 1 it is Newton's
    step. Lecture 004, slides 66-78. Cost: one symmetric eigendecomposition.
    """
    if H.dim() != 2 or H.shape[0] != H.shape[1] or not H.is_floating_point():
        raise ValueError(f"whitening needs a square matrix of real numbers, got {H.dtype} {tuple(H.shape)}")
    slack = 100 * torch.finfo(H.dtype).eps * H.abs().max()
    if not (H.isfinite().all() and (H - H.T).abs().max() <= slack):
        raise ValueError("whitening needs a finite symmetric matrix, got another one: take (H + H.T) / 2")
    values, vectors = torch.linalg.eigh(H)
    if not values[0] > len(H) * torch.finfo(H.dtype).eps * values[-1]:
        raise ValueError(
            f"whitening needs positive eigenvalues, got {float(values[0]):.4g} beside {float(values[-1]):.4g}: add a "
            "multiple of the identity"
        )
    return Whitening(
        (vectors * values.sqrt()) @ vectors.T,
        (vectors * values.rsqrt()) @ vectors.T,
    )


def semi_axes(spectrum: _Spectrum, level: float) -> Tensor:
    """(n,): √(2c/λ), the semi-axes of the ellipsoid where L − L(w*) = c; infinite where λ = 0.

    Lecture 004, slide 77, prints them as proportional to the eigenvalues.
    """
    if not level > 0:
        raise ValueError(f"a level above the minimum is needed, got {level}")
    return (2 * level / _convex(spectrum)).sqrt()


# Bounds for functions that are not quadratic


def smooth_bound(distance: float, rate: float, steps: float | Tensor, *, smoothness: float) -> float | Tensor:
    """‖w₀−w*‖²/(2ηt), which f(w_t) − f* of gradient descent does not exceed for any convex f.

    f' is Lipschitz with constant `smoothness` = L, and η ≤ 1/L. Nesterov (2004), §2.1.5; lecture 004, slide 64.
    """
    _check_step(rate, 1 / _positive("smoothness", smoothness), "1/L")
    _positive("distance", distance)
    return distance**2 / (2 * rate * steps)


def smooth_steps(distance: float, rate: float, error: float, *, smoothness: float) -> int:
    """Steps of gradient descent after which f − f* ≤ error for any convex f: ‖w₀−w*‖²/(2η·error), O(1/error)."""
    bound = smooth_bound(distance, rate, 1, smoothness=smoothness)
    return math.ceil(bound / _positive("error", error))


def strongly_convex_bound(
    gap: float, rate: float, steps: float | Tensor, *, convexity: float, smoothness: float
) -> float | Tensor:
    """(1 − 2ηm(1 − ηL/2))^t (f(w₀) − f*), which f(w_t) − f* of gradient descent does not exceed.

    m ≤ f'' ≤ L with `convexity` = m and `smoothness` = L; `gap` is f(w₀) − f*, and η < 2/L. At η = 1/L the factor is
    1 − m/L. It holds too where ‖∇f‖² ≥ 2m(f − f*) without convexity (Polyak 1963; Karimi, Nutini and Schmidt 2016,
    Theorem 1). Lecture 004, slides 57-58.
    """
    m, L = _positive("convexity", convexity), _positive("smoothness", smoothness)
    if m > L:
        raise ValueError(f"convexity m ≤ smoothness L is needed, got m={m} and L={L}: swap them")
    _check_step(rate, 2 / L, "2/L")
    return (1 - 2 * rate * m * (1 - rate * L / 2)) ** steps * gap


def _eigenvalues(spectrum: _Spectrum) -> Tensor:
    held = spectrum if isinstance(spectrum, Tensor) else getattr(spectrum, "values", spectrum)
    values = held if isinstance(held, Tensor) else torch.as_tensor(held, dtype=torch.float64)
    if values.dim() != 1 or not len(values) or not values.is_floating_point() or not values.isfinite().all():
        raise ValueError(
            f"finite real eigenvalues of shape (n,) are needed, got {values.dtype} {tuple(values.shape)}: of a matrix "
            "take torch.linalg.eigvalsh(H)"
        )
    return values


def _convex(spectrum: _Spectrum) -> Tensor:
    values = _eigenvalues(spectrum)
    if values.min() < -len(values) * torch.finfo(values.dtype).eps * values.abs().max():
        raise ValueError(
            f"a minimum needs eigenvalues of at least 0, got λmin={float(values.min()):.4g}: step off first"
        )
    return values.clamp(min=0)  # what rounding leaves below


def _ends(spectrum: _Spectrum) -> tuple[float, float]:
    values = _convex(spectrum)
    low, high = float(values.min()), float(values.max())
    if low == 0:
        raise ValueError("a best rate needs λmin > 0, got 0: leave the flat directions out")
    return low, high


def _positive(name: str, x: float) -> float:
    if not 0 < x < math.inf:
        raise ValueError(f"{name} is positive and finite, got {x}")
    return x


def _check_rate(rate: float) -> None:
    _positive("a rate", rate)


def _check_momentum(momentum: float) -> None:
    if not 0 <= momentum < 1:
        raise ValueError(f"momentum lies between 0 and 1, got {momentum}")


def _check_step(rate: float, limit: float, name: str) -> None:
    if not 0 < rate <= limit * (1 + 1e-12):
        raise ValueError(f"the bound holds for rates up to {name} = {limit:.4g}, got {rate}: lower it")
