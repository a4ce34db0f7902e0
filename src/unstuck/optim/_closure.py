"""A closure over a model's parameters, as an objective."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree

from unstuck.objective import Objective, Term, nodes_behind

Closure = Callable[[], Tensor]


def objective_of(closure: Closure, params: Sequence[Tensor]) -> tuple[Objective, list[Tensor]]:
    """The loss that a closure returns as a function of the parameters that it uses, and these.

    The closure is asked again with other tensors in the place of the parameters, and with the same random numbers each
    time; only the first call draws them from the global generator. The parameters and their gradients stay as they are.
    """
    params = [p for p in params if p.requires_grad]
    devices = sorted({p.device.index for p in params if p.device.type == "cuda"})
    states = torch.get_rng_state(), [torch.cuda.get_rng_state(k) for k in devices]

    def at(places: Sequence[Tensor], drawing: Callable[[], AbstractContextManager[None]]) -> Term:
        def loss(values: Sequence[Tensor]) -> Tensor:
            stand_ins = {id(p): value for p, value in zip(places, values, strict=True)}
            with drawing(), _StandIns(stand_ins):
                result = closure()
            _check_graph(result, places, values)
            return result

        return Term(loss, 1)

    @contextmanager
    def again() -> Iterator[None]:
        with torch.random.fork_rng(devices=devices):
            torch.set_rng_state(states[0])
            for k, state in zip(devices, states[1], strict=True):
                torch.cuda.set_rng_state(state, k)
            yield

    leaves = [p.detach().clone().requires_grad_() for p in params]
    with torch.enable_grad():
        first = at(params, nullcontext).at(leaves)
    behind = {id(leaf) for leaf in _leaves_behind(first)}
    used = [p for p, leaf in zip(params, leaves, strict=True) if id(leaf) in behind]
    if not used:
        raise ValueError(
            "a closure must return a loss that depends on a parameter, got one that depends on none: return it with "
            "its graph, without backward(), detach() or item()"
        )
    return Objective.of_terms([at(used, again)], {str(k): p for k, p in enumerate(used)}), used


@torch.no_grad()
def write(objective: Objective, point: Tensor, params: Sequence[Tensor]) -> None:
    """Puts a flat point of an objective into the parameters that it is a function of."""
    for p, value in zip(params, objective.unflatten(point), strict=True):
        p.copy_(value)


class _StandIns(TorchFunctionMode):
    """Every call that is given one of the parameters gets the tensor that stands in for it."""

    def __init__(self, stand_ins: Mapping[int, Tensor]) -> None:
        super().__init__()
        self.stand_ins = stand_ins

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        def other(x: Any) -> Any:
            return self.stand_ins.get(id(x), x)

        args, options = _pytree.tree_map(other, tuple(args)), _pytree.tree_map(other, dict(kwargs or {}))
        if func in (torch.nn.functional.embedding, torch.nn.functional.embedding_bag):
            options["sparse"] = False  # a sparse gradient has no second derivative
        return func(*args, **options)


def _check_graph(result: object, params: Sequence[Tensor], values: Sequence[Tensor]) -> None:
    """Raises where a closure has called backward(), or has reached a parameter past torch's functions."""
    if any(value.grad is not None for value in values):
        raise ValueError(
            "a closure must return the loss with its graph, got one that calls backward(): leave that out, this "
            "optimiser differentiates by itself"
        )
    if isinstance(result, Tensor) and result.requires_grad:
        own = {id(p) for p in params}
        if any(id(leaf) in own for leaf in _leaves_behind(result)):
            raise ValueError(
                "a closure must use its parameters in torch's own functions, got one that hands them to a custom "
                "autograd function or compiled code: call the model as it was before that"
            )


def _leaves_behind(result: Tensor) -> list[Tensor]:
    nodes = (getattr(node, "variable", None) for node in nodes_behind([result]))
    return [result] if result.is_leaf else [leaf for leaf in nodes if leaf is not None]
