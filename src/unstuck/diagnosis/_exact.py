"""Causes that PyTorch's contract gives away: no threshold, no experiment, no reference run."""

from collections.abc import Callable, Mapping
from typing import Any

from unstuck.diagnosis._blown import fact_of, forward_overflow, non_finite_gradient, on_rank
from unstuck.diagnosis._case import Case
from unstuck.diagnosis._findings import SHOWN, Evidence, Finding
from unstuck.diagnosis._loop import (
    OFTEN,
    fp16_underflow,
    scaler_skips,
    stepped_twice,
    update_below_precision,
    weights_reset,
    wrong_order,
)
from unstuck.diagnosis._settings import cosine_beyond_its_end
from unstuck.diagnosis._wiring import WIRING, wiring_findings

LEAST_STEPS = 3
Check = Callable[[Case], Finding | None]


def exact_findings(case: Case) -> list[Finding]:
    """The exact faults of a run, each named once."""
    return [*told_findings(case), *_found(case, READ), *wiring_findings(case)]


def told_findings(case: Case) -> list[Finding]:
    """Those that facts alone tell, which a run on its way can be asked for often."""
    return _found(case, TOLD)


def _found(case: Case, checks: Mapping[str, Check]) -> list[Finding]:
    return [found for check in checks.values() if (found := check(case)) is not None]


def non_finite_data(case: Case) -> Finding | None:
    blown, later = fact_of(case.run, "non-finite"), fact_of(case.run, "non-finite-batch")
    if blown is None or (blown.get("origin") != "batch" and later is None):
        return None
    fact = blown if later is None else later
    rows = fact.get("rows", [])
    since = f"The loss{on_rank(blown)} is {blown['loss']} since step {blown['step']}"
    return Finding(
        "non-finite-data",
        SHOWN,
        blown["step"],
        f"{fact['where']}, {'row' if len(rows) == 1 else 'rows'} {', '.join(map(str, rows))}",
        f"{since} because the batch itself holds numbers that are not finite; the weights were still finite before it."
        if later is None
        else f"{since}. That step was not recorded, but the batch of step {fact['step']} itself holds numbers that are "
        "not finite, and one such batch is enough.",
        "Find these rows in the data and drop or impute them; check the data once with torch.isfinite before training.",
        (Evidence.exact("rows that are not finite", len(rows), "rows of the batch with NaN or infinity"),),
    )


def zero_grad_missing(case: Case) -> Finding | None:
    fact, steps = _habit(case, "stale-gradient")
    if fact is None:
        return None
    return Finding(
        "zero-grad-missing",
        SHOWN,
        1,
        fact["line"],
        "The gradients are never cleared, so every step uses the sum of all gradients so far: what one step had used "
        "was still there, untouched, when the next backward() added to it.",
        "Call optimizer.zero_grad() once before each backward(), or before the first of an accumulation.",
        (Evidence.exact("steps with old gradients", fact["count"], f"of the {steps} steps up to then", n=steps),),
    )


def parameters_not_optimised(case: Case) -> Finding | None:
    fact, steps = _habit(case, "orphan-gradient")
    if fact is None:
        return None
    names = fact["names"]
    return Finding(
        "parameters-not-optimised",
        SHOWN,
        1,
        _some(names),
        f"{len(names)} parameters receive a gradient at every step, but no optimiser moves them: {_some(names)}.",
        "Build the optimiser after the model is complete, or add them with optimizer.add_param_group.",
        (
            Evidence.exact(
                "parameters without an optimiser", len(names), f"seen in {fact['count']} of {steps} steps", n=steps
            ),
        ),
    )


def graph_cut(case: Case) -> Finding | None:
    fact, steps = _habit(case, "graph-cut")
    if fact is None:
        return None
    names = fact["names"]
    notes = (e for e in case.run.facts if e["code"] == "graph-cut" and e["line"] == fact["line"])
    module = next((e["module"] for e in notes if e.get("module")), "")  # not every note has it
    inside = f" in {module}" if module else ""
    return Finding(
        "graph-cut",
        SHOWN,
        1,
        fact["line"],
        f"No gradient reaches {_some(names)}: the forward pass uses them, and the optimiser should move them, but "
        f"{fact['function']}(){inside} takes a value out of the graph on the way to the loss.",
        f"Remove the {fact['function']}() there, or freeze these parameters on purpose with requires_grad_(False).",
        (
            Evidence.exact(
                "parameters cut off", len(names), f"without a gradient in {fact['count']} of {steps} steps", n=steps
            ),
        ),
    )


def _habit(case: Case, code: str) -> tuple[dict[str, Any] | None, int]:
    """The last note of a fact that holds at nearly every step, and how many steps had been looked at by then."""
    notes = [e for e in case.run.facts if e["code"] == code]
    if not notes:
        return None, 0
    last = notes[-1]
    looked = last["of"]
    every = (case.run.looked or looked) if code == "stale-gradient" else case.run.heard or looked
    # Notes come at counts 1, 2, 4, 8 …: a habit's count keeps up with the steps looked at.
    lasted = last["count"] >= LEAST_STEPS - 1 and last["count"] >= OFTEN * (looked - 1) and every < 3 * looked + 2
    return (last if lasted else None), looked


def _some(names: list[str]) -> str:
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")


TOLD: dict[str, Check] = {  # causes before what they lead to
    "non-finite-data": non_finite_data,
    "forward-overflow": forward_overflow,
    "non-finite-gradient": non_finite_gradient,
    "wrong-order": wrong_order,
    "stepped-twice": stepped_twice,
    "zero-grad-missing": zero_grad_missing,
    "parameters-not-optimised": parameters_not_optimised,
    "graph-cut": graph_cut,
    "weights-reset": weights_reset,
}
READ: dict[str, Check] = {
    "scaler-skips": scaler_skips,
    "fp16-underflow": fp16_underflow,
    "update-below-precision": update_below_precision,
    "scheduler-misused": cosine_beyond_its_end,
}
FACTS = (*TOLD, *READ)  # which need no step that can be replayed
EXACT = (*FACTS, *WIRING)
