"""Both ends of a spectrum from one Lanczos run."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from unstuck.curvature._krylov import Krylov, Ritz
from unstuck.curvature._operator import Operator, draws, gaussian

_RANDOM_PART = 0.3  # of a warm start, beside the unit vector that is known
_LEAD = 0.25  # of what an operator leads with, beside a random unit vector
_MISSED = 0.1  # wanted eigenvalues that may be expected to be hidden still, shared by the two ends


@dataclass(frozen=True, eq=False)
class Eigenpairs:
    """Eigenvalues in ascending order with unit eigenvectors, and how far each is to be trusted."""

    values: Tensor  # (k,)
    vectors: Tensor  # (k, size), one a row
    residuals: Tensor  # (k,), ‖A v − λ v‖
    errors: Tensor  # (k,), the estimated distance of each value to the eigenvalue in its place
    scale: float  # the largest |λ| seen
    missed: float  # how many of the wanted eigenvalues the random start is expected to have hidden
    converged: bool  # whether every error is within the tolerance, and `missed` small enough
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
    value are within tol · max|λ|: half of min(r, r²/gap), with r its residual and gap the distance to the other Ritz
    values less both residuals (Parlett 1998, 11.7.1); what its last moves leave to come, as a geometric series; and how
    far it would move if the tridiagonal matrix went on as it did of late. `errors`, the largest of them and at least
    that tolerance, are careful estimates, not bounds; within `residuals` there is certainly an eigenvalue, wanted
    or not. Both contain the rounding of the products, taken as 100 ulp of the largest |λ|.

    An eigenvalue does not show while the start holds next to nothing of its vector. How little that must be follows
    from the products; how probable it is, from the start's randomness. `missed` adds this up over the places where a
    wanted eigenvalue might be, as many of them to a length as were found; it must fall to 0.1, too, and for both
    ends to 0.05.

    Where only the largest are wanted, three or more, the Hessian of an objective adds a quarter of its gradient to the
    start: most of it lies in their span (Gur-Ari, Roberts and Dyer 2018). `missed` then takes the start to hold as much
    of a hidden vector as of the found one that it holds least of.

    The basis takes one vector a product, up to `memory` bytes; then it is compressed to the Ritz vectors nearest to the
    two ends (thick restart, Wu and Simon 2000), which costs products but no accuracy. `start` warms the search up with
    vectors of a nearby operator, one a row. It saves products, but part of the proof as well: an eigenvalue that has
    grown out of other vectors may be passed over, although a random part is added. So start cold now and then. Neither
    a compressed nor a warm run waits for `missed` to fall.

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
    if not 0 < tol < 1:
        raise ValueError(f"a tolerance is a share of the largest |λ| between 0 and 1, got tol={tol}")
    smallest = min(smallest, A.size)
    largest = min(largest, A.size - smallest)
    pairs = largest + smallest
    if max_products < pairs:
        raise ValueError(
            f"{pairs} eigenpairs need at least as many products, got max_products={max_products}: raise it"
        )
    generator = draws(generator, A.device)  # the same start each time, if none is given
    rows = _rows(A, pairs, max_products, memory)
    known, part = None, 1 / _LEAD
    if start is not None:
        known, part = _sum(A, start), _RANDOM_PART
    elif A.lead is not None and largest >= 3 and not smallest:  # fewer do not tell how much of the hidden it holds
        known = A.lead()
    first, share = _beside(A, known, part, generator)
    krylov = Krylov(A, rows=rows, start=first, generator=generator)
    settled = _Settled(krylov, tol, largest, smallest, share=share, warm=start is not None)
    while True:
        krylov.grow()
        last = krylov.products == max_products or len(krylov) == A.size
        if not (last or krylov.full or _worth_a_look(len(krylov), pairs)):
            continue
        ritz = krylov.ritz()
        errors, done = settled(ritz, last=last)
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
        missed=settled.missed,
        converged=done,
        products=krylov.products,
    )


class _Settled:
    """Whether the wanted pairs are as good as they will be taken for; called once for each look at the spectrum."""

    def __init__(self, krylov: Krylov, tol: float, largest: int, smallest: int, *, share: float, warm: bool) -> None:
        self.krylov = krylov
        self.tol = tol
        self.largest, self.smallest = largest, smallest
        self.share = share  # of the start that is random
        self.warm = warm  # and does not wait for `missed` to fall
        self.led = share < 1 and not warm
        self.values: Tensor | None = None  # at the look before
        self.moves: Tensor | None = None  # since the look before that
        self.ahead = math.inf
        self.missed = math.inf

    def wanted(self, count: int) -> list[int]:
        """The places of the wanted among `count` ascending values."""
        return [*range(self.smallest), *range(count - self.largest, count)]

    def __call__(self, ritz: Ritz, *, last: bool) -> tuple[Tensor, bool]:
        """The errors of the wanted pairs, and whether to stop."""
        wanted = self.wanted(len(ritz.values))
        values, errors = ritz.values[wanted], ritz.errors[wanted]
        unit = self.tol * ritz.scale
        if self.krylov.closed:
            self.missed = 0.0
            return errors, bool((errors <= unit).all())
        longer = self.krylov.ahead()
        drift = (longer[self.wanted(len(longer))] - values).abs()
        left = self._left(values)
        before, self.ahead = self.ahead, float(drift.max())
        careful = torch.maximum(torch.maximum(errors / 2, drift), left).clamp(min=unit)
        # a value that was about to leap far a step ago has leapt only just
        still = float(careful.max()) <= unit and before <= 40 * unit
        if still or last:
            self.missed = min(self.missed, self._expected(ritz, unit))
        ends = bool(self.largest) + bool(self.smallest)
        return careful, still and (self.missed <= _MISSED / ends or self.warm or self.krylov.kept > 0)

    def _expected(self, ritz: Ritz, unit: float) -> float:
        """How many wanted eigenvalues may still be hidden beyond the innermost that was found at each end."""
        expected = 0.0
        for count, sign in ((self.largest, 1), (self.smallest, -1)):
            if not count:
                continue
            values = (sign * ritz.values).sort(descending=True).values
            inner, beyond = float(values[count - 1]), float(values[0] - values[min(count, len(values) - 1)])
            steps = unit * 2.0 ** torch.arange(40, dtype=torch.float64)
            steps = steps[steps < float(values[0]) - inner + beyond + 2 * unit]
            odds = self.krylov.hidden(ritz, sign * (inner + steps), self._spread(ritz))
            area = float(torch.trapezoid(odds, steps)) if len(steps) > 1 else unit * float(odds.sum())
            expected += area * count / max(beyond, unit)
        return expected

    def _spread(self, ritz: Ritz) -> float:
        """How much of the start to expect in an eigenvector that is hidden.

        A start that is led has no less in it than in the found ones: it holds the largest of them all alike.
        """
        random = self.share / math.sqrt(self.krylov.A.size)
        if not self.led:
            return random
        found = (self.krylov.start @ ritz.vectors)[self.wanted(len(ritz.values))]
        return max(random, float(found.abs().min()))

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


def _beside(A: Operator, known: Tensor | None, part: float, generator: torch.Generator) -> tuple[Tensor, float]:
    """A random vector of norm `part` beside what is known, as a unit vector; and the share of it that is random."""
    drawn = gaussian(A, generator)
    drawn /= float(A.dot(drawn, drawn)) ** 0.5
    length = 0.0 if known is None else float(A.dot(known, known)) ** 0.5
    if known is None or not 0 < length < math.inf:
        return drawn, 1.0
    return drawn.mul_(part).add_(known, alpha=1 / length), part / math.hypot(1, part)


def _sum(A: Operator, start: Tensor) -> Tensor:
    """The sum of the vectors of a warm start."""
    rows = torch.atleast_2d(start).to(A.device, A.dtype)
    signs = (rows @ rows[:1].sum(0) >= 0).to(A.dtype) * 2 - 1  # of one direction, or two vectors of it could cancel
    vector = signs @ rows
    if vector.shape != (A.size,) or not vector.isfinite().all():
        raise ValueError(f"start needs finite vectors of length {A.size}, one a row, got shape {tuple(start.shape)}")
    return vector


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
