"""Errors in the loop: the order of its calls, who writes into the weights, and updates that change nothing."""

import statistics
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from unstuck.diagnosis._case import Case
from unstuck.diagnosis._findings import SHOWN, Evidence, Finding
from unstuck.objective import Instruction, Program, Tape, TapeError

OFTEN = 0.9  # the share of the steps at which a fact must hold before it is the run's habit
LEAST = 3  # times that it was seen
TWICE = 0.3  # of the steps looked at: of two steps with one gradient, one repeats the other
SKIPS, SKIPPED = 32, 0.2  # steps that a scaler left out: more than a first scale needs, and their share of all
LOST = 0.2  # of the gradient's numbers
KEPT = 0.5  # of the numbers of coarse weights, that most updates leave as they were


def wrong_order(case: Case) -> Finding | None:
    return _emptied(case) or _thrown_away(case)


def _thrown_away(case: Case) -> Finding | None:
    fact = _usual(case, "gradient-thrown-away")
    if fact is None:
        return None
    parts = fact["order"].count("b")
    return Finding(
        "wrong-order",
        SHOWN,
        1,
        fact["line"],
        f"Of the {parts} backward() calls of a step only the last one counts: the gradients are cleared in between"
        f"{_place(fact)}, and nobody has looked at them.",
        "Call zero_grad() once a step, before the first backward(): each backward() adds to the gradients.",
        (
            Evidence.exact(
                "gradients thrown away",
                parts - 1,
                f"of {parts} in each of {fact['count']} of {fact['of']} recorded steps; calls of a step: "
                f"{_spelled(fact['order'])}",
                n=fact["of"],
            ),
        ),
    )


def _emptied(case: Case) -> Finding | None:
    fact = _usual(case, "cleared-before-step")
    if fact is None:
        return None
    return Finding(
        "wrong-order",
        SHOWN,
        1,
        fact["line"],
        f"The optimiser finds nothing to step with: after the last backward() and before step() the gradients are "
        f"cleared{_place(fact)}.",
        "Call them in the order zero_grad(), forward, backward(), step().",
        (_steps("steps with empty gradients", fact),),
    )


def stepped_twice(case: Case) -> Finding | None:
    fact = _last(case, "stepped-again")
    if fact is None or fact["count"] < LEAST or fact["count"] < TWICE * fact["of"]:
        return None
    who = "Another optimiser that holds the same parameters" if fact["other"] else "The same optimiser"
    return Finding(
        "stepped-twice",
        SHOWN,
        1,
        fact["line"],
        f"One gradient is used more than once. {who} steps again, and in between nobody called backward() or cleared "
        "anything.",
        "Call step() once for each backward(), of one optimiser for each parameter.",
        (Evidence.exact("steps without a new gradient", fact["count"], f"of {fact['of']} looked at", n=fact["of"]),),
    )


def weights_reset(case: Case) -> Finding | None:
    fact = _last(case, "weights-reset")
    if fact is None or fact["count"] < 2:
        return None
    return Finding(
        "weights-reset",
        SHOWN,
        next(e["step"] for e in case.run.facts if e["code"] == "weights-reset"),
        "",
        "The weights are set back to those of the start, between two steps and not by the optimiser: what was learned "
        "up to then is lost.",
        "Load or initialise the weights once, before the loop over the epochs.",
        (
            Evidence.exact(
                "weights back at their start",
                fact["count"],
                f"comparisons between two steps; the last one told was before step {fact['step']}",
            ),
        ),
    )


def scaler_skips(case: Case) -> Finding | None:
    return _clipped_scaled(case) or _left_out(case)


def _clipped_scaled(case: Case) -> Finding | None:
    fact = _usual(case, "clipped-scaled")
    if fact is None:
        return None
    return Finding(
        "scaler-skips",
        SHOWN,
        1,
        fact["line"],
        f"The gradients are clipped{_place(fact)} while they are still multiplied by the scale of the GradScaler: the "
        "clipping leaves that much less of them.",
        "Call scaler.unscale_(optimizer) before the clipping.",
        (_steps("steps clipped before they are unscaled", fact),),
    )


def _left_out(case: Case) -> Finding | None:
    skipped, taken = case.run.skipped, case.run.steps
    if skipped < SKIPS or skipped < SKIPPED * (skipped + taken):
        return None
    fact = _last(case, "step-left-out")
    where = ""
    if fact is not None:
        where = ", ".join(str(fact[key]) for key in ("module", "call") if fact.get(key))
    first = f"; the first gradient that was not finite arose in {where}" if where else ""
    return Finding(
        "scaler-skips",
        SHOWN,
        1,
        where,
        f"The GradScaler leaves out {skipped} of {skipped + taken} steps, because scaled gradients are not finite"
        f"{first}. A few at the start are by design, as many are not.",
        "Mend what overflows, or let the scale fall: the default backoff_factor of 0.5 and growth_interval of 2000.",
        (Evidence.exact("steps left out", skipped, f"of {skipped + taken}", n=skipped + taken),),
    )


def update_below_precision(case: Case) -> Finding | None:
    steps, shares = case.run.series("unchanged")
    if len(shares) < LEAST or statistics.median(shares) <= KEPT:
        return None
    middle = statistics.median(shares)
    return Finding(
        "update-below-precision",
        SHOWN,
        steps[0],
        "",
        f"Updates are lost in rounding: {middle:.0%} of the numbers of bfloat16 or float16 weights that have a "
        "gradient stay as they were at a step, since what is to be added is less than half of their last digit.",
        "Keep the weights in float32 and compute in the short type (torch.autocast), or round stochastically.",
        (
            Evidence(
                "numbers left unchanged",
                middle,
                min(shares),
                max(shares),
                len(shares),
                "share of those with a gradient, at the steps that were measured",
            ),
        ),
    )


def fp16_underflow(case: Case) -> Finding | None:
    fact = _last(case, "gradient-lost")
    share, steps = (fact["share"], fact["count"]) if fact is not None else (case.once(lost_in_half), len(case.fixed))
    if share < LOST:
        return None
    return Finding(
        "fp16-underflow",
        SHOWN,
        next((e["step"] for e in case.run.facts if e["code"] == "gradient-lost"), 1),
        "",
        f"Gradients are lost in half precision: {share:.0%} of their numbers are 0, though in float32 they are not. "
        "float16 has nothing between 0 and 6e-8.",
        "Scale the loss with torch.amp.GradScaler, or compute in bfloat16, which reaches as far down as float32.",
        (Evidence.exact("gradient lost", share, "share of its numbers, 0 in float16 alone", n=steps),),
    )


def lost_in_half(case: Case) -> float:
    """The share of the gradient's numbers that are 0 only because a recorded step computed in float16."""
    tape = next((t for t in reversed(case.fixed) if any(map(_in_half, t.program.instructions))), None)
    if tape is None or case.state is None:
        return 0.0
    plain = tuple(replace(c, autocast=None) for c in tape.program.instructions)
    try:
        half, full = (_gradient(t, case.state.weights) for t in (tape, replace(tape, program=_with(tape, plain))))
    except (RuntimeError, TapeError):
        return 0.0
    return float(((full != 0) & (half == 0)).sum()) / max(int((full != 0).sum()), 1)


def _in_half(call: Instruction) -> bool:
    return call.autocast is not None and call.autocast[1] == torch.float16


def _with(tape: Tape, instructions: tuple[Instruction, ...]) -> Program:
    return replace(tape.program, instructions=instructions)


def _gradient(tape: Tape, weights: Sequence[Tensor]) -> Tensor:
    leaves = [w.detach().requires_grad_(w.is_floating_point()) for w in weights]
    used = [leaves[k] for k in sorted(tape.program.reads()) if leaves[k].requires_grad]
    found = torch.autograd.grad(tape.replay(leaves), used, allow_unused=True, materialize_grads=True)
    return torch.cat([g.flatten().double() for g in found])


def _last(case: Case, code: str) -> dict[str, Any] | None:
    """The last note of a fact, which has its highest count."""
    return next((e for e in reversed(case.run.facts) if e["code"] == code), None)


def _usual(case: Case, code: str) -> dict[str, Any] | None:
    """The last note of a fact that holds at nearly every step looked at, but for the first."""
    fact = _last(case, code)
    rare = fact is None or fact["count"] < LEAST or fact["count"] < OFTEN * (fact["of"] - 1)
    return None if rare else fact


def _place(fact: dict[str, Any]) -> str:
    return f" ({fact['line']})" if fact["line"] else ""


def _steps(name: str, fact: dict[str, Any]) -> Evidence:
    told = f"of {fact['of']} looked at; calls of a step: {_spelled(fact['order'])}"
    return Evidence.exact(name, fact["count"], told, n=fact["of"])


def _spelled(order: str) -> str:
    words = {"z": "zero_grad", "b": "backward", "c": "clip", "l": "schedule", "u": "unscale", "s": "step"}
    return ", ".join(words.get(letter, letter) for letter in order)
