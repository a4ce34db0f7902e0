"""The diagonal of an operator from few products."""

from dataclasses import dataclass

import torch
from torch import Tensor

from unstuck.curvature._eigenpairs import Eigenpairs
from unstuck.curvature._operator import Operator, draws
from unstuck.curvature._trace import signs, without


@dataclass(frozen=True, eq=False)
class Diagonal:
    """An unbiased estimate of each diagonal entry, with its standard error."""

    estimate: Tensor  # (size,)
    stderr: Tensor  # (size,)
    relative_error: float  # ‖stderr‖ / ‖estimate‖
    converged: bool  # whether relative_error is within the tolerance
    products: int

    def __str__(self) -> str:
        word = "" if self.converged else ", not converged"
        return (
            f"diagonal of {len(self.estimate)} entries, ‖stderr‖/‖estimate‖ = {self.relative_error:.2g} "
            f"({self.products} products{word})"
        )


def diagonal(
    A: Operator,
    *,
    tol: float = 0.1,
    max_products: int = 100,
    known: Eigenpairs | None = None,
    generator: torch.Generator | None = None,
) -> Diagonal:
    """The diagonal of A as the mean of v ∘ Av over vectors v of random signs (Bekas, Kokiopoulou, Saad 2007).

    Entry i has the variance Σ_{j≠i} Aᵢⱼ² / samples, so it is exact for a diagonal A and slow for a dense one. `known`
    pairs are split off exactly. It stops when ‖stderr‖ ≤ tol·‖estimate‖, after four samples at the least. Without a
    generator the signs are the same each time.

    >>> A = Operator(lambda v: torch.tensor([3.0, -1.0, 2.0]) * v, size=3)
    >>> diagonal(A).estimate
    tensor([ 3., -1.,  2.])
    """
    if max_products < 4:
        raise ValueError(f"a diagonal needs at least 4 products, got max_products={max_products}: raise it")
    generator = draws(generator, A.device)
    rest = A if known is None else without(A, known)
    base = torch.zeros(A.size, dtype=A.dtype, device=A.device)
    if known is not None:
        base = known.values @ known.vectors.square()
    mean, spread = torch.zeros_like(base), torch.zeros_like(base)  # Welford's sums: no samples are kept
    count = 0
    while True:
        count += 1
        v = signs(A, generator)
        sample = v * (rest @ v)
        step = sample - mean
        mean = mean + step / count
        spread = spread + step * (sample - mean)
        if count < 4:
            continue
        estimate, stderr = base + mean, (spread / (count - 1) / count).sqrt()
        error, size = (float(A.dot(x, x)) ** 0.5 for x in (stderr, estimate))
        if not size < torch.inf:
            raise ValueError("a diagonal needs finite products, got NaN or infinity: the loss has overflowed")
        if error <= tol * size or count == max_products:
            break
    relative = error / size if size else (torch.inf if error else 0.0)
    return Diagonal(estimate, stderr, relative, error <= tol * size, count)
