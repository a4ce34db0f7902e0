"""Linear systems with a symmetric operator, whatever the signs of its eigenvalues."""

from dataclasses import dataclass

import torch
from torch import Tensor

from unstuck.curvature._operator import Operator


@dataclass(frozen=True, eq=False)
class Solution:
    """What came of A x = b, and whether a direction of negative curvature was met on the way."""

    x: Tensor  # (size,)
    residual: float  # ‖A x − b‖ / ‖b‖, from a product of its own
    curvature: float  # the lowest dᵀAd/‖d‖² among the residuals that the method went through
    direction: Tensor | None  # (size,), the unit d of that curvature where it is negative
    converged: bool
    products: int

    def __str__(self) -> str:
        word = "solved" if self.converged else "NOT solved"
        text = f"A x = b {word} to a relative residual of {self.residual:.2g} ({self.products} products)"
        if self.direction is None:
            return text
        return f"{text}; A is not positive: dᵀAd = {self.curvature:.3g} along a unit d"


def solve(A: Operator, b: Tensor, *, tol: float = 1e-4, max_products: int = 300) -> Solution:
    """x with ‖A x − b‖ ≤ tol·‖b‖ by MINRES, for symmetric A of any signs; the residual never grows.

    Where A is positive this costs what conjugate gradients cost. The curvature along each residual is known for free,
    and the lowest is returned: a Newton step where it is positive, a way out where it is negative (Liu and Roosta 2022,
    lemma 3.1; there the method stops, here it goes on). Not converged means too few products, or a b that lies partly
    outside the range of a singular A: x is then the least-squares solution so far. Memory: eight vectors.

    >>> A = Operator(lambda v: torch.tensor([2.0, -4.0]) * v, size=2)
    >>> found = solve(A, torch.tensor([2.0, 4.0]))
    >>> found.x.round(decimals=4), found.converged, found.curvature < 0
    (tensor([ 1., -1.]), True, True)
    """
    if b.shape != (A.size,) or not b.isfinite().all():
        raise ValueError(f"a finite right-hand side of shape ({A.size},) is needed, got {tuple(b.shape)}: look at b")
    if max_products < 2:
        raise ValueError(f"solve needs at least two products, got max_products={max_products}: raise it")
    size = float(A.dot(b, b)) ** 0.5
    x = torch.zeros_like(b)
    if size == 0:
        return Solution(x, 0.0, float("nan"), None, True, 0)
    rounding = torch.finfo(A.dtype).eps
    left, v, residual = x, b / size, b
    older, newer = x, x  # the last two steps' directions
    beta, phi, c, s, delta, epsilon, largest = 0.0, size, -1.0, 0.0, 0.0, 0.0, 0.0
    curvature, direction = float("inf"), None
    products = 0
    while phi > tol * size and products < max_products - 1:  # the last product checks the residual
        image = A @ v
        products += 1
        alpha = float(A.dot(v, image))
        if not abs(alpha) < float("inf"):
            raise ValueError(f"solve needs finite products, got {alpha} in product {products}")
        image = image - beta * left - alpha * v
        left, beta = v, float(A.dot(image, image)) ** 0.5
        largest = max(largest, abs(alpha), beta)
        delta, gamma, following = c * delta + s * alpha, s * delta - c * alpha, s * beta
        if -c * gamma < curvature:
            curvature = -c * gamma
            direction = residual / phi if curvature < -100 * rounding * largest else None
        length = (gamma**2 + beta**2) ** 0.5
        if length <= 100 * rounding * largest:  # A maps what is left of b to zero
            break
        c_before, c, s = c, gamma / length, beta / length
        older, newer = newer, (left - delta * newer - epsilon * older) / length
        x = x + c * phi * newer
        phi, epsilon, delta = s * phi, following, -c_before * beta
        if beta <= rounding * largest:
            break
        v = image / beta
        residual = s**2 * residual - phi * c * v
    rest = A @ x - b
    left_over = float(A.dot(rest, rest)) ** 0.5 / size
    return Solution(x, left_over, curvature, direction, left_over <= 1.1 * tol, products + 1)
