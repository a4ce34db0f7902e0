"""Graphs that are kept where they fit a memory budget and built again for each product where they do not."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from unstuck.objective._term import Origin, nodes_behind

Directions = Sequence[Tensor]  # one tensor a parameter

WORK = 1.5  # what a product takes while it runs, in graphs; up to 1.4 was measured in resident memory


@dataclass(frozen=True, eq=False)
class Chunk:
    """The loss of one batch, or of a part of it, ready to be differentiated."""

    at: Callable[[Sequence[Tensor]], Tensor]  # the parameters -> the loss
    leaves: Sequence[Tensor]  # the parameters
    weight: float
    index: int  # no two chunks, on all ranks, have the same

    def loss(self) -> Tensor:
        """0-d and finite."""
        loss = self.at(self.leaves)
        if not loss.isfinite():
            raise ValueError(f"curvature needs a finite loss, got {loss.item()}: look at the loss here first")
        return loss


@dataclass(frozen=True, eq=False)
class Linear:
    """A linear map on directions that was read off a graph, which lives as long as the map does."""

    apply: Callable[[Directions], Directions]
    roots: Sequence[Tensor | Origin]  # from which the whole graph can be reached


@dataclass(frozen=True)
class Plan:
    """What became of the graphs of an objective: how many are kept and how many are built for each product."""

    kept: int
    rebuilt: int
    bytes: int  # of the kept graphs
    largest: int  # bytes of the largest graph
    budget: int  # bytes

    def __str__(self) -> str:
        return (
            f"{self.kept} of {self.kept + self.rebuilt} graphs are kept in {self.bytes / 1e6:.3g} MB of "
            f"{self.budget / 1e6:.3g} MB, {self.rebuilt} are built again for each product"
        )


class Graphs:
    """The linear maps of all chunks, in order. The first pass measures them and decides which ones stay."""

    def __init__(
        self, chunks: Callable[[], Sequence[Chunk]], build: Callable[[Chunk], Linear], memory: float | None
    ) -> None:
        self._chunks = chunks
        self._build = build
        self._memory = memory
        self._kept: dict[int, Linear] = {}
        self._plan: Plan | None = None

    @property
    def plan(self) -> Plan | None:
        """None before the first pass."""
        return self._plan

    def __iter__(self) -> Iterator[Callable[[Directions], Directions]]:
        return self.built_by(self._build)

    def built_by(self, build: Callable[[Chunk], Linear]) -> Iterator[Callable[[Directions], Directions]]:
        """The maps, those that are not kept yet from another function, which may look at what it builds."""
        chunks = self._chunks()
        if self._plan is not None:
            for index, chunk in enumerate(chunks):
                yield (self._kept.get(index) or build(chunk)).apply
            return
        self._kept.clear()  # what a pass has left that an exception cut short
        limit = self._memory if self._memory is not None else budget(chunks[0].leaves[0].device) if chunks else 0
        held: dict[int, int] = {}  # storages; the graphs share some, as the rows of one tensor of data
        largest, rest = 0, math.fsum(chunk.weight for chunk in chunks)
        for index, chunk in enumerate(chunks):
            graph = build(chunk)
            storages = graph_storages(graph.roots, chunk.leaves)
            self._check(sum(storages.values()))
            added = sum(size for address, size in storages.items() if address not in held)
            largest = max(largest, added)
            taken = sum(held.values())
            expected = taken + (added * rest / chunk.weight if chunk.weight else added)
            rest -= chunk.weight
            all_fit = expected + WORK * largest <= limit and len(self._kept) == index
            room = WORK * largest + (0 if all_fit else largest)  # for the product, and for a graph that is built for it
            if taken + added + room <= limit:
                self._kept[index] = graph
                held |= storages
            yield graph.apply
            del graph  # or two would be alive while the next one is built
        self._plan = Plan(len(self._kept), len(chunks) - len(self._kept), sum(held.values()), largest, int(limit))

    def _check(self, size: int) -> None:
        needed = (1 + WORK) * size
        if self._memory is not None and needed > self._memory:
            raise ValueError(
                f"the graph of one batch and a product take {needed / 1e6:.4g} MB, got memory={self._memory / 1e6:.4g} "
                "MB: give smaller batches or more memory"
            )


def graph_storages(roots: Sequence[Tensor | Origin], leaves: Sequence[Tensor] = ()) -> Mapping[int, int]:
    """The bytes of each storage that the graph behind `roots` holds, by address; those of the leaves apart."""
    known = {leaf.untyped_storage().data_ptr() for leaf in leaves}
    held: dict[int, int] = {}
    for node in nodes_behind(roots):
        for tensor in _saved(node):
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in known:
                held[storage.data_ptr()] = storage.nbytes()
    return held


def budget(device: torch.device) -> float:
    """Half of the memory that is free now."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0] / 2
    return min(_available(), _left_in_group()) / 2


def _saved(node: torch.autograd.graph.Node) -> Iterator[Tensor]:
    kind = type(node)
    if kind not in _SAVED:
        _SAVED[kind] = [name for name in dir(kind) if name.startswith("_saved_") or name == "saved_tensors"]
    for name in _SAVED[kind]:
        try:
            saved = getattr(node, name)
        except RuntimeError:  # it was freed already
            continue
        for part in saved if isinstance(saved, tuple | list) else (saved,):
            if isinstance(part, Tensor) and part.layout == torch.strided:
                yield part


_SAVED: dict[type, list[str]] = {}  # the attributes that hold tensors, for each kind of node


def _available() -> float:
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return 1024 * float(line.split()[1])
    except OSError:  # not Linux
        pass
    return 4e9


def _left_in_group() -> float:
    """What the limits of a container leave of the memory."""
    try:
        limit, used = (Path(f"/sys/fs/cgroup/memory.{what}").read_text().strip() for what in ("max", "current"))
        return math.inf if limit == "max" else float(limit) - float(used)
    except OSError:
        return math.inf
