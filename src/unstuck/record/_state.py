"""Where the weights and the optimiser stood at a step, as copies that nobody else writes into."""

import importlib
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from unstuck.record._ranks import ranked


@dataclass(frozen=True, eq=False)
class State:
    """Weights, and the optimiser that moves them, as they stood before a step."""

    step: int  # how many steps had been taken
    weights: tuple[Tensor, ...]  # one for each known parameter
    optimizer: "Optimizer | None"

    @property
    def finite(self) -> bool:
        return all(bool(w.isfinite().all()) for w in self.weights)


@dataclass(frozen=True, eq=False)
class Optimizer:
    """An optimiser taken apart: enough to build another one of its kind over copies of the weights."""

    kind: str  # dotted name of the class
    groups: tuple[Mapping[str, Any], ...]  # options of each group, without its parameters
    members: tuple[tuple[int, ...], ...]  # the parameters of each group, by their index
    state: Mapping[int, Mapping[str, Any]]  # by the index of the parameter

    def build(self, weights: Sequence[Tensor]) -> torch.optim.Optimizer:
        """The optimiser over `weights` (leaves, one for each known parameter) with its state copied.

        ValueError where the class cannot be found or built from its groups' options.
        """
        module, _, name = self.kind.rpartition(".")
        groups = [
            {**options, "params": [weights[k] for k in members]}
            for options, members in zip(self.groups, self.members, strict=True)
        ]
        try:
            kind = getattr(importlib.import_module(module), name)
            built: torch.optim.Optimizer = kind(groups)
        except (ImportError, AttributeError, TypeError, ValueError) as error:
            raise ValueError(f"an optimiser like the script's ({self.kind}) cannot be built again: {error}") from None
        for k, values in self.state.items():
            built.state[weights[k]] = _copied(values)
        return built


def moved(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    """The parameters that an optimiser moves, group by group."""
    return [p for g in optimizer.param_groups for p in g["params"]]


def snapshot(
    step: int, leaves: Sequence[Tensor], optimizer: torch.optim.Optimizer | None, *, copy: bool = True
) -> State:
    """Copies of the weights and of the optimiser's state; without `copy` these themselves, to be written at once."""
    weights = tuple(p.detach().clone() if copy else p.detach() for p in leaves)
    return State(step, weights, None if optimizer is None else taken_apart(optimizer, leaves, copy=copy))


def taken_apart(optimizer: torch.optim.Optimizer, leaves: Sequence[Tensor], *, copy: bool = True) -> Optimizer:
    index = {id(p): k for k, p in enumerate(leaves)}
    kind = type(optimizer)
    return Optimizer(
        kind=f"{kind.__module__}.{kind.__qualname__}",
        groups=tuple(
            {k: v.item() if isinstance(v, Tensor) else v for k, v in g.items() if k != "params"}
            for g in optimizer.param_groups
        ),
        members=tuple(tuple(index[id(p)] for p in g["params"]) for g in optimizer.param_groups),
        state={
            index[id(p)]: _copied(values) if copy else values for p, values in optimizer.state.items() if id(p) in index
        },
    )


def pack_state(state: State) -> dict[str, Any]:
    """The state as plain values and tensors, for torch.save."""
    optimizer = None
    if state.optimizer is not None:
        o = state.optimizer
        optimizer = {
            "kind": o.kind,
            "groups": [{k: v for k, v in g.items() if _plain(v)} for g in o.groups],
            "members": [list(m) for m in o.members],
            "state": {k: {n: v for n, v in s.items() if _plain(v)} for k, s in o.state.items()},
        }
    return {"step": state.step, "weights": list(state.weights), "optimizer": optimizer}


def unpack_state(data: Mapping[str, Any], *, moved: bool = False) -> State:
    """The state that `pack_state` packed; `moved` to the CPU, where no step is captured for a GPU."""
    o = data["optimizer"]
    optimizer = None
    if o is not None:
        groups = tuple({**g, "capturable": False} if moved and "capturable" in g else g for g in o["groups"])
        optimizer = Optimizer(o["kind"], groups, tuple(tuple(m) for m in o["members"]), o["state"])
    return State(data["step"], tuple(data["weights"]), optimizer)


class Shelf:
    """States on disk, for weights too large to be held twice: the one at the start and the latest two."""

    def __init__(self, folder: Path, rank: int | None) -> None:
        self._folder = folder
        self._rank = rank
        self._latest: deque[Path] = deque()

    def put(self, state: State) -> None:
        """Writes a state, whole or not at all; OSError or RuntimeError where the disk refuses."""
        path = self._folder / ranked(f"{_SHELVED}{state.step:09}.pt", self._rank)
        part = path.with_suffix(".part")
        try:
            torch.save(pack_state(state), part)
            part.replace(path)
        finally:
            part.unlink(missing_ok=True)
        if state.step:
            self._latest.append(path)
        while len(self._latest) > 2:
            self._latest.popleft().unlink(missing_ok=True)


def shelf(folder: Path, rank: int | None) -> list[Path]:
    """The files of the states on the shelf of a run folder, by step."""
    return sorted(folder.glob(ranked(f"{_SHELVED}{'[0-9]' * 9}.pt", rank)))


def shelved(paths: Sequence[Path], *, moved: bool = False) -> list[State]:
    """The states in these files; `moved` to the CPU, or where they were."""
    place = "cpu" if moved else None
    return [unpack_state(torch.load(path, map_location=place, weights_only=True), moved=moved) for path in paths]


_SHELVED = "state-"


def _copied(x: Any) -> Any:
    if isinstance(x, Tensor):
        return x.detach().clone()
    if isinstance(x, Mapping):
        return {k: _copied(v) for k, v in x.items()}
    return [_copied(v) for v in x] if isinstance(x, list) else x


def _plain(x: Any) -> bool:
    if isinstance(x, (tuple, list)):
        return all(_plain(y) for y in x)
    return x is None or isinstance(x, (bool, int, float, str, Tensor))
