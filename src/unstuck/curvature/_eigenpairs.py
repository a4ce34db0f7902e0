"""Both ends of a spectrum from one Lanczos run."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from unstuck.curvature._krylov import Krylov, Ritz
from unstuck.curvature._operator import Operator, draws

_RANDOM_PART = 0.3  # of a warm start, beside the unit vector that is known


@dataclass(frozen=True, eq=False)
class Eigenpairs:
    """Eigenvalues in ascending order with unit eigenvectors, and how far each is to be trusted."""

    values: Tensor  # (k,)
    vectors: Tensor  # (k, size), one a row
    residuals: Tensor  # (k,), ‖A v − λ v‖
    errors: Tensor  # (k,), the estimated distance of each value to the eigenvalue in its place
    scale: float  # the largest |λ| seen
    converged: bool  # whether every error is within the tolerance
    products: int

    def __str__(self) -> str:
        pairs = zip(self.values.tolist(), self.errors.tolist(), strict=True)
        shown = ", ".join(f"{value:.5g} ± {error:.1g}" for value, error in pairs)
        word = "" if self.converged else ", NOT converged"
        return f"eigenvalues {shown} ({self.products} products{word})"


def eigenpairs(  # noqa: PLR0913 each argument a student may need, five of them rarely
    A: Operator,
    *,
    largest: int = 1,
    smallest: int = 1,
    tol: float = 1e-3,
    max_products: int = 300,
    memory: float = 4e9,
    start: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> Eigenpairs:
    """The `largest` and `smallest` eigenvalues of A (by sign, not magnitude) with vectors; all, where these meet.

    Lanczos from a random start with full reorthogonalisation stops when three estimates of the error of each wanted
    value are within tol · max|λ|: twice min(r, r²/gap), with r its residual and gap its distance to the other Ritz
    values (Parlett 1998, 11.7.1); what its last moves leave to come, as a geometric series; and how far it would move
    if the tridiagonal matrix went on as it did of late. An eigenvalue that has not shown at all, because the start held
    next to nothing of its vector, deceives all three. So `errors`, the largest of them, are careful estimates, not
    bounds; half the tolerance is the least, for neighbours that look like one. Within `residuals` there is certainly an
    eigenvalue, wanted or not. Both contain the rounding of the products, taken as 100 ulp of the largest |λ|.

    The basis takes one vector a product, up to `memory` bytes; then it is compressed to the Ritz vectors nearest to the
    two ends (thick restart, Wu and Simon 2000), which costs products but no accuracy. `start` warms the search up with
    vectors of a nearby operator, one a row. It saves products, but part of the proof as well: an eigenvalue that has
    grown out of other vectors may be passed over, although a random part is added. So start cold now and then.

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
    pairs = largest + smallest
    if max_products < pairs:
        raise ValueError(
            f"{pairs} eigenpairs need at least as many products, got max_products={max_products}: raise it"
        )
    generator = draws(generator, A.device)  # the same start each time, if none is given
    krylov = Krylov(
        A, rows=_rows(A, pairs, max_products, memory), start=_warm(A, start, generator), generator=generator
    )
    settled = _Settled(krylov, tol, lambda count: [*range(smallest), *range(count - largest, count)])
    while True:
        krylov.grow()
        last = krylov.products == max_products or len(krylov) == A.size
        if not (last or krylov.full or _worth_a_look(len(krylov), pairs)):
            continue
        ritz = krylov.ritz()
        errors, done = settled(ritz)
        done = done and _has_all_copies(krylov, ritz, largest, smallest, tol)
        if done or last:
            break
        if krylov.full:
            krylov.compress(ritz, _spread(len(krylov), largest, smallest))
    wanted = settled.wanted(len(krylov))
    return Eigenpairs(
        values=ritz.values[wanted].to(A.device, A.dtype),
        vectors=krylov.combine(ritz.vectors[:, wanted]),
        residuals=ritz.residuals[wanted].to(A.device, A.dtype),
        errors=errors.to(A.device, A.dtype),
        scale=ritz.scale,
        converged=done,
        products=krylov.products,
    )


class _Settled:
    """Whether the wanted pairs are as good as they will be taken for; called once for each look at the spectrum."""

    def __init__(self, krylov: Krylov, tol: float, wanted: Callable[[int], list[int]]) -> None:
        self.krylov = krylov
        self.tol = tol
        self.wanted = wanted
        self.values: Tensor | None = None  # at the look before
        self.moves: Tensor | None = None  # since the look before that
        self.ahead = math.inf

    def __call__(self, ritz: Ritz) -> tuple[Tensor, bool]:
        """The errors of the wanted pairs, and whether to stop."""
        wanted = self.wanted(len(ritz.values))
        values, errors = ritz.values[wanted], ritz.errors[wanted]
        unit = self.tol * ritz.scale
        if self.krylov.closed:
            return errors, bool((errors <= unit).all())
        longer = self.krylov.ahead()
        drift = (longer[self.wanted(len(longer))] - values).abs()
        left = self._left(values)
        before, self.ahead = self.ahead, float(drift.max())
        careful = torch.maximum(torch.maximum(2 * errors, drift), left).clamp(min=unit / 2)
        # a value that was about to leap a step ago has leapt only just
        good = float(torch.maximum(2 * errors, left).max()) <= unit and self.ahead <= unit and before <= 10 * unit
        return careful, good

    def _left(self, values: Tensor) -> Tensor:
        """What the moves of the wanted values leave to come, if they fall off as the last two did."""
        moves = None if self.values is None else (values - self.values).abs()
        former, self.values, self.moves = self.moves, values, moves
        if moves is None or former is None:
            return torch.full_like(values, math.inf)
        ratio = (moves / former.clamp(min=torch.finfo(moves.dtype).tiny)).clamp(max=0.9)
        return moves * ratio / (1 - ratio)


def _rows(A: Operator, pairs: int, max_products: int, memory: float) -> int:
    """How many basis vectors the run may keep; the results take as many again as there are pairs."""
    vector = A.size * A.dtype.itemsize
    rows = min(max_products, int(memory / vector) - pairs)
    least = min(A.size, max_products, 2 * pairs + 6)
    if rows < least:
        raise ValueError(
            f"{pairs} eigenpairs of size {A.size} need {(least + pairs) * vector / 1e9:.3g} GB for a basis that can "
            f"grow, got memory={memory / 1e9:.3g} GB: raise memory or ask for fewer"
        )
    return rows


def _spread(count: int, largest: int, smallest: int) -> list[int]:
    """Which of `count` Ritz pairs to keep: the wanted ones and as many beside them as fill half the basis."""
    more = max(0, count // 2 - largest - smallest)
    below = smallest + (more * smallest) // (largest + smallest)
    above = largest + (more * largest) // (largest + smallest)
    return [*range(below), *range(count - above, count)]


def _warm(A: Operator, start: Tensor | None, generator: torch.Generator | None) -> Tensor | None:
    if start is None:
        return None
    vector = torch.atleast_2d(start).sum(0).to(A.device, A.dtype)
    if vector.shape != (A.size,) or not vector.isfinite().all():
        raise ValueError(f"start needs finite vectors of length {A.size}, one a row, got shape {tuple(start.shape)}")
    drawn = torch.randn(A.size, generator=generator, dtype=A.dtype, device=A.device)
    norm, length = (float(A.dot(x, x)) ** 0.5 for x in (drawn, vector))
    return vector / length + drawn * (_RANDOM_PART / norm) if length else None


def _worth_a_look(count: int, pairs: int) -> bool:
    """Whether to solve for Ritz pairs now: always at first, rarely when that has become expensive."""
    return count >= pairs and count % (1 + count // 64) == 0


def _has_all_copies(krylov: Krylov, ritz: Ritz, largest: int, smallest: int, tol: float) -> bool:
    """Whether a new block could hold no further copy of a wanted eigenvalue, as the newest one shows."""
    if len(krylov) == krylov.A.size or (krylov.block == 0 and not krylov.closed):
        return True
    newest = krylov.ritz(krylov.block)
    slack = krylov.rounding * ritz.scale
    top_is_known = newest.errors[-1] <= tol * ritz.scale and newest.values[-1] <= ritz.values[-largest] + slack
    bottom_is_known = newest.errors[0] <= tol * ritz.scale and newest.values[0] >= ritz.values[smallest - 1] - slack
    return bool((largest == 0 or top_is_known) and (smallest == 0 or bottom_is_known))
