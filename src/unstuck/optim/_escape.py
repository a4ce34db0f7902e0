"""An optimiser that notices that another one stands at a saddle, and steps off it."""

from typing import Any

import torch
from torch import Tensor

from unstuck.critical import escape, examine
from unstuck.optim._closure import Closure, objective_of, write
from unstuck.optim._elementwise import Group, refuse_complex
from unstuck.optim._second_order import SecondOrder


class NegativeCurvatureEscape(torch.optim.Optimizer):
    """Another optimiser, stepped off the saddles that it comes to.

    Where the gradient is at most `small` long, the point is examined. If the smallest eigenvalue of the Hessian is
    negative beyond its error, the loss is searched along its eigenvector to both sides, and the step goes to the lower
    end, if that is lower; otherwise the inner optimiser goes on, and `wait` steps pass before the next look. An
    examination takes as many products as there are weights up to 500, at most 300 beyond.

    `step(closure)` needs a closure that returns the loss with its graph, and does *not* call backward(): the inner
    optimiser is handed the gradient. It may be any that steps along `.grad`, or one of this room. The groups are those
    of the inner one, so that schedulers work on either.

    >>> w = torch.nn.Parameter(torch.zeros(2))
    >>> optimizer = NegativeCurvatureEscape(torch.optim.SGD([w], lr=0.1))
    >>> loss = optimizer.step(lambda: (1 - w[0] * w[1]) ** 2)
    >>> round((w[0] * w[1]).item(), 4)
    1.0
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        *,
        small: float = 1e-3,
        wait: int = 100,
        generator: torch.Generator | None = None,
    ) -> None:
        if not isinstance(optimizer, torch.optim.Optimizer):
            raise TypeError(f"an optimiser to be stepped off saddles is needed, got {type(optimizer).__name__}")
        if small < 0 or wait < 0:
            raise ValueError(f"small and wait are not negative, got {small=}, {wait=}")
        self.optimizer, self.small, self.wait, self.generator = optimizer, small, wait, generator
        defaults = {key: value for key, value in optimizer.defaults.items() if key != "maximize"}
        super().__init__(optimizer.param_groups, defaults)
        for group in self.param_groups:
            self._check(group)

    def add_param_group(self, param_group: Group) -> None:
        """Adds a group of parameters to the inner optimiser, and with it here."""
        if not any(group is param_group for group in self.optimizer.param_groups):
            self._check(param_group)
            self.optimizer.add_param_group(param_group)
        self.param_groups = self.optimizer.param_groups

    def step(self, closure: Closure | None = None) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        """One step of the inner optimiser, or off the saddle; the loss before it."""
        if closure is None:
            raise TypeError(
                "NegativeCurvatureEscape needs a closure, got none: step(closure), where closure() returns the loss "
                "with its graph and does not call backward()"
            )
        params = [p for group in self.param_groups for p in group["params"]]
        objective, used = objective_of(closure, params)
        loss, gradient = objective.value_and_gradient()
        memory = self.state[params[0]]
        waiting = memory.get("waiting", 0)
        memory["waiting"] = max(0, waiting - 1)
        if waiting == 0 and float(gradient.norm()) <= self.small:
            point = examine(objective, samples=0, generator=self.generator)
            if point.negative:
                found = escape(objective, along=point.direction)
                if found.decrease > 0:
                    write(objective, found.point, used)
                    return loss
            memory["waiting"] = self.wait
        if isinstance(self.optimizer, SecondOrder):
            return self.optimizer.step(closure)
        self._step_along(dict(zip(used, objective.unflatten(gradient), strict=True)), params)
        return loss

    def _step_along(self, slopes: dict[Tensor, Tensor], params: list[Tensor]) -> None:
        """A step of the inner optimiser with these gradients in the place of those in `.grad`."""
        kept = [p.grad for p in params]
        try:
            for p in params:
                p.grad = slopes.get(p)
            self.optimizer.step()
        finally:
            for p, grad in zip(params, kept, strict=True):
                p.grad = grad

    def state_dict(self) -> dict[str, Any]:
        """The inner optimiser's state, and how long to wait."""
        inner = self.optimizer.state_dict()
        return {"optimizer": inner, "param_groups": inner["param_groups"], "waiting": self._first.get("waiting", 0)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Goes on from there."""
        self.optimizer.load_state_dict(state_dict["optimizer"])
        self.param_groups = self.optimizer.param_groups
        self._first["waiting"] = state_dict["waiting"]

    def __getstate__(self) -> dict[str, Any]:
        own = ("optimizer", "small", "wait", "generator")
        return {**super().__getstate__(), **{name: vars(self)[name] for name in own}}

    @property
    def _first(self) -> dict[str, Any]:
        return self.state[self.param_groups[0]["params"][0]]

    def _check(self, group: Group) -> None:
        params = group["params"]
        refuse_complex(self, [params] if isinstance(params, Tensor) else params)
        if group.get("maximize"):
            raise ValueError("NegativeCurvatureEscape goes down, got a group with maximize=True: negate the loss")
