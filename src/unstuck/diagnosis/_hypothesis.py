"""What a hypothesis is, and the symptoms that call for one."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from unstuck.diagnosis._case import Case
from unstuck.diagnosis._findings import plain
from unstuck.diagnosis._structure import DEPENDS
from unstuck.diagnosis._trial import Remedy
from unstuck.record import State

INF = math.inf
RISEN = 1.5  # times its lowest: a loss that had been so much lower does not fall
SLOWLY = 8  # steps after which a loss can be slow
SORTED = 0.7  # of the spread of all targets, within a batch: such batches do not come at random
BACK = 2.5  # times what guessing earns: a loss that blew up and has come back to it does not blow up any more,
LOWERED = 10.0  # nor one whose rate was so many times as high then
DIVERGED, BLIND, STUCK = "diverged", "blind", "stuck"  # symptoms
SLOW = "slow"  # the loss falls, and is far from done
AMISS = "amiss"  # one of the first weights, or of the order of the rows, whatever became of them


@dataclass(frozen=True)
class Prediction:
    """What a hypothesis says a quantity must be, and the sentence that a reader gets when it is not."""

    quantity: str
    low: float
    high: float
    refuted: str  # a format with {value}, or {shown} where it is to be read as a plain number
    needed: bool = True  # whether the hypothesis falls where the quantity cannot be measured
    premise: bool = False  # whether without it there is nothing to weigh: then the cause is no rival of others

    def because(self, value: float) -> str:
        """The sentence with the number in it."""
        return self.refuted.format(value=value, shown=plain(value))

    def holds(self, case: Case) -> bool | None:
        found = case[self.quantity]
        return None if found is None else self.low <= found.value <= self.high


@dataclass(frozen=True)
class Hypothesis:
    """A cause, the symptoms it can explain, what it predicts, and the remedies that should then work.

    It falls when a quantity lies outside its prediction. What survives has its remedies tried; without remedies it can
    be suspected, never proved, or shown where its predictions are decisive.
    """

    code: str
    symptoms: tuple[str, ...]
    predictions: tuple[Prediction, ...]
    claim: Callable[[Case], str]
    advice: str
    remedies: Callable[[Case], Sequence[Remedy]] = lambda case: ()
    origin: Callable[[Case], State | None] = lambda case: case.state  # where its trial starts
    evidence: tuple[str, ...] = ()  # quantities to show beside the predicted ones
    suspected: bool = False  # whether its predictions alone make it a SUSPECT, whatever the symptom
    over_again: bool = False  # whether a trial that failed is followed by one from the first weights
    decisive: bool = False  # whether its predictions alone show it, should the trial not prove it
    experiment: tuple[Prediction, ...] = ()  # as dear as a trial: weighed when nothing before it is proved or shown


def symptom(case: Case) -> str | None:
    """What is wrong with the loss, if anything: without a symptom there is no verdict."""
    rise, level, dependence = case["rise of the loss"], case["loss over chance"], case["input dependence"]
    usual = math.inf if level is None else min(level.value, level.high)  # without single batches far off
    back = case.guess is not None and (usual < BACK or value(case, "fall of the rate") >= LOWERED)
    if rise is not None and (
        math.isinf(rise.value) or (rise.value >= 10 and not back and (level is None or level.value > 0.8))
    ):
        return DIVERGED
    if dependence is not None and dependence.value < DEPENDS and at_chance(case):
        return BLIND
    trend = case["trend"]
    flat = trend is not None and (
        trend.value > -0.15 or trend.high > 0.3 or value(case, "loss over its lowest") > RISEN
    )
    if level is not None and level.value > 0.05 and (flat or len(case.losses) >= SLOWLY):
        return STUCK if flat else SLOW
    return AMISS if _began_amiss(case) else None


def _began_amiss(case: Case) -> bool:
    """Whether the first weights, or the order in which classes come, alone say that something is wrong."""
    mixture = case["mixture of a batch"]
    if mixture is not None and mixture.value < SORTED and case.classes:
        return True
    loss, outputs = case["loss at the start"], case["size of the outputs at the start"]
    if loss is not None and outputs is not None and loss.value >= 2.8 and outputs.value >= 3:
        return True
    saturated = case["saturation at the start"]
    return saturated is not None and saturated.value >= 0.5


def at_chance(case: Case) -> bool:
    """Whether the loss is no better than guessing.

    Where it is not known what guessing earns, it must still be where it began: neither lower, nor, as that of a policy
    or of a game often is, higher.
    """
    level = case["loss over chance"]
    if level is None:
        return False
    return level.value > 0.8 if case.guess is not None else level.low > 0.8 and level.high < 1 / 0.8


def value(case: Case, name: str) -> float:
    found = case[name]
    return math.nan if found is None else found.value


BLINDNESS = Prediction(
    "input dependence", 0, DEPENDS, "the outputs depend on the inputs ({value:.0%} of their variance)"
)
SIGHT = Prediction(
    "input dependence", DEPENDS, 1, "the outputs do not depend on the inputs ({value:.1%} of their variance)"
)
DEATH = Prediction("dead units", 0.9, 1, "the units are alive ({value:.0%} of the worst layer never fire)")
LIFE = Prediction("dead units", 0, 0.9, "the units are dead ({value:.0%} of a layer never fire)", needed=False)
SIGNAL = Prediction(
    "signal into the dead layer", 1e-3, INF, "the dead layer gets no signal to speak of (rms {shown})", needed=False
)
