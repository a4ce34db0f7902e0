"""What kind of point an optimiser has ended at, whatever it says of itself."""

import importlib
import importlib.util
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from torch import Tensor, nn

from unstuck.critical._point import CriticalPoint, examine
from unstuck.objective import Objective, unwrapped


@dataclass(frozen=True, eq=False)
class Verification:
    """The point where an optimiser ended, beside what it reported."""

    point: CriticalPoint
    success: bool | None  # as reported; None where nothing was
    loss: float | None  # as reported

    @property
    def holds(self) -> bool:
        """Whether the point is a minimum by eigenvalues that have converged, and its loss the reported one."""
        agrees = self.loss is None or abs(self.loss - self.point.loss) <= 1e-3 * abs(self.point.loss) + 1e-12
        return self.point.kind == "minimum" and self.point.converged and agrees

    def __str__(self) -> str:
        said = {True: "The optimiser reports success.", False: "The optimiser reports failure.", None: ""}[self.success]
        loss = "" if self.loss is None else f"It reports a loss of {self.loss:.6g}; here it is {self.point.loss:.6g}."
        return " ".join(filter(None, [said, loss, str(self.point)]))


def verify(objective: Objective, found: Any, *, generator: torch.Generator | None = None) -> Verification:
    """Whether what an optimiser returned is a minimum of the objective.

    `found` is a SciPy OptimizeResult, a trained model, a state dict, the weights as one flat vector in the order of the
    objective, or the path of a file with a state dict, alone or within a checkpoint: one that torch.save wrote, of
    which only weights are read, or a .safetensors file. Buffers and frozen weights stay those of the objective.
    """
    point = examine(objective.at(_weights(objective, found)), generator=generator)
    success, loss = getattr(found, "success", None), getattr(found, "fun", None)
    return Verification(point, None if success is None else bool(success), None if loss is None else float(loss))


def _weights(objective: Objective, found: Any) -> Tensor:
    if isinstance(found, str | Path):
        found = _read(Path(found))
    if isinstance(found, nn.Module):
        found = dict(unwrapped(found).named_parameters())
    elif hasattr(found, "x"):
        found = found.x
    if isinstance(found, Mapping):
        found = _in_order(objective, found)
    if not isinstance(found, Tensor | Sequence) and not hasattr(found, "__array__"):
        raise TypeError(
            f"a SciPy result, a model, a state dict, its path or a flat vector is needed, got {type(found).__name__}"
        )
    flat = torch.as_tensor(found).detach().reshape(-1)
    return flat.to(device=objective.device, dtype=objective.dtype)


def _in_order(objective: Objective, found: Mapping[str, Any]) -> Tensor:
    """The weights of a state dict, or of one within a checkpoint, flat in the order of the objective."""
    plain = [{_plain(key): value for key, value in part.items()} for part in _state_dicts(found)]
    state = next((part for part in plain if part.keys() >= set(objective.names)), plain[0])
    missing = [name for name in objective.names if name not in state]
    if missing:
        raise ValueError(f"weights are needed for every parameter of the objective, got none for {missing[0]}")
    pieces = [torch.as_tensor(state[name]).detach() for name in objective.names]
    for name, piece, shape in zip(objective.names, pieces, objective.shapes, strict=True):
        if piece.shape != shape:
            raise ValueError(f"weights of the objective's shapes are needed, got {tuple(piece.shape)} for {name}")
    return torch.cat([piece.reshape(-1) for piece in pieces])


def _state_dicts(found: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    return [found, *(part for part in found.values() if isinstance(part, Mapping))]


def _plain(name: Any) -> str:
    """A parameter's name without those of the wrappers of `unwrapped`."""
    return ".".join(part for part in str(name).split(".") if part != "_orig_mod").removeprefix("module.")


def _read(path: Path) -> Any:
    """What a file holds, on the CPU."""
    if path.suffix == ".safetensors":
        if importlib.util.find_spec("safetensors") is None:
            raise ValueError(f"the package safetensors is needed for {path.name}, got none: install it")
        return importlib.import_module("safetensors.torch").load_file(path)
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except (UnpicklingError, RuntimeError, EOFError) as error:
        raise ValueError(
            f"a state dict that torch.save wrote is needed, got {path.name} with something else: write it with "
            "torch.save(model.state_dict(), path)"
        ) from error
