"""The peers of the numerical core, each called as its own documentation calls it, at its defaults or better.

A peer works on a copy of the model, because some force eval mode and leave gradients behind. Attention runs in torch's
math kernel throughout: only that one can be differentiated twice.
"""

import contextlib
import copy
import importlib
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from importlib import metadata
from typing import Any
from unittest import mock

import numpy as np
import torch
from scipy.sparse.linalg import LinearOperator, eigsh
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

import unstuck
from unstuck.curvature import to_scipy
from workloads import Workload, loss

PACKAGES = {
    "PyHessian": "pyhessian",
    "hessian-eigenthings": "hessian_eigenthings",
    "curvlinops-for-pytorch": "curvlinops",
    "scipy": "scipy",
}


@dataclass(frozen=True)
class Answer:
    """What a tool said of a spectrum."""

    values: Sequence[float]
    products: int
    converged: bool | None  # its own claim; None where it makes none


@dataclass(frozen=True)
class Quadrature:
    """The nodes of a density and their weights, one list a probe."""

    nodes: Sequence[Sequence[float]]
    weights: Sequence[Sequence[float]]


class Counted:
    """A function that knows how often it was called."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function = function
        self.calls = 0

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self.calls += 1
        return self.function(*args, **kwargs)


def missing() -> dict[str, str]:
    """Why a peer is left out, by package."""
    found = {}
    for package, module in PACKAGES.items():
        try:
            importlib.import_module(module)
        except ImportError as error:
            found[package] = f"{package} is left out: {sentence(error)}; `make bench` installs it"
    return found


def versions() -> dict[str, str]:
    """The installed version of each peer."""
    absent = missing()
    return {package: metadata.version(package) for package in PACKAGES if package not in absent}


def sentence(error: BaseException) -> str:
    """The first line of an error, with its type."""
    first = next((line.strip() for line in str(error).splitlines() if line.strip()), "no message")
    return f"{type(error).__name__}: {first}"


@contextlib.contextmanager
def conditions(seed: int, *, relaxed: bool = False) -> Iterator[None]:
    """What the peers need around them: math attention, a seeded global generator and, if wanted, relaxed products.

    Relaxed products are those that our own take for themselves where a trial shows them to be as exact.
    """
    matmul = torch.backends.mkldnn.matmul
    before = matmul.fp32_precision
    with sdpa_kernel(SDPBackend.MATH), torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        try:
            if relaxed:
                matmul.fp32_precision = "bf16"
            yield
        finally:
            matmul.fp32_precision = before


class PyHessian:
    """Power iteration with deflation. One batch keeps its graph; several come as a loader, and are built anew."""

    def __init__(self, given: Workload) -> None:
        self.model = copy.deepcopy(given.model)
        self.batches = given.batches
        importlib.import_module("pyhessian")
        self.module: Any = sys.modules["pyhessian.hessian"]  # its class of the same name hides it from an import

    def _begin(self) -> Any:
        data = {"data": self.batches[0]} if len(self.batches) == 1 else {"dataloader": self.batches}
        return self.module.hessian(self.model, _criterion, cuda=False, **data)

    def product(self) -> Callable[[Tensor], Tensor]:
        begun = self._begin()

        def apply(v: Tensor) -> Tensor:
            vs = _split(v, begun.params)
            if len(self.batches) > 1:
                return _flat(begun.dataloader_hv_product(vs)[1])
            return _flat(self.module.hessian_vector_product(begun.gradsH, begun.params, vs))

        return apply

    def top(self, *, tol: float = 1e-3, max_iter: int = 100, count: int = 5) -> Answer:
        orthogonalise = Counted(self.module.orthnormal)  # once before each product
        with mock.patch.object(self.module, "orthnormal", orthogonalise):
            values, _ = self._begin().eigenvalues(maxIter=max_iter, tol=tol, top_n=count)
        return Answer(values, orthogonalise.calls, None)

    def density(self, *, steps: int, samples: int) -> Quadrature:
        nodes, weights = self._begin().density(iter=steps, n_v=samples)
        return Quadrature(*([[float(x) for x in probe] for probe in part] for part in (nodes, weights)))

    def density_mended(self, *, steps: int, samples: int) -> Quadrature:
        """The same with torch.eig, which torch has no more, put back for symmetric matrices."""

        def eig(T: Tensor, *, eigenvectors: bool) -> tuple[Tensor, Tensor]:
            values, vectors = torch.linalg.eigh(T)
            return values[:, None], vectors

        with mock.patch.object(torch, "eig", eig):
            return self.density(steps=steps, samples=samples)

    def trace(self, *, samples: int) -> Sequence[float]:
        return self._begin().trace(maxIter=samples, tol=-math.inf)  # a mean never moves by less: all samples are drawn


class Eigenthings:
    """hessian-eigenthings: Lanczos with a given number of steps, which says whether they sufficed."""

    def __init__(self, given: Workload) -> None:
        self.model = copy.deepcopy(given.model)
        self.batches = given.batches
        self.module: Any = importlib.import_module("hessian_eigenthings")

    def _operator(self) -> Any:
        return self.module.HessianOperator(self.model, self.batches, loss)

    def product(self) -> Callable[[Tensor], Tensor]:
        return self._operator().matvec

    def lanczos(self, *, seed: int, count: int = 5, which: str = "LM", **options: Any) -> Answer:
        found = self.module.lanczos(self._operator(), k=count, which=which, seed=seed, **options)
        return Answer(found.eigenvalues.tolist(), found.iterations, bool(found.converged.all()))

    def told(self, steps: Sequence[int], *, seed: int) -> Answer:
        """The five largest in the number of steps that suffices; its run cannot know that number."""
        return self.lanczos(seed=seed, max_iter=steps[0], which="LA", reorthogonalize=True)

    def told_ends(self, steps: Sequence[int], *, seed: int) -> Answer:
        parts = [
            self.lanczos(seed=seed, count=1, which=which, max_iter=m, reorthogonalize=True)
            for which, m in zip(("LA", "SA"), steps, strict=True)
        ]
        return _joined(parts)

    def doubling(self, *, seed: int, tol: float, count: int = 5, which: str = "LA") -> Answer:
        """Runs of twice as many steps until it calls one converged; it cannot go on with a run.

        Reorthogonalised beyond 50 steps as well, where its default would find copies of what it has.
        """
        steps, products = 10, 0
        while True:
            found = self.lanczos(seed=seed, count=count, which=which, max_iter=steps, tol=tol, reorthogonalize=True)
            products += found.products
            if found.converged or steps >= 320:
                return Answer(found.values, products, found.converged)
            steps *= 2

    def ends(self, *, seed: int, tol: float) -> Answer:
        return _joined([self.doubling(seed=seed, tol=tol, count=1, which=which) for which in ("LA", "SA")])

    def density(self, *, steps: int, samples: int) -> Quadrature:
        found = self.module.spectral_density(self._operator(), num_runs=samples, lanczos_steps=steps, seed=0)
        return Quadrature(found.raw_eigenvalues.tolist(), found.raw_weights.tolist())

    def trace(self, *, samples: int) -> Sequence[float]:
        return self.module.trace(self._operator(), num_matvecs=samples, method="hutchinson", seed=0).samples.tolist()


class MeanCrossEntropy(nn.Module):
    """The loss of the workloads, as a module that says how it reduces."""

    reduction = "mean"

    def forward(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return _criterion(outputs, targets)


class Curvlinops:
    """curvlinops' Hessian, without its check of determinism; it leaves eigenvalues to SciPy's ARPACK."""

    def __init__(self, given: Workload) -> None:
        self.model = copy.deepcopy(given.model)
        self.batches = given.batches
        self.module: Any = importlib.import_module("curvlinops")

    def _operator(self) -> Any:
        params = list(self.model.parameters())
        return self.module.HessianLinearOperator(
            self.model, MeanCrossEntropy(), params, self.batches, check_deterministic=False
        )

    def product(self) -> Callable[[Tensor], Tensor]:
        return self._operator().__matmul__

    def top(self, *, seed: int, tol: float = 0) -> Answer:
        return arpack(self._operator().to_scipy(np.float32), seed=seed, tol=tol)

    def both_ends(self, *, seed: int, tol: float) -> Answer:
        return arpack(self._operator().to_scipy(np.float32), seed=seed, tol=tol, count=2, which="BE")

    def one_by_one(self, *, seed: int, tol: float) -> Answer:
        matrix = self._operator().to_scipy(np.float32)
        return _joined([arpack(matrix, seed=seed, tol=tol, count=1, which=which) for which in ("LA", "SA")])

    def trace(self, *, samples: int) -> Sequence[float]:
        module = importlib.import_module("curvlinops.trace.hutchinson")
        return [float(module.hutchinson_trace(self._operator(), samples))]


class OursBySciPy:
    """Our Hessian under SciPy's solver: the same product, another way through the spectrum."""

    def __init__(self, given: Workload) -> None:
        self.given = given

    def top(self, *, seed: int, tol: float = 0) -> Answer:
        return arpack(to_scipy(unstuck.hessian(self.given.objective())), seed=seed, tol=tol)

    def both_ends(self, *, seed: int, tol: float) -> Answer:
        matrix = to_scipy(unstuck.hessian(self.given.objective()))
        return arpack(matrix, seed=seed, tol=tol, count=2, which="BE")


def arpack(matrix: Any, *, seed: int, tol: float, count: int = 5, which: str = "LA") -> Answer:
    """SciPy's eigsh in float32; it raises where it has not converged."""
    size = matrix.shape[0]
    matvec = Counted(matrix.matvec)
    start = torch.randn(size, generator=torch.Generator().manual_seed(seed)).numpy()
    wrapped = LinearOperator((size, size), matvec=matvec, dtype=np.float32)
    values = eigsh(wrapped, k=count, which=which, tol=tol, v0=start, return_eigenvectors=False)
    return Answer(values.tolist(), matvec.calls, True)


def plain_gradient(given: Workload) -> Tensor:
    """The gradient by the loop that one writes by hand."""
    params = list(given.model.parameters())
    total = [torch.zeros_like(p) for p in params]
    for batch in given.batches:
        share = len(batch[0]) / len(given.inputs)
        for sum_, g in zip(total, torch.autograd.grad(loss(given.model, batch), params), strict=True):
            sum_.add_(g, alpha=share)
    return _flat(total)


def plain_product(given: Workload, v: Tensor) -> Tensor:
    """The Hessian product by hand: backward through the gradient, batch by batch."""
    params = list(given.model.parameters())
    total = torch.zeros_like(v)
    for batch in given.batches:
        gradient = torch.autograd.grad(loss(given.model, batch), params, create_graph=True)
        along = torch.autograd.grad(gradient, params, _split(v, params))
        total += _flat(along) * (len(batch[0]) / len(given.inputs))
    return total


def finite_difference(given: Workload, v: Tensor, *, step: float = 1e-9) -> Tensor:
    """The Hessian product in float64 from two gradients, at a distance along v so small that few ReLUs change sides."""
    model = copy.deepcopy(given.model).double()
    batches = [(x.double() if x.is_floating_point() else x, y) for x, y in given.batches]
    moved = replace(given, model=model, batches=batches)
    unit = v.double() / v.double().norm()
    gradients = []
    for sign in (1, -1):
        _move(model, unit, sign * step)
        gradients.append(plain_gradient(moved))
        _move(model, unit, -sign * step)
    return (gradients[0] - gradients[1]) * (v.double().norm() / (2 * step))


def _move(model: nn.Module, direction: Tensor, step: float) -> None:
    params = list(model.parameters())
    with torch.no_grad():
        for p, d in zip(params, _split(direction, params), strict=True):
            p.add_(d, alpha=step)


def _criterion(outputs: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(outputs.flatten(0, -2), targets.flatten())


def _split(v: Tensor, params: Sequence[Tensor]) -> list[Tensor]:
    pieces = v.split([p.numel() for p in params])
    return [piece.view_as(p) for piece, p in zip(pieces, params, strict=True)]


def _flat(pieces: Sequence[Tensor]) -> Tensor:
    return torch.cat([piece.detach().reshape(-1) for piece in pieces])


def _joined(parts: Sequence[Answer]) -> Answer:
    values = [value for part in parts for value in part.values]
    claims = [part.converged for part in parts]
    return Answer(values, sum(part.products for part in parts), None if None in claims else all(claims))
