"""What kind of point an optimiser has ended at, whatever it says of itself."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from unstuck.critical._point import CriticalPoint, examine
from unstuck.objective import Objective


@dataclass(frozen=True, eq=False)
class Verification:
    """The point where an optimiser ended, beside what it reported."""

    point: CriticalPoint
    success: bool | None  # as reported; None where nothing was
    loss: float | None  # as reported

    @property
    def holds(self) -> bool:
        """Whether the point is a minimum, and its loss the reported one."""
        agrees = self.loss is None or abs(self.loss - self.point.loss) <= 1e-3 * abs(self.point.loss) + 1e-12
        return self.point.kind == "minimum" and agrees

    def __str__(self) -> str:
        said = {True: "The optimiser reports success.", False: "The optimiser reports failure.", None: ""}[self.success]
        loss = "" if self.loss is None else f"It reports a loss of {self.loss:.6g}; here it is {self.point.loss:.6g}."
        return " ".join(filter(None, [said, loss, str(self.point)]))


def verify(objective: Objective, found: Any, *, generator: torch.Generator | None = None) -> Verification:
    """Whether what an optimiser returned is a minimum of the objective.

    `found` is a SciPy OptimizeResult, a trained model, a state dict, or the weights as one flat vector in the order of
    the objective.
    """
    point = examine(objective.at(_weights(objective, found)), generator=generator)
    success, loss = getattr(found, "success", None), getattr(found, "fun", None)
    return Verification(point, None if success is None else bool(success), None if loss is None else float(loss))


def _weights(objective: Objective, found: Any) -> Tensor:
    if isinstance(found, nn.Module):
        found = dict(found.named_parameters())
    elif hasattr(found, "x"):
        found = found.x
    if isinstance(found, Mapping):
        missing = [name for name in objective.names if name not in found]
        if missing:
            raise ValueError(f"weights are needed for every parameter of the objective, got none for {missing[0]}")
        found = torch.cat([torch.as_tensor(found[name]).detach().reshape(-1) for name in objective.names])
    if not isinstance(found, Tensor | Sequence) and not hasattr(found, "__array__"):
        raise TypeError(f"a SciPy result, a model, a state dict or a flat vector is needed, got {type(found).__name__}")
    flat = torch.as_tensor(found).detach().reshape(-1)
    return flat.to(device=objective.device, dtype=objective.dtype)
