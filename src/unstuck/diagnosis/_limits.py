"""The causes that lie in what a network, or its loss, can express: no step and no start gets further."""

from unstuck.diagnosis import _capacity as capacity
from unstuck.diagnosis._case import Case
from unstuck.diagnosis._hypothesis import BLIND, INF, LIFE, SIGHT, STUCK, Hypothesis, Prediction, value


def _unseparated(case: Case) -> str:
    return (
        f"The squared error leaves {value(case, 'rows on the wrong side'):.0%} of the rows on the wrong side, though "
        "the same network can tell the two kinds apart: under a logistic loss it is "
        f"{value(case, 'on the wrong side under a logistic loss'):.0%}. Rows far on the right side draw the fit away."
    )


def _too_narrow(case: Case) -> str:
    narrow = capacity.narrowest(case)
    return (
        "The network is too small for what the data hold: a wide one that learned some of the recorded rows leaves "
        f"{value(case, 'what a wide network leaves'):.0%} of its loss on the others, and trained anew, from its own "
        f"start and from fresh ones, it does not come near that.{f' {narrow}.' if narrow else ''}"
    )


def _no_good(case: Case) -> str:
    return (
        "The run lies in a minimum that is no good: the gradient is small, and no probe finds a way down, while from "
        f"other first weights a few steps leave {value(case, 'what another start reaches'):.0%} of the loss."
    )


SEPARABLE = Hypothesis(
    "not-separated",
    (STUCK,),
    (
        Prediction(
            "rows on the wrong side", 0.05, 1, "the rows lie on the right side ({value:.0%} do not)", premise=True
        ),
    ),
    _unseparated,
    "Use a logistic loss (cross-entropy), or a hinge loss, where the targets are two kinds; draw in what lies far out.",
    decisive=True,
    experiment=(
        Prediction(
            "on the wrong side under its own loss",
            0.04,
            1,
            "trained on it gets there by itself ({value:.1%} are still on the wrong side)",
        ),
        Prediction(
            "on the wrong side under a logistic loss",
            0,
            0.01,
            "no other loss tells them apart with this network ({value:.0%} are still on the wrong side)",
        ),
    ),
)  # weighed before outliers, which may be what draws the fit away

POOR = Hypothesis(
    "poor-minimum",
    (BLIND, STUCK),
    (
        Prediction("loss over chance", 0.5, 2, "the loss is {value:.0%} of what guessing earns"),
        Prediction(
            "relative gradient", 0, 1, "the gradient is large: ‖g‖‖w‖/L = {shown}, near a minimum it is below 1"
        ),
        Prediction("drift gain", 0, 0.01, "the loss falls by {value:.0%} further along its way", needed=False),
    ),
    _no_good,
    "Start again from another initialisation, or from several; give the network more width.",
    decisive=True,
    experiment=(
        Prediction("what its own start reaches", 0.6, INF, "trained anew from its own start it gets to {value:.0%}"),
        Prediction("what another start reaches", 0, 0.5, "from other starts it comes to no less than {value:.0%}"),
    ),
)  # weighed last

SMALL = Hypothesis(
    "capacity-too-small",
    (STUCK,),
    (
        Prediction(
            "loss of the same rows", 0.2, INF, "the network leaves little ({value:.0%} of chance)", premise=True
        ),
        SIGHT,
        LIFE,
    ),
    _too_narrow,
    "Make the narrowest layer wider, or the network deeper; where it has no activation between its layers, add one.",
    decisive=True,
    experiment=(
        Prediction("what a wide network leaves", 0, 0.5, "a wide network leaves {value:.0%} of its loss"),
        Prediction(
            "what its own network gains",
            -INF,
            capacity.ENOUGH,
            "trained anew, its own network goes {value:.0%} of the way to a wide one",
        ),
    ),
)  # weighed last: what is left where no cause that lies in the optimisation is
