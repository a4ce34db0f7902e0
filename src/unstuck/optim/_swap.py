"""Stochastic weight averaging in parallel."""

import copy
from collections.abc import Callable, Iterable
from concurrent.futures import Executor
from typing import Any, TypeVar

from torch import nn
from torch.optim.swa_utils import AveragedModel, update_bn

from unstuck.optim._renorm import BatchRenorm1d, BatchRenorm2d

Model = TypeVar("Model", bound=nn.Module)


def swap(
    model: Model,
    refine: Callable[[Model, int], Model],
    workers: int,
    *,
    batches: Iterable[Any] | None = None,
    executor: Executor | None = None,
) -> Model:
    """The mean of `workers` copies of a model that are refined apart: phases two and three of SWAP.

    Gupta, Serrano and DeCoste (2020), algorithm 1; lecture 000, "Fish and bear's paws". Phase one is yours: train
    `model` with a large batch and a high rate, and stop before it fits the training set. Here `refine(copy, worker)`
    trains a copy with a small batch, in an order of its own that the number of the worker seeds, and returns it; in
    turn, or side by side in an `executor` (one of processes needs a `refine` that can be pickled). Then the weights are
    averaged, by torch.optim.swa_utils.AveragedModel, and the statistics of batch norm are taken anew by update_bn, from
    `batches` of inputs or of tuples that begin with them: a model that has such layers needs them. `model` stays as it
    is.
    """
    if workers < 1:
        raise ValueError(f"at least one worker is needed, got workers={workers}")
    layers = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]  # noqa: SLF001, as update_bn
    if batches is None and any(layer.running_mean is not None for layer in layers):
        raise ValueError("a model with batch norm needs batches= to take its statistics anew, got none")
    if any(isinstance(m, (BatchRenorm1d, BatchRenorm2d)) for m in model.modules()):
        raise ValueError(
            "weights are averaged with batch norm, got batch renormalisation: nothing takes its statistics anew"
        )
    side_by_side = map if executor is None else executor.map
    averaged = None
    for refined in side_by_side(refine, (copy.deepcopy(model) for _ in range(workers)), range(workers)):
        if not isinstance(refined, nn.Module):
            raise TypeError(f"refine(model, worker) returns the model that it trained, got {type(refined).__name__}")
        averaged = AveragedModel(refined) if averaged is None else averaged
        averaged.update_parameters(refined)
    assert averaged is not None
    if batches is not None:
        update_bn(batches, averaged)
    return averaged.module  # pyright: ignore[reportReturnType]
