"""The causes whose premise stands in the script or in the data: weighed before what they lead to."""

from collections.abc import Callable

from unstuck.diagnosis import _data as data
from unstuck.diagnosis import _remedies as remedies
from unstuck.diagnosis._case import Case
from unstuck.diagnosis._findings import plain
from unstuck.diagnosis._hypothesis import BLIND, DIVERGED, INF, SLOW, STUCK, Hypothesis, Prediction, symptom, value
from unstuck.diagnosis._trial import Remedy
from unstuck.record import State

VARIED = 0.25  # of the numbers of a row: inputs of which no more differ have lost nearly everything


def _decayed_away(case: Case) -> str:
    return (
        f"Weight decay makes {value(case, 'share of weight decay'):.0%} of each update: it pulls the weights to zero "
        "as fast as the loss can pull them anywhere."
    )


def _before(*signs: str) -> Callable[[Case], State | None]:
    """Where the run stands, or its start where a symptom says that nothing is left to go on from."""
    return lambda case: case.start if symptom(case) in signs else case.state


def _swinging(case: Case) -> str:
    beta = value(case, "momentum")
    long = f"for some {1 / (1 - beta):.0f} steps" if beta < 1 else "for ever"
    return f"With a momentum of {beta:g} each gradient acts {long}: the weights swing past where the gradient turns."


def _summed(case: Case) -> list[Remedy]:
    rows = case["scale of the loss"]
    return [remedies.rate(case.start, 1 / (rows.value * rows.n))] if rows is not None else []


def _too_loud(case: Case) -> str:
    rows = case["scale of the loss"]
    n = 0 if rows is None else rows.n
    if rows is not None and rows.meaning.endswith("losses"):
        return (
            f"The {n} losses of a step are added up, not averaged: their gradient, and so each step, is {n} times as "
            "long as that of one."
        )
    return (
        f"The loss is summed over the {n} rows of a batch, not averaged: its gradient, and so each step, is {n} times "
        "as long, and grows with the batch."
    )


def _dropped(case: Case) -> str:
    return (
        f"Dropout of {value(case, 'dropout'):.0%} leaves too little of each layer: the gradient of one mask says "
        "hardly anything of that of the next."
    )


def _far_out(case: Case) -> str:
    return (
        f"A row of the data lies {plain(value(case, 'longest row'))} times as far out as the median one of its "
        "batch: where it comes up it makes the whole step."
    )


def _hardly_any(case: Case) -> str:
    rows = case["columns that vary"]
    n = 0 if rows is None else rows.n
    return (
        f"Only {value(case, 'columns that vary'):.1%} of the numbers of a row differ at all among {n} rows: hardly "
        "anything is left in the inputs that could tell the targets."
    )


def _few_rows(case: Case) -> str:
    return (
        f"Batch norm has only {plain(value(case, 'numbers to a norm'))} numbers of a channel to take mean and spread "
        "from: they are mostly noise, and differ between training and evaluation."
    )


GIVEN: tuple[Hypothesis, ...] = (
    Hypothesis(
        "outliers",
        (DIVERGED, BLIND, STUCK),
        (Prediction("longest row", 20, INF, "no row lies far out (at most {shown} median lengths)", premise=True),),
        _far_out,
        "Find the rows furthest out and mend or drop them; clip the gradient, or use a loss that grows linearly.",
        lambda case: [remedies.without_outliers(data.cut_off(case))],
        origin=lambda case: case.start,
    ),
    Hypothesis(
        "inputs-empty",
        (BLIND, STUCK, SLOW),
        (
            Prediction(
                "columns that vary", 0, VARIED, "the inputs vary ({value:.0%} of their numbers do)", premise=True
            ),
        ),
        _hardly_any,
        "Look at one batch as it enters the network, and follow it back to the file: a wrong column or path, a crop or "
        "a mask that leaves nothing, a scale that rounds all to 0.",
        decisive=True,
    ),  # of inputs that are all the same there is no doubt, whatever the loss does
    Hypothesis(
        "dropout-too-high",
        (DIVERGED, STUCK, SLOW),
        (Prediction("dropout", 0.6, 1, "dropout is at most {value:.0%}", premise=True),),
        _dropped,
        "Lower dropout; 0.1 to 0.5 is usual.",
        lambda case: [remedies.less_dropout(0.2)],
        origin=lambda case: case.start,
    ),
    Hypothesis(
        "loss-summed",
        (DIVERGED, BLIND, STUCK, SLOW),
        (Prediction("scale of the loss", 0.5, 2, "the loss is no sum over the rows of a batch", premise=True),),
        _too_loud,
        "Average the loss over the batch (reduction='mean') and over its parts, or divide the rate by their number.",
        _summed,
        origin=lambda case: case.start,
    ),
    Hypothesis(
        "weight-decay-too-large",
        (BLIND, STUCK, SLOW),
        (Prediction("share of weight decay", 0.15, INF, "weight decay makes {value:.0%} of the update", premise=True),),
        _decayed_away,
        "Lower the weight decay; 0.01 to 0.1 is usual where it is decoupled, 1e-4 where it is not.",
        lambda case: [remedies.option("weight_decay", 0.0, "no weight decay", least=remedies.FAR)],
        origin=_before(BLIND),
    ),
    Hypothesis(
        "batchnorm-tiny-batch",
        (BLIND, STUCK, SLOW),
        (Prediction("numbers to a norm", 0, 6, "batch norm has {shown} numbers of a channel to go by", premise=True),),
        _few_rows,
        "Use larger batches, or a norm that does not depend on them (layer norm, group norm).",
        decisive=True,
    ),
    Hypothesis(
        "momentum-too-high",
        (DIVERGED, BLIND, STUCK, SLOW),
        (Prediction("momentum", 0.92, 1, "the momentum is {shown}", premise=True),),
        _swinging,
        "Use a momentum of 0.9.",
        lambda case: [remedies.less_momentum(0.9)],
        origin=_before(DIVERGED, BLIND),
    ),
)
