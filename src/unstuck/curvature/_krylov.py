"""The Krylov space of an operator: an orthonormal basis, and the small matrix that the operator is in it."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from unstuck.curvature._operator import Operator, draws, gaussian

_COLUMNS = 2**20  # of the basis, that are replaced at a time


@dataclass(frozen=True, eq=False)
class Ritz:
    """The eigenpairs of A as seen from a Krylov space, in float64."""

    values: Tensor  # (j,), ascending
    vectors: Tensor  # (j, j), one a column, in coordinates of the basis
    links: Tensor  # (j,), what couples each to the next vector of the basis: its residual with a sign
    residuals: Tensor  # (j,)
    errors: Tensor  # (j,)
    scale: float


class Krylov:
    """An orthonormal basis that grows by one product at a time, and the matrix T of A in it.

    T is tridiagonal, unless the basis was compressed: then an arrow stands before the tridiagonal part (Wu and Simon
    2000). Where A maps the space into itself the basis goes on with a random vector orthogonal to it: a new block of T,
    coupled to the others by 0. A random vector has a part in every eigenspace, hence a block meets each eigenvalue
    once, and a multiple one again in the next block.
    """

    def __init__(
        self, A: Operator, *, rows: int, start: Tensor | None = None, generator: torch.Generator | None = None
    ) -> None:
        self.A = A
        self.generator = draws(generator, A.device)
        self.rounding = 100 * torch.finfo(A.dtype).eps  # of a product through a deep network, relative to max|λ|
        self.basis = torch.empty(min(rows, A.size), A.size, dtype=A.dtype, device=A.device)
        self.matrix = torch.zeros(len(self.basis), len(self.basis), dtype=torch.float64)
        self.links = torch.zeros(0, dtype=torch.float64)  # (j,), what couples the basis to the next vector
        self.block = 0  # where the newest block begins
        self.kept = 0  # vectors that a compression left
        self.products = 0
        self.magnitude = 0.0  # the largest entry of T
        self.next = self._random() if start is None else start / float(A.dot(start, start)) ** 0.5
        self.start = torch.ones(1, dtype=torch.float64)  # (j,), the first vector of the newest block in the basis

    def __len__(self) -> int:
        return len(self.links)

    @property
    def closed(self) -> bool:
        """Whether A maps the space into itself."""
        return len(self) > 0 and not self.links.any()

    @property
    def full(self) -> bool:
        """Whether the memory of the basis is used up."""
        return len(self) == len(self.basis)

    def grow(self) -> None:
        """One more vector, for one product."""
        if self.closed:
            self.block = len(self)
            self.next = self._random()
            self.start = torch.nn.functional.one_hot(torch.tensor(self.block)).double()
        count = len(self)
        self.basis[count] = self.next
        self.next = self.basis[count]  # held once: vectors may be large
        self.matrix[count, :count] = self.matrix[:count, count] = self.links
        product = self.A @ self.next
        diagonal = float(self.A.dot(self.next, product))
        self.products += 1
        if not math.isfinite(diagonal):
            raise ValueError(
                f"a spectrum needs finite products, got {diagonal} in product {self.products}: "
                "the loss has overflowed, or has no second derivative at this point"
            )
        self.matrix[count, count] = diagonal
        self.links = torch.zeros(count + 1, dtype=torch.float64)
        self.start = torch.nn.functional.pad(self.start, (0, count + 1 - len(self.start)))
        rest, norm = self._orthogonal(product)
        del product
        self.magnitude = max(self.magnitude, abs(diagonal))
        if norm <= self.rounding * self.magnitude or len(self) == self.A.size:
            norm = 0.0
        self.links[count] = norm
        self.magnitude = max(self.magnitude, norm)
        self.next = rest.div_(norm) if norm else rest

    def compress(self, ritz: Ritz, kept: Sequence[int]) -> None:
        """Replaces the basis by some of its Ritz vectors; what is known of the others is forgotten."""
        coordinates = ritz.vectors[:, kept]
        for columns in self.basis.split(_COLUMNS, dim=1):
            columns[: len(kept)] = coordinates.T.to(columns) @ columns[: len(self)]
        self.matrix.zero_()
        self.matrix[range(len(kept)), range(len(kept))] = ritz.values[kept]
        self.links, self.start = self.links @ coordinates, self.start @ coordinates
        self.block, self.kept = 0, len(kept)

    def combine(self, coordinates: Tensor) -> Tensor:
        """Vectors (k, size), one a row, from their coordinates (j, k)."""
        return coordinates.T.to(self.basis) @ self.basis[: len(self)]

    def ritz(self, first: int = 0) -> Ritz:
        """The eigenpairs of T from row `first` on; min(r, r²/gap) are their errors (Parlett 1998, 11.7.1).

        Deviation: the residuals of both count against the gap, because a neighbour may still move.
        """
        count = len(self)
        values, vectors = torch.linalg.eigh(self.matrix[first:count, first:count])
        links = self.links[first:] @ vectors
        residuals = links.abs()
        gaps = (values[:, None] - values).abs() - residuals[:, None] - residuals
        gap = gaps.fill_diagonal_(math.inf).amin(1) if len(values) > 1 else torch.zeros_like(values)
        errors = residuals * (residuals / gap.clamp(min=torch.finfo(gap.dtype).tiny)).clamp(max=1)
        scale = float(values.abs().max())
        rounding = self.rounding * scale
        return Ritz(values, vectors, links, residuals + rounding, errors + rounding, scale)

    def hidden(self, ritz: Ritz, points: Tensor, spread: float) -> Tensor:
        """The odds that a random start hides an eigenvalue at each of the points: (p,) -> (p,), up to 1.

        Let y be an eigenvector of A with eigenvalue μ, in coordinates of the basis, and η its part along the next
        vector. Then T y + η·links = μ y and ‖y‖² + η² ≤ 1, which bounds the part ⟨start, y⟩ that the start may have in
        it: in a tridiagonal T by Christoffel's function (Szegő 1975, 3.4). That part is taken as normally distributed
        with the standard deviation `spread`, which is 1/√n in a random start of n entries.
        """
        gaps = ritz.values - points[:, None]
        known = gaps.abs().amin(1) > self.rounding * ritz.scale  # at a Ritz value itself there may well be another
        parts = ritz.links / gaps.where(known[:, None], 1.0)
        bound = (parts @ (self.start @ ritz.vectors)).abs() / (1 + parts.square().sum(1)).sqrt()
        return torch.erf(bound / (spread * math.sqrt(2))).where(known, 1.0)

    def ahead(self, steps: int = 12) -> Tensor:
        """The eigenvalues of T continued with the mean of its last three rows: where Ritz values would go next.

        What is about to appear shows in these rows first, several steps before it is a Ritz value (the recursion
        method's terminator, Haydock 1980).
        """
        count = len(self)
        last = range(max(count - 3, min(self.kept, count - 1)), count)
        diagonal = self.matrix[last, last].mean()
        beside = [float(self.matrix[i, i + 1]) for i in last[:-1]] + [float(self.links[-1])]
        longer = torch.zeros(count + steps, count + steps, dtype=torch.float64)
        longer[:count, :count] = self.matrix[:count, :count]
        new = range(count, count + steps)
        longer[new, new] = diagonal
        longer[new[1:], new[:-1]] = sum(beside) / len(beside)
        longer[count, :count] = self.links
        return torch.linalg.eigvalsh(longer)  # of the lower triangle

    def _random(self) -> Tensor:
        vector, norm = self._orthogonal(gaussian(self.A, self.generator))
        return vector.div_(norm)

    def _orthogonal(self, vector: Tensor) -> tuple[Tensor, float]:
        """What of a vector lies outside the basis, and its norm."""
        known = self.basis[: len(self)]
        norm = float(self.A.dot(vector, vector)) ** 0.5
        vector = vector.clone()  # what a product returns may be its operator's own
        for _ in range(3):
            vector.addmv_(known.T, self.A.dot(known, vector), alpha=-1)
            before, norm = norm, float(self.A.dot(vector, vector)) ** 0.5
            if norm > 0.7 * before:  # otherwise the pass cancelled, and left the rounding of the larger part behind
                break
        return vector, norm
