"""What the optimiser is set to, and what of each update that setting makes."""

import math
import statistics
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from unstuck.diagnosis._case import Case
from unstuck.diagnosis._findings import Evidence, Finding
from unstuck.diagnosis._motion import update
from unstuck.diagnosis._wires import shown
from unstuck.objective import Tape
from unstuck.record import State

ZERO, HIGH, JUMP = 1e-3, 0.9, 0.4  # of its peak: a rate at its bottom, at its top again, and set there at once
LOST = 1 / 30  # of its peak: a rate below it moves next to nothing
MOST = 3  # tapes that a setting is tried on


def clip_ratio(case: Case) -> Evidence | None:
    """How much of the gradient is left by the script's own clipping: the median over the recorded batches."""
    if case.state is None or not case.fixed:
        return None
    if case.clip == math.inf:
        return Evidence.exact("what clipping leaves", 1.0, "share of the gradient's norm (the script does not clip)")
    shares = sorted(min(case.clip / max(norm, 1e-300), 1.0) for norm in _norms(case.state.weights, case.fixed))
    meaning = "share of the gradient's norm that the script's clipping leaves"
    return Evidence("what clipping leaves", statistics.median(shares), shares[0], shares[-1], len(shares), meaning)


def _norms(weights: Sequence[Tensor], tapes: Sequence[Tape]) -> list[float]:
    found = []
    for tape in tapes:
        leaves = [w.detach().clone().requires_grad_(w.is_floating_point()) for w in weights]
        tape.replay(leaves).backward()
        parts = [w.grad.double().square().sum() for w in leaves if w.grad is not None]
        found.append(math.sqrt(float(sum(parts))) if parts else 0.0)
    return found


def decay_share(case: Case) -> Evidence | None:
    """The share of the update that weight decay makes: what changes in it where there is none.

    The larger one of those at the first weights and at the last: once the weights are gone, decay has nothing to do.
    """
    state = case.state
    if state is None or state.optimizer is None or not case.fixed:
        return None
    if not any(float(g.get("weight_decay", 0) or 0) for g in state.optimizer.groups):
        return Evidence.exact("share of weight decay", 0.0, "of the update (there is none)")
    moments = [s for s in (case.start, state) if s is not None and s.optimizer is not None]
    shares = max(
        (sorted(_decay_share(case, s, tape) for tape in case.fixed[:MOST]) for s in moments), key=statistics.median
    )
    meaning = "of the update's length, the share that weight decay makes"
    return Evidence("share of weight decay", statistics.median(shares), shares[0], shares[-1], len(shares), meaning)


def _decay_share(case: Case, state: State, tape: Tape) -> float:
    whole = update(state, tape, case.clip)
    rest = update(state, tape, case.clip, change=setting("weight_decay", 0.0))
    length = math.sqrt(sum(float(d.double().square().sum()) for d in whole))
    part = math.sqrt(sum(float((d - r).double().square().sum()) for d, r in zip(whole, rest, strict=True)))
    return part / length if length else 0.0


def setting(name: str, value: float) -> Callable[[torch.optim.Optimizer], None]:
    """Gives all groups that have an option of this name another value."""

    def change(optimizer: torch.optim.Optimizer) -> None:
        for group in optimizer.param_groups:
            if name in group:
                group[name] = value

    return change


def momentum(case: Case) -> Evidence | None:
    """The largest momentum, or β₁, of the optimiser."""
    if case.state is None or case.state.optimizer is None:
        return None
    found = [
        float(g["betas"][0]) if "betas" in g else float(g.get("momentum", 0.0) or 0.0)
        for g in case.state.optimizer.groups
    ]
    return Evidence.exact("momentum", max(found, default=0.0), "β, or β₁: a step lasts for 1/(1 − β) more")


def rate_lost(case: Case) -> Evidence | None:
    """The share of the run at whose steps the rate was a small share of what it had been at its peak."""
    rates = case.run.series("lr")[1]
    if not rates:
        return None
    peak, low = rates[0], 0
    for rate in rates:
        peak = max(peak, rate)
        low += rate < LOST * peak
    return Evidence.exact(
        "steps at a lost rate",
        low / len(rates),
        f"share of the steps at a rate below 1/{1 / LOST:.0f} of its peak",
        n=len(rates),
    )


def rate_fallen(case: Case) -> Evidence | None:
    """How many times its present value the rate was when the loss was at its worst."""
    rates = dict(zip(*case.run.series("lr"), strict=True))
    worst = max(zip(case.losses, case.steps, strict=True), default=(0.0, 0))[1]
    there = max(rates.get(worst, 0.0), rates.get(worst - 1, 0.0))  # the step before is what made it
    if not there or not all(map(math.isfinite, case.losses)):
        return None
    now = rates[max(rates)]
    fall = there / now if now else math.inf
    return Evidence.exact("fall of the rate", fall, "the rate at the worst loss over the present one", n=len(rates))


def rate_rising(case: Case) -> Evidence | None:
    """How many times its first value the rate is, where it has risen to the very end of the run."""
    rates = case.run.series("lr")[1]
    if len(rates) < 2:
        return None
    late = rates[-max(len(rates) // 10, 2) :]
    rises = late[-1] > late[0] and late[-1] >= max(rates)
    return Evidence.exact(
        "rise of the rate",
        rates[-1] / rates[0] if rises and rates[0] else 1.0,
        "last over first rate, where it rose to the end",
        n=len(rates),
    )


def cosine_beyond_its_end(case: Case) -> Finding | None:
    """A rate that falls to 0 and climbs back smoothly, again and again, as a cosine does that is stepped too often."""
    steps, rates = case.run.series("lr")
    turns = _climbs(rates)
    if len(turns) < 2:
        return None
    apart = (steps[turns[-1]] - steps[turns[0]]) / (len(turns) - 1)
    return shown(
        "scheduler-misused",
        "",
        f"The rate has fallen to 0 and climbed back to its height {len(turns)} times, every {apart:.0f} steps: "
        "a cosine schedule that is stepped beyond its T_max goes up again.",
        "Give T_max in the steps that the schedule is stepped, or step it after each epoch; for restarts on purpose, "
        "CosineAnnealingWarmRestarts.",
        Evidence.exact("climbs of the rate", len(turns), "from 0 back to its peak", n=len(rates)),
        step=steps[turns[0]],
    )


def _climbs(rates: Sequence[float]) -> list[int]:
    """Where a rate is at the bottom before it climbs, without a jump, back to the height that it came from."""
    peak, found, bottom = 0.0, list[int](), None
    for k, rate in enumerate(rates):
        peak = max(peak, rate)
        if k and rate > rates[k - 1] + JUMP * peak:
            bottom = None
        elif rate <= ZERO * peak:
            bottom = k
        elif bottom is not None and rate >= HIGH * peak:
            found.append(bottom)
            bottom = None
    return found


def schedule_calls(case: Case) -> Evidence | None:
    """How often the script calls a schedule's step() between two steps of the optimiser."""
    calls = case.run.series("schedules")[1]
    if not calls:
        return None
    return Evidence.exact("schedule calls", statistics.fmean(calls), "for each step of the optimiser", n=len(calls))


def misuse(case: Case) -> Evidence | None:
    """1 where a schedule that is stepped at each step has run out, or a warm-up has not ended."""
    lost, calls, rising = case["steps at a lost rate"], case["schedule calls"], case["rise of the rate"]
    if lost is None or rising is None:
        return None
    often = calls is not None and calls.value > 0.9
    wrong = rising.value > 3 or (often and lost.value > 1 / 3)
    return Evidence.exact("misuse of the schedule", float(wrong), "1: stepped too often, or a warm-up without end")


def whole_batches(case: Case) -> Evidence | None:
    """1 for an optimiser that compares one step's gradient or loss with the last one's."""
    names = {str(o["name"]).rpartition(".")[2] for o in case.run.of("optimizer")}
    return Evidence.exact("whole batches needed", float(bool(names & {"Rprop", "LBFGS"})), "1: by Rprop or L-BFGS")
