"""Large batches in parts: the same mean, from smaller activations."""

import math
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from unstuck.objective._chunks import WORK, graph_storages
from unstuck.objective._term import Term, gradient_of

LARGEST = (
    32 * 2**20
)  # bytes; larger blocks glibc maps anew each time, and to clear their pages takes longer than to work
GRAPH = 3  # how many times the graph of the loss that of its gradient takes, at most


class Division:
    """The terms of an objective, in parts where that is wanted and exact; found out once, at the first evaluation."""

    def __init__(self, terms: Sequence[Term], memory: float | None) -> None:
        self._terms = tuple(terms)
        self._memory = memory
        self._divided: tuple[Term, ...] | None = None

    def __call__(self, leaves: Sequence[Tensor]) -> tuple[Term, ...]:
        """The terms to compute with; the first one is tried at `leaves`."""
        if self._divided is None:
            self._divided = self._parts(leaves) if any(term.parts for term in self._terms) else self._terms
        return self._divided

    def _parts(self, leaves: Sequence[Tensor]) -> tuple[Term, ...]:
        largest = max(self._terms, key=lambda term: term.weight)
        with torch.enable_grad():
            loss = largest.at(leaves)
            count = self._wanted(graph_storages([loss], leaves).values(), leaves[0].device)
            if count < 2 or largest.parts is None or not _is_mean(loss, largest.parts(count), largest.weight, leaves):
                return self._terms
        rows = largest.weight / count
        return tuple(
            part
            for term in self._terms
            for part in ([term] if term.parts is None else term.parts(math.ceil(term.weight / rows)))
        )

    def _wanted(self, storages: Iterable[int], device: torch.device) -> int:
        """Into how many parts the batch should go, by the storages that its loss needs."""
        sizes = list(storages)
        wanted = 1
        if device.type == "cpu" and sizes:
            wanted = math.ceil(max(sizes) / LARGEST)
        if self._memory is not None:
            wanted = max(wanted, math.ceil(GRAPH * (1 + WORK) * sum(sizes) / self._memory))
        return wanted


def _is_mean(loss: Tensor, parts: Sequence[Term], weight: float, leaves: Sequence[Tensor]) -> bool:
    """Whether a loss and its gradient are the weighted means of those of the parts, up to rounding in float32."""
    if len(parts) < 2 or not loss.isfinite() or not math.isclose(sum(part.weight for part in parts), weight):
        return False
    rest = gradient_of(loss, leaves)
    value, reach = loss.detach().double(), 0.0
    for part in parts:
        share = part.weight / weight
        piece = part.at(leaves)
        gradient = gradient_of(piece, leaves)
        value = value - share * piece.detach().double()
        rest = [r - share * g for r, g in zip(rest, gradient, strict=True)]
        reach += share * _norm(gradient)
    return abs(float(value)) <= 1e-5 * abs(float(loss.detach())) and _norm(rest) <= 1e-4 * reach


def _norm(pieces: Sequence[Tensor]) -> float:
    return math.sqrt(math.fsum(float(piece.detach().double().square().sum()) for piece in pieces))
