"""The causes that only a measurement tells apart: what each predicts, what refutes it, and what should cure it."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from unstuck.diagnosis import _motion as motion
from unstuck.diagnosis import _remedies as remedies
from unstuck.diagnosis import _structure as structure
from unstuck.diagnosis._case import Case, Measure
from unstuck.diagnosis._findings import plain
from unstuck.diagnosis._trial import Remedy
from unstuck.record import State

INF = math.inf
DIVERGED, BLIND, STUCK = "diverged", "blind", "stuck"  # symptoms
DEPENDS = structure.DEPENDS
STEEP = 3.0  # λ₁η from which on neither noise nor a healthy run is met (measured: bouncing 2 to 145, noise below 0.7)
GENUINE = 0.05  # a saddle leads down to both sides by this share of the loss

MEASURES: dict[str, Measure] = {
    "trend": motion.trend,
    "loss over chance": motion.level,
    "rise of the loss": motion.rise,
    "input dependence": structure.input_dependence,
    "dead units": structure.dead_share,
    "saturation": structure.saturation,
    "units at rest": structure.at_rest,
    "smallest signal": structure.smallest_scale,
    "signal into the dead layer": structure.dead_signal,
    "relative gradient": structure.relative_gradient,
    "zero gradients": structure.zero_gradients,
    "zero weights at the start": structure.zero_at_start,
    "growth of the weights": structure.growth,
    "head-room": motion.head_room,
    "head-room elsewhere": motion.head_room_elsewhere,
    "drift gain": motion.drift_gain,
    "under ε": motion.under_epsilon,
    "curvature × rate": motion.curvature_times_rate,
    "curvature × rate at the start": motion.curvature_at_the_start,
    "different batches": motion.different_batches,
    "escape gain": motion.escape_gain,
}


@dataclass(frozen=True)
class Prediction:
    """What a hypothesis says a quantity must be, and the sentence that a reader gets when it is not."""

    quantity: str
    low: float
    high: float
    refuted: str  # a format with {value}, or {shown} where it is to be read as a plain number
    needed: bool = True  # whether the hypothesis falls where the quantity cannot be measured

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
    be suspected, never proved.
    """

    code: str
    symptoms: tuple[str, ...]
    predictions: tuple[Prediction, ...]
    claim: Callable[[Case], str]
    advice: str
    remedies: Callable[[Case], Sequence[Remedy]] = lambda case: ()
    origin: Callable[[Case], State | None] = lambda case: case.state  # where its trial starts
    evidence: tuple[str, ...] = ()  # quantities to show beside the predicted ones
    decisive: bool = False  # whether its predictions alone show it, should the trial not prove it


def symptom(case: Case) -> str | None:
    """What is wrong with the loss, if anything: without a symptom there is no verdict."""
    rise, level, dependence = case["rise of the loss"], case["loss over chance"], case["input dependence"]
    high = level is None or level.value > 0.8
    if rise is not None and (math.isinf(rise.value) or (rise.value >= 10 and high)):
        return DIVERGED
    if dependence is not None and dependence.value < DEPENDS and at_chance(case):
        return BLIND
    trend = case["trend"]
    flat = trend is not None and (trend.value > -0.15 or trend.high > 0.3)
    return STUCK if flat and level is not None and level.value > 0.05 else None


def at_chance(case: Case) -> bool:
    """Whether the loss is no better than guessing.

    Where it is not known what guessing earns, it must still be where it began: neither lower, nor, as that of a policy
    or of a game often is, higher.
    """
    level = case["loss over chance"]
    if level is None:
        return False
    return level.value > 0.8 if case.guess is not None else level.low > 0.8 and level.high < 1 / 0.8


def _value(case: Case, name: str) -> float:
    found = case[name]
    return math.nan if found is None else found.value


def _everything(case: Case) -> list[int]:
    return sorted({k for t in case.fixed for k in t.program.reads()})


def _diverged(case: Case) -> str:
    rise = _value(case, "rise of the loss")
    worst = "it is no longer a number" if math.isinf(rise) else f"it rose to {plain(rise)} times its start"
    return (
        f"The loss blew up: {worst}. The step is too large for the curvature, so every update lands higher than before."
    )


def _slowed(case: Case) -> list[Remedy]:
    steep = _value(case, "curvature × rate at the start")
    return [remedies.rate(case.start, 1 / k) for k in (10, 100, 1000, *([steep] if 1000 < steep < INF else []))]


def _zero(case: Case) -> str:
    return (
        f"The weights started at zero, and {_value(case, 'zero gradients'):.0%} of the parameters have a gradient of "
        "exactly 0: all units compute the same, and only the output's bias learns."
    )


def _dead(case: Case) -> str:
    return (
        f"{_value(case, 'dead units'):.0%} of the units of a ReLU layer are zero for every input: no gradient passes, "
        "and what lies before them cannot learn."
    )


def _revived(case: Case) -> list[Remedy]:
    layers = structure.dead_layers(case, case.fixed[-1].program)
    return [remedies.renew(layers, case.names, "dead layer initialised afresh")] if layers else []


def _killed(case: Case) -> str:
    return (
        f"An earlier step destroyed the network: {_value(case, 'units at rest'):.0%} of a layer's units are dead or "
        f"saturated, and the weights are {plain(_value(case, 'growth of the weights'))} times as long as at the start. "
        "A lower rate from here cures nothing."
    )


def _critical_point(case: Case) -> str:
    gain = _value(case, "escape gain")
    if gain >= GENUINE:
        return (
            "The network sits on a saddle: the gradient vanishes, and along the most negative curvature the loss falls "
            f"to both sides, by {gain:.0%} or more."
        )
    return (
        "The network sits at the flat origin of a deep network, a degenerate saddle: the gradient vanishes, and even "
        "the most negative curvature hardly leads down, so that gradient descent cannot leave in reasonable time."
    )


def _way_out(case: Case) -> list[Remedy]:
    found = case.once(motion.way_out)
    step = [] if found is None else [remedies.along(found[1], _everything(case))]
    return [remedies.randomise(), *step]


def _saturated(case: Case) -> str:
    return f"{_value(case, 'saturation'):.0%} of the activations lie on the flat part of a tanh or sigmoid."


def _tiny_steps(case: Case) -> str:
    return (
        "The loss hardly moves because the steps are tiny: each update could be "
        f"{plain(_value(case, 'head-room'))} times as long before the loss of its own batch rises again."
    )


def _dulled(case: Case) -> str:
    return (
        f"The optimiser's ε is larger than the gradients: for {_value(case, 'under ε'):.0%} of the weights it takes "
        "the place of the root mean square gradient, and the steps are as small as the gradients are."
    )


def _raised(case: Case) -> list[Remedy]:
    room = _value(case, "head-room")
    return [remedies.rate(case.state, room / 4), remedies.rate(case.state, room / 40)]


def _bouncing(case: Case) -> str:
    return (
        "The loss has stopped falling although the gradient is still large: every step jumps across a ravine instead "
        "of going down in it."
    )


def _noisy(case: Case) -> str:
    return (
        "The loss has stopped falling because the batches disagree: the noise of the gradient moves the weights as far "
        "as its mean."
    )


def _lowered(case: Case) -> list[Remedy]:
    arms = [remedies.rate(case.state, 1 / k, least=remedies.SLIGHTLY) for k in (3, 10)]
    if motion.repeats_one_batch(case):
        return arms
    # it helps a step that the curvature makes bounce as well as one that noise does: λ₁η tells them apart
    cause = "lr-bounces" if _value(case, "curvature × rate") >= STEEP else "noise-floor"
    return [*arms, remedies.larger_batch(4, proves=cause)]


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

HYPOTHESES: tuple[Hypothesis, ...] = (
    Hypothesis(
        "lr-diverges",
        (DIVERGED,),
        (Prediction("rise of the loss", 10, INF, "the loss never rose far above its start (at worst {shown} × it)"),),
        _diverged,
        "Start again with a learning rate that the trial accepts; warm-up or clipping helps an unstable start.",
        _slowed,
        origin=lambda case: case.start,
    ),
    Hypothesis(
        "zero-init",
        (BLIND, STUCK),
        (
            Prediction("zero weights at the start", 0.5, 1, "the weights did not start at zero ({value:.0%} did)"),
            BLINDNESS,
            Prediction(
                "zero gradients", 0.4, 1, "the gradients are not zero ({value:.0%} of the parameters have none)"
            ),
        ),
        _zero,
        "Use the layers' own initialisation (Kaiming or Xavier); zero is right for biases only.",
        lambda case: (
            remedies.renew(_everything(case), case.names, "weights initialised afresh"),
            remedies.randomise(),
        ),
        decisive=True,
    ),
    Hypothesis(
        "dead-units",
        (BLIND, STUCK),
        (
            DEATH,
            SIGNAL,
            Prediction(
                "growth of the weights",
                0,
                8,
                "the weights are {shown} × as long as at the start: a step killed them",
                needed=False,
            ),
        ),
        _dead,
        "Initialise the dead layer afresh, its bias at 0; a leaky activation cannot die.",
        _revived,
        decisive=True,
    ),
    Hypothesis(
        "killed",
        (BLIND, STUCK),
        (
            Prediction("units at rest", 0.9, 1, "the units are alive ({value:.0%} of the worst layer are at rest)"),
            SIGNAL,
            Prediction("growth of the weights", 8, INF, "the weights have not grown (‖w‖ is {shown} × its start)"),
        ),
        _killed,
        "Start again from the beginning with a lower learning rate.",
        lambda case: [remedies.rate(case.start, 1 / k) for k in (10, 30)],
        origin=lambda case: case.start,
        decisive=True,
    ),
    Hypothesis(
        "saddle",
        (BLIND, STUCK),
        (
            BLINDNESS,
            Prediction(
                "zero weights at the start", 0, 0.5, "the weights started at exactly zero ({value:.0%})", needed=False
            ),
            Prediction(
                "signal into the dead layer",
                0,
                1e-3,
                "the units are dead under a strong signal (rms {shown})",
                needed=False,
            ),
            Prediction(
                "relative gradient", 0, 0.05, "the gradient is large: ‖g‖‖w‖/L = {shown}, at a saddle below 0.05"
            ),
        ),
        _critical_point,
        "Initialise at the usual scale (Kaiming or Xavier).",
        _way_out,
        evidence=("escape gain",),
    ),
    Hypothesis(
        "plateau",
        (BLIND,),
        (
            Prediction("saturation", 0.5, 1, "the activations are not on a flat part ({value:.0%} are saturated)"),
            Prediction(
                "input dependence",
                0,
                DEPENDS,
                "the outputs follow the inputs ({value:.0%} of their variance): no plateau",
            ),
            Prediction(
                "growth of the weights",
                0,
                8,
                "the weights are {shown} × as long as at the start: a step threw them there",
                needed=False,
            ),
        ),
        _saturated,
        "Rescale the inputs or the layer, or use an activation that does not saturate.",
    ),
    Hypothesis(
        "poor-minimum",
        (),  # no measurement of one run shows that better is reachable: a rival only
        (
            SIGHT,
            Prediction(
                "relative gradient", 0, 1, "the gradient is large: ‖g‖‖w‖/L = {shown}, near a minimum it is below 1"
            ),
            Prediction("drift gain", 0, 0.01, "the loss falls by {value:.0%} further along its way", needed=False),
        ),
        lambda case: "The gradient is small and no probe finds a way down.",
        "Start again from another initialisation, or give the network more width.",
    ),
    Hypothesis(
        "adam-constants",
        (STUCK,),
        (
            SIGHT,
            Prediction("under ε", 0.5, 1, "ε is below the gradients ({value:.0%} of the weights lie under it)"),
            Prediction("head-room", 20, INF, "an update could be only {shown} × as long (a dulled one: over 20 ×)"),
        ),
        _dulled,
        "Leave ε at its default of 1e-8, or at a hundredth of the gradients' root mean square.",
        lambda case: [remedies.epsilon(1e-8)],
    ),
    Hypothesis(
        "lr-too-small",
        (STUCK,),
        (
            SIGHT,
            Prediction(
                "under ε", 0, 0.5, "ε holds the steps back ({value:.0%} of the weights lie under it)", needed=False
            ),
            Prediction("head-room", 200, INF, "an update could be only {shown} × as long (a tiny one: over 200 ×)"),
            Prediction("head-room elsewhere", 20, INF, "on another batch it could be only {shown} times as long"),
            Prediction("drift gain", 0.01, 1, "nothing is gained further along its way ({value:.1%})", needed=False),
        ),
        _tiny_steps,
        "Raise the learning rate to one that the trial accepts.",
        _raised,
    ),
    Hypothesis(
        "lr-bounces",
        (STUCK,),
        (
            SIGHT,
            LIFE,
            Prediction("head-room", 0, 200, "the step is tiny: an update could be {shown} times as long"),
            Prediction(
                "curvature × rate", 1, INF, "the step is small for the curvature (λ₁η = {shown}, bouncing: above 1)"
            ),
        ),
        _bouncing,
        "Lower the learning rate to one that the trial accepts, or let it decay; a larger batch may help.",
        _lowered,
        evidence=("relative gradient",),
    ),
    Hypothesis(
        "noise-floor",
        (STUCK,),
        (
            SIGHT,
            Prediction("different batches", 2, INF, "every step uses the same batch: its gradient has no noise"),
            Prediction("head-room", 0, 200, "the step is tiny: an update could be {shown} times as long"),
            Prediction(
                "curvature × rate",
                0,
                1,
                "curvature limits the step before noise does (λ₁η = {shown}, noise: below 1)",
            ),
        ),
        _noisy,
        "Let the learning rate decay, or use a larger batch.",
        _lowered,
    ),
)
