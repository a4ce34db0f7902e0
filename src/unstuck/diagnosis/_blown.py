"""What is known of a loss or a gradient that stopped being finite, in words."""

import math
from collections.abc import Mapping
from typing import Any

from unstuck.diagnosis._case import Case
from unstuck.diagnosis._findings import SHOWN, Evidence, Finding
from unstuck.record import Run

EXPONENTIALS = frozenset("exp exp_ exp2 expm1 sinh cosh pow __pow__".split())
RISEN = 10.0  # times its start
ADVICE = {
    "overflow": "Compute this in a stable form (log_softmax, logsumexp, clamp its argument), or in a wider type.",
    "zeros": "Keep the argument away from 0 where it goes in: add a small constant there, or clamp it.",
    "hidden": "Mend what goes into that call: a torch.where on its result does not keep the gradient finite.",
    "masked": "See that no row is masked throughout.",
}


def fact_of(run: Run, code: str) -> dict[str, Any] | None:
    """The first fact of this code."""
    return next((e for e in run.facts if e["code"] == code), None)


def on_rank(fact: Mapping[str, Any]) -> str:
    """Where several ranks trained together and another one than the first told the fact."""
    return f" on rank {fact['rank']}" if "rank" in fact else ""


def non_finite(run: Run) -> Finding | None:
    """That the loss, or its gradient, stopped being finite, and where it began: what happened, and not why."""
    fact = fact_of(run, "non-finite")
    if fact is None:
        return None
    later = fact_of(run, "non-finite-call") if _unexplained(fact) else None
    if fact["origin"] == "backward":
        claim = (
            f"The gradient{on_rank(fact)} is not finite since step {fact['step']}, while the loss is "
            f"{fact['loss']:.4g}: {_where(fact)}."
        )
    else:
        claim = (
            f"The loss{on_rank(fact)} is {fact['loss']} since step {fact['step']}, and the first number that is not "
            f"finite is in {_where(fact)}."
        )
    told = " ".join((claim, *_more(fact), *(() if later is None else _again(later))))
    kind = later or fact.get("cause") or fact
    advice = next((words for name, words in ADVICE.items() if kind.get(name)), "See which cause explains it.")
    where = fact["where"] or fact.get("parameter", "")
    return Finding("non-finite", SHOWN, fact["step"], where, told, advice)


def forward_overflow(case: Case) -> Finding | None:
    """An exponential of numbers too large for its type, in a loss or a softmax written by hand."""
    fact = _first_call(case.run, "forward")
    if fact is None or fact.get("call") not in EXPONENTIALS:
        return None
    finite = [x for x in case.losses if math.isfinite(x)]
    calm = not finite or max(finite) < RISEN * finite[0]  # else a loss that blew up brought the numbers there
    if not fact.get("overflow") and not (calm and fact["inf"] and not fact["nan"]):
        return None
    return _of_call(case.run, fact, "forward-overflow", ADVICE["overflow"])


def non_finite_gradient(case: Case) -> Finding | None:
    """The slope of a call that has none where its argument is 0, or of one whose result a mask leaves out."""
    fact = _first_call(case.run, "backward")
    kind = None if fact is None else next((name for name in ("hidden", "zeros") if fact.get(name)), None)
    if fact is None or kind is None or not fact["where"]:
        return None
    return _of_call(case.run, fact, "non-finite-gradient", ADVICE[kind])


def _first_call(run: Run, origin: str) -> dict[str, Any] | None:
    """What the first number that was not finite is known to have come from, if that is a call of this kind."""
    blown = fact_of(run, "non-finite")
    if blown is None:
        return None
    known = (blown, blown.get("cause"), fact_of(run, "non-finite-call") if _unexplained(blown) else None)
    return next((fact for fact in known if fact is not None and fact.get("origin") == origin), None)


def _of_call(run: Run, fact: Mapping[str, Any], code: str, advice: str) -> Finding | None:
    whole = non_finite(run)
    if whole is None:
        return None
    bad = fact["nan"] + fact["inf"]
    found = Evidence.exact("numbers that are not finite", bad, f"of {fact['numbers']} at that call", n=fact["numbers"])
    return Finding(code, SHOWN, whole.step, fact["where"], whole.claim, advice, (found,))


def _unexplained(fact: Mapping[str, Any]) -> bool:
    return fact["origin"] in ("unknown", "parameter") and "cause" not in fact


def _where(fact: Mapping[str, Any]) -> str:
    """The place of the first number that is not finite."""
    where = fact["where"]
    if fact["origin"] == "backward":
        return _backward(fact)
    if fact["origin"] == "forward" and "numbers" in fact:
        given = "that are finite, or the −infinity of a mask" if fact.get("masked") else "that are all finite"
        return f"the output of {where}, shape {_shape(fact)}: {_how_many(fact)}, made of arguments {given}"
    return {
        "parameter": f"the weights of {where}",
        "forward": f"the forward pass, {where}()",
        "batch": f"the batch, {where}",
        "unknown": "a place that was not recorded",
    }.get(fact["origin"], f"the {fact['origin']} of {where}")


def _backward(fact: Mapping[str, Any]) -> str:
    parameter = fact.get("parameter", "a parameter")
    if not fact["where"]:
        because = "a replay of the step has finite ones" if fact.get("replayed") else "the step was not recorded"
        return f"that of {parameter} is not, and {because}"
    numbers = f"shape {_shape(fact)}: {_how_many(fact)}"
    if fact.get("met"):
        return f"finite gradients add up to more than their type can hold at the output of {fact['where']}, {numbers}"
    return f"the backward pass of {fact['where']} is given a finite gradient and makes one that is not, {numbers}"


def _more(fact: Mapping[str, Any]) -> tuple[str, ...]:
    """What else is known of the place, a sentence each."""
    found = []
    if fact.get("overflow"):
        found.append("In float64 the call is finite: the numbers are too large for their type.")
    if fact.get("zeros"):
        found.append(f"{fact['zeros']} of its arguments are exactly 0.")
    if fact.get("hidden"):
        found.append(
            f"Numbers that are not finite went through it in the forward pass already: they arose in {fact['hidden']}, "
            "and were left out of the loss."
        )
    if fact["origin"] == "parameter" and "since" in fact:
        found.append(
            f"The loss of step {fact['since']} was finite: what spoilt them is the update of that step."
            if fact["since"]
            else "They were so before the first step."
        )
    if "cause" in fact:
        found += _again(fact["cause"])
    return tuple(found)


def _again(fact: Mapping[str, Any]) -> tuple[str, ...]:
    """What a recorded step shows at other weights than it had."""
    return (
        f"Step {fact['step']} shows it at the weights of step {fact['weights']} as well: "
        f"{'' if fact['origin'] == 'backward' else 'the first number that is not finite is in '}{_where(fact)}.",
        *_more(fact),
    )


def _shape(fact: Mapping[str, Any]) -> str:
    return str(tuple(fact["shape"]))


def _how_many(fact: Mapping[str, Any]) -> str:
    kinds = [(fact[key], name) for key, name in (("nan", "NaN"), ("inf", "infinite")) if fact[key]]
    count, name = kinds[0]
    first = f"{count} of {fact['numbers']} number{'s' * (fact['numbers'] != 1)} {'is' if count == 1 else 'are'} {name}"
    return " and ".join((first, *(f"{count} {name}" for count, name in kinds[1:])))
