"""What a schedule does over a number of steps, found on a copy."""

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import ExponentialLR, LambdaLR, LRScheduler, ReduceLROnPlateau

from unstuck.optim._schedules import InverseTime

_SLACK = 0.05  # of a measured power: as near to a limit it counts as on it
_FEWEST = 16  # steps that a power can be read off


@dataclass(frozen=True, eq=False)
class Course:
    """The rates of a schedule, and what their sums allow."""

    rates: Tensor  # (steps,), float64; the first is the rate of the next step
    total: float  # Ση, how far descent may go
    squares: float  # Ση², how much gradient noise gets in
    power: float  # p of η ∼ k^(−p) as it would go on: 0 without decay, infinite for one faster than any; NaN if unknown
    reaches: bool | None  # whether Ση would diverge, so that no start is too far; None where too few steps tell
    settles: bool | None  # whether Ση² would converge, so that noise dies out; None where too few steps tell

    def left(self, curvature: float) -> float:
        """Π(1 − η_kλ): what gradient descent leaves of the distance along an eigenvector of curvature λ."""
        return float((1 - curvature * self.rates).prod())

    def __str__(self) -> str:
        words = {True: "yes", False: "no", None: "cannot tell"}
        first, last = float(self.rates[0]), float(self.rates[-1])
        sums = f"Ση = {self.total:.7g}, Ση² = {self.squares:.7g}"
        return (
            f"{len(self.rates)} steps from η = {first:.4g} to {last:.4g}: {sums}"
            f" (can reach: {words[self.reaches]}, can settle: {words[self.settles]})"
        )


def describe(schedule: LRScheduler | Callable[[int], float], steps: int, *, group: int = 0) -> Course:
    """The next `steps` rates of a schedule, their sums, and whether it can reach a minimum and settle in it.

    `schedule` is any of torch.optim.lr_scheduler, from where it stands now, for one `group` of parameters; or a
    function of the step, from 0. The schedule and its optimiser are not stepped: a copy on parameters of its own is.
    One that waits for losses has no course of its own and is refused.

    Reaching (Ση = ∞) and settling (Ση² < ∞) are statements about steps that are not taken (Robbins and Monro 1951).
    The power of InverseTime and of ExponentialLR is known; of others it is read off the means of log η over the last
    half, quarter and eighth of the steps, with a shift k₀ of (k + k₀)^(−p) removed: so give as many steps as show how
    it goes on. Lecture 004, slide 99.

    >>> print(describe(lambda k: 1 / (k + 1) ** 2, 1000))
    1000 steps from η = 1 to 1e-06: Ση = 1.643935, Ση² = 1.082323 (can reach: no, can settle: yes)
    """
    if steps < 1:
        raise ValueError(f"a course has at least one step, got steps={steps}")
    known = None
    if isinstance(schedule, LRScheduler):
        rates = _followed(schedule, steps, group)
        if isinstance(schedule, InverseTime):
            known = float(schedule.power) if schedule.rate else 0.0
        elif isinstance(schedule, ExponentialLR):
            known = math.inf if schedule.gamma < 1 else 0.0
    elif callable(schedule):
        rates = [float(schedule(k)) for k in range(steps)]
    else:
        raise TypeError(f"a torch scheduler or a function of the step is needed, got {type(schedule).__name__}")
    curve = torch.tensor(rates, dtype=torch.float64)
    if not (curve.isfinite().all() and (curve >= 0).all()):
        raise ValueError(f"rates are finite and at least 0, got {min(rates):.4g} to {max(rates):.4g}")
    power, slack = (_power(curve), _SLACK) if known is None else (known, 0.0)
    told = not math.isnan(power)
    return Course(
        rates=curve,
        total=math.fsum(rates),
        squares=math.fsum(rate**2 for rate in rates),
        power=power,
        reaches=power <= 1 + slack if told else None,
        settles=power > 0.5 + slack if told else None,
    )


def _followed(schedule: LRScheduler, steps: int, group: int) -> list[float]:
    if isinstance(schedule, ReduceLROnPlateau):
        raise ValueError(
            f"a course needs a schedule of the step alone, got {type(schedule).__name__}, which waits for losses"
        )
    groups = schedule.optimizer.param_groups
    if not 0 <= group < len(groups):
        raise ValueError(f"group= is one of the {len(groups)} of the optimiser, from 0, got {group}")
    own = _Still([{"params": [torch.zeros(1)], "lr": 0.0} for _ in groups], {})
    LambdaLR(own, lambda _: 1.0)  # schedules look at what the first of them leaves on an optimiser
    for mine, theirs in zip(own.param_groups, groups, strict=True):
        mine.update(copy.deepcopy({key: value for key, value in theirs.items() if key != "params"}))
    twin = copy.deepcopy(schedule, {id(schedule.optimizer): own})
    rates = []
    for _ in range(steps):
        rates.append(float(own.param_groups[group]["lr"]))
        twin.step()
    return rates


class _Still(Optimizer):
    """An optimiser that has rates and changes nothing."""

    _opt_called = True  # as step() would leave it, but without the hooks that watch all optimisers

    def step(self, closure: None = None) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        pass


def _power(curve: Tensor) -> float:
    """p of η ∼ (k + k₀)^(−p), from the last three octaves of the curve."""
    n = len(curve)
    if n < _FEWEST:
        return math.nan
    if curve[-1] == 0:
        return math.inf
    blocks = [curve[n // 8 : n // 4], curve[n // 4 : n // 2], curve[n // 2 :]]
    if any(bool((block == 0).any()) for block in blocks):
        return math.nan
    first, second, third = (float(block.log().mean()) for block in blocks)
    early, late = (first - second) / math.log(2), (second - third) / math.log(2)
    if late <= _SLACK:
        return 0.0
    if early <= 0:
        return math.nan
    # a shift makes 1/slope linear in 1/k, and k doubles
    inverse = 2 / late - 1 / early
    return 1 / inverse if inverse > _SLACK else math.inf
