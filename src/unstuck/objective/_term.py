"""One batch of an objective: its loss, the gradient of the loss and the curvature along a direction."""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, get_gradient_edge
from torch.utils.checkpoint import CheckpointFunction

WRITTEN_PARAMETERS = (
    "a loss must leave the parameters alone, got one that writes into them: take the step, the clipping or the "
    "max_norm= of an embedding out of it"
)
WRITTEN_BATCH = (
    "an objective needs its batches as they were when it was built, got one that was written into: pass copies, or "
    "build the objective anew"
)

Origin = GradientEdge | None  # where in a graph a tensor comes from; None for a constant


@dataclass(frozen=True, eq=False)
class Term:
    """The loss of one batch as a function of the parameters, and the number of examples it is the mean of."""

    loss: Callable[[Sequence[Tensor]], Tensor]  # the parameters, in the order of the objective -> scalar
    weight: float
    parts: Callable[[int], "Sequence[Term]"] | None = None  # a number -> terms that this one may be the mean of

    def at(self, leaves: Sequence[Tensor]) -> Tensor:
        """The loss, 0-d, if it is one."""
        check_mode()
        versions = [leaf._version for leaf in leaves]
        loss = self.loss(leaves)
        if not isinstance(loss, Tensor) or loss.numel() != 1 or not loss.is_floating_point():
            raise TypeError(
                f"the loss must be a tensor with one real number, got {_told(loss)}: return the batch's mean loss"
            )
        if versions != [leaf._version for leaf in leaves]:
            raise ValueError(WRITTEN_PARAMETERS)
        return loss.reshape(())


def check_mode() -> None:
    if torch.is_inference_mode_enabled():
        raise ValueError("an objective needs graphs, got torch.inference_mode(): ask outside of it, or in no_grad()")


def gradient_of(loss: Tensor, leaves: Sequence[Tensor], *, create_graph: bool = False) -> list[Tensor]:
    """The gradient of a loss, zero for a parameter that it does not use."""
    _check_functions(loss, twice=create_graph)
    found: Sequence[Tensor | None] = (
        torch.autograd.grad(loss, leaves, create_graph=create_graph, allow_unused=True) if loss.requires_grad else ()
    )
    if all(g is None for g in found):
        raise ValueError(
            "the loss must depend on a parameter, got one that depends on none: compute it with the model that loss() "
            "is given, without detach(), item() or no_grad()"
        )
    return [torch.zeros_like(leaf) if g is None else g for g, leaf in zip(found, leaves, strict=True)]


def origins(tensors: Sequence[Tensor]) -> list[Origin]:
    """Where tensors come from: enough to differentiate them, while their numbers, one a weight, can be forgotten."""
    return [get_gradient_edge(tensor) if tensor.requires_grad else None for tensor in tensors]


def along(slopes: Sequence[Origin], leaves: Sequence[Tensor], directions: Sequence[Tensor]) -> Sequence[Tensor]:
    """The gradient of ⟨slopes, directions⟩; with those of a loss it is, by symmetry, the curvature along them."""
    curved = [(s, d) for s, d in zip(slopes, directions, strict=True) if s is not None]
    if not curved:  # they are constant
        return [torch.zeros_like(leaf) for leaf in leaves]
    slopes, ways = zip(*curved, strict=True)
    return torch.autograd.grad(slopes, leaves, ways, retain_graph=True, materialize_grads=True)


@contextlib.contextmanager
def second_derivatives() -> Iterator[None]:
    """Says in one sentence that the loss has none, where torch says so in one of its many ways."""
    try:
        yield
    except RuntimeError as error:
        if not any(sign in str(error) for sign in _ONCE):
            raise
        raise ValueError(
            f"curvature needs second derivatives, got a loss that torch differentiates once ({_sentence(error)}): "
            "compute it from operations that have them"
        ) from error


def own_functions(roots: Sequence[Tensor]) -> list[Any]:
    """The nodes of custom autograd functions in the graph that leads to the roots.

    Raises for a reentrant checkpoint: for torch, weights that it hides take no part in the loss.
    """
    found = [node for node in nodes_behind(roots) if hasattr(node, "_forward_cls")]
    if any(getattr(node, "_forward_cls", None) is CheckpointFunction for node in found):
        raise ValueError(
            "a loss needs all its weights in one graph, got a reentrant checkpoint, which hides them: call "
            "checkpoint() with use_reentrant=False"
        )
    return found


def _check_functions(loss: Tensor, *, twice: bool) -> None:
    """Raises where a graph holds a function marked as differentiable once, if it is to be differentiated twice.

    torch itself complains only if the slope that reaches it requires a gradient, and otherwise takes its derivative for
    a constant.
    """
    for node in own_functions([loss]):
        function = node._forward_cls  # noqa: SLF001
        if twice and getattr(function.backward, "__code__", None) is _MARKED:
            raise RuntimeError(f"{function.__name__} is marked with @once_differentiable")


def nodes_behind(roots: Sequence[Tensor | Origin]) -> Iterator[torch.autograd.graph.Node]:
    """The nodes of the graph that leads to the roots, each once."""
    seen = set()
    waiting = [root.grad_fn if isinstance(root, Tensor) else root and root.node for root in roots]
    while waiting:
        node = waiting.pop()
        if node is not None and node not in seen:
            seen.add(node)
            waiting += [parent for parent, _ in node.next_functions]
            yield node


_MARKED = torch.autograd.function.once_differentiable(nodes_behind).__code__
_ONCE = ("twice", "double backward", "once_differentiable", "is not implemented", "not differentiable")


def _told(loss: Any) -> str:
    if isinstance(loss, Tensor):
        return f"a {loss.dtype} of shape {tuple(loss.shape)}"
    return repr(loss) if loss is None or isinstance(loss, int | float | complex) else f"a {type(loss).__name__}"


def _sentence(error: Exception) -> str:
    return str(error).strip().partition("\n")[0].partition(". ")[0]
