"""The causes that only a measurement tells apart: what each predicts, what refutes it, and what should cure it."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from unstuck.diagnosis import _motion as motion
from unstuck.diagnosis import _remedies as remedies
from unstuck.diagnosis import _structure as structure
from unstuck.diagnosis._case import Case, Measure
from unstuck.diagnosis._trial import Remedy
from unstuck.record import State

DIVERGED, BLIND, STUCK = "diverged", "blind", "stuck"  # symptoms

MEASURES: dict[str, Measure] = {
    "trend": motion.trend,
    "loss over chance": motion.level,
    "rise of the loss": motion.rise,
    "input dependence": structure.input_dependence,
    "dead units": structure.dead_share,
    "saturation": structure.saturation,
    "smallest signal": structure.smallest_scale,
    "relative gradient": structure.relative_gradient,
    "zero gradients": structure.zero_gradients,
    "zero weights at the start": structure.zero_at_start,
    "growth of the weights": structure.growth,
    "head-room": motion.head_room,
    "head-room elsewhere": motion.head_room_elsewhere,
    "drift gain": motion.drift_gain,
    "curvature × rate": motion.curvature_times_rate,
    "different batches": motion.different_batches,
    "escape gain": motion.escape_gain,
}


@dataclass(frozen=True)
class Prediction:
    """What a hypothesis says a quantity must be, and the sentence that a reader gets when it is not."""

    quantity: str
    low: float
    high: float
    refuted: str  # a format with {value}
    needed: bool = True  # whether the hypothesis falls where the quantity cannot be measured

    def holds(self, case: Case) -> bool | None:
        found = case[self.quantity]
        return None if found is None else self.low <= found.value <= self.high


@dataclass(frozen=True)
class Hypothesis:
    """A cause, the symptoms it can explain, what it predicts, and the remedies that should then work.

    `claim` and `advice` are formats over the measured quantities (spaces and signs in a name become underscores).
    A hypothesis without remedies can be ruled out or suspected, never proved.
    """

    code: str
    symptoms: tuple[str, ...]
    predictions: tuple[Prediction, ...]
    claim: Callable[[Case], str]
    advice: str
    remedies: Callable[[Case], Sequence[Remedy]] = lambda case: ()
    origin: Callable[[Case], State | None] = lambda case: case.state  # where its trial starts
    shown: bool = False  # whether its predictions, all measured, are decisive without a trial


def symptom(case: Case) -> str | None:
    """What is wrong with the loss, if anything: without a symptom there is no verdict."""
    rise, level = case["rise of the loss"], case["loss over chance"]
    if rise is not None and (math.isinf(rise.value) or (rise.value >= 10 and (level is None or level.value > 0.8))):
        return DIVERGED
    dependence = case["input dependence"]
    if dependence is not None and dependence.value < 0.002 and (level is None or level.value > 0.8):
        return BLIND
    trend = case["trend"]
    if trend is not None and trend.value > -0.15 and level is not None and level.value > 0.1:
        return STUCK
    return None


def _value(case: Case, name: str) -> float:
    found = case[name]
    return math.nan if found is None else found.value


def _everything(case: Case) -> list[int]:
    return sorted({k for t in case.fixed for k in t.program.reads()})


def _dead(case: Case) -> list[Remedy]:
    layers = structure.dead_layers(case, case.fixed[-1].program)
    return (
        [remedies.renew(layers, case.names, f"dead layer initialised afresh ({case.names[layers[0]]} …)")]
        if layers
        else []
    )


def _raised(case: Case) -> list[Remedy]:
    room = min(_value(case, "head-room"), motion.CAP)
    return [remedies.rate(room / 4), remedies.rate(max(room / 40, 3))]


def _lowered(case: Case) -> list[Remedy]:
    arms = [remedies.rate(1 / 3), remedies.rate(1 / 10)]
    return arms if motion.repeats_one_batch(case) else [*arms, remedies.larger_batch(4)]


def _critical_point(case: Case) -> str:
    gain, g = _value(case, "escape gain"), _value(case, "relative gradient")
    here = f"The gradient vanishes (‖g‖‖w‖/L = {g:.2g}) and the outputs do not depend on the inputs"
    if gain >= 0.05:
        return f"{here}: this is a saddle. Along the negative curvature the loss falls to both sides, by {gain:.0%} at least."
    return (
        f"{here}: this is the flat origin of a deep network, a degenerate saddle where even the most negative curvature "
        "hardly leads down. Gradient descent cannot leave it in reasonable time; weights of the usual size can."
    )


def _way_out(case: Case) -> list[Remedy]:
    found = case.once(motion.way_out)
    return [] if found is None else [remedies.along(found[1], _everything(case))]


SEES = Prediction(
    "input dependence",
    0.002,
    1.0,
    "the outputs do not depend on the inputs ({value:.1e} of their variance comes from them)",
)
BLINDNESS = Prediction(
    "input dependence", 0.0, 0.002, "the outputs depend on the inputs ({value:.0%} of their variance comes from them)"
)

HYPOTHESES: tuple[Hypothesis, ...] = (
    Hypothesis(
        "lr-diverges",
        (DIVERGED,),
        (
            Prediction(
                "rise of the loss", 10, math.inf, "the loss never rose far above its start (×{value:.2g} at worst)"
            ),
        ),
        lambda case: (
            "The loss blew up: "
            + (
                "it is no longer a number"
                if math.isinf(_value(case, "rise of the loss"))
                else f"it rose {_value(case, 'rise of the loss'):.3g} times"
            )
            + ". The step is too large for the curvature, so that every update lands higher on the other side."
        ),
        "Start again with the smaller learning rate that the trial accepts; warm-up or gradient clipping help where only the first steps are unstable.",
        lambda case: (remedies.rate(1 / 10), remedies.rate(1 / 100), remedies.rate(1 / 1000)),
        origin=lambda case: case.start,
        shown=True,
    ),
    Hypothesis(
        "zero-init",
        (BLIND, STUCK),
        (
            Prediction(
                "zero weights at the start",
                0.5,
                1.0,
                "the weights did not start at zero ({value:.0%} of the matrices did)",
            ),
            BLINDNESS,
            Prediction(
                "zero gradients", 0.4, 1.0, "the gradients are not zero ({value:.0%} of the parameters have none)"
            ),
        ),
        lambda case: (
            f"All weights started at zero, and {_value(case, 'zero gradients'):.0%} of the parameters have a gradient of exactly 0: "
            "every unit computes the same, so that nothing tells them apart and only the output's bias learns."
        ),
        "Use the layers' own initialisation (Kaiming or Xavier); zero is right for biases only.",
        lambda case: (
            remedies.renew(_everything(case), case.names, "weights initialised afresh"),
            remedies.randomise(),
        ),
        shown=True,
    ),
    Hypothesis(
        "dead-units",
        (BLIND, STUCK),
        (
            Prediction("dead units", 0.9, 1.0, "the units are alive ({value:.0%} of the worst layer never fire)"),
            Prediction(
                "growth of the weights",
                0.0,
                8.0,
                "the weights have grown {value:.3g}-fold: an earlier step killed the units",
                needed=False,
            ),
        ),
        lambda case: (
            f"{_value(case, 'dead units'):.0%} of the units of a ReLU layer are zero for every input, so that no gradient passes "
            "through them and the layers before them cannot learn."
        ),
        "Initialise the dead layer afresh (its bias first), use a leaky activation, or lower the rate if a large step has killed it.",
        _dead,
        shown=True,
    ),
    Hypothesis(
        "killed",
        (BLIND, STUCK),
        (
            Prediction("dead units", 0.9, 1.0, "the units are alive ({value:.0%} of the worst layer never fire)"),
            Prediction("growth of the weights", 8.0, math.inf, "the weights have not grown ({value:.3g}-fold)"),
        ),
        lambda case: (
            f"An earlier step destroyed the network: {_value(case, 'dead units'):.0%} of a layer's units are dead and the weights are "
            f"{_value(case, 'growth of the weights'):.3g} times as long as at the start. A lower rate from here cures nothing."
        ),
        "Start again from the beginning with a lower learning rate.",
        lambda case: (remedies.rate(1 / 10), remedies.rate(1 / 30)),
        origin=lambda case: case.start,
        shown=True,
    ),
    Hypothesis(
        "saddle",
        (BLIND, STUCK),
        (
            BLINDNESS,
            Prediction(
                "dead units", 0.0, 0.9, "the units are dead ({value:.0%} of the worst layer never fire)", needed=False
            ),
            Prediction(
                "relative gradient",
                0.0,
                0.05,
                "the gradient is large: ‖g‖‖w‖/L = {value:.3g}, at a saddle it is below 0.05",
            ),
        ),
        _critical_point,
        "Initialise at the usual scale (Kaiming or Xavier); added noise or a step along the negative curvature leaves a saddle.",
        lambda case: (remedies.randomise(), *_way_out(case)),
    ),
    Hypothesis(
        "plateau",
        (BLIND, STUCK),
        (Prediction("saturation", 0.5, 1.0, "the activations are not on a flat part ({value:.0%} are saturated)"),),
        lambda case: f"{_value(case, 'saturation'):.0%} of the activations lie on the flat part of a tanh or sigmoid.",
        "Rescale the inputs or the layer, or use an activation that does not saturate.",
    ),
    Hypothesis(
        "poor-minimum",
        (BLIND, STUCK),
        (
            Prediction(
                "relative gradient",
                0.0,
                1.0,
                "the gradient is large: ‖g‖‖w‖/L = {value:.3g}, near a minimum it is below 1",
            ),
            Prediction(
                "drift gain",
                0.0,
                0.01,
                "the loss still falls by {value:.0%} along the way the weights came",
                needed=False,
            ),
            SEES,
        ),
        lambda case: "The gradient is small and no probe finds a way down.",
        "Start again from another initialisation, or give the network more width.",
    ),
    Hypothesis(
        "lr-too-small",
        (STUCK, BLIND),
        (
            SEES,
            Prediction(
                "head-room",
                200,
                math.inf,
                "the step is not small: the update could be only {value:.3g} times as long (a small one: over 200)",
            ),
            Prediction(
                "head-room elsewhere",
                20,
                math.inf,
                "on another batch the update could be only {value:.3g} times as long",
            ),
            Prediction(
                "drift gain",
                0.01,
                1.0,
                "nothing is gained further along the way (the loss falls by {value:.2%})",
                needed=False,
            ),
        ),
        lambda case: (
            f"The loss hardly moves because the steps are tiny: each update could be {_value(case, 'head-room'):.3g} times as long "
            "before the loss of its own batch rises again."
        ),
        "Raise the learning rate to the one that the trial accepts.",
        _raised,
    ),
    Hypothesis(
        "lr-bounces",
        (STUCK,),
        (
            SEES,
            Prediction(
                "dead units", 0.0, 0.9, "the units are dead ({value:.0%} of the worst layer never fire)", needed=False
            ),
            Prediction("head-room", 0.0, 200, "the step is small: the update could be {value:.3g} times as long"),
            Prediction(
                "curvature × rate",
                1.0,
                math.inf,
                "the step is small for the curvature (λ₁η = {value:.2g}, bouncing needs about 2)",
            ),
        ),
        lambda case: (
            "The loss has stopped falling although the gradient is still large "
            f"(‖g‖‖w‖/L = {_value(case, 'relative gradient'):.3g}): the step jumps across a ravine instead of following it "
            f"(λ₁η = {_value(case, 'curvature × rate'):.2g}, and above 2 a step lands higher on the other side)."
        ),
        "Lower the learning rate to the one that the trial accepts, or let it decay; a larger batch helps where batches differ.",
        _lowered,
    ),
    Hypothesis(
        "noise-floor",
        (STUCK,),
        (
            SEES,
            Prediction("different batches", 2, math.inf, "every step uses the same batch: its gradient has no noise"),
            Prediction("head-room", 0.0, 4096, "the step is small: the update could be {value:.3g} times as long"),
            Prediction(
                "curvature × rate",
                0.0,
                1.0,
                "curvature, not noise, limits the step (λ₁η = {value:.2g}; under noise alone it is below 1)",
            ),
        ),
        lambda case: (
            "The loss has stopped falling because the batches disagree: the noise of the gradient moves the weights as far as its mean "
            f"(λ₁η = {_value(case, 'curvature × rate'):.2g} leaves room, but a smaller step or a larger batch ends lower)."
        ),
        "Let the learning rate decay, or use a larger batch.",
        _lowered,
    ),
)
