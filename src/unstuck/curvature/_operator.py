"""Symmetric linear maps as values: known by their products, added and multiplied like numbers."""

from collections.abc import Callable, Collection
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from unstuck.objective import Chunk, Linear, Objective

Where = Callable[[str], bool] | Collection[str]


@dataclass(frozen=True, eq=False)
class Operator:
    """A symmetric linear map on vectors of length `size`, known only by its products.

    >>> A = Operator(lambda v: torch.tensor([3.0, -1.0]) * v, size=2)
    >>> (2 * A - identity(2)) @ torch.ones(2)
    tensor([ 5., -3.])
    """

    matvec: Callable[[Tensor], Tensor]  # (size,) -> (size,)
    size: int
    dot: Callable[[Tensor, Tensor], Tensor] = torch.matmul  # of one vector or of the rows of a matrix with a vector
    dtype: torch.dtype = torch.float32  # of the vectors that algorithms make for it
    device: torch.device | str = "cpu"
    lead: Callable[[], Tensor] | None = None  # () -> (size,), a vector that leans to where the map is strong

    def __matmul__(self, v: Tensor) -> Tensor:
        if v.shape != (self.size,):
            raise ValueError(f"a vector of shape ({self.size},) is needed to the right of @, got {tuple(v.shape)}")
        return self.matvec(v)

    def __add__(self, other: "Operator") -> "Operator":
        if other.size != self.size:
            raise ValueError(f"operators of one size are needed for a sum, got {self.size} and {other.size}")
        return replace(self, matvec=lambda v: self @ v + other @ v, lead=self.lead or other.lead)

    def __mul__(self, factor: float) -> "Operator":
        return replace(self, matvec=lambda v: factor * (self @ v))

    __rmul__ = __mul__

    def __neg__(self) -> "Operator":
        return -1 * self

    def __sub__(self, other: "Operator") -> "Operator":
        return self + -other


def identity(size: int, *, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu") -> Operator:
    """The operator that returns its vector: `H + 1e-3 * identity(H.size)` is H damped."""
    return Operator(torch.clone, size, dtype=dtype, device=device)


def hessian(objective: Objective, *, where: Where | None = None) -> Operator:
    """The Hessian H of the objective at its point; H @ v costs about two gradients once the first product is paid.

    `where` restricts it to some parameters: names, of these or of modules that hold them, or a predicate of a name.
    """
    objective = objective if where is None else objective.restrict(where)
    return Operator(
        objective.product, objective.size, dtype=objective.dtype, device=objective.device, lead=objective.lead
    )


def operator_of(objective: Objective, where: Where | None, build: Callable[[Chunk], Linear]) -> Operator:
    """The mean over the terms of an objective of what `build` reads off the graph of each."""
    objective = objective if where is None else objective.restrict(where)
    return Operator(objective.matrix(build), objective.size, dtype=objective.dtype, device=objective.device)


def dense(A: Operator, *, memory: float = 1e9) -> Tensor:
    """A as a matrix (size, size), from `size` products; what rounding leaves of asymmetry is averaged away.

    It refuses a matrix of more than `memory` bytes. Two of them are alive at once.
    """
    needed = A.size**2 * A.dtype.itemsize
    if needed > memory:
        raise ValueError(
            f"a dense matrix of size {A.size} takes {needed / 1e9:.3g} GB, more than memory={memory / 1e9:.3g} GB: "
            "use eigenpairs(), which needs only products, or raise memory"
        )
    matrix = torch.empty(A.size, A.size, dtype=A.dtype, device=A.device)
    unit = torch.zeros(A.size, dtype=A.dtype, device=A.device)
    for i in range(A.size):
        unit[i] = 1
        matrix[i] = A @ unit
        unit[i] = 0
    if not matrix.isfinite().all():
        raise ValueError(
            "finite products are needed, got NaN or infinity: the loss is not smooth here or has overflowed"
        )
    return (matrix + matrix.T) / 2


def draws(generator: torch.Generator | None, device: torch.device | str) -> torch.Generator:
    """The generator that was given, or one with a fixed seed: the global one is the caller's, and is left alone."""
    return torch.Generator(device).manual_seed(0) if generator is None else generator


def gaussian(A: Operator, generator: torch.Generator) -> Tensor:
    """A vector of standard normal numbers for A, from a generator of any device."""
    return torch.randn(A.size, generator=generator, dtype=A.dtype, device=generator.device).to(A.device)


@dataclass(frozen=True, eq=False)
class ArrayOperator:
    """An operator on NumPy arrays, with the attributes by which SciPy takes it for a LinearOperator."""

    matvec: Callable[[np.ndarray], np.ndarray]  # (n,) -> (n,)
    rmatvec: Callable[[np.ndarray], np.ndarray]  # the same, as the operator is symmetric
    shape: tuple[int, int]
    dtype: np.dtype


def to_scipy(A: Operator) -> ArrayOperator:
    """A for SciPy's iterative solvers, as in `scipy.sparse.linalg.eigsh(to_scipy(A), k=3)`.

    Those accept what has a shape and a matvec, so that SciPy need not be installed here; to calculate with it, take
    `scipy.sparse.linalg.aslinearoperator(to_scipy(A))`.
    """

    def matvec(x: np.ndarray) -> np.ndarray:
        return (A @ torch.from_numpy(x.reshape(-1).copy()).to(dtype=A.dtype, device=A.device)).cpu().numpy()

    return ArrayOperator(matvec, matvec, (A.size, A.size), torch.empty(0, dtype=A.dtype).numpy().dtype)
