"""How the eigenvalues of an operator are spread, from Lanczos runs of random starts."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from unstuck.curvature._krylov import Krylov
from unstuck.curvature._operator import Operator, draws


@dataclass(frozen=True, eq=False)
class Share:
    """The share of the eigenvalues above a threshold, with what the samples and the quadrature leave open."""

    estimate: float
    stderr: float  # over the samples
    quadrature: float  # half the width of the bracket that the quadrature proves for the samples at hand

    @property
    def error(self) -> float:
        """Two standard errors and the quadrature's half width."""
        return 2 * self.stderr + self.quadrature

    def __str__(self) -> str:
        return f"{100 * self.estimate:.3g} % ± {100 * self.error:.2g} %"


@dataclass(frozen=True, eq=False)
class Density:
    """The distribution of the eigenvalues: for each sample, point masses that match its first 2·steps − 1 moments."""

    nodes: Tensor  # (samples, steps), float64, ascending
    weights: Tensor  # (samples, steps), of each sample with sum 1
    exact: Tensor  # (samples,), whether the sample's Krylov space closed: all its moments match
    grid: Tensor  # (g,)
    heights: Tensor  # (g,), the density smoothed by a Gaussian of this width, with the integral 1
    stderr: Tensor  # (g,), over the samples
    width: float
    drift: float  # the area by which the curve moved in the last third of the steps
    converged: bool  # whether drift ≤ 0.1 or all samples are exact: more steps would not change the picture
    products: int

    def above(self, threshold: float) -> Share:
        """The share of the eigenvalues above the threshold.

        A Gauss quadrature brackets each sample's distribution at a point within the masses of the two nodes beside it
        (Chebyshev, Markov, Stieltjes; Szegő 1975, 3.41).
        """
        over = (self.weights * (self.nodes > threshold)).sum(1)
        position = (self.nodes <= threshold).sum(1, keepdim=True)  # of the first node above
        left = self.weights.gather(1, (position - 1).clamp(min=0)).where(position > 0, 0.0)
        right = self.weights.gather(1, position.clamp(max=self.nodes.shape[1] - 1))
        right = right.where(position < self.nodes.shape[1], 0.0)
        low = over - right[:, 0].where(~self.exact, 0.0)
        high = over + left[:, 0].where(~self.exact, 0.0)
        middle = (low + high) / 2
        return Share(float(middle.mean()), _stderr(middle), float((high - low).mean()) / 2)

    def __str__(self) -> str:
        low, high = float(self.nodes.min()), float(self.nodes.max())
        text = (
            f"density of the eigenvalues over [{low:.4g}, {high:.4g}], smoothed by {self.width:.2g}: "
            f"{self.above(0.0)} positive ({len(self.nodes)} samples, {self.products} products)"
        )
        return text if self.converged else f"{text}, not converged: raise steps"


def density(
    A: Operator,
    *,
    steps: int = 30,
    samples: int = 4,
    width: float | None = None,
    points: int = 400,
    generator: torch.Generator | None = None,
) -> Density:
    """The distribution of A's eigenvalues by stochastic Lanczos quadrature (Lin, Saad, Yang 2016).

    Each random start gives the nodes and weights of a Gauss quadrature; their mean, smoothed by a Gaussian of `width`
    (a hundredth of the spectrum's), is the curve, their spread its error. Two samples at the least, for an error.
    Cost: at most steps · samples products, and a basis of `steps` vectors. Without a generator the starts are the same
    each time.
    """
    if min(steps, points) < 2 or samples < 2:
        raise ValueError(
            f"a density needs at least two steps, samples and points, got steps={steps}, samples={samples}, "
            f"points={points}"
        )
    steps, generator = min(steps, A.size), draws(generator, A.device)
    runs = [_quadratures(A, steps, generator) for _ in range(samples)]
    nodes, weights = (torch.stack([run[0][k] for run in runs]) for k in (0, 1))
    exact = torch.tensor([run[3] for run in runs])
    low, high = float(nodes.min()), float(nodes.max())
    width = width or (high - low or abs(high) or 1.0) / 100
    grid = torch.linspace(low - 5 * width, high + 5 * width, points, dtype=torch.float64)
    curves = torch.stack([_smooth(grid, *run[0], width) for run in runs])
    before = torch.stack([_smooth(grid, *run[1], width) for run in runs])
    heights = curves.mean(0)
    drift = float((heights - before.mean(0)).abs().sum() * (grid[1] - grid[0])) / 2
    return Density(
        nodes=nodes,
        weights=weights,
        exact=exact,
        grid=grid,
        heights=heights,
        stderr=curves.std(0) / math.sqrt(samples),
        width=width,
        drift=drift,
        converged=drift <= 0.1 or bool(exact.all()),
        products=sum(run[2] for run in runs),
    )


def _quadratures(
    A: Operator, steps: int, generator: torch.Generator
) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor], int, bool]:
    """Nodes and weights after all steps, after two thirds of them, the products, and whether the space closed."""
    krylov = Krylov(A, rows=steps, generator=generator)
    while not (krylov.full or krylov.closed):
        krylov.grow()
    count = len(krylov)
    values, vectors = torch.linalg.eigh(krylov.matrix[:count, :count])
    early, early_vectors = torch.linalg.eigh(krylov.matrix[: math.ceil(2 * count / 3), : math.ceil(2 * count / 3)])
    nodes = torch.cat([values, values[-1:].expand(steps - count)])  # a closed space has all there is to its start
    weights = torch.cat([vectors[0].square(), values.new_zeros(steps - count)])
    return (nodes, weights), (early, early_vectors[0].square()), count, krylov.closed


def _smooth(grid: Tensor, nodes: Tensor, weights: Tensor, width: float) -> Tensor:
    z = (grid[:, None] - nodes) / width
    return (torch.exp(-z.square() / 2) @ weights) / (width * math.sqrt(2 * math.pi))


def _stderr(samples: Tensor) -> float:
    return float(samples.std()) / len(samples) ** 0.5
