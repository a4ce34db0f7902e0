"""Curvature without the second derivatives of the model: the Gauss–Newton matrix and the Fisher information."""

import functools
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from unstuck.curvature._likelihood import LIKELIHOODS, Prediction, prediction
from unstuck.curvature._operator import Operator, Where, draws, operator_of
from unstuck.curvature._outputs import LOSSES, SOFTENED, Cut, Function, cut_at
from unstuck.objective import (
    Chunk,
    Linear,
    Objective,
    along,
    both_sides,
    check_custom,
    check_linear,
    gradient_of,
    origins,
    second_derivatives,
)

Tangents = Sequence[Tensor]  # of the outputs, one a cut
Metric = Callable[[Tensor, Sequence[Cut], Chunk], Callable[[Tangents], Tangents]]  # of a loss, its cuts and its chunk


def gauss_newton(objective: Objective, *, where: Where | None = None) -> Operator:
    """The Gauss–Newton matrix Σ Jᵀ Hℓ J: the Hessian of the objective with the model replaced by its tangent.

    J are the derivatives of the model's outputs, Hℓ is the Hessian of the loss in them. The outputs are what the loss
    gives to torch's cross_entropy, mse_loss and the like, or what it marks with `outputs()`. Positive semidefinite if
    the loss is convex in them; equal to the Hessian where it is fitted perfectly or the model is linear. A product
    costs about a gradient and a half. (Schraudolph 2002, eq. 9.)

    >>> model, x, y = torch.nn.Linear(2, 1, bias=False), torch.eye(2), torch.zeros(2, 1)
    >>> objective = Objective(model, lambda m, b: torch.nn.functional.mse_loss(m(b[0]), b[1]), [(x, y)])
    >>> gauss_newton(objective) @ torch.tensor([3.0, 5.0])
    tensor([3., 5.])
    """

    known, seen = LOSSES | SOFTENED, set()

    def elsewhere(chunk: Chunk) -> Iterator[tuple[Tensor, Sequence[Tensor]]]:
        for side in both_sides(chunk.leaves):
            loss, cuts = cut_at(replace(chunk, leaves=side), known)
            yield loss, [cut.leaf for cut in cuts]

    def metric(loss: Tensor, cuts: Sequence[Cut], chunk: Chunk) -> Callable[[Tangents], Tangents]:
        leaves = [cut.leaf for cut in cuts]
        slopes = gradient_of(loss, leaves, create_graph=True)
        check_custom(loss, leaves, elsewhere(chunk), seen)
        return functools.partial(along, origins(slopes), leaves)

    return _operator(objective, where, known, metric)


def fisher(objective: Objective, *, where: Where | None = None) -> Operator:
    """The Fisher information Σ Jᵀ E[s sᵀ] J of the model's predictions, s the score of an outcome drawn from them.

    The loss is read as the negative logarithm of a likelihood: cross_entropy (or log_softmax and nll_loss) of the
    categorical distribution, binary_cross_entropy_with_logits of Bernoulli's, mse_loss of the normal one with variance
    ½. For these it equals the Gauss–Newton matrix. (Martens 2020, section 9.)
    """

    def metric(loss: Tensor, cuts: Sequence[Cut], chunk: Chunk) -> Callable[[Tangents], Tangents]:
        predictions = _predictions(loss, cuts)
        return lambda tangents: [p.exact(t) for p, t in zip(predictions, tangents, strict=True)]

    return _operator(objective, where, LIKELIHOODS, metric)


def sampled_fisher(
    objective: Objective, samples: int, *, where: Where | None = None, generator: torch.Generator | None = None
) -> Operator:
    """The Fisher information with its expectation replaced by the mean over `samples` outcomes for each prediction.

    Unbiased over the outcomes, which are drawn once: each product sees the same, and so does each call without a
    generator. `fisher` is exact and costs no more;
    this one has the factors s that approximations are built from.
    """
    if samples < 1:
        raise ValueError(f"a sampled Fisher information needs at least one sample, got samples={samples}")
    generator = draws(generator, "cpu")
    seed = int(torch.randint(2**62, (1,), generator=generator, device=generator.device))

    def metric(loss: Tensor, cuts: Sequence[Cut], chunk: Chunk) -> Callable[[Tangents], Tangents]:
        predictions = _predictions(loss, cuts)
        own = torch.Generator(loss.device).manual_seed((seed + 1_000_003 * chunk.index) % 2**63)
        scores = [[p.score(own) for _ in range(samples)] for p in predictions]
        return lambda tangents: [p.sampled(s, t) for p, s, t in zip(predictions, scores, tangents, strict=True)]

    return _operator(objective, where, LIKELIHOODS, metric)


def empirical_fisher(objective: Objective, *, where: Where | None = None) -> Operator:
    """Σ gᵢ gᵢᵀ / N: the uncentred covariance of the gradients of single examples, at their own labels.

    An example is an entry along the first dimension of the outputs: a token, where a language model flattens its
    logits. It is not the Fisher information and no curvature, and vanishes where every example is fitted (Kunstner,
    Balles, Hennig 2019). Train-mode batch norm mixes examples; then gᵢ is what one output contributes.
    """

    def metric(loss: Tensor, cuts: Sequence[Cut], chunk: Chunk) -> Callable[[Tangents], Tangents]:
        rows = {len(cut.leaf) for cut in cuts}
        if len(rows) > 1:
            raise ValueError(f"outputs with one row an example are needed, got {sorted(rows)} rows in one loss")
        slopes = torch.autograd.grad(loss, [cut.leaf for cut in cuts], retain_graph=True, materialize_grads=True)
        count = max(_examples(cut) for cut in cuts)

        def apply(tangents: Tangents) -> Tangents:
            dots = torch.stack([_rows_dot(s, t) for s, t in zip(slopes, tangents, strict=True)]).sum(0)
            return [count * s * dots.view(-1, *[1] * (s.ndim - 1)) for s in slopes]

        return apply

    return _operator(objective, where, LOSSES | LIKELIHOODS.keys(), metric)


def _operator(objective: Objective, where: Where | None, functions: Collection[Function], metric: Metric) -> Operator:
    build = functools.partial(_pulled_back, functions=functions, metric=metric, seen=set())
    return operator_of(objective, where, build)


def _pulled_back(chunk: Chunk, *, functions: Collection[Function], metric: Metric, seen: set[type]) -> Linear:
    """v ↦ Jᵀ M J v, with the metric M on the outputs of a chunk and J their derivatives."""
    loss, cuts = cut_at(chunk, functions)
    outputs = [cut.outputs for cut in cuts]
    with second_derivatives():
        bend = metric(loss, cuts, chunk)
        # the gradient of ⟨z, w⟩ is Jᵀ w; its derivative along v, in w, is J v
        weights = [torch.zeros_like(z, requires_grad=True) for z in outputs]
        flat = torch.autograd.grad(outputs, chunk.leaves, weights, create_graph=True, materialize_grads=True)
        pulled = origins(flat)
        del flat  # one number a weight
        check_linear(outputs, seen)

    def apply(directions: Sequence[Tensor]) -> Sequence[Tensor]:
        bent = bend(along(pulled, weights, directions))
        return torch.autograd.grad(outputs, chunk.leaves, bent, retain_graph=True, materialize_grads=True)

    return Linear(apply, [*pulled, *outputs, loss])


def _predictions(loss: Tensor, cuts: Sequence[Cut]) -> list[Prediction]:
    results = [cut.result for cut in cuts]
    slopes = torch.autograd.grad(loss, results, create_graph=True, materialize_grads=True)
    if any(slope.requires_grad for slope in slopes):
        raise ValueError(
            "a Fisher information needs a loss that is a sum of negative log-likelihoods, got a function of them: "
            "use gauss_newton()"
        )
    return [prediction(cut, slope) for cut, slope in zip(cuts, slopes, strict=True)]


def _rows_dot(s: Tensor, t: Tensor) -> Tensor:
    return (s * t).reshape(len(s), -1).sum(1)


def _examples(cut: Cut) -> int:
    """How many rows of the outputs take part in the loss."""
    (_, *others), kwargs = cut.arguments if cut.arguments[0] else ((None,), cut.arguments[1])
    target = kwargs.get("target", others[0] if others else None)
    if cut.leaf.ndim == 2 and isinstance(target, Tensor) and not target.is_floating_point() and target.ndim == 1:
        return int((target != kwargs.get("ignore_index", -100)).sum())
    return len(cut.leaf)
