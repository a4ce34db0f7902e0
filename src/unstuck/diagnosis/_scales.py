"""Whether two sets of rows lie on the same scale, judged against the error that so few rows make."""

import math
from dataclasses import dataclass

from torch import Tensor

LEAST_SHIFT, LEAST_RATIO = 0.1, 1.15  # in spreads of the first set, and of the two spreads
SURE = 4.0  # standard errors of one column, even where all columns are the same one


@dataclass(frozen=True, eq=False)
class Apart:
    """How far the second set lies from the first: root mean squares over the columns, without the sampling error."""

    shift: float  # in spreads of the first
    ratio: float  # of the spreads, the second over the first: their geometric mean
    stretch: float  # of the logarithm of the ratio
    surely: bool
    first: tuple[Tensor, Tensor]  # mean and spread
    second: tuple[Tensor, Tensor]

    @property
    def far(self) -> float:
        """In spreads, or in doublings of the spread."""
        return max(self.shift, self.stretch / math.log(2))

    def mended(self, rows: Tensor) -> Tensor:
        """Rows of the second set on the scale of the first."""
        (mean, spread), (there, width) = self.first, self.second
        return (rows - there) / width.clamp_min(1e-12) * spread + mean


def scales_apart(first: Tensor, second: Tensor, *, whole: bool) -> Apart | None:
    """Of all numbers or column by column; None where nothing varies."""
    (a, mean, spread), (b, there, width) = (_moments(x, whole=whole) for x in (first, second))
    varied = (spread > 0) & (width > 0)
    if not bool(varied.any()):
        return None
    rows = 1 / len(first) + 1 / len(second)  # the numbers of a row need not be independent
    shift, error = ((there - mean) / spread)[varied].square(), rows * (1 + (width / spread)[varied].square()) / 2
    stretch = (width / spread)[varied].log()
    doubt = rows * (((a + b) / 2)[varied] - 1).clamp_min(0.1) / 4  # of the logarithm of a spread, by the kurtosis
    moved, stretched = float(shift.mean()), float(stretch.square().mean())
    sure = moved > SURE**2 * float(error.mean()) and moved > LEAST_SHIFT**2
    sure |= stretched > SURE**2 * float(doubt.mean()) and stretched > math.log(LEAST_RATIO) ** 2
    return Apart(
        shift=max(moved - float(error.mean()), 0.0) ** 0.5,
        ratio=math.exp(float(stretch.mean())),
        stretch=max(stretched - float(doubt.mean()), 0.0) ** 0.5,
        surely=sure,
        first=(mean, spread),
        second=(there, width),
    )


def _moments(x: Tensor, *, whole: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Kurtosis, mean and spread, of all numbers or of each column."""
    numbers = x.double().flatten() if whole else x.double()
    mean, spread = numbers.mean(0), numbers.std(0)
    kurtosis = ((numbers - mean) / spread.clamp_min(1e-12)).pow(4).mean(0)
    return kurtosis, mean, spread
