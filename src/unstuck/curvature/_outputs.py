"""Where a loss takes the outputs of the model: there its graph is cut into the model's part and the loss's own."""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode, handle_torch_function, has_torch_function_unary

from unstuck.objective import Chunk, nodes_behind

Function = Callable[..., Any]


def outputs(z: Tensor) -> Tensor:
    """z itself, marked in a loss as the outputs of the model, for `gauss_newton` and its kin.

    Needed where the loss on them is none of torch's, as in `lambda model, batch: my_loss(outputs(model(x)), y)`.
    """
    if has_torch_function_unary(z):
        return handle_torch_function(outputs, (z,), z)
    return z


LOSSES: frozenset[Function] = frozenset(
    {
        outputs,
        F.cross_entropy,
        F.mse_loss,
        F.binary_cross_entropy_with_logits,
        F.huber_loss,
        F.smooth_l1_loss,
        F.poisson_nll_loss,
    }
)
SOFTENED: frozenset[Function] = frozenset({F.log_softmax, torch.log_softmax, Tensor.log_softmax})


@dataclass(frozen=True, eq=False)
class Cut:
    """One place where outputs enter a loss."""

    function: Function
    arguments: tuple[Sequence[Any], Mapping[str, Any]]  # its own, the outputs replaced by the leaf
    outputs: Tensor  # with the graph of the model
    leaf: Tensor  # the same, where the graph of the loss begins
    result: Tensor


def cut_at(chunk: Chunk, functions: Collection[Function]) -> tuple[Tensor, list[Cut]]:
    """The loss of a chunk as a function of the outputs alone, and the places where these enter it."""
    cutter = _Cutter(functions)
    with cutter:
        loss = chunk.loss()
    cuts = cutter.cuts
    if not cuts:
        raise ValueError(
            "the outputs of the model are needed, got a loss that calls neither cross_entropy() nor another known "
            "function on them: mark them, as in my_loss(outputs(model(x)), y)"
        )
    known = {id(leaf) for leaf in chunk.leaves}
    if known & _leaves_behind([loss]):
        raise ValueError(
            "the loss must see the weights through the outputs only, got one that sees them past these, as a penalty "
            "does: leave it out and add its Hessian, as in gauss_newton(objective) + decay * identity(objective.size)"
        )
    if {id(cut.leaf) for cut in cuts} & _leaves_behind([cut.outputs for cut in cuts]):
        raise ValueError(
            "outputs must not depend on each other, got one computed from another: mark the last with outputs()"
        )
    if not loss.requires_grad:
        raise ValueError(
            "the loss must depend on the outputs, got one that depends on none: compute it without detach(), item() or "
            "no_grad()"
        )
    if not known & _leaves_behind([cut.outputs for cut in cuts]):
        raise ValueError(
            "the outputs must depend on a parameter, got some that depend on none: compute them with the model that "
            "loss() is given, without detach(), item() or no_grad()"
        )
    return loss, cuts


class _Cutter(TorchFunctionMode):
    def __init__(self, functions: Collection[Function]) -> None:
        super().__init__()
        self.functions = functions
        self.cuts: list[Cut] = []
        self.marked = False

    def __torch_function__(
        self, func: Function, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        wanted = func in self.functions
        self.marked |= wanted and func is outputs
        wanted &= func is outputs or not self.marked
        z = args[0] if args else kwargs.get("input")
        if not wanted or not isinstance(z, Tensor) or not z.requires_grad:
            return func(*args, **kwargs)
        leaf = z.detach().requires_grad_()
        given = ((leaf, *args[1:]), kwargs) if args else ((), {**kwargs, "input": leaf})
        result = leaf.view_as(leaf) if func is outputs else func(*given[0], **given[1])
        self.cuts.append(Cut(func, given, z, leaf, result))
        return result


def _leaves_behind(roots: Sequence[Tensor]) -> set[int]:
    """The identities of the leaves that a graph comes down to."""
    found = {id(root) for root in roots if root.is_leaf}
    variables = (getattr(node, "variable", None) for node in nodes_behind(roots))
    return found | {id(variable) for variable in variables if variable is not None}
