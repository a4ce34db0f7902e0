"""The causes that keep a network where it began: no signal, no gradient, no way down."""

from unstuck.diagnosis import _motion as motion
from unstuck.diagnosis import _remedies as remedies
from unstuck.diagnosis import _structure as structure
from unstuck.diagnosis._begins import TINY, WAITED
from unstuck.diagnosis._case import Case
from unstuck.diagnosis._findings import plain
from unstuck.diagnosis._hypothesis import (
    BLIND,
    BLINDNESS,
    DEATH,
    INF,
    LIFE,
    SIGNAL,
    SLOW,
    STUCK,
    Hypothesis,
    Prediction,
    value,
)
from unstuck.diagnosis._trial import Remedy

ALWAYS = Prediction(
    "loss over its lowest", 0, 1.5, "the loss is {shown} times what it had been: a step killed them", needed=False
)
GENUINE = 0.05  # a saddle leads down to both sides by this share of the loss


def _everything(case: Case) -> list[int]:
    return sorted({k for t in case.fixed for k in t.program.reads()})


def _zero(case: Case) -> str:
    return (
        f"The weights started at zero, and {value(case, 'zero gradients'):.0%} of the parameters have a gradient of "
        "exactly 0: all units compute the same, and only the output's bias learns."
    )


def _dead(case: Case) -> str:
    return (
        f"{value(case, 'dead units'):.0%} of the units of a ReLU layer are zero for every input: through these no "
        "gradient passes, and they learn no more."
    )


def _revived(case: Case) -> list[Remedy]:
    layers = structure.dead_layers(case, case.fixed[-1].program)
    return [remedies.renew(layers, case.names, "dead layer initialised afresh")] if layers else []


def _killed(case: Case) -> str:
    return (
        f"An earlier step destroyed the network: {value(case, 'units at rest'):.0%} of a layer's units are dead or "
        f"saturated, and the weights are {plain(value(case, 'growth of the weights'))} times as long as at the start. "
        "A lower rate from here cures nothing."
    )


def _critical_point(case: Case) -> str:
    gain = value(case, "escape gain")
    if gain >= GENUINE:
        return (
            "The network sits on a saddle: the gradient vanishes, and along the most negative curvature the loss falls "
            f"to both sides, by {gain:.0%} or more."
        )
    return (
        "The network sits at the flat origin of a deep network, a degenerate saddle: the gradient vanishes, and even "
        "the most negative curvature hardly leads down, so that gradient descent cannot leave in reasonable time."
    )


def _from_zero(case: Case) -> str:
    return (
        f"The weights began so near zero (signals of an rms of {plain(value(case, 'signal at the start'))}) that the "
        f"gradient hardly led away from there: the loss stood at the level of guessing for "
        f"{plain(value(case, 'steps at chance'))} steps."
    )


def _way_out(case: Case) -> list[Remedy]:
    found = case.once(motion.way_out)
    step = [] if found is None else [remedies.along(found[1], _everything(case))]
    return [remedies.randomise(), *step]


def _saturated(case: Case) -> str:
    return f"{value(case, 'flat activations'):.0%} of the activations lie on the flat part of a tanh or sigmoid."


def _unsaturated(case: Case) -> list[Remedy]:
    layers = structure.saturated_layers(case, case.fixed[-1].program)
    return [remedies.renew(layers, case.names, "saturated layer initialised afresh")] if layers else []


def _vanishing(case: Case) -> str:
    return (
        "The gradient vanishes on its way back: in the first layer it is "
        f"{plain(value(case, 'gradient of the first layer'))} of what it is in the last one, while no unit is dead or "
        "saturated, and the outputs do not depend on the inputs."
    )


def _vanished(case: Case) -> str:
    return (
        "At the start the gradient vanished on its way back through "
        f"{plain(value(case, 'squashing layers'))} layers of tanh or sigmoid: in the first layer it was "
        f"{plain(value(case, 'gradient of the first layer at the start'))} of what it was in the last one, and the "
        f"loss stood at the level of guessing for {plain(value(case, 'steps at chance'))} steps."
    )


ORIGINS: tuple[Hypothesis, ...] = (
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
            ALWAYS,
        ),
        _dead,
        "Initialise the dead layer afresh, its bias at 0; a leaky activation cannot die.",
        _revived,
        decisive=True,
    ),
    Hypothesis(
        "dead-units",
        (STUCK, SLOW),
        (
            Prediction("dead units", 0.6, 0.9, "the units are alive", premise=True),
            SIGNAL,
            Prediction("signal at the start", TINY, INF, "the weights began near zero", needed=False),
            Prediction(
                "growth of the weights", 0, 3, "the weights are {shown} × as long as at the start", needed=False
            ),
            ALWAYS,
        ),
        _dead,
        "Initialise the dead units afresh, their bias at 0; a leaky activation cannot die.",
        lambda case: [remedies.revive(structure.dead_rows(case), least=remedies.FAR)],
    ),
    Hypothesis(
        "killed",
        (BLIND, STUCK),
        (
            Prediction("units at rest", 0.8, 1, "the units are alive ({value:.0%} of the worst layer are at rest)"),
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
            Prediction("flat activations", 0, 0.5, "{value:.0%} of a layer's activations are flat", needed=False),
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
        "saddle",
        (STUCK, SLOW),
        (
            WAITED,
            Prediction("signal at the start", 0, TINY, "the signals began at an rms of {shown}", premise=True),
            Prediction("zero weights at the start", 0, 0.5, "the weights started at exactly zero", needed=False),
        ),
        _from_zero,
        "Initialise at the usual scale (Kaiming or Xavier).",
        lambda case: [remedies.renew(_everything(case), case.names, "weights initialised afresh", least=remedies.FAR)],
        origin=lambda case: case.start,
    ),
    Hypothesis(
        "plateau",
        (BLIND, STUCK),
        (
            Prediction("flat activations", 0.5, 1, "the activations are not on a flat part ({value:.0%} are)"),
            Prediction(
                "relative gradient", 0, 0.05, "the gradient is large: ‖g‖‖w‖/L = {shown}, on a plateau below 0.05"
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
        _unsaturated,
    ),
    Hypothesis(
        "vanishing-gradient",
        (BLIND,),
        (
            BLINDNESS,
            LIFE,
            Prediction("saturation", 0, 0.5, "the activations are saturated ({value:.0%})"),
            Prediction(
                "smallest signal at the start", 0.05, INF, "the signal itself fades (to an rms of {shown} at the start)"
            ),
            Prediction(
                "gradient of the first layer",
                0,
                0.01,
                "the gradient reaches the first layer ({shown} of the last one's)",
            ),
            Prediction(
                "gradient of the first layer at the start",
                0,
                0.05,
                "the gradient reached the first layer at the start ({shown} of the last one's)",
                needed=False,
            ),
            Prediction(
                "growth of the weights", 0, 8, "the weights are {shown} × as long as at the start", needed=False
            ),
        ),
        _vanishing,
        "Use ReLU and its kin with their initialisation, connections that skip layers, or a norm between them.",
        decisive=True,
    ),
    Hypothesis(
        "vanishing-gradient",
        (STUCK, SLOW),
        (
            WAITED,
            Prediction("squashing layers", 2, INF, "there is hardly a tanh or sigmoid", premise=True),
            Prediction("saturation at the start", 0, 0.25, "a layer began saturated ({value:.0%})"),
            Prediction(
                "gradient of the first layer at the start",
                0,
                0.05,
                "the gradient reached the first layer ({shown} of the last one's at the start)",
            ),
            Prediction(
                "smallest signal at the start", 0.05, INF, "the signal itself fades (to an rms of {shown} at the start)"
            ),
        ),
        _vanished,
        "Use ReLU and its kin with their initialisation, connections that skip layers, or a norm between them.",
        lambda case: [remedies.rectified(case, least=remedies.FAR)],
        origin=lambda case: case.start,
    ),
)
