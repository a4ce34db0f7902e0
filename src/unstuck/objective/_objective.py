"""The loss as a function of the parameters: its value, gradient and Hessian products, summed over weighted terms."""

import contextlib
import functools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel


@dataclass(frozen=True, eq=False)
class Term:
    """The loss of one batch as a function of the parameters, and the number of examples it is the mean of."""

    loss: Callable[[Sequence[Tensor]], Tensor]  # the parameters, in the order of the objective -> scalar
    weight: float


def examples(batch: Any) -> int:
    """The length of the first tensor in a batch: how many examples it holds."""
    for tensor in _tensors(batch):
        if tensor.ndim > 0:
            return len(tensor)
    raise ValueError(
        f"the number of examples is read off the first tensor of a batch, got {type(batch).__name__} without one: "
        "pass weight=, a function from the batch to that number"
    )


class Objective:
    """L(θ) = Σ w_b ℓ_b(θ) / Σ w_b: the loss of a model over batches, as a function of its parameters.

    `loss(model, batch)` returns the mean over the batch and `weight(batch)` its number of examples. θ holds every
    parameter with requires_grad=True, a tied one once, in the order of `named_parameters()`; flat tensors are float32,
    or wider where a parameter is. Train or eval mode, buffers and random masks are fixed when the objective is built,
    so that it is one deterministic function. The model, its gradients and the global generator are left alone.

    The batches are read once, into a list. The first Hessian product keeps the graph of the gradient, which takes the
    activations of all batches; from then on a product costs about as much as two gradients.
    """

    def __init__(
        self,
        model: nn.Module,
        loss: Callable[[Any, Any], Tensor],
        batches: Iterable[Any],
        *,
        weight: Callable[[Any], float] = examples,
    ) -> None:
        parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
        if not parameters:
            raise ValueError(
                "an objective needs a parameter with requires_grad=True, the model has none: unfreeze what to look at"
            )
        self._begin(_batch_terms(model, loss, batches, weight), parameters)

    @classmethod
    def of_terms(cls, terms: Iterable[Term], parameters: Mapping[str, Tensor]) -> "Objective":
        """The objective over given terms, at the values that the named parameters have now.

        >>> double_well = Term(lambda values: (values[0] ** 2 - 1).square().sum(), weight=1)
        >>> Objective.of_terms([double_well], {"x": torch.zeros(1)}).product(torch.ones(1))
        tensor([-4.])
        """
        self = cls.__new__(cls)
        self._begin(terms, parameters)
        return self

    def _begin(self, terms: Iterable[Term], parameters: Mapping[str, Tensor]) -> None:
        self.terms = tuple(terms)
        self.weight = math.fsum(term.weight for term in self.terms)
        if not self.terms:
            raise ValueError("an objective needs at least one batch, got none: an iterator can be read only once")
        if not (all(term.weight >= 0 for term in self.terms) and 0 < self.weight < math.inf):
            weights = [term.weight for term in self.terms]
            raise ValueError(f"weights count examples, so none is negative and their sum is positive, got {weights}")
        if not parameters:
            raise ValueError("an objective needs at least one parameter, got none")
        self.names = tuple(parameters)
        self.shapes = tuple(p.shape for p in parameters.values())
        self.size = sum(p.numel() for p in parameters.values())
        self._kinds = tuple((p.dtype, p.device) for p in parameters.values())
        self._point = self._flatten([p.detach() for p in parameters.values()])

    def at(self, point: Tensor) -> "Objective":
        """The same objective at another point; the terms are shared."""
        return self.of_terms(self.terms, dict(zip(self.names, self.unflatten(point), strict=True)))

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

    def value(self) -> Tensor:
        """L(θ), 0-d; NaN and infinity are returned as they are."""
        with torch.no_grad():
            return self._mean_loss(self._loss(term) for term in self.terms)

    def gradient(self) -> Tensor:
        """∇L(θ), flat; zero for a parameter that the loss does not use."""
        return self.value_and_gradient()[1]

    def value_and_gradient(self) -> tuple[Tensor, Tensor]:
        """L(θ) and ∇L(θ), at the cost of the gradient."""
        losses = []

        def gradients() -> Iterator[Tensor]:
            for term in self.terms:
                loss = self._loss(term)
                losses.append(loss.detach())
                yield self._flatten(_gradient(loss, self._leaves))

        with torch.enable_grad():
            gradient = self._mean(gradients())
        return self._mean_loss(losses), gradient

    def product(self, v: Tensor) -> Tensor:
        """H v, flat, with H the Hessian of L at θ."""
        directions = self.unflatten(v)
        return self._mean(self._flatten(_directional(g, self._leaves, directions)) for g in self._gradient_graphs)

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
        # clones, because a view into the flat vector may be misaligned and round differently from the model's own
        return [piece.clone().requires_grad_() for piece in self.unflatten(self._point)]

    @functools.cached_property
    def _gradient_graphs(self) -> list[list[Tensor]]:
        """The gradient of each term with its graph, to be differentiated again."""
        graphs = []
        with torch.enable_grad():
            for term in self.terms:
                loss = self._loss(term)
                if not loss.isfinite():
                    raise ValueError(
                        f"a Hessian needs a finite loss, got {loss.item()} here: look at the point before its curvature"
                    )
                graphs.append(_gradient(loss, self._leaves, create_graph=True))
        return graphs

    def _loss(self, term: Term) -> Tensor:
        loss = term.loss(self._leaves)
        if not isinstance(loss, Tensor) or loss.numel() != 1 or not loss.is_floating_point():
            what = f"a {loss.dtype} of shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else repr(loss)
            raise TypeError(f"the loss must be a tensor with one real number, got {what}: return the batch's mean loss")
        return loss.reshape(())

    def _mean_loss(self, losses: Iterable[Tensor]) -> Tensor:
        # float64, because a line search compares values that differ by less than a float32 sum over batches resolves
        return self._mean(loss.to(device=self.device, dtype=torch.float64) for loss in losses).to(self.dtype)

    def _mean(self, parts: Iterable[Tensor]) -> Tensor:
        """Σ w_b x_b / Σ w_b: the one place where batches, and one day ranks, are summed."""
        total = torch.zeros((), dtype=self.dtype, device=self.device)
        for term, part in zip(self.terms, parts, strict=True):
            total = total + term.weight * part
        return total / self.weight


def _gradient(loss: Tensor, leaves: Sequence[Tensor], *, create_graph: bool = False) -> list[Tensor]:
    found: Sequence[Tensor | None] = (
        torch.autograd.grad(loss, leaves, create_graph=create_graph, allow_unused=True) if loss.requires_grad else ()
    )
    if all(g is None for g in found):
        raise ValueError(
            "the loss must depend on a parameter, got one that depends on none: compute it with the model that loss() "
            "is given, without detach(), item() or no_grad()"
        )
    return [torch.zeros_like(leaf) if g is None else g for g, leaf in zip(found, leaves, strict=True)]


def _directional(
    gradient: Sequence[Tensor], leaves: Sequence[Tensor], directions: Sequence[Tensor]
) -> Sequence[Tensor]:
    """The derivative of the gradient along the directions, by symmetry that of ⟨gradient, directions⟩."""
    curved = [(g, d) for g, d in zip(gradient, directions, strict=True) if g.requires_grad]
    if not curved:  # the loss is linear
        return [torch.zeros_like(leaf) for leaf in leaves]
    slopes, ways = zip(*curved, strict=True)
    return torch.autograd.grad(slopes, leaves, ways, retain_graph=True, materialize_grads=True)


class _Evaluated(nn.Module):
    """The loss as a module, for `functional_call` to put other weights under the whole of it."""

    def __init__(self, model: nn.Module, loss: Callable[[Any, Any], Tensor]) -> None:
        super().__init__()
        self.model = model
        self.loss = loss

    def forward(self, batch: Any) -> Tensor:
        return self.loss(self.model, batch)


def _batch_terms(
    model: nn.Module, loss: Callable[[Any, Any], Tensor], batches: Iterable[Any], weight: Callable[[Any], float]
) -> Iterator[Term]:
    evaluated = _Evaluated(model, loss)
    names = tuple(f"model.{name}" for name, p in model.named_parameters() if p.requires_grad)
    buffers = {name: b.detach().clone() for name, b in evaluated.named_buffers()}
    modes = {module: module.training for module in model.modules()}
    devices = sorted({p.device.index for p in model.parameters() if p.device.type == "cuda"})

    def term(batch: Any, seed: int) -> Term:
        def at(values: Sequence[Tensor]) -> Tensor:
            own = {name: b.clone() for name, b in buffers.items()}  # train-mode layers write into them
            with _modes(modes), _seeded(seed, devices), sdpa_kernel(SDPBackend.MATH):  # the others lack Hessians
                return functional_call(evaluated, {**own, **dict(zip(names, values, strict=True))}, (batch,))

        return Term(at, float(weight(batch)))

    with torch.random.fork_rng(devices=devices):  # a shuffling loader draws from the global generator
        kept = list(batches)
        seeds = torch.randint(2**62, (len(kept),)).tolist()
    return (term(batch, seed) for batch, seed in zip(kept, seeds, strict=True))


@contextlib.contextmanager
def _modes(modes: Mapping[nn.Module, bool]) -> Iterator[None]:
    """Train or eval mode, module by module, for the length of the block."""
    before = {module: module.training for module in modes}
    try:
        for module, training in modes.items():
            module.training = training
        yield
    finally:
        for module, training in before.items():
            module.training = training


@contextlib.contextmanager
def _seeded(seed: int, devices: Sequence[int]) -> Iterator[None]:
    """The global generators of the CPU and of the devices start from the seed, and go on after the block as before."""
    with torch.random.fork_rng(devices=devices):
        torch.default_generator.manual_seed(seed)  # torch.manual_seed would also seed devices that were not saved
        for device in devices:
            torch.cuda.default_generators[device].manual_seed(seed)
        yield


def _tensors(batch: Any) -> Iterator[Tensor]:
    if isinstance(batch, Tensor):
        yield batch
    elif isinstance(batch, Mapping):
        for part in batch.values():
            yield from _tensors(part)
    elif isinstance(batch, list | tuple):
        for part in batch:
            yield from _tensors(part)
