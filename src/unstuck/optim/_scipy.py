"""SciPy's minimisers behind the conventions of torch.optim."""

import importlib
import math
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.optim import Optimizer

from unstuck.objective import Origin, Term, along, gradient_of, origins, second_derivatives

_FIRST = ("BFGS", "L-BFGS-B", "CG")
_PRODUCTS = ("Newton-CG", "trust-ncg", "trust-krylov", "trust-constr")
_MATRIX = ("trust-exact",)
_SQUARE = ("BFGS", *_MATRIX)  # keep a matrix of size n²


@dataclass(frozen=True, eq=False)
class Minimised:
    """How a run of SciPy's minimiser ended."""

    loss: float
    gradient_norm: float
    iterations: int
    evaluations: int  # of loss and gradient together
    products: int  # of the Hessian with a vector
    converged: bool  # by SciPy's word; where the gradient vanishes, which may be a saddle
    message: str


class ScipyMinimize(Optimizer):
    """`scipy.optimize.minimize` as an optimiser: each step is a whole minimisation from where the weights are.

    Methods: BFGS, L-BFGS-B, CG; with Hessian products Newton-CG, trust-ncg, trust-krylov, trust-constr; with the whole
    Hessian, from as many products as there are weights, trust-exact. `max_iter` and `tol` are SciPy's, and `options`
    holds what else the method knows. `last` tells how the last step ended.

    The closure returns the loss with its graph and does not call backward: gradients and Hessian products are taken
    from it by autograd, and `.grad` is left alone. It must be one function of the weights, so give it the same batch
    and no dropout. SciPy sees the weights as one flat float64 vector, in the order of `params`; those with
    requires_grad=False stay. There is no state between steps. Where the loss ends at NaN or infinity, or the closure
    raises, the weights are put back.

    Only trust-exact leaves the line of weights that descent draws into a saddle, and none leaves the saddle itself:
    `unstuck.escape` does. BFGS and trust-exact keep n² numbers and refuse more than `memory` bytes of them.

    >>> w = torch.tensor([-1.2, 1.0], dtype=torch.float64, requires_grad=True)
    >>> optimizer = ScipyMinimize([w], "trust-exact")
    >>> _ = optimizer.step(lambda: 100 * (w[1] - w[0] ** 2) ** 2 + (1 - w[0]) ** 2)
    >>> w.detach().round(decimals=4)
    tensor([1., 1.], dtype=torch.float64)
    """

    last: Minimised | None = None

    def __init__(
        self,
        params: Iterable[Any],
        method: str,
        *,
        max_iter: int = 100,
        tol: float | None = None,
        options: Mapping[str, Any] | None = None,
        memory: float = 1e9,
    ) -> None:
        known = (*_FIRST, *_PRODUCTS, *_MATRIX)
        if method not in known:
            raise ValueError(f"a method of SciPy's is needed, one of {', '.join(known)}, got {method!r}")
        if max_iter < 1:
            raise ValueError(f"at least one iteration is needed, got max_iter={max_iter}")
        if tol is not None and not tol > 0:
            raise ValueError(f"a tolerance is positive, got tol={tol}")
        _scipy()
        own = {"method": method, "max_iter": max_iter, "tol": tol, "options": dict(options or {}), "memory": memory}
        super().__init__(params, own)
        self._weights()

    def step(self, closure: Callable[[], Tensor] | None = None) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Minimises the loss that the closure returns; returns the loss at the start, 0-d."""
        if closure is None:
            raise ValueError("ScipyMinimize needs a closure that returns the loss with its graph, got none")
        group = self.param_groups[0]
        function = _Function(closure, self._weights())
        start = function.read()
        try:
            first, _ = function.value_and_gradient(start)
            if not math.isfinite(first):
                raise ValueError(f"a minimisation starts from a finite loss, got {first}: look at the weights first")
            found = self._run(function, start, group)
            end = found.x if np.isfinite(found.x).all() and math.isfinite(found.fun) else start
        except BaseException:
            function.restore(start)
            raise
        function.write(end)
        loss, slope = function.value_and_gradient(end)
        self.last = Minimised(
            loss=loss,
            gradient_norm=float(np.linalg.norm(slope)),
            iterations=int(found.nit),
            evaluations=function.evaluations,
            products=function.products,
            converged=bool(found.success) and end is not start,
            message=str(found.message),
        )
        weight = function.weights[0]
        return torch.tensor(first, dtype=weight.dtype, device=weight.device)

    def _run(self, function: "_Function", start: np.ndarray, group: Mapping[str, Any]) -> Any:
        method = group["method"]
        second = {}
        if method in _PRODUCTS:
            second = {"hessp": function.product}
        elif method in _MATRIX:
            second = {"hess": function.matrix}
        with warnings.catch_warnings():
            warnings.filterwarnings("error", message="Unknown solver options")
            try:
                return _scipy().minimize(
                    function.value_and_gradient,
                    start,
                    jac=True,
                    method=method,
                    tol=group["tol"],
                    options={**group["options"], "maxiter": group["max_iter"]},
                    **second,
                )
            except _scipy().OptimizeWarning as warning:
                raise ValueError(f"options= of {method} are those of SciPy, got others: {warning}") from None

    def _weights(self) -> list[Tensor]:
        first = self._options(self.param_groups[0])
        if any(self._options(group) != first for group in self.param_groups[1:]):
            raise ValueError(
                "ScipyMinimize needs the same options in all groups, got groups that differ: it sees one vector"
            )
        weights = [p for group in self.param_groups for p in group["params"] if p.requires_grad]
        if not weights:
            raise ValueError("ScipyMinimize needs a parameter with requires_grad=True, got none: unfreeze one")
        odd = [p.dtype for p in weights if not p.is_floating_point()]
        if odd:
            raise TypeError(f"ScipyMinimize needs real parameters, got {odd[0]}: take torch.view_as_real")
        size = sum(w.numel() for w in weights)
        if first["method"] in _SQUARE and 8 * size**2 > first["memory"]:
            raise ValueError(
                f"{first['method']} keeps {8 * size**2 / 1e9:.3g} GB for {size} weights, more than "
                f"memory={first['memory'] / 1e9:.3g} GB: use L-BFGS-B or trust-krylov, or raise memory"
            )
        return weights

    def _options(self, group: Mapping[str, Any]) -> dict[str, Any]:
        return {key: group[key] for key in ("method", "max_iter", "tol", "options", "memory")}


class _Function:
    """A closure as SciPy wants it: a function of a flat float64 vector."""

    def __init__(self, closure: Callable[[], Tensor], weights: Sequence[Tensor]) -> None:
        self.weights = weights
        self.evaluations = self.products = 0
        self._term = Term(lambda _: closure(), weight=1)
        self._sizes = [w.numel() for w in weights]
        self._known: tuple[np.ndarray, float, np.ndarray] | None = None
        self._here: np.ndarray | None = None  # where the weights are
        self._slopes: list[Origin] | None = None  # there, with their graph, which moving the weights would spoil

    def read(self) -> np.ndarray:
        return _flat(self.weights)

    def write(self, x: np.ndarray) -> None:
        if self._here is not None and np.array_equal(self._here, x):
            return
        self._here, self._slopes = x.copy(), None
        with torch.no_grad():
            for w, piece in zip(self.weights, self._pieces(x), strict=True):
                w.copy_(piece)

    def restore(self, x: np.ndarray) -> None:
        self._here = None  # a closure that writes into the weights may have moved them
        self.write(x)

    def value_and_gradient(self, x: np.ndarray) -> tuple[float, np.ndarray]:
        if self._known is None or not np.array_equal(self._known[0], x):
            loss = self._loss(x)
            self.evaluations += 1
            self._known = (x.copy(), loss.item(), _flat(self._gradient(loss)))
        return self._known[1], self._known[2].copy()

    def product(self, x: np.ndarray, v: np.ndarray) -> np.ndarray:
        self.write(x)
        if self._slopes is None:
            loss = self._loss(x)
            self.evaluations += 1
            with second_derivatives():
                self._slopes = origins(self._gradient(loss, create_graph=True))
        self.products += 1
        with second_derivatives():
            return _flat(along(self._slopes, self.weights, self._pieces(v)))

    def matrix(self, x: np.ndarray) -> np.ndarray:
        found = np.stack([self.product(x, unit) for unit in np.eye(len(x))])
        return (found + found.T) / 2

    def _loss(self, x: np.ndarray) -> Tensor:
        self.write(x)
        with torch.enable_grad():
            return self._term.at(self.weights)

    def _gradient(self, loss: Tensor, *, create_graph: bool = False) -> list[Tensor]:
        try:
            return gradient_of(loss, self.weights, create_graph=create_graph)
        except RuntimeError as error:
            if "a second time" not in str(error):
                raise
            raise ValueError(
                "the closure must return the loss with its graph, got one whose graph backward() has used up: leave "
                "backward() to the optimiser"
            ) from error

    def _pieces(self, x: np.ndarray) -> list[Tensor]:
        pieces = torch.from_numpy(np.asarray(x, dtype=np.float64)).split(self._sizes)
        return [piece.view_as(w).to(w) for piece, w in zip(pieces, self.weights, strict=True)]


def _flat(pieces: Iterable[Tensor]) -> np.ndarray:
    dense = (p.to_dense() if p.is_sparse else p for p in pieces)
    return torch.cat([p.detach().reshape(-1).to("cpu", torch.float64) for p in dense]).numpy()


def _scipy() -> ModuleType:
    try:
        return importlib.import_module("scipy.optimize")
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "ScipyMinimize needs SciPy, which is not installed: pip install 'unstuck[studies]'"
        ) from error
