"""The remedy trial: every arm starts from the same copy of the run and trains on the same recorded steps.

Control, the remedies and a null arm (the control from minutely perturbed weights) all cool down to rate 0 before they
are compared. Without the cool-down a lower rate looks best on any noisy loss (short-horizon bias, Wu et al. 2018).
"""

import functools
import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from unstuck.diagnosis._case import Case, clipped, distinct, examples_in, rebuilt
from unstuck.diagnosis._findings import Arm, Trial
from unstuck.diagnosis._structure import mean_loss
from unstuck.objective import Tape, TapeError
from unstuck.record import State

STEPS, COOLDOWN = 60, 30
LEAST = math.log(0.95)  # an accepted remedy ends at least 5 % lower than the control
SHORT = math.log(0.5)  # half, where a trial is short for want of steps: there a lower rate gains up to 26 % anyway
RESTLESS = 0.02  # a null arm that moves further than this asks for more orders
ORDERS = 5
ROWS = 200  # to judge by, at the least
FEW = 90  # recorded steps that an arm may learn by heart: fewer than it takes itself
BY_HEART = 0.05  # how much further the loss of the control falls on what it trains on, as ln, where it does
STUDENT = 2.5  # the 97.5 % quantile of Student's t for some six degrees of freedom
FLOOR = 1e-12  # under the logarithm of a loss
HOPELESS = 100.0  # times the first loss: an arm that climbs so high is given up
NUDGE = 1e-3  # the null arm's relative perturbation

Progress = Callable[[str, float], None]  # what is being tried, and the share of the trial that is done


@dataclass(eq=False)
class Fork:
    """A copy of the run that a remedy may change before it trains."""

    weights: list[Tensor]  # leaves
    optimizer: torch.optim.Optimizer
    together: int = 1  # recorded batches a step
    clip: float = math.inf  # the norm that gradients are shortened to
    altered: Callable[[Tape], Tape] = lambda tape: tape  # what it is given instead of a recorded step
    parted: Callable[[Tape], Sequence[Tape]] = lambda tape: (tape,)  # the steps that it takes in the place of one
    generator: torch.Generator = field(default_factory=lambda: torch.Generator().manual_seed(0))

    def scale_rate(self, factor: float) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] *= factor

    def set_weight(self, index: int, value: Tensor) -> None:
        """New contents for a parameter; what the optimiser remembers of it is forgotten."""
        self.weights[index].data.copy_(value)
        self.optimizer.state.pop(self.weights[index], None)

    def noise(self, like: Tensor) -> Tensor:
        return torch.randn(like.shape, generator=self.generator).to(like)


@dataclass(frozen=True)
class Remedy:
    """A change that a hypothesis predicts to help."""

    name: str
    apply: Callable[[Fork], None]
    proves: str = ""  # the code of the cause that it proves where it wins, if not of the one that tries it
    least: float = LEAST  # how far below the control it must end, as ln of the two losses' ratio
    judged: Callable[[Tape], Tape] | None = None  # what all arms are judged on instead of the recorded steps
    once: bool = False  # whether all arms are to pass over the recorded steps once, as many as there are


def fork(state: State, clip: float = math.inf) -> Fork:
    """A copy of the run as it stood; ValueError where its optimiser cannot be built again."""
    weights = [w.detach().clone().requires_grad_(w.is_floating_point()) for w in state.weights]
    return Fork(weights, rebuilt(state, weights), clip=clip)


def nudge(copy: Fork) -> None:
    """The null arm: nothing but a perturbation of a thousandth of each parameter's size."""
    for w in copy.weights:
        if w.is_floating_point():
            w.data.add_(copy.noise(w), alpha=NUDGE * float(w.detach().norm()) / math.sqrt(max(w.numel(), 1)))


def run_trial(
    case: Case,
    remedies: Sequence[Remedy],
    *,
    state: State | None = None,
    unseen: Sequence[Tape] = (),
    progress: Progress | None = None,
) -> Trial:
    """Tries remedies beside the control and a null arm from `state` (by default where the run stands).

    An arm is accepted when its interval excludes 0 and it ends as far below the control as it must, twice as far
    as the null arm strayed, and no higher than it started. Where the null arm strays by more than 2 % the state is
    chaotic: all arms are repeated over shuffled orders, and the null arms count as controls. Where so few steps were
    recorded that the control learns them by heart, the arms pass over them once and are judged on `unseen` rows, which
    the run is not trained on. ValueError where the run cannot be continued, or nothing is left to compare by.
    """
    state = state or case.state
    if state is None or len(case.tapes) < 8:
        raise ValueError(
            f"a trial needs 8 recorded steps and finite weights, the run has {len(case.tapes)} recorded steps"
        )
    courses = [_course(case, unseen)]
    once = any(r.once for r in remedies)
    if unseen:
        courses = [_once(case, unseen)] if once else [*courses, _once(case, unseen)]
    elif once:
        courses = [_once(case, distinct(case.tapes))]
    for course in courses:
        found = _compared(case, course, remedies, state, progress)
        if found is not None:
            return found
    raise ValueError(f"a trial of {len(courses[0].train)} recorded steps learns them by heart: more are needed")


@dataclass(frozen=True)
class _Course:
    """What the arms of a trial are put through."""

    train: Sequence[Tape]
    judge: Sequence[Tape]
    steps: int = STEPS
    cooldown: int = COOLDOWN
    telling: bool = False  # whether it tells something though the arms may learn their steps by heart
    once: bool = False  # whether every arm passes over the steps once
    ceiling: float = math.inf  # a loss at which an arm is given up

    @property
    def held_out(self) -> bool:
        return not {id(t) for t in self.train} & {id(t) for t in self.judge}


def _course(case: Case, unseen: Sequence[Tape]) -> _Course:
    train, judge = case.split
    if sum(map(examples_in, judge)) < ROWS <= sum(map(examples_in, unseen)):
        train, judge = case.tapes, unseen
    return _Course(train, judge, telling=len(train) >= FEW)


def _once(case: Case, judge: Sequence[Tape]) -> _Course:
    """One pass over the recorded steps, at most as many as usual."""
    steps = min(len(case.tapes), STEPS + COOLDOWN)
    cooldown = max(steps * COOLDOWN // (STEPS + COOLDOWN), 1)
    return _Course(case.tapes[-steps:], judge, steps - cooldown, cooldown, telling=True, once=True)


def _compared(
    case: Case, course: _Course, remedies: Sequence[Remedy], state: State, progress: Progress | None
) -> Trial | None:
    """The arms of a trial; None where its steps are learned by heart, so that whatever learns less would win."""
    arms = [
        ("as it is", "control", None),
        *((r.name, "remedy", r.apply) for r in remedies),
        ("nothing but a nudge", "null", nudge),
    ]
    make = functools.partial(fork, state, case.clip)
    other = next((r.judged for r in remedies if r.judged is not None), None)
    if other is not None:
        course = replace(course, judge=[other(t) for t in course.judge])
    begin = math.log(max(mean_loss(state.weights, course.judge), FLOOR))
    course = replace(course, ceiling=HOPELESS * max(math.exp(begin), 1e-3))
    if progress is not None:
        progress(arms[0][0], 0.0)
    control = _train(make(), course)
    if not course.telling and _by_heart(control, begin, state, course):  # before the others take their time
        return None
    orders = [_all_arms(make, arms, course, order=0, progress=progress, control=control)]
    if abs(orders[0][-1].level - orders[0][0].level) > RESTLESS:
        orders += [_all_arms(make, arms, course, order=k, progress=progress) for k in range(1, ORDERS)]
    bound = SHORT if course.once and not any(r.once for r in remedies) else 0.0
    least = [LEAST, *(min(r.least, bound) for r in remedies), LEAST]
    made = [_arm(arm, [order[k] for order in orders], orders, begin, least[k]) for k, arm in enumerate(arms)]
    return Trial(tuple(made), course.steps, course.cooldown, held_out=course.held_out)


@dataclass(frozen=True, eq=False)
class _Result:
    curve: tuple[float, ...]
    end: tuple[float, ...]  # the loss on each tape to judge by; empty where the arm was given up

    @property
    def level(self) -> float:
        """ln of the mean loss at the end."""
        return math.log(max(statistics.fmean(self.end), FLOOR)) if self.end else math.inf


def _all_arms(
    make: Callable[[], Fork],
    arms: Sequence[tuple],
    course: _Course,
    *,
    order: int,
    progress: Progress | None,
    control: _Result | None = None,
) -> list[_Result]:
    if order:
        shuffled = torch.randperm(len(course.train), generator=torch.Generator().manual_seed(order)).tolist()
        course = replace(course, train=[course.train[k] for k in shuffled])
    results = [] if control is None else [control]  # what is known already
    for k, (name, _, apply) in enumerate(arms[len(results) :], len(results)):
        if progress is not None:
            progress(name, k / len(arms))
        copy = make()
        if apply is not None:
            apply(copy)
        results.append(_train(copy, course))
    return results


def _train(copy: Fork, course: _Course) -> _Result:
    rates = [group["lr"] for group in copy.optimizer.param_groups]
    train = [part for t in course.train for part in copy.parted(copy.altered(t))]
    judge = [copy.altered(t) for t in course.judge]
    each = len(train) // len(course.train)
    steps, cooldown = each * (course.steps + course.cooldown), each * course.cooldown
    if course.once:
        steps, cooldown = max(steps // copy.together, 1), max(cooldown // copy.together, 1)
    curve: list[float] = []
    taken = 0
    for k in range(steps):
        share = min(1.0, (steps - k) / cooldown)
        for group, rate in zip(copy.optimizer.param_groups, rates, strict=True):
            group["lr"] = rate * share
        batch = [train[(taken + j) % len(train)] for j in range(copy.together)]
        taken += copy.together
        copy.optimizer.zero_grad()
        try:
            loss = torch.stack([t.replay(copy.weights) for t in batch]).mean()
        except TapeError:
            return _Result(tuple(curve), ())
        curve.append(float(loss.detach()))
        if not math.isfinite(curve[-1]) or curve[-1] > course.ceiling:
            return _Result(tuple(curve), ())
        loss.backward()
        clipped(copy.weights, copy.clip)
        copy.optimizer.step()
    with torch.no_grad():
        end = tuple(float(t.replay(copy.weights)) for t in judge)
    return _Result(tuple(curve), end if all(math.isfinite(x) for x in end) else ())


def _by_heart(control: _Result, begin: float, state: State, course: _Course) -> bool:
    """Whether the control learns its few batches by heart: its loss falls further on them than on the others."""
    count = len(course.train)
    if not control.end or len(control.curve) < count:
        return False
    before = math.log(max(mean_loss(state.weights, course.train), FLOOR))
    trained = math.log(max(statistics.fmean(control.curve[-count:]), FLOOR)) - before
    return control.level - begin > trained + BY_HEART


def _arm(
    arm: tuple[str, str, Any],
    results: Sequence[_Result],
    orders: Sequence[Sequence[_Result]],
    begin: float,
    least: float,
) -> Arm:
    name, role, _ = arm
    mine = [r.level for r in results]
    # Where the null arm strays, it is one more sample of what the control does; its single stray counts as error else.
    control = [r.level for order in orders for r in ((order[0],) if len(orders) == 1 else (order[0], order[-1]))]
    if not all(math.isinf(level) for level in control):  # one that was given up ended somewhere up there
        control = [min(level, begin + math.log(HOPELESS)) for level in control]
    effect = _difference(mine, control if role != "control" else mine)
    reach, stray = 0.0, _difference([orders[0][-1].level], [orders[0][0].level])
    if role != "control" and math.isfinite(effect):
        one = math.hypot(2 * _spread(orders[0][0], results[0]), stray)
        reach = one if len(orders) == 1 else STUDENT * math.hypot(_standard_error(mine), _standard_error(control))
    accepted = role == "remedy" and effect + reach < 0 and effect <= least and statistics.fmean(mine) <= begin
    if len(orders) == 1 and math.isfinite(effect):
        accepted = accepted and effect < -2 * abs(stray)
    return Arm(name, role, effect, effect - reach, effect + reach, accepted, results[0].curve)


def _difference(mine: Sequence[float], control: Sequence[float]) -> float:
    if math.inf in mine:
        return 0.0 if math.inf in control else math.inf
    return -math.inf if math.inf in control else statistics.fmean(mine) - statistics.fmean(control)


def _standard_error(levels: Sequence[float]) -> float:
    return statistics.stdev(levels) / math.sqrt(len(levels)) if len(levels) > 1 else 0.0


def _spread(control: _Result, other: _Result) -> float:
    """The jackknife error of the effect over the tapes to judge by: they are the same for both arms."""
    n = len(control.end)
    if n < 2 or len(other.end) != n:
        return 0.0
    a, b = torch.tensor(other.end, dtype=torch.float64), torch.tensor(control.end, dtype=torch.float64)
    left_out = ((a.sum() - a).clamp_min(FLOOR) / (b.sum() - b).clamp_min(FLOOR)).log()
    return math.sqrt((n - 1) / n * float((left_out - left_out.mean()).square().sum()))
