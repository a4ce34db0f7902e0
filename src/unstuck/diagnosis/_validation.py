"""Whether the rows that a script evaluates tell the truth."""

from collections.abc import Callable, Collection

import torch
from torch import Tensor

from unstuck.diagnosis._case import Case
from unstuck.diagnosis._findings import Evidence, Finding
from unstuck.diagnosis._generalises import class_imbalance, label_noise, overfitting, same_batch
from unstuck.diagnosis._held_out import (
    ALL,
    CERTAIN,
    FEW,
    HeldOut,
    above,
    answered,
    apart,
    certain,
    distinct_rows,
    each_once,
    few_batches,
    held_out,
    normalises,
    rows_trained_on,
    share_hashed,
    trained_on,
    within,
)
from unstuck.diagnosis._scales import scales_apart
from unstuck.diagnosis._wires import shown

ENOUGH = ((3.0, 1.5), (1.0, 2.0))  # so far off, so many standard errors of the gain are enough: the rest is no chance
LOWER = 0.9  # times the loss, with the inputs brought to the scale that is trained on
MOVED = 0.6  # of the rows of a class that are called by another's name
LEAKED = 0.1  # of the rows: fewer are met by chance, as of blank lines, and change a score little
EASIER = 1.5  # times the loss of the known rows that the others have
LITTLE = 1.1  # the same where all leaking rows are known, and SINGLE of the evaluated ones come once: few by chance
MOSTLY, SINGLE = 0.5, 0.9  # where so many of such rows leak, few others need not be surely harder


def validation_findings(case: Case, codes: Collection[str] = ()) -> list[Finding]:
    """The first error that the evaluations of a run show, of all or of some kinds."""
    for check in (CHECKS[code] for code in codes or CHECKS):
        for rows in case.once(held_out):
            try:
                found = check(case, rows)
            except (RuntimeError, ValueError):  # the others may still tell
                continue
            if found is not None:
                return [found]
    return []


def train_while_validating(case: Case, rows: HeldOut) -> Finding | None:
    """Dropout that is on, or batch norm that uses the statistics of the rows at hand, while rows are evaluated."""
    first = next((e for e, _ in rows.series if e.training and e.drawn), None)
    if first is None or not rows.latest.training or not rows.latest.drawn:
        return None
    drawn, answers = rows.latest.drawn, rows.answers
    evidence = []
    if "dropout" in drawn and rows.inputs is not None:
        quiet = _asked(case, rows, rows.inputs)
        if quiet is None:
            return None
        gain = rows.losses - quiet
        if "batch norm" not in drawn and certain(gain) < 2:  # that dropout is on is certain anyway
            return None
        evidence.append(
            _paired("cost of the training mode", gain / quiet.mean(), "of the loss of these rows without dropout")
        )
    return shown(
        "train-while-validating",
        rows.place,
        f"The model is in training mode while {len(rows.losses)} rows are evaluated: its {' and '.join(drawn)} behaves "
        "as in training, so the score is not that of the model that will be used.",
        "Call model.eval() before the validation, and model.train() again before the training goes on.",
        Evidence.exact("rows evaluated in training mode", len(answers.outputs), "at the last look"),
        *evidence,
        step=first.step,
    )


def preprocessing_mismatch(case: Case, rows: HeldOut) -> Finding | None:
    """Held-out inputs on another scale than those trained on; brought to it, the network answers better."""
    seen = case.once(rows_trained_on)
    if rows.inputs is None or seen is None or not seen.is_floating_point():
        return None
    seen = each_once(seen)
    now = None if case.once(normalises) else _asked(case, rows, rows.inputs)
    before = [rows.losses] if now is None else [rows.losses, now]  # the weights may have moved since
    for whole in (True, False):  # one scale for all numbers, or one for each column
        off = scales_apart(seen, rows.inputs, whole=whole)
        if off is None or not off.surely:
            continue
        mended = _asked(case, rows, off.mended(rows.inputs))
        enough = next((least for far, least in ENOUGH if off.far >= far), CERTAIN)
        if mended is None or any(certain(x - mended) < enough or mended.mean() > LOWER * x.mean() for x in before):
            continue
        which = "" if whole else "column by column "
        return shown(
            "preprocessing-mismatch",
            rows.place,
            f"The inputs that are evaluated lie elsewhere than those trained on ({off.shift:.2g} spreads off, "
            f"{off.ratio:.2g} times as spread); on the same scale {which}their loss is {float(mended.mean()):.3g} "
            f"instead of {float(rows.losses.mean()):.3g}.",
            "Prepare held-out and training inputs by one function, with the mean and the spread of the training set.",
            Evidence.exact("shift of the inputs", off.shift, "in spreads of those trained on", n=len(rows.inputs)),
            Evidence.exact("ratio of the spreads", off.ratio, "evaluated over trained on", n=len(rows.inputs)),
            _paired("loss on the same scale", mended / rows.losses.mean(), "over the loss as it is"),
            step=rows.series[0][0].step,
        )
    return None


def label_map_wrong(case: Case, rows: HeldOut) -> Finding | None:
    """Classes that go by other numbers than in the training: each is called by one wrong name, nearly always."""
    trained = case.once(trained_on)
    if trained is None or trained.kind not in ("classes", "odds") or trained.kind != rows.answers.kind:
        return None
    there, here = rows.answers.confusion, trained.confusion
    if there.shape != here.shape:
        return None
    counts = there.sum(1)
    share, shares = there / counts[:, None].clamp_min(1), here / here.sum(1, keepdim=True).clamp_min(1)
    moved = {
        k: int(share[k].argmax())
        for k in range(len(share))
        if counts[k] >= FEW and float(share[k].max()) > MOVED and int(share[k].argmax()) != k
    }
    names = set(moved.values())
    if len(names) < len(moved) or len(names & moved.keys()) < max(2, len(moved) / 2):
        return None  # several are called by one name, or by one that is rightly another's
    if any(float(shares[k, k]) < MOVED for k in names):
        return None  # the training itself gets them wrong
    raw = float(there.diagonal().sum() / there.sum())
    mended = float(sum(there[k, moved.get(k, k)] for k in range(len(there))) / there.sum())
    told = ", ".join(f"{k} is called {v}" for k, v in list(moved.items())[:3]) + (" …" if len(moved) > 3 else "")
    return shown(
        "label-map-wrong",
        rows.place,
        f"The classes of the rows that are evaluated go by other numbers than in the training: {told}. "
        f"With the names exchanged {mended:.0%} of the answers are right, as it is {raw:.0%}.",
        "Number the classes once, from the training set, and use that map for both sets; print it from both loaders.",
        Evidence.exact("right answers", raw, "share, as the classes are numbered", n=int(there.sum())),
        Evidence.exact("right with the names exchanged", mended, "share", n=int(there.sum())),
        Evidence.exact(
            "right in the training",
            float(here.diagonal().sum() / here.sum()),
            "share of the recorded rows",
            n=int(here.sum()),
        ),
        step=rows.series[0][0].step,
    )


def leakage(case: Case, rows: HeldOut) -> Finding | None:
    """Rows that are trained on as well, and answered better than the others beside them."""
    if rows.known is None or rows.inputs is None or (case.once(few_batches) and within(case, rows)):
        return None
    mixed = [k for k in rows.parts.unique().tolist() if len(rows.known[rows.parts == k].unique()) == 2]
    there = torch.isin(rows.parts, torch.tensor(mixed, dtype=torch.long))  # else they may be several sets of rows
    if min(int((there & rows.known).sum()), int((there & ~rows.known).sum())) < FEW:
        return None
    share = float((there & rows.known).double().mean())
    if share < LEAKED:
        return None
    answers = (rows.losses, _asked(case, rows, rows.inputs))  # then, and now that more is learned by heart
    pairs = [(x[there & rows.known], x[there & ~rows.known]) for x in answers if x is not None]
    measured, single = case.once(share_hashed) >= ALL, len(distinct_rows(rows.inputs)) >= SINGLE * len(rows.inputs)
    by_far = EASIER if not (measured and single) else LITTLE
    found = [
        (k, o) for k, o in pairs if _easier(k, o, by_far) or (share >= MOSTLY and single and _easier(k, o, EASIER, 0))
    ]
    if not found:
        return None
    known, others = found[-1]
    least = "" if measured else "At least "
    return shown(
        "leakage",
        rows.place,
        f"{least}{share:.0%} of the {len(rows.losses)} rows that are evaluated are trained on as well, number for "
        f"number; their loss is {float(known.mean()):.3g}, that of the others {float(others.mean()):.3g}: the score is "
        "better than on new rows.",
        "Split before anything is copied or augmented, by what belongs together (a patient, a document, a day); drop "
        "duplicates first.",
        Evidence.exact("rows trained on", share, f"of those evaluated{least and ', at the least'}", n=len(rows.losses)),
        Evidence.exact("loss of the others", float(others.mean() / known.mean()), "over that of these", n=len(others)),
        step=rows.series[0][0].step,
    )


def _easier(known: Tensor, others: Tensor, times: float, least: float = CERTAIN) -> bool:
    """Whether the others have so many times the loss, by so many errors: a few of them far off, or most a little."""
    clear = max(apart(others, known), above(others, known))
    return float(others.mean()) >= times * float(known.mean()) and clear >= least


CHECKS: dict[str, Callable[[Case, HeldOut], Finding | None]] = {
    "train-while-validating": train_while_validating,
    "preprocessing-mismatch": preprocessing_mismatch,
    "label-map-wrong": label_map_wrong,
    "same-batch": same_batch,
    "leakage": leakage,
    "class-imbalance": class_imbalance,
    "label-noise": label_noise,
    "overfitting": overfitting,
}


def _asked(case: Case, rows: HeldOut, inputs: Tensor) -> Tensor | None:
    """The losses, row by row, of other inputs in the place of those that were evaluated."""
    found = answered(case, rows, inputs)
    return None if found is None else found.by_rows(len(inputs))


def _paired(name: str, values: Tensor, meaning: str) -> Evidence:
    mean, error = float(values.mean()), 2 * float(values.std()) / max(len(values), 1) ** 0.5
    return Evidence(name, mean, mean - error, mean + error, len(values), meaning)
