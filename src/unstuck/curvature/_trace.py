"""The trace of an operator from few products: random signs, and a sketch that finds the outliers by itself."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from unstuck.curvature._eigenpairs import Eigenpairs
from unstuck.curvature._operator import Operator, draws

_FEWEST = 8  # samples before a standard error is believed


@dataclass(frozen=True, eq=False)
class Trace:
    """An unbiased estimate of the sum of the eigenvalues, with the spread of its samples."""

    estimate: float
    stderr: float
    samples: Tensor  # (m,), float64, each an estimate of its own
    tolerance: float  # the standard error that was asked for
    converged: bool  # whether stderr ≤ tolerance
    products: int

    def __str__(self) -> str:
        cost = f"{len(self.samples)} samples, {self.products} products"
        text = f"trace {self.estimate:.4g} ± {self.stderr:.2g} ({cost})"
        return text if self.converged else f"{text}, not converged: ± {self.tolerance:.2g} was asked for"


def signs(A: Operator, generator: torch.Generator) -> Tensor:
    """A vector of random signs for A: E[v vᵀ] = I."""
    return torch.randint(2, (A.size,), generator=generator, device=generator.device).to(A.device, A.dtype) * 2 - 1


def without(A: Operator, known: Eigenpairs) -> Operator:
    """A − Σ θ q qᵀ over the known pairs, at no product more than A; whatever the pairs, it is exact as a difference."""
    values, vectors = known.values, known.vectors
    return Operator(
        lambda v: A @ v - (values * A.dot(vectors, v)) @ vectors, A.size, A.dot, dtype=A.dtype, device=A.device
    )


def trace(
    A: Operator,
    *,
    tol: float = 0.05,
    max_products: int = 100,
    known: Eigenpairs | None = None,
    generator: torch.Generator | None = None,
) -> Trace:
    """Hutchinson's estimate of tr A: the mean of v·Av over vectors v of random signs.

    It stops when the standard error is at most `tol` of the estimate, after eight samples at the least. A sample has
    the variance 2 (‖A‖_F² − Σ Aᵢᵢ²), often much of it from a few large eigenvalues: `known` pairs are split off exactly
    and cost nothing here. Without them the samples are skewed, and twice the standard error of the first eight holds
    in five cases of six. Where the eigenvalues fall off fast, `xtrace` needs no known pairs. Without a generator the
    signs are the same each time. (Hutchinson 1990; Gambhir, Stathopoulos, Orginos 2017.)

    >>> A = Operator(lambda v: torch.tensor([3.0, -1.0, 2.0]) * v, size=3)
    >>> trace(A).estimate
    4.0
    """
    if max_products < _FEWEST:
        raise ValueError(f"a trace needs at least {_FEWEST} products, got max_products={max_products}: raise it")
    generator = draws(generator, A.device)
    rest = A if known is None else without(A, known)
    base = 0.0 if known is None else math.fsum((known.values * known.vectors.square().sum(1)).tolist())
    drawn: list[float] = []
    while True:
        v = signs(A, generator)
        drawn.append(base + float(A.dot(v, rest @ v)))
        _refuse_unfinite(drawn[-1], len(drawn))
        if len(drawn) >= _FEWEST:
            found = _summary(drawn, tol=tol, products=len(drawn))
            if found.converged or len(drawn) == max_products:
                return found


def xtrace(A: Operator, *, products: int = 40, tol: float = 0.05, generator: torch.Generator | None = None) -> Trace:
    """The trace of A where few eigenvalues hold most of it: exact on the range of A's sketch, a mean on the rest.

    Half the products go into Y = AΩ with columns of random signs, half into A on an orthonormal basis Q of Y. Each
    column in turn estimates what the basis of the others leaves over (Epperly, Tropp, Webber 2024; deviation: without
    their normalisation of the columns). An A of lower rank than Ω is found exactly. On a flat spectrum it is no better
    than `trace`, which can also stop early. Memory: three vectors for every two products. Without a generator the signs
    are the same each time.
    """
    count = min(products // 2, A.size)
    if count < 2:
        raise ValueError(f"xtrace needs at least four products and a size of two, got {products} and size {A.size}")
    generator = draws(generator, A.device)
    probes = torch.stack([signs(A, generator) for _ in range(count)])
    basis, R = _factor(A, probes)
    if not len(basis):
        return _summary([0.0] * count, tol=tol, products=count)
    images = torch.stack([A @ q for q in basis])
    H, W = (torch.stack([A.dot(basis, x) for x in xs], dim=1).double().cpu() for xs in (images, probes))
    if len(basis) < count:  # the range of A is exhausted
        drawn = [float(H.trace())] * count
    else:
        S = torch.linalg.inv(R).T
        S = S / S.norm(dim=0)  # column i: what the basis loses without probe i
        U = W - S * (S * W).sum(0)  # the part of each probe within the basis of the others
        outside = (W * R).sum(0) - 2 * (U * R).sum(0) + (U * (H @ U)).sum(0)
        drawn = (H.trace() - (S * (H @ S)).sum(0) + outside).tolist()
    return _summary(drawn, tol=tol, products=count + len(basis))


def _factor(A: Operator, probes: Tensor) -> tuple[Tensor, Tensor]:
    """A Ω = Q R with orthonormal rows of Q, fewer than probes where A has a lower rank; R in float64."""
    basis = torch.empty_like(probes)
    R = torch.zeros(len(probes), len(probes), dtype=torch.float64)
    rank = 0
    for i, probe in enumerate(probes):
        image = A @ probe
        whole = float(A.dot(image, image)) ** 0.5
        _refuse_unfinite(whole, i + 1)
        for _ in range(2):
            parts = A.dot(basis[:rank], image)
            image = image - parts @ basis[:rank]
            R[:rank, i] += parts.double().cpu()
        norm = float(A.dot(image, image)) ** 0.5
        if norm > 100 * torch.finfo(A.dtype).eps * whole:
            basis[rank], R[rank, i] = image / norm, norm
            rank += 1
    return basis[:rank], R


def _summary(drawn: list[float], *, tol: float, products: int) -> Trace:
    samples = torch.tensor(drawn, dtype=torch.float64)
    estimate, stderr = float(samples.mean()), float(samples.std()) / len(samples) ** 0.5
    tolerance = tol * abs(estimate)
    return Trace(estimate, stderr, samples, tolerance, stderr <= tolerance, products)


def _refuse_unfinite(sample: float, product: int) -> None:
    if not math.isfinite(sample):
        raise ValueError(f"a trace needs finite products, got {sample} in product {product}: the loss has overflowed")
