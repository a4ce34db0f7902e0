"""The loss as a function of the parameters: its value, gradient and Hessian products, summed over weighted terms."""

import functools
import math
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, distributed, nn

from unstuck.objective import _ranks
from unstuck.objective._chunks import Chunk, Graphs, Linear, Plan
from unstuck.objective._custom import both_sides, check_custom
from unstuck.objective._division import Division
from unstuck.objective._kernels import full_precision
from unstuck.objective._matmul import fast_matmul
from unstuck.objective._model import batch_terms, examples, unwrapped
from unstuck.objective._term import (
    WRITTEN_BATCH,
    WRITTEN_PARAMETERS,
    Term,
    along,
    check_mode,
    gradient_of,
    origins,
    second_derivatives,
)


class Objective:
    """L(θ) = Σ w_b ℓ_b(θ) / Σ w_b: the loss of a model over batches, as a function of its parameters.

    `loss(model, batch)` returns the mean over the batch and `weight(batch)` its number of examples (or tokens, if it
    is the mean over these). θ holds every parameter with requires_grad=True, a tied one once, in the order of
    `named_parameters()`; flat tensors are float32, or wider where a parameter is.

    An objective is one deterministic function: weights (frozen ones too), buffers, train or eval mode and random masks
    are copied when it is built, so that training the model afterwards changes nothing here. Build another one to look
    at the new weights. Batches are kept, not copied; writing into them is noticed and refused, unless torch cannot see
    it (through .data or shared NumPy memory). The model, its gradients and the global generators are left alone.

    The first Hessian product measures the graphs of the gradients and keeps them as far as `memory` allows: in bytes,
    products included, beyond what a gradient takes; half of what is free, if not given. `plan` tells what was decided.
    A product then costs at most about two gradients, and three where the graph is built again. On a CPU, large batches
    are computed in parts, where a trial on the largest shows that its loss is the mean of those of its parts.

    With a process `group`, each rank gives batches of its own and all get the mean over all examples, from one
    all-reduce a product. All ranks must ask for the same things in the same order.
    """

    def __init__(
        self,
        model: nn.Module,
        loss: Callable[[Any, Any], Tensor],
        batches: Iterable[Any],
        *,
        weight: Callable[[Any], float] = examples,
        memory: float | None = None,
        group: "distributed.ProcessGroup | None" = None,
    ) -> None:
        model = unwrapped(model)
        parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
        if not parameters:
            raise ValueError(
                "an objective needs a parameter with requires_grad=True, the model has none: unfreeze what to look at"
            )
        self._begin(batch_terms(model, loss, batches, weight), parameters, memory, group)

    @classmethod
    def of_terms(
        cls,
        terms: Iterable[Term],
        parameters: Mapping[str, Tensor],
        *,
        memory: float | None = None,
        group: "distributed.ProcessGroup | None" = None,
    ) -> "Objective":
        """The objective over given terms, at the values that the named parameters have now.

        >>> double_well = Term(lambda values: (values[0] ** 2 - 1).square().sum(), weight=1)
        >>> Objective.of_terms([double_well], {"x": torch.zeros(1)}).product(torch.ones(1))
        tensor([-4.])
        """
        self = cls.__new__(cls)
        self._begin(terms, parameters, memory, group)
        return self

    def _begin(
        self,
        terms: Iterable[Term],
        parameters: Mapping[str, Tensor],
        memory: float | None,
        group: "distributed.ProcessGroup | None",
    ) -> None:
        if memory is not None and not memory > 0:
            raise ValueError(f"memory is a positive number of bytes, got {memory}")
        if not parameters:
            raise ValueError("an objective needs at least one parameter, got none")
        _check_real(parameters)
        self.names = tuple(parameters)
        self.shapes = tuple(p.shape for p in parameters.values())
        self.size = sum(p.numel() for p in parameters.values())
        self._kinds = tuple((p.dtype, p.device) for p in parameters.values())
        self._point = self._flatten([p.detach() for p in parameters.values()])
        self.terms = tuple(terms)
        weights = [term.weight for term in self.terms]
        countable = all(weight >= 0 for weight in weights)
        self.weight = _ranks.total_weight(math.fsum(weights) if countable else math.nan, self._point, group)
        if not self.terms and self.weight == 0:
            raise ValueError("an objective needs at least one batch, got none: an iterator can be read only once")
        if not 0 < self.weight < math.inf:
            raise ValueError(f"weights count examples, so none is negative and their sum is positive, got {weights}")
        _ranks.check_same(self._point, group)
        self._memory, self._group = memory, group
        self._left_alone = False  # whether a pass has shown that the terms leave the parameters alone
        self._divided = Division(self.terms, memory)

    def at(self, point: Tensor) -> "Objective":
        """The same objective at another point; the terms are shared."""
        values = dict(zip(self.names, self.unflatten(point), strict=True))
        other = self.of_terms(self.terms, values, memory=self._memory, group=self._group)
        other._divided = self._divided  # noqa: SLF001, found out once for all points
        return other

    def restrict(self, where: Callable[[str], bool] | Collection[str]) -> "Objective":
        """The objective as a function of some of its parameters; the others stay as they are.

        `where` holds names, of parameters or of the modules that they lie in, or is a predicate of a parameter's name.
        """
        chosen = _chosen(self.names, where)
        values = self.unflatten(self._point)
        constants = [value.clone() for value in values]

        def part(term: Term) -> Term:
            def loss(given: Sequence[Tensor]) -> Tensor:
                merged = list(constants)
                for k, value in zip(chosen, given, strict=True):
                    merged[k] = value
                return term.loss(merged)

            parts = term.parts
            return Term(loss, term.weight, None if parts is None else lambda n: [part(piece) for piece in parts(n)])

        parameters = {self.names[k]: values[k] for k in chosen}
        return self.of_terms(map(part, self.terms), parameters, memory=self._memory, group=self._group)

    @property
    def point(self) -> Tensor:
        """A copy of θ, flat."""
        return self._point.clone()

    @property
    def dtype(self) -> torch.dtype:
        return self._point.dtype

    @property
    def device(self) -> torch.device:
        return self._point.device

    @property
    def plan(self) -> Plan | None:
        """Which graphs are kept for Hessian products; None before the first of them."""
        return self._hessian.plan

    def value(self) -> Tensor:
        """L(θ), 0-d; NaN and infinity are returned as they are."""
        with torch.no_grad():
            return self._mean_loss(lambda: [term.at(self._leaves) for term in self._divided(self._leaves)])

    def gradient(self) -> Tensor:
        """∇L(θ), flat; zero for a parameter that the loss does not use."""
        return self.value_and_gradient()[1]

    def value_and_gradient(self) -> tuple[Tensor, Tensor]:
        """L(θ) and ∇L(θ), at the cost of the gradient."""
        losses = []

        def gradients() -> Iterator[Sequence[Tensor]]:
            for term in self._divided(self._leaves):
                loss = term.at(self._leaves)
                losses.append(loss.detach())
                yield gradient_of(loss, self._leaves)

        with torch.enable_grad():
            gradient = self._mean(gradients)
        return self._mean_loss(lambda: losses), gradient

    def lead(self) -> Tensor:
        """∇L(θ), flat, as a start for Hessian products: it costs next to nothing before the first of them.

        They need its graphs anyway, which are built here, and kept as far as memory allows.
        """
        if self.plan is not None:
            return self.gradient()
        slopes: list[Sequence[Tensor]] = []

        def gradients() -> Iterator[Sequence[Tensor]]:
            for _ in self._hessian.built_by(functools.partial(_hessian_of, seen=set(), read=slopes.append)):
                yield slopes.pop()

        with torch.enable_grad():
            return self._mean(gradients)

    def product(self, v: Tensor) -> Tensor:
        """H v, flat, with H the Hessian of L at θ."""
        return self._apply(self._hessian, v)

    def matrix(self, build: Callable[[Chunk], Linear]) -> Callable[[Tensor], Tensor]:
        """v ↦ Σ w_b A_b v / Σ w_b on flat v, with A_b the symmetric map that `build` reads off the graph of a term.

        The graphs are kept as far as the memory of the objective allows, and built again where not.
        """
        return functools.partial(self._apply, self._graphs(build))

    def over_ranks(self, compute: Callable[[], float]) -> float:
        """The sum of a number over all ranks; itself without a group."""
        like = torch.zeros(1, dtype=torch.float64, device=self.device)
        return _ranks.total(lambda: like + compute(), like, self._group).item()

    def unflatten(self, flat: Tensor) -> list[Tensor]:
        """A flat tensor cut into the shapes, types and devices of the parameters."""
        if flat.shape != (self.size,):
            raise ValueError(
                f"a flat tensor of shape ({self.size},) is needed, one number for each weight, got {tuple(flat.shape)}"
            )
        pieces = flat.split([shape.numel() for shape in self.shapes])
        return [
            piece.view(shape).to(dtype=dtype, device=device)
            for piece, shape, (dtype, device) in zip(pieces, self.shapes, self._kinds, strict=True)
        ]

    def __repr__(self) -> str:
        return f"Objective({len(self.terms)} terms, {self.size} weights)"

    def _flatten(self, pieces: Iterable[Tensor]) -> Tensor:
        # float32 at least: sums over batches and Krylov vectors do not survive eight bits of mantissa
        dtype = functools.reduce(torch.promote_types, (dtype for dtype, _ in self._kinds), torch.float32)
        device = self._kinds[0][1]
        return torch.cat([piece.reshape(-1).to(dtype=dtype, device=device) for piece in pieces])

    @functools.cached_property
    def _leaves(self) -> list[Tensor]:
        check_mode()
        # clones, because a view into the flat vector may be misaligned and round differently from the model's own
        return [piece.clone().requires_grad_() for piece in self.unflatten(self._point)]

    def _check_leaves(self) -> None:
        """Raises where the first pass has written into the parameters unseen by autograd, as through .data."""
        if self._left_alone:
            return
        values = self.unflatten(self._point)
        if not all(torch.allclose(a, b, 0, 0, equal_nan=True) for a, b in zip(self._leaves, values, strict=True)):
            raise ValueError(WRITTEN_PARAMETERS)
        self._left_alone = True

    @functools.cached_property
    def _hessian(self) -> Graphs:
        return self._graphs(functools.partial(_hessian_of, seen=set()))

    def _graphs(self, build: Callable[[Chunk], Linear]) -> Graphs:
        first = _ranks.rank_of(self._group) << 32
        chunks = functools.partial(_chunks, self._divided, self._leaves, first)  # without self, which would be a cycle
        return Graphs(chunks, build, self._memory)

    def _apply(self, graphs: Graphs, v: Tensor) -> Tensor:
        directions = self.unflatten(v)

        def products() -> Iterator[Sequence[Tensor]]:
            for apply in graphs:
                with fast_matmul(), second_derivatives():
                    product = _unwritten(apply, directions)
                del apply  # or its graph would be alive while the next one is built
                yield product

        with torch.enable_grad():
            return self._mean(products, mark=float(v.sum()) if self._group is not None else 0.0)

    def _mean_loss(self, losses: Callable[[], Sequence[Tensor]]) -> Tensor:
        # float64, because a line search compares values that differ by less than a float32 sum over batches resolves
        like = torch.zeros(1, dtype=torch.float64, device=self.device)

        def weighted() -> Tensor:
            pairs = zip(self._divided(self._leaves), losses(), strict=True)
            total = sum((term.weight * loss.to(like) for term, loss in pairs), like)
            self._check_leaves()
            return total

        with full_precision(device for _, device in self._kinds):
            return (_ranks.total(weighted, like, self._group)[0] / self.weight).to(self.dtype)

    def _mean(self, parts: Callable[[], Iterable[Sequence[Tensor]]], *, mark: float = 0.0) -> Tensor:
        """Σ w_b x_b / Σ w_b, flat: the one place where batches and ranks are summed."""

        def weighted() -> Tensor:
            total = torch.zeros_like(self._point)
            pieces = total.split([shape.numel() for shape in self.shapes])
            for term, part in zip(self._divided(self._leaves), parts(), strict=True):
                for piece, x in zip(pieces, part, strict=True):  # never flat: that would be one copy more
                    piece.add_((x.to_dense() if x.is_sparse else x).reshape(-1).to(total), alpha=term.weight)
            self._check_leaves()
            return total

        with full_precision(device for _, device in self._kinds):
            return _ranks.total(weighted, self._point, self._group, mark=mark).div_(self.weight)


def _chunks(divided: Division, leaves: Sequence[Tensor], first: int) -> list[Chunk]:
    def chunk(term: Term, index: int) -> Chunk:
        return Chunk(term.at, leaves, term.weight, index)

    return [chunk(term, first + k) for k, term in enumerate(divided(leaves))]


def _check_real(parameters: Mapping[str, Tensor]) -> None:
    for name, p in parameters.items():
        lazy = isinstance(p, nn.UninitializedParameter)
        if lazy or p.is_complex():
            raise ValueError(
                f"an objective needs real parameters with a shape, got a {'lazy' if lazy else 'complex'} one, {name}: "
                "run a lazy model once first, and hold complex numbers as torch.view_as_real() does"
            )


def _unwritten(apply: Callable[[Sequence[Tensor]], Sequence[Tensor]], directions: Sequence[Tensor]) -> Sequence[Tensor]:
    try:
        return apply(directions)
    except RuntimeError as error:
        if "inplace operation" in str(error):  # of what a kept graph holds
            raise ValueError(WRITTEN_BATCH) from error
        raise


def _hessian_of(chunk: Chunk, *, seen: set[type], read: Callable[[Sequence[Tensor]], object] | None = None) -> Linear:
    loss = chunk.loss()
    with fast_matmul(), second_derivatives():
        gradient = gradient_of(loss, chunk.leaves, create_graph=True)
        slopes = origins(gradient)
        if read is not None:
            read([slope.detach() for slope in gradient])
        del gradient  # its numbers, one a weight, are not needed again
        check_custom(loss, chunk.leaves, ((chunk.at(side), side) for side in both_sides(chunk.leaves)), seen)
    return Linear(functools.partial(along, slopes, chunk.leaves), slopes)


def _chosen(names: Sequence[str], where: Callable[[str], bool] | Collection[str]) -> list[int]:
    """The places of the parameters that `where` holds."""
    if callable(where):
        chosen = [k for k, name in enumerate(names) if where(name)]
    else:
        given = {where} if isinstance(where, str) else set(where)
        unknown = [w for w in given if not any(name == w or name.startswith(f"{w}.") for name in names)]
        if unknown:
            raise ValueError(f"where= holds names of parameters or of their modules, got {unknown} among {list(names)}")
        chosen = [k for k, name in enumerate(names) if any(name == w or name.startswith(f"{w}.") for w in given)]
    if not chosen:
        raise ValueError(f"where= must hold at least one parameter, got none of {list(names)}")
    return chosen
