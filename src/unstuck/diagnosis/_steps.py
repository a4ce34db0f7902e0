"""The causes that lie in the steps: their length, their direction, and what the optimiser makes of a gradient."""

import math
from dataclasses import replace

from unstuck.diagnosis import _data as data
from unstuck.diagnosis import _motion as motion
from unstuck.diagnosis import _remedies as remedies
from unstuck.diagnosis import _settings as settings
from unstuck.diagnosis._case import Case
from unstuck.diagnosis._findings import plain
from unstuck.diagnosis._held_out import batches_trained_on
from unstuck.diagnosis._hypothesis import (
    AMISS,
    DIVERGED,
    INF,
    LIFE,
    SIGHT,
    SLOW,
    SORTED,
    STUCK,
    Hypothesis,
    Prediction,
    value,
)
from unstuck.diagnosis._trial import LEAST, Remedy
from unstuck.diagnosis._wires import wires

BEYOND = 5.0  # λ₁η from which on a lower rate need gain little (healthy runs that stand still: below 3.3)
FAR_BELOW = 1 / 64  # λ₁η: a rate that could be over 100 times as high (healthy runs that are slow: 0.02 and more)
STRONG = 0.1  # of the gradient that clipping leaves: no healthy run comes near that
SMALLEST = 4  # rows of a part of a batch
EDGE = 2.0  # λ₁η up to which a step of the mean loss is stable (measured: bouncing 4 and more, noise below 1.5)


def _diverged(case: Case) -> str:
    rise = value(case, "rise of the loss")
    worst = "it is no longer a number" if math.isinf(rise) else f"it rose to {plain(rise)} times its start"
    return (
        f"The loss blew up: {worst}. The step is too large for the curvature, so every update lands higher than before."
    )


def _slowed(case: Case) -> list[Remedy]:
    steep = value(case, "curvature × rate at the start")
    return [remedies.rate(case.start, 1 / k) for k in (10, 100, 1000, *([steep] if 1000 < steep < INF else []))]


def _tiny_steps(case: Case) -> str:
    return (
        "The loss hardly moves because the steps are tiny: each update could be "
        f"{plain(value(case, 'head-room'))} times as long before the loss of its own batch rises again."
    )


def _dulled(case: Case) -> str:
    return (
        f"The optimiser's ε is larger than the gradients: for {value(case, 'under ε'):.0%} of the weights it takes "
        "the place of the root mean square gradient, and the steps are as small as the gradients are."
    )


def _raised(case: Case) -> list[Remedy]:
    room = value(case, "head-room")
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
    beyond = value(case, "curvature × rate") >= BEYOND
    least = remedies.SLIGHTLY if beyond else remedies.FAR
    arms = [remedies.rate(case.state, 1 / k, least=least) for k in (3, 10)]
    if motion.repeats_one_batch(case):
        return arms
    # it helps a step that the curvature makes bounce as well as one that noise does: λ₁η tells them apart
    cause = "lr-bounces" if value(case, "curvature × rate") >= EDGE else "noise-floor"
    return [*arms, remedies.larger_batch(4, proves=cause)]


def _clipped_away(case: Case) -> str:
    return (
        f"Clipping leaves {plain(value(case, 'what clipping leaves'))} of the gradient: it no longer bounds the rare "
        "long step, it sets the length of every one."
    )


def _unclipped(case: Case) -> list[Remedy]:
    left = value(case, "what clipping leaves")
    least = LEAST if left < STRONG else remedies.FAR
    return [remedies.unclipped(least=least), remedies.looser_clip(case.clip / left / 2, least=least)]


def _run_dry(case: Case) -> str:
    return (
        f"The schedule has taken the rate away: for {value(case, 'steps at a lost rate'):.0%} of the run it was "
        f"below 1/{1 / settings.LOST:.0f} of its peak, while the loss could still fall."
    )


def _misused(case: Case) -> str:
    rising = value(case, "rise of the rate")
    if rising > 1:
        return (
            "The warm-up has not ended: the rate rose to the very last step, and is still too small to move the loss."
        )
    return (
        f"The schedule is stepped once for every step of the optimiser, and so has taken the rate away early: for "
        f"{value(case, 'steps at a lost rate'):.0%} of the run it was below 1/{1 / settings.LOST:.0f} of its peak."
    )


def _restored(case: Case) -> list[Remedy]:
    if value(case, "rise of the rate") > 3:
        return [remedies.rate(case.state, k) for k in (50, 10)]
    peak = max(case.run.series("lr")[1])
    return [remedies.rate_at(peak), remedies.rate_at(peak / 10)]


def _sorted(case: Case) -> str:
    return (
        f"The batches come sorted: the targets of one spread {value(case, 'mixture of a batch'):.0%} as far as those "
        "of all, so each step undoes what the last ones have learned of the others."
    )


def _unrelated(case: Case) -> str:
    told = max(value(case, "what neighbours tell"), 0.0)
    return (
        "The targets do not seem to go with the inputs: the rows nearest to a row tell its target no better than "
        f"guessing ({told:.0%} of the way to certainty), though the network responds to its inputs and its steps are "
        "long enough to learn."
    )


def _few_steps(case: Case) -> str:
    return (
        f"A batch holds {value(case, 'batch over the data'):.0%} of the rows, so that a pass over them makes hardly "
        "any progress: the gradient is exact, and there are too few steps along it."
    )


def _smaller(case: Case) -> list[Remedy]:
    rows = min(map(len, case.once(batches_trained_on)))
    parts = [n for n in (8, 32) if rows // n >= SMALLEST and case.once(wires)[0].of_any_size]
    return [remedies.smaller_batch(n, data.parted(case, n)) for n in parts]


MIXED = Prediction("mixture of a batch", SORTED, INF, "the batches come sorted", needed=False)

TINY = Hypothesis(
    "lr-too-small",
    (STUCK,),
    (
        SIGHT,
        Prediction("trend", -0.15, INF, "the loss falls (ln by {value:.2f} in the last third of the run)"),
        Prediction("under ε", 0, 0.5, "ε holds the steps back ({value:.0%} of the weights lie under it)", needed=False),
        Prediction("what clipping leaves", 0.1, 1, "clipping shortens the steps: it leaves {value:.0%}", needed=False),
        Prediction("share of weight decay", 0, 0.3, "weight decay makes {value:.0%} of each update", needed=False),
        Prediction("steps at a lost rate", 0, 1 / 3, "a schedule took the rate away", needed=False),
        Prediction("rise of the rate", 0, 3, "the rate was still rising", needed=False),
        Prediction("head-room", 200, INF, "an update could be only {shown} × as long (a tiny one: over 200 ×)"),
        Prediction("head-room elsewhere", 20, INF, "on another batch it could be only {shown} times as long"),
        Prediction("drift gain", 0.01, 1, "nothing is gained further along its way ({value:.1%})", needed=False),
    ),
    _tiny_steps,
    "Raise the learning rate to one that the trial accepts.",
    _raised,
)
# of a loss that falls: healthy ones that are cut short could be faster, too, but not by so much
TINY_AND_SLOW = replace(
    TINY,
    symptoms=(SLOW,),
    predictions=(
        *(p for p in TINY.predictions if p.quantity != "trend"),
        Prediction("trend", -0.5, INF, "the loss falls (ln by {value:.2f} in the last third of the run)"),
        Prediction("curvature × rate", 0, FAR_BELOW, "the step is not tiny for the curvature (λ₁η = {shown})"),
    ),
)

STEPS: tuple[Hypothesis, ...] = (
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
        "clip-too-strong",
        (STUCK, SLOW),
        (
            Prediction("what clipping leaves", 0, 0.3, "clipping leaves {value:.0%} of the gradient", premise=True),
            SIGHT,
        ),
        _clipped_away,
        "Clip at about the longest norm of a healthy stretch, or not at all.",
        _unclipped,
        evidence=("head-room",),
    ),
    Hypothesis(
        "scheduler-misused",
        (STUCK, SLOW),
        (
            SIGHT,
            Prediction(
                "misuse of the schedule",
                1,
                1,
                "the schedule is not stepped too often, and no warm-up is without end",
                premise=True,
            ),
        ),
        _misused,
        "Step a schedule as often as it counts: after each epoch, or with its lengths given in steps.",
        _restored,
    ),
    Hypothesis(
        "lr-decayed-early",
        (STUCK, SLOW),
        (
            SIGHT,
            Prediction("steps at a lost rate", 1 / 3, 1, "the rate was lost in {value:.0%} of the steps", premise=True),
        ),
        _run_dry,
        "Let the rate decay later, or not as far.",
        _restored,
    ),
    Hypothesis(
        "adam-constants",
        (STUCK, SLOW),
        (
            SIGHT,
            Prediction(
                "under ε", 0.5, 1, "ε is below the gradients ({value:.0%} of the weights lie under it)", premise=True
            ),
            Prediction("head-room", 20, INF, "an update could be only {shown} × as long (a dulled one: over 20 ×)"),
        ),
        _dulled,
        "Leave ε at its default of 1e-8, or at a hundredth of the gradients' root mean square.",
        lambda case: [remedies.option("eps", 1e-8, "ε 1e-08")],
    ),
    TINY,
    TINY_AND_SLOW,
    Hypothesis(
        "labels-shuffled",
        (STUCK,),
        (
            Prediction(
                "what neighbours tell", -1, 0.1, "rows that lie near one another have like targets", premise=True
            ),
            SIGHT,
            LIFE,
            Prediction("head-room", 0, 200, "the step is tiny: an update could be {shown} times as long"),
        ),
        _unrelated,
        "Look at some rows with their targets: a sort, a shuffle or a join has moved one and not the other.",
        suspected=True,
    ),
    Hypothesis(
        "not-shuffled",
        (STUCK, SLOW, AMISS),
        (
            Prediction(
                "mixture of a batch",
                0,
                SORTED,
                "the batches are mixed (their targets spread {value:.0%} as far as all)",
                premise=True,
            ),
        ),
        _sorted,
        "Shuffle the rows anew for each epoch (DataLoader(shuffle=True)), over all of the data.",
        decisive=True,
    ),
    Hypothesis(
        "batch-too-large",
        (STUCK, SLOW),
        (
            Prediction("batch over the data", data.LARGE, 1, "a batch holds {value:.0%} of the rows", premise=True),
            Prediction("whole batches needed", 0, 0, "the optimiser needs the same loss at each step", premise=True),
            Prediction("loss over chance", 0.15, INF, "the loss is down to {value:.0%} of what guessing earns"),
        ),
        _few_steps,
        "Use smaller batches, or as many more passes; with a larger batch goes a higher rate, and a warm-up.",
        _smaller,
        origin=lambda case: case.start,
    ),
    Hypothesis(
        "lr-bounces",
        (STUCK,),
        (
            SIGHT,
            LIFE,
            MIXED,
            Prediction("head-room", 0, 200, "the step is tiny: an update could be {shown} times as long"),
            Prediction(
                "curvature × rate", EDGE, INF, "the step is small for the curvature (λ₁η = {shown}, bouncing: above 2)"
            ),
        ),
        _bouncing,
        "Lower the learning rate to one that the trial accepts, or let it decay; a larger batch may help.",
        _lowered,
        evidence=("relative gradient",),
        over_again=True,
    ),
    Hypothesis(
        "noise-floor",
        (STUCK,),
        (
            SIGHT,
            MIXED,
            Prediction("different batches", 2, INF, "every step uses the same batch: its gradient has no noise"),
            Prediction(
                "head-room elsewhere", 0, 200, "the step is tiny: on another batch it could be {shown} times as long"
            ),
            Prediction(
                "curvature × rate",
                0,
                EDGE,
                "curvature limits the step before noise does (λ₁η = {shown}, noise: below 2)",
            ),
        ),
        _noisy,
        "Let the learning rate decay, or use a larger batch.",
        _lowered,
    ),
)
