"""What the known losses are the negative log-likelihoods of, and the scores of outcomes drawn from these."""

import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from unstuck.curvature._outputs import Cut, Function


@dataclass(frozen=True, eq=False)
class Prediction:
    """The distributions that a model predicts at one cut: one an entry of its outputs, or a row of classes."""

    share: Tensor  # of each distribution in the loss; has the dimensions of the outputs
    dot: Callable[[Tensor, Tensor], Tensor]  # of two tangents of the outputs, for each distribution
    covariance: Callable[[Tensor], Tensor]  # E[s sᵀ] times a tangent, s the score ∂(−log p)/∂z of an outcome
    score: Callable[[torch.Generator], Tensor]  # of an outcome drawn

    def exact(self, tangent: Tensor) -> Tensor:
        return self.share * self.covariance(tangent)

    def sampled(self, scores: Sequence[Tensor], tangent: Tensor) -> Tensor:
        total = torch.zeros_like(tangent)
        for s in scores:
            total = total + s * self.dot(s, tangent)
        return self.share * total / len(scores)


def prediction(cut: Cut, slope: Tensor) -> Prediction:
    """The distributions that the loss at a cut is the likelihood of; `slope` is the derivative by that loss."""
    args, kwargs = cut.arguments
    bound = inspect.signature(cut.function).bind(*args, **kwargs)
    bound.apply_defaults()
    given = bound.arguments
    altered = [name for name in _ALTERING if given.get(name) is not None and not _is_zero(given[name])]
    if altered:
        raise ValueError(
            f"a Fisher information needs the plain likelihood, got {cut.function.__name__}() with {altered[0]}=: use "
            "gauss_newton(), which takes any convex loss"
        )
    return LIKELIHOODS[cut.function](cut.leaf.detach(), given, slope.detach())


_ALTERING = ("weight", "pos_weight", "label_smoothing", "size_average", "reduce")


def _is_zero(value: Any) -> bool:
    return isinstance(value, float | int) and value == 0


def _categorical(z: Tensor, given: Mapping[str, Any], slope: Tensor) -> Prediction:
    dim = 0 if z.ndim == 1 else 1
    p = z.softmax(dim)

    def score(generator: torch.Generator) -> Tensor:
        return p - _drawn(p, dim, generator)

    def covariance(t: Tensor) -> Tensor:
        return p * t - p * (p * t).sum(dim, keepdim=True)

    return Prediction(_by_row(z, given, slope, dim), _row_dot(dim), covariance, score)


def _categorical_of_logarithms(z: Tensor, given: Mapping[str, Any], slope: Tensor) -> Prediction:
    dim = 0 if z.ndim == 1 else 1
    p = z.exp()

    def score(generator: torch.Generator) -> Tensor:
        return -_drawn(p, dim, generator)

    return Prediction(_by_row(z, given, slope, dim), _row_dot(dim), lambda t: p * t, score)


def _bernoulli(z: Tensor, given: Mapping[str, Any], slope: Tensor) -> Prediction:
    p = z.sigmoid()

    def score(generator: torch.Generator) -> Tensor:
        return p - torch.bernoulli(p, generator=generator)

    return Prediction(_by_entry(z, given, slope), torch.mul, lambda t: p * (1 - p) * t, score)


def _normal(z: Tensor, given: Mapping[str, Any], slope: Tensor) -> Prediction:
    def score(generator: torch.Generator) -> Tensor:  # 2 (z − y) with y of variance ½, as (z − y)² says
        noise = torch.randn(z.shape, generator=generator, dtype=z.dtype, device=z.device)
        return math.sqrt(2) * noise

    return Prediction(_by_entry(z, given, slope), torch.mul, lambda t: 2 * t, score)


LIKELIHOODS: dict[Function, Callable[[Tensor, Mapping[str, Any], Tensor], Prediction]] = {
    F.cross_entropy: _categorical,
    F.nll_loss: _categorical_of_logarithms,
    F.binary_cross_entropy_with_logits: _bernoulli,
    F.mse_loss: _normal,
}


def _drawn(p: Tensor, dim: int, generator: torch.Generator) -> Tensor:
    """One outcome for each row of probabilities, one-hot."""
    rows = p.movedim(dim, -1)
    flat = torch.multinomial(rows.reshape(-1, rows.shape[-1]), 1, generator=generator)
    return F.one_hot(flat.view(rows.shape[:-1]), rows.shape[-1]).to(p).movedim(-1, dim)


def _row_dot(dim: int) -> Callable[[Tensor, Tensor], Tensor]:
    return lambda s, t: (s * t).sum(dim, keepdim=True)


def _by_row(z: Tensor, given: Mapping[str, Any], slope: Tensor, dim: int) -> Tensor:
    """The share of each row of classes, 0 where its target is to be ignored."""
    target = given["target"]
    part = z.new_ones(z.select(dim, 0).shape)  # one for each prediction
    if not target.is_floating_point():  # but a class, which may be marked as no class
        part = (target != given["ignore_index"]).to(z)
    count = part.sum() if given["reduction"] == "mean" else 1
    return (part * slope / count).unsqueeze(dim)


def _by_entry(z: Tensor, given: Mapping[str, Any], slope: Tensor) -> Tensor:
    return slope / (z.numel() if given["reduction"] == "mean" else 1) + torch.zeros_like(z)
