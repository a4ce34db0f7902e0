"""Whether what was learned holds on the held-out rows, and why it does not."""

import math
import sys

from torch import Tensor

from unstuck.diagnosis._case import Case
from unstuck.diagnosis._findings import SHOWN, SUSPECT, Evidence, Finding
from unstuck.diagnosis._held_out import (
    CERTAIN,
    FEW,
    Answers,
    HeldOut,
    answered,
    apart,
    certain,
    distinct_rows,
    few_batches,
    one_target_a_row,
    rows_trained_on,
    trained_at,
    trained_on,
    within,
)
from unstuck.diagnosis._wires import losses, shown, wires

RISEN = 1.1  # times its lowest that the loss of the held-out rows ends at
FALLEN = 0.7  # times what the training loss was then
WIDE, GAP = 5.0, 0.1  # times the training loss of numbers; the least held-out loss, over guessing, or share of errors
BY_HEART = 0.01  # of the rows trained on, at the most, that are answered wrongly
NOISIER = 2.0  # times the held-out loss that the training loss is
NEAR = 3  # weights of steps near that of the lowest held-out loss
CONTRADICTED = 0.07  # of the rows trained on that are answered wrongly, beyond the share of those held out
RARE, MISSED = 0.1, 0.2  # of the most frequent class, and of the held-out rows of rare ones beyond the others


def same_batch(case: Case, rows: HeldOut) -> Finding | None:
    """A few batches that come again and again, though there are more rows than theirs."""
    count, trained, seen = case.once(few_batches), case.once(trained_on), case.once(rows_trained_on)
    if not count or trained is None or seen is None or trained.kind != rows.answers.kind:
        return None
    unlike, asked_for, ratio = len(distinct_rows(seen)), len(rows.losses), rows.answers.loss / max(trained.loss, 1e-30)
    if not within(case, rows):  # else the script itself evaluates the others as rows to train on
        few = count > 1 and unlike < asked_for  # a single batch may be the whole of the data
        if not few or ratio < 2 or apart(rows.answers.losses, trained.losses) < CERTAIN:
            return None
    steps = len(case.once(wires)[0].tapes)
    return shown(
        "same-batch",
        rows.place,
        f"The {steps} recorded steps used the same {f'{count} batches' if count > 1 else 'batch'} again and again, "
        f"{unlike} rows in all, while {asked_for} are evaluated; the loss is {trained.loss:.3g} on those trained on, "
        f"{rows.answers.loss:.3g} on these.",
        "Print the first rows of a few batches of two epochs: a loader that is seeded anew, made anew inside the loop "
        "or left after a few batches gives the same ones each time.",
        Evidence.exact("different batches", count, "among the recorded steps", n=steps),
        Evidence.exact("evaluated over training loss", ratio, "now", n=asked_for),
        step=case.once(wires)[0].tapes[0].step,
    )


def label_noise(case: Case, rows: HeldOut) -> Finding | None:
    """Rows trained on whose targets contradict what the network has learned, while those held out agree with it.

    What is right is learned before what is wrong is learned by heart (Arpit and others, 2017): where the last weights
    answer all training rows, those of the lowest held-out loss tell.
    """
    trained = case.once(trained_on)
    if trained is None or trained.kind != rows.answers.kind or len(list(losses(case.once(wires)[0]))) != 1:
        return None  # several losses may well ask for several things at once, as of mixed rows
    seen = case.once(rows_trained_on)
    different = sys.maxsize if seen is None else len(distinct_rows(seen))
    step, found = 0, _contradiction(trained, rows.answers, different)
    if found is None:
        step, found = _before_by_heart(case, rows, different)
    if found is None:
        return None
    told, evidence = found
    since = f"At step {step}, before the network learned its rows by heart, " if step else ""
    return shown(
        "label-noise",
        rows.place,
        f"{since}{told}: many targets of the training rows contradict what the network has learned from the others.",
        "Look at the rows of the highest loss: mend or drop their labels; else a robust loss, and stop before they are "
        "learned by heart. If the training rows are made harder on purpose (augmentation), nothing is wrong.",
        evidence,
        step=step or 1,
    )


def _contradiction(trained: Answers, held: Answers, different: int) -> tuple[str, Evidence] | None:
    """How much worse the rows trained on are answered, of which so many are different; None where they are not."""
    if trained.kind == "values":
        wrong = trained.loss / max(held.loss, 1e-30)
        if wrong < NOISIER or apart(trained.losses, held.losses, most=different) < CERTAIN:
            return None
        told = f"the loss of the rows trained on is {trained.loss:.3g}, {wrong:.1f} times that of the rows held out"
        return told, Evidence.exact("training over held-out loss", wrong, "at the same weights", n=len(trained.losses))
    gap = float(held.right.mean() - trained.right.mean())
    if gap < CONTRADICTED or apart(held.right, trained.right, most=different) < CERTAIN:
        return None
    told = (
        f"{float(held.right.mean()):.0%} of the rows held out are answered rightly, but only "
        f"{float(trained.right.mean()):.0%} of those trained on"
    )
    meaning = "share, beyond those held out"
    return told, Evidence.exact("wrong among those trained on", gap, meaning, n=len(trained.right))


def _before_by_heart(case: Case, rows: HeldOut, different: int) -> tuple[int, tuple[str, Evidence] | None]:
    """The step at whose weights the rows held out are answered best, of a few near it, and what contradicts there."""
    if rows.inputs is None or case.memory is None:
        return 0, None
    best = min(rows.series, key=lambda pair: pair[1].loss)[0].step
    states = [s for s in (*case.memory.passed, *case.memory.states) if s.step and s.finite]
    states.sort(key=lambda s: abs(math.log(s.step / max(best, 1))))
    asked = [(s, a) for s in states[:NEAR] if (a := answered(case, rows, rows.inputs, s.weights)) is not None]
    if not asked:
        return 0, None
    state, held = min(asked, key=lambda pair: pair[1].loss)
    trained = trained_at(case, state.weights)
    return state.step, None if trained is None else _contradiction(trained, held, different)


def class_imbalance(case: Case, rows: HeldOut) -> Finding | None:
    """Classes that are rare among the rows trained on, and are missed among those held out."""
    trained = case.once(trained_on)
    if trained is None or trained.kind not in ("classes", "odds") or trained.kind != rows.answers.kind:
        return None
    there, here = rows.answers.confusion, trained.confusion
    if there.shape != here.shape or not case.once(one_target_a_row):
        return None  # of many places to a row, as of a text, some classes are rare by nature
    often, asked_for = here.sum(1), there.sum(1)
    rare = (often <= RARE * often.max()) & (asked_for > 0)
    common = (often > RARE * often.max()) & (asked_for > 0)
    missed, met = asked_for[rare].sum(), asked_for[common].sum()
    if min(float(missed), float(met)) < FEW:
        return None
    found, others = (float(there.diagonal()[m].sum() / there.sum(1)[m].sum()) for m in (rare, common))
    error = (found * (1 - found) / float(missed) + others * (1 - others) / float(met)) ** 0.5
    if others - found < MISSED or others - found < CERTAIN * error:
        return None
    names = ", ".join(str(k) for k in rare.nonzero().flatten().tolist()[:5]) + (" …" if int(rare.sum()) > 5 else "")
    share = float(often[rare].sum() / often.sum())
    return shown(
        "class-imbalance",
        rows.place,
        f"The classes {names} make {share:.1%} of the rows trained on, and of those held out {found:.0%} of theirs are "
        f"recognised; of the others {others:.0%}.",
        "Give rare classes more weight (weight= of the loss, or a sampler), or add their log-frequency to the logits; "
        "judge by the balanced accuracy.",
        Evidence.exact("share of the rare classes", share, "of the rows trained on", n=int(often.sum())),
        Evidence.exact("recall of the rare classes", found, "share of their held-out rows", n=int(missed)),
        Evidence.exact("recall of the others", others, "share of their held-out rows", n=int(met)),
    )


def overfitting(case: Case, rows: HeldOut) -> Finding | None:
    """Rows learned by heart: the held-out loss rises while that of the training falls, or is of another order."""
    trained = case.once(trained_on)
    if trained is None or trained.kind != rows.answers.kind or len(rows.series) < 3:
        return None
    best = min(range(len(rows.series)), key=lambda k: rows.series[k][1].loss)
    (then, low), (_, high) = rows.series[best], rows.series[-1]
    ratio = high.loss / max(trained.loss, 1e-30)
    evidence = (
        Evidence.exact("rise of the held-out loss", high.loss / low.loss, "times its lowest", n=len(high.losses)),
        Evidence.exact("held-out over training loss", ratio, "now", n=len(high.losses)),
    )
    advice = (
        "Keep the weights of the best step and stop there; then more data, augmentation, weight decay, dropout or a "
        "smaller network."
    )
    if _rises(case, rows, best) and ratio > 2:
        claim = (
            f"The network learns its rows by heart: the loss of the rows held out was lowest at step {then.step} "
            f"({low.loss:.3g}) and is {high.loss:.3g} now, that of the rows trained on {trained.loss:.3g}."
        )
        return Finding("overfitting", SHOWN, then.step, rows.place, claim, advice, evidence)
    gap = _gap(case, trained, high)
    if not gap:
        return None
    advice = "More data, augmentation, weight decay, dropout or a smaller network: to train on gains nothing."
    return Finding("overfitting", SUSPECT, then.step, rows.place, gap, advice, evidence)


def _rises(case: Case, rows: HeldOut, best: int) -> bool:
    """Whether the held-out loss has surely risen, with no fewer errors, while the training loss fell."""
    (then, low), (_, high) = rows.series[best], rows.series[-1]
    if high.loss < RISEN * low.loss or not _surely(high.losses, low.losses, paired=rows.fixed):
        return False
    if high.kind != "values" and _surely(high.right, low.right, paired=rows.fixed, least=1.0):
        return False
    fall = _fall(case, then.step)
    return fall is not None and fall <= FALLEN


def _gap(case: Case, trained: Answers, held: Answers) -> str:
    """What is left to gain on the rows held out, where nothing is on those trained on; else nothing."""
    if held.kind == "values":
        far = held.loss > WIDE * trained.loss and held.loss > GAP * case.chance
        told = f"the loss of the rows trained on is {trained.loss:.3g}, that of the rows held out {held.loss:.3g}"
    else:
        wrong, errors = 1 - float(held.right.mean()), 1 - float(trained.right.mean())
        far = errors < BY_HEART and wrong > GAP and apart(trained.right, held.right) > CERTAIN
        told = f"{1 - errors:.0%} of the rows trained on are answered rightly, and {1 - wrong:.0%} of those held out"
    return f"The network knows its rows by heart: {told}." if far else ""


def _surely(a: Tensor, b: Tensor, *, paired: bool, least: float = CERTAIN) -> bool:
    """Whether a lies above b."""
    return (certain(a - b) if paired else apart(a, b)) >= least


def _fall(case: Case, since: int) -> float | None:
    """What is left of the training loss since a step: the mean of its last tenth over that around the step."""
    pairs = list(zip(case.steps, case.losses, strict=True))
    width = max(len(pairs) // 10, 1)
    at = next((k for k, (step, _) in enumerate(pairs) if step >= since), len(pairs) - 1)
    then = [x for _, x in pairs[max(at - width // 2, 0) : at + width // 2 + 1]]
    now = [x for _, x in pairs[-width:]]
    return (sum(now) / len(now)) / (sum(then) / len(then)) if then and now and sum(then) > 0 else None
