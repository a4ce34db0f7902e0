"""Schedules that torch lacks, by the conventions of torch.optim.lr_scheduler.

η₀e^(−βk) is `torch.optim.lr_scheduler.ExponentialLR(optimizer, gamma=math.exp(-beta))`, and η divided by ten on a
plateau is `ReduceLROnPlateau(optimizer, factor=0.1)`.
"""

import math
from typing import Any, SupportsFloat

from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau


class InverseTime(LRScheduler):
    """η_k = η₀ / (1 + βk)^p: the decay that stochastic approximation asks for, with β = `rate` and p = `power`.

    k counts the calls of step(), from 0; β is a share a step, so that after 1/β steps the rate is η₀/2^p. Lecture 004,
    slide 99, calls η₀/(k+1) linear (β = 1, p = 1) and η₀/(k+1)² quadratic (p = 2). Ση diverges for p ≤ 1, so that any
    minimum can be reached, and Ση² converges for p > ½, so that noise dies out (Robbins and Monro 1951): with p = 2
    training stops wherever it is by then. torch.optim.lr_scheduler.LinearLR is a ramp, not this.

    >>> import torch
    >>> optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    >>> schedule = InverseTime(optimizer, rate=0.5)
    >>> for _ in range(2):
    ...     optimizer.step()
    ...     schedule.step()
    >>> schedule.get_last_lr()
    [0.5]
    """

    def __init__(self, optimizer: Optimizer, rate: float, *, power: float = 1, last_epoch: int = -1) -> None:
        if not 0 <= rate < math.inf:
            raise ValueError(f"the rate of decay is at least 0 a step, got rate={rate}")
        if not 0 < power < math.inf:
            raise ValueError(f"the power of a decay is positive, got power={power}")
        self.rate, self.power = rate, power
        super().__init__(optimizer, last_epoch)

    def get_lr(self) -> list[float | Tensor]:
        """The rates of the groups, from those of the step before, so that the schedule can be chained."""
        if self.last_epoch == 0 or getattr(
            self, "_is_initial", False
        ):  # on resuming the optimiser has its rate already
            return [_own(group["lr"]) for group in self.optimizer.param_groups]
        fall = self._decay(self.last_epoch) / self._decay(self.last_epoch - 1)
        return [group["lr"] * fall for group in self.optimizer.param_groups]

    def _get_closed_form_lr(self) -> list[float | Tensor]:
        return [base * self._decay(self.last_epoch) for base in self.base_lrs]

    def _decay(self, k: int) -> float:
        return (1 + self.rate * k) ** -self.power


class WarmupPlateau(ReduceLROnPlateau):
    """A rate that rises linearly over `warmup` steps to the optimiser's own, then falls on every plateau.

    torch refuses to put ReduceLROnPlateau behind another schedule (its issue 68978). Each call of step() is one step of
    the warm-up while it lasts, with a loss or without: η_k = η₀(s + (1 − s)k/warmup) from s = `start` on. Losses given
    then are not looked at. Afterwards step(loss) is that of ReduceLROnPlateau, and step() without one does nothing: so
    call step() after every batch and step(loss) after every epoch. `plateau` holds the arguments of ReduceLROnPlateau.

    >>> import torch
    >>> optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    >>> schedule = WarmupPlateau(optimizer, warmup=4, start=0.0, factor=0.5, patience=0)
    >>> rates = []
    >>> for loss in (9.0, 9.0, 9.0, 9.0, 3.0, 3.0, 3.0):
    ...     rates.append(optimizer.param_groups[0]["lr"])
    ...     schedule.step(loss)
    >>> rates
    [0.0, 0.25, 0.5, 0.75, 1.0, 1.0, 0.5]
    """

    def __init__(self, optimizer: Optimizer, warmup: int, *, start: float = 0.1, **plateau: Any) -> None:
        if warmup < 0:
            raise ValueError(f"a warm-up takes at least 0 steps, got warmup={warmup}")
        if not 0 <= start <= 1:
            raise ValueError(f"a warm-up starts at a share of the rate between 0 and 1, got start={start}")
        super().__init__(optimizer, **plateau)
        self.warmup, self.start = warmup, start
        for group in optimizer.param_groups:
            group.setdefault("initial_lr", _own(group["lr"]))
        self.base_lrs = [_own(group["initial_lr"]) for group in optimizer.param_groups]
        if warmup:
            self._set(start)
        self.last_epoch = 0

    @property
    def warming(self) -> bool:
        """Whether the warm-up still lasts."""
        return self.last_epoch < self.warmup

    def step(self, metrics: SupportsFloat | None = None) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """One step of the warm-up, or after it one look at a loss."""
        if self.warming:
            self.last_epoch += 1
            self._set(self.start + (1 - self.start) * self.last_epoch / self.warmup)
        elif metrics is not None:
            super().step(metrics)

    def _set(self, share: float) -> None:
        for group, base in zip(self.optimizer.param_groups, self.base_lrs, strict=True):
            if isinstance(group["lr"], Tensor):
                group["lr"].fill_(float(base) * share)
            else:
                group["lr"] = base * share
        self._last_lr = [_own(group["lr"]) for group in self.optimizer.param_groups]


def linear_scaling(base_rate: float, base_batch: int, batch: int) -> float:
    """The rate for a batch of another size: base_rate · batch / base_batch.

    k steps of small batches go about as far as one of a batch k times as large at k times the rate, while the gradient
    changes little over them (Goyal et al. 2017, §2.1; lecture 000, "Fish and bear's paws"). At the start it changes a
    lot, so warm up from the small batch's rate, over some five epochs:

        optimizer = torch.optim.SGD(params, lr=linear_scaling(0.1, 256, 8192), momentum=0.9)
        schedule = torch.optim.lr_scheduler.LinearLR(optimizer, start_factor=256 / 8192, total_iters=5 * steps)

    The rule ends where curvature does: above 2(1+β)/λmax (`rate_limit`) no batch is large enough.

    >>> linear_scaling(0.1, 256, 1024)
    0.4
    """
    if not (base_rate > 0 and base_batch > 0 and batch > 0):
        raise ValueError(f"positive rate and batches are needed, got {base_rate}, {base_batch} and {batch}")
    return base_rate * batch / base_batch


def _own(value: float | Tensor) -> float | Tensor:
    """A number, or a copy of a tensor that the optimiser writes into."""
    return value.clone() if isinstance(value, Tensor) else value
