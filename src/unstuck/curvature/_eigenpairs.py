"""Both ends of a spectrum from one Lanczos run."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from unstuck.curvature._operator import Operator


@dataclass(frozen=True, eq=False)
class Eigenpairs:
    """Eigenvalues in ascending order with unit eigenvectors, and how far each is to be trusted."""

    values: Tensor  # (k,)
    vectors: Tensor  # (k, size), one a row
    residuals: Tensor  # (k,), ‖A v − λ v‖
    errors: Tensor  # (k,), the distance of each value to an eigenvalue of A
    scale: float  # the largest |λ| seen
    converged: bool  # whether every error is within the tolerance
    products: int


def eigenpairs(
    A: Operator,
    *,
    largest: int = 1,
    smallest: int = 1,
    tol: float = 1e-3,
    max_products: int = 300,
    generator: torch.Generator | None = None,
) -> Eigenpairs:
    """The `largest` and `smallest` eigenvalues of A (by sign, not magnitude) with vectors; all, where these meet.

    Lanczos from a random start with full reorthogonalisation stops when min(r, r²/gap) ≤ tol · max|λ| for each wanted
    pair, with r its residual and gap its distance to the other Ritz values (Parlett 1998, theorem 11.7.1). Deviation:
    the residuals of both count against the gap, and the criterion must hold three times in a row, because a neighbour
    may not have shown yet; a start with next to nothing of a wanted vector can still deceive it. So `errors` are
    careful estimates, not bounds; they contain the rounding of the products, taken as 100 ulp of the largest |λ|.
    Memory: one vector a product.

    An eigenvalue of multiplicity m is found m times if the Krylov space closes, as in small or low-rank problems. If it
    does not, the copies appear late, when rounding has let them in.

    >>> A = Operator(lambda v: torch.tensor([4.0, 4.0, 1.0, -2.0]) * v, size=4)
    >>> eigenpairs(A, largest=2, smallest=1).values.round(decimals=3)
    tensor([-2.,  4.,  4.])
    """
    if A.size < 1 or min(largest, smallest) < 0 or largest + smallest == 0:
        raise ValueError(
            f"eigenpairs needs a size and a number of wanted pairs of at least 1, got size={A.size}, "
            f"largest={largest}, smallest={smallest}"
        )
    smallest = min(smallest, A.size)
    largest = min(largest, A.size - smallest)
    if max_products < largest + smallest:
        raise ValueError(
            f"{largest + smallest} eigenpairs need at least as many products, got max_products={max_products}: raise it"
        )
    krylov = _Krylov(A, generator)
    settled = 0
    while True:
        krylov.grow()
        last = len(krylov) == min(A.size, max_products)
        if not (last or krylov.worth_a_look(largest + smallest)):
            continue
        ritz = krylov.ritz()
        wanted = [*range(smallest), *range(len(krylov) - largest, len(krylov))]
        settled = settled + 1 if (ritz.errors[wanted] <= tol * ritz.scale).all() else 0
        done = settled >= (1 if krylov.closed else 3) and krylov.has_all_copies(ritz, largest, smallest, tol)
        if done or last:
            break
    return Eigenpairs(
        values=ritz.values[wanted].to(A.device, A.dtype),
        vectors=krylov.combine(ritz.vectors[:, wanted]),
        residuals=ritz.residuals[wanted].to(A.device, A.dtype),
        errors=ritz.errors[wanted].to(A.device, A.dtype),
        scale=ritz.scale,
        converged=done,
        products=len(krylov),
    )


@dataclass(frozen=True, eq=False)
class _Ritz:
    """The eigenpairs of A as seen from a Krylov space, in float64."""

    values: Tensor  # (j,), ascending
    vectors: Tensor  # (j, j), one a column, in coordinates of the basis
    residuals: Tensor  # (j,)
    errors: Tensor  # (j,)
    scale: float


class _Krylov:
    """An orthonormal basis that grows by one product at a time and in which A is tridiagonal.

    Where A maps the space into itself the basis goes on with a random vector orthogonal to it: a new block of the
    tridiagonal matrix, coupled to the others by 0. A random vector has a part in every eigenspace, hence a block meets
    each eigenvalue once, and a multiple one again in the next block.
    """

    def __init__(self, A: Operator, generator: torch.Generator | None) -> None:
        self.A = A
        self.generator = generator
        self.rounding = 100 * torch.finfo(A.dtype).eps  # of a product through a deep network, relative to max|λ|
        self.basis = torch.empty(0, A.size, dtype=A.dtype, device=A.device)
        self.diagonal: list[float] = []
        self.coupling: list[float] = []  # of each vector to the one after it
        self.block = 0  # where the newest block begins
        self.magnitude = 0.0  # the largest entry of the tridiagonal matrix
        self.next = self.random()

    def __len__(self) -> int:
        return len(self.diagonal)

    @property
    def closed(self) -> bool:
        return len(self) > 0 and self.coupling[-1] == 0

    def grow(self) -> None:
        if self.closed:
            self.block = len(self)
            self.next = self.random()
        self.append(self.next)
        product = self.A @ self.next
        diagonal = float(self.A.dot(self.next, product))
        if not math.isfinite(diagonal):
            raise ValueError(
                f"a spectrum needs finite products, got {diagonal} in product {len(self) + 1}: "
                "the loss has overflowed, or has no second derivative at this point"
            )
        self.diagonal.append(diagonal)
        rest, norm = self.orthogonal(product)
        self.magnitude = max(self.magnitude, abs(diagonal))
        if norm <= self.rounding * self.magnitude or len(self) == self.A.size:
            norm = 0.0
        self.coupling.append(norm)
        self.magnitude = max(self.magnitude, norm)
        self.next = rest / norm if norm else rest

    def append(self, vector: Tensor) -> None:
        count, size = len(self), self.A.size
        if count == len(self.basis):
            room = self.basis.new_empty(min(max(count, 32), size - count), size)
            self.basis = torch.cat([self.basis, room])
        self.basis[count] = vector

    def random(self) -> Tensor:
        drawn = torch.randn(self.A.size, generator=self.generator, dtype=self.A.dtype, device=self.A.device)
        vector, norm = self.orthogonal(drawn)
        return vector / norm

    def orthogonal(self, vector: Tensor) -> tuple[Tensor, float]:
        """What of a vector lies outside the basis, and its norm."""
        known = self.basis[: len(self)]
        norm = float(self.A.dot(vector, vector)) ** 0.5
        for _ in range(3):
            vector = vector - self.A.dot(known, vector) @ known
            before, norm = norm, float(self.A.dot(vector, vector)) ** 0.5
            if norm > 0.7 * before:  # otherwise the pass cancelled, and left the rounding of the larger part behind
                break
        return vector, norm

    def ritz(self, start: int = 0) -> _Ritz:
        """The eigenpairs of the tridiagonal matrix from `start` on."""
        diagonal = torch.tensor(self.diagonal[start:], dtype=torch.float64)
        coupling = torch.tensor(self.coupling[start:], dtype=torch.float64)
        T = torch.diag(diagonal) + torch.diag(coupling[:-1], 1) + torch.diag(coupling[:-1], -1)
        values, vectors = torch.linalg.eigh(T)
        residuals = (coupling[-1] * vectors[-1]).abs()
        gaps = (values[:, None] - values).abs() - residuals[:, None] - residuals
        gap = gaps.fill_diagonal_(math.inf).amin(1) if len(values) > 1 else torch.zeros_like(values)
        errors = residuals * (residuals / gap.clamp(min=torch.finfo(gap.dtype).tiny)).clamp(max=1)  # min(r, r²/gap)
        scale = float(values.abs().max())
        rounding = self.rounding * scale
        return _Ritz(values, vectors, residuals + rounding, errors + rounding, scale)

    def worth_a_look(self, pairs: int) -> bool:
        """Whether to solve for Ritz pairs now: always at first, rarely when that has become expensive."""
        return len(self) >= pairs and len(self) % (1 + len(self) // 64) == 0

    def has_all_copies(self, ritz: _Ritz, largest: int, smallest: int, tol: float) -> bool:
        """Whether a new block could hold no further copy of a wanted eigenvalue, as the newest one shows."""
        if len(self) == self.A.size or (self.block == 0 and not self.closed):
            return True
        newest = self.ritz(self.block)
        slack = self.rounding * ritz.scale
        top_is_known = newest.errors[-1] <= tol * ritz.scale and newest.values[-1] <= ritz.values[-largest] + slack
        bottom_is_known = newest.errors[0] <= tol * ritz.scale and newest.values[0] >= ritz.values[smallest - 1] - slack
        return bool((largest == 0 or top_is_known) and (smallest == 0 or bottom_is_known))

    def combine(self, coordinates: Tensor) -> Tensor:
        """Vectors (k, size), one a row, from their coordinates (j, k)."""
        return coordinates.T.to(self.basis) @ self.basis[: len(self)]
