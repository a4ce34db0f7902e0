"""The causes that lie in how a training begins: the scale of its weights, of its outputs and of its inputs."""

from dataclasses import replace

from unstuck.diagnosis import _remedies as remedies
from unstuck.diagnosis import _start as start
from unstuck.diagnosis._case import Case
from unstuck.diagnosis._findings import plain
from unstuck.diagnosis._hypothesis import (
    AMISS,
    BLIND,
    BLINDNESS,
    DIVERGED,
    INF,
    SLOW,
    STUCK,
    Hypothesis,
    Prediction,
    value,
)
from unstuck.diagnosis._trial import Remedy

SCALED = Prediction("scale of the inputs", 0, 1, "the inputs themselves are not scaled", needed=False)
VARIED = Prediction(
    "constant part of the outputs", 0, 0.98, "{value:.0%} of the outputs are the same for every input", needed=False
)
FAR_OFF = Prediction("loss at the start", 2.8, INF, "the loss began at {shown} times what guessing earns", premise=True)
FADING = Prediction("smallest signal at the start", 1e-12, 0.05, "the weakest signal began at an rms of {shown}")
TINY = 3e-3  # rms of the strongest signal, below which all weights begin near zero: a saddle
WAITED = Prediction("steps at chance", 40, INF, "the loss left the level of guessing after {shown} steps", premise=True)
LOUD = Prediction("signal at the start", 11, INF, "no signal was large at the start (at most {shown})")


def _too_large(case: Case) -> str:
    return (
        f"The weights began too large: signals reach an rms of {plain(value(case, 'signal at the start'))} in the "
        f"network, and before the first step the loss is {plain(value(case, 'loss at the start'))} times what "
        "guessing earns."
    )


def _exploding(case: Case) -> str:
    return (
        "The signal grows from layer to layer: the first makes it "
        f"{plain(value(case, 'gain of the first layer'))} times as large, and it ends at an rms of "
        f"{plain(value(case, 'signal at the start'))}; the gradient grows as much on its way back."
    )


def _too_small(case: Case) -> str:
    return (
        "The weights began too small: the signal fades to an rms of "
        f"{plain(value(case, 'smallest signal at the start'))} within the network, so that nothing of the inputs "
        "reaches the outputs and hardly any gradient comes back."
    )


def _began_small(case: Case) -> str:
    return (
        "The weights began too small: the signal faded to an rms of "
        f"{plain(value(case, 'smallest signal at the start'))} within the network, and the loss stood at the level of "
        f"guessing for {plain(value(case, 'steps at chance'))} steps, until they had grown."
    )


def _afresh(case: Case) -> list[Remedy]:
    every = sorted({k for t in case.fixed for k in t.program.reads()})
    return [remedies.renew(every, case.names, "weights initialised afresh", least=remedies.FAR)]


def _louder(case: Case) -> list[Remedy]:
    """Weights of the usual size may need the usual rate, where a higher one was set to make up for small ones."""
    (afresh,) = _afresh(case)
    return [afresh, remedies.together(afresh, remedies.rate(case.start, 1 / 10))]


def _far_inputs(case: Case) -> str:
    return (
        f"The inputs are not scaled: their rms is {plain(value(case, 'size of the inputs'))}, and in the median "
        f"column the mean is {plain(value(case, 'offset of the inputs'))} times the spread."
    )


def _uneven_inputs(case: Case) -> str:
    return (
        f"A wide column of the inputs has {plain(value(case, 'spread of the inputs'))} times the spread of a narrow "
        "one: the curvature differs as much between their weights, and one rate suits few of them."
    )


def _standardised(case: Case) -> list[Remedy]:
    return [remedies.altered("standardised inputs", start.standardised(case), least=remedies.FAR)]


def _far_outputs(case: Case) -> str:
    return (
        f"The outputs began far off: {value(case, 'constant part of the outputs'):.0%} of their size is the same for "
        "every input, which the output's bias makes, and the first steps go into undoing it."
    )


def _flat_start(case: Case) -> str:
    return (
        f"{value(case, 'saturation at the start'):.0%} of a layer's activations began on the flat part of a tanh or "
        "sigmoid, where hardly any gradient passes."
    )


ALL = (DIVERGED, BLIND, STUCK, SLOW, AMISS)

BEGINS: tuple[Hypothesis, ...] = (
    Hypothesis(
        "inputs-unscaled",
        (DIVERGED, BLIND, STUCK, SLOW),
        (Prediction("scale of the inputs", 1, INF, "the inputs are of a usual size and near 0", premise=True),),
        _far_inputs,
        "Standardise the inputs: subtract each column's mean and divide by its spread, both of the training data.",
        _standardised,
        origin=lambda case: case.start,
        evidence=("size of the inputs", "offset of the inputs"),
    ),
    Hypothesis(
        "inputs-unscaled",
        (STUCK, SLOW),
        (Prediction("scale of the inputs", 0.35, 1, "the inputs are of a usual size and near 0", premise=True),),
        _far_inputs,
        "Standardise the inputs: subtract each column's mean and divide by its spread, both of the training data.",
        lambda case: [replace(r, least=remedies.BY_HALF) for r in _standardised(case)],
        origin=lambda case: case.start,
        evidence=("size of the inputs", "offset of the inputs"),
    ),
    Hypothesis(
        "output-bias",
        ALL,
        (
            FAR_OFF,
            Prediction(
                "constant part of the outputs", 0.98, 1, "the outputs differ with the inputs ({value:.0%} is constant)"
            ),
            Prediction("size of the outputs at the start", 3, INF, "the outputs began small ({shown})"),
            SCALED,
        ),
        _far_outputs,
        "Set the output's bias to 0, or to the log of the class frequencies, or to the mean of the targets.",
        lambda case: [remedies.no_constant(case)],
        origin=lambda case: case.start,
        decisive=True,
    ),
    Hypothesis(
        "exploding-gradient",
        ALL,
        (
            FAR_OFF,
            LOUD,
            Prediction(
                "gain of the first layer", 0, 4, "the first layer alone makes the signal {shown} times as large"
            ),
            Prediction("saturation at the start", 0, 0.5, "a layer began saturated ({value:.0%})", needed=False),
            SCALED,
            VARIED,
        ),
        _exploding,
        "Initialise for the depth (Kaiming, orthogonal with gain 1 for recurrence), normalise between the layers, or "
        "clip the gradient.",
        _afresh,
        origin=lambda case: case.start,
        decisive=True,
    ),
    Hypothesis(
        "init-too-large",
        ALL,
        (
            FAR_OFF,
            LOUD,
            Prediction("longest row", 0, 20, "a row lies {shown} median lengths out", needed=False),
            Prediction(
                "gain of the first layer",
                4,
                INF,
                "the first layer keeps the signal's size ({shown} times)",
                needed=False,
            ),
            SCALED,
            VARIED,
        ),
        _too_large,
        "Use the layers' own initialisation (Kaiming or Xavier), which keeps a signal's size.",
        _afresh,
        origin=lambda case: case.start,
        decisive=True,
    ),
    Hypothesis(
        "init-too-small",
        (BLIND,),
        (
            BLINDNESS,
            FADING,
            Prediction("signal at the start", TINY, INF, "even the strongest signal began at an rms of {shown}"),
            SCALED,
        ),
        _too_small,
        "Use the layers' own initialisation (Kaiming or Xavier), which keeps a signal's size.",
        _louder,
        origin=lambda case: case.start,
    ),
    Hypothesis(
        "init-too-small",
        (STUCK, SLOW),
        (
            WAITED,
            replace(FADING, premise=True),
            Prediction("signal at the start", TINY, INF, "even the strongest signal began at an rms of {shown}"),
            SCALED,
        ),
        _began_small,
        "Use the layers' own initialisation (Kaiming or Xavier), which keeps a signal's size.",
        _louder,
        origin=lambda case: case.start,
    ),
    Hypothesis(
        "ill-conditioned",
        (DIVERGED, BLIND, STUCK, SLOW),
        (
            SCALED,
            Prediction(
                "spread of the inputs",
                20,
                INF,
                "the columns of the inputs spread alike (within {shown} times)",
                premise=True,
            ),
        ),
        _uneven_inputs,
        "Standardise the inputs column by column; an adaptive optimiser, or batch norm, evens them out in part.",
        _standardised,
        origin=lambda case: case.start,
    ),
)

SATURATED = Hypothesis(
    "saturated",
    ALL,
    (
        Prediction("saturation at the start", 0.25, 1, "no layer began saturated ({value:.0%})", premise=True),
        Prediction("size of the outputs at the start", 0, 10, "the outputs themselves began large ({shown})"),
        SCALED,
    ),
    _flat_start,
    "Use the layers' own initialisation, a norm before the activation, or one that does not saturate.",
    _afresh,
    origin=lambda case: case.start,
    decisive=True,
)  # weighed after a plateau, which begins so as well
