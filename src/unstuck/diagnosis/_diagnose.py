"""From a recorded run to its findings: exact facts first, then symptom, hypotheses, elimination and trial."""

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace

from unstuck.diagnosis._blown import non_finite
from unstuck.diagnosis._case import Case, Measure
from unstuck.diagnosis._exact import EXACT, FACTS, exact_findings
from unstuck.diagnosis._findings import (
    CANNOT_TELL,
    PROVED,
    SHOWN,
    SUSPECT,
    WORDS,
    Diagnosis,
    Evidence,
    Finding,
    RuledOut,
    Trial,
)
from unstuck.diagnosis._held_out import held_out, unseen
from unstuck.diagnosis._hypotheses import HYPOTHESES, MEASURES
from unstuck.diagnosis._hypothesis import (
    AMISS,
    BLIND,
    DIVERGED,
    SLOW,
    STUCK,
    Hypothesis,
    Prediction,
    at_chance,
    symptom,
)
from unstuck.diagnosis._structure import dead_layers
from unstuck.diagnosis._trial import Progress, Remedy, run_trial
from unstuck.diagnosis._validation import CHECKS, validation_findings
from unstuck.diagnosis._wiring import WIRING
from unstuck.record import Run, State

MODES = ("train-while-validating",)  # checks that need no symptom, and do not explain one
LASTING = 10.0  # times its start that a finite loss ends at, where that alone is to be a fault
UNKNOWN = "unknown"  # the code of a finding that says only that something is wrong


def diagnose(
    run: Run,
    *,
    hypotheses: Sequence[Hypothesis] = HYPOTHESES,
    measures: Mapping[str, Measure] | None = None,
    progress: Progress | None = None,
) -> Diagnosis:
    """Why the run is stuck: findings with evidence, the rivals that it rules out, and remedies tried on a copy.

    A run whose loss shows no symptom gets no finding. `hypotheses` and `measures` can be extended with one's own:
    `diagnose(run, hypotheses=(*HYPOTHESES, mine))`. `progress(text, share)` is told how far it is. Neither the run nor
    the training that wrote it is changed.
    """
    with run.paused():
        return _diagnosis(Case(run, {**MEASURES, **(measures or {})}), hypotheses, progress)


def _diagnosis(case: Case, hypotheses: Sequence[Hypothesis], progress: Progress | None) -> Diagnosis:
    run = case.run
    codes = tuple(dict.fromkeys((*EXACT, *(h.code for h in hypotheses), *CHECKS)))
    exact = exact_findings(case)
    if run.steps == 0 and not exact:
        return _result(run, [], (), dict.fromkeys(codes, "no optimiser step was recorded"))
    unread = {} if case.tapes else dict.fromkeys(WIRING, _why_no_tapes(case))
    if exact:
        because = f"{exact[0].code} explains it: mend that first"
        checked = [c for c in EXACT if c not in unread]
        return _result(run, exact, checked, unread | dict.fromkeys((c for c in codes if c not in EXACT), because))
    certain = validation_findings(case, MODES)
    sign = symptom(case)
    unheard = _unheard(case)
    if sign is None or (sign == SLOW and not case.tapes):
        unseen = unread | _unseen(case, hypotheses, STUCK, SLOW) | unheard
        found = certain or _elsewhere(case) or validation_findings(case)
        return _result(run, found, [c for c in codes if c not in unseen], unseen)
    if not case.tapes:
        return _without_tapes(case, codes, {h.code for h in hypotheses}, sign)
    findings, open_questions = _eliminate(case, hypotheses, sign, progress)
    open_questions |= unheard | (_unseen(case, hypotheses, STUCK) if sign == SLOW else {})
    if not certain and not any(f.word in (PROVED, SHOWN) for f in findings):
        findings += validation_findings(case)
    findings = findings or (_elsewhere(case) if sign == SLOW else [])
    if not findings and sign in (BLIND, DIVERGED):
        what = _blown_up(case) if sign == DIVERGED else "The outputs do not depend on the inputs"
        findings = [_unknown(case, f"{what}; no known cause survives the measurements.")]
    if case.memory is not None and case.memory.apart:
        share = f"This rests on rank {run.rank}'s share of each batch alone, since {case.memory.apart}."
        findings = [replace(f, claim=f"{f.claim} {share}") for f in findings]
    checked = [c for c in codes if c not in open_questions]
    return _result(run, findings, checked, open_questions, certain)


def _unseen(case: Case, hypotheses: Sequence[Hypothesis], *symptoms: str) -> dict[str, str]:
    """The hypotheses that no symptom can lead to here, because whether the loss stands still cannot be told."""
    why = case.reasons.get("trend")
    return {} if why is None else {h.code: why for h in hypotheses if h.symptoms and set(h.symptoms) <= {*symptoms}}


def _unheard(case: Case) -> dict[str, str]:
    """Why the evaluations of the run were not checked, if they were not."""
    if case.memory is None:
        return dict.fromkeys(CHECKS, _why_no_tapes(case))
    if case.once(held_out):
        return {}
    return dict.fromkeys(CHECKS, "no validation was heard")


def _eliminate(
    case: Case, hypotheses: Sequence[Hypothesis], sign: str, progress: Progress | None
) -> tuple[list[Finding], dict[str, str]]:
    """What is left when every hypothesis has met its own predictions, and the survivors their own remedies."""
    ruled_out: list[RuledOut] = []
    open_questions: dict[str, str] = {}
    survivors: list[Hypothesis] = []
    for k, h in enumerate(_weighed(hypotheses, sign)):
        if progress is not None:
            progress(f"checking {h.code}", 0.4 * k / len(hypotheses))
        refuted, missing = _judge(case, h.predictions)
        if refuted is not None:
            ruled_out += [RuledOut(h.code, refuted)] if refuted else []
        elif missing is not None:
            if not (sign == SLOW and _lacks_a_premise(case, h)):
                open_questions[h.code] = missing
        elif sign in h.symptoms:
            survivors.append(h)
    findings: list[Finding] = []
    for h in survivors:
        if any(f.word in (PROVED, SHOWN) for f in findings):
            break
        found, refuted, unsettled = _tried(case, h, hypotheses, sign, progress)
        findings += found
        ruled_out += refuted
        open_questions |= unsettled
    rivals = {r.code: r for r in reversed(ruled_out)}  # of several with one code the first
    once = [r for r in ruled_out if rivals[r.code] is r]
    findings = [replace(f, ruled_out=tuple(r for r in once if r.code != f.code)) for f in findings]
    return findings, open_questions


def _lacks_a_premise(case: Case, h: Hypothesis) -> bool:
    """Whether it is unknown if there is anything that the cause could lie in: where a loss falls nobody asks."""
    return any(p.premise and p.holds(case) is None for p in h.predictions)


def _weighed(hypotheses: Sequence[Hypothesis], sign: str) -> list[Hypothesis]:
    """Those that can explain the symptom, and the first of each code, to rule it out.

    Of a loss that is only slow no others are asked: what they measure is dear, and most such runs are healthy.
    """
    first = {h.code: h for h in reversed(hypotheses)}
    return [h for h in hypotheses if sign in h.symptoms or (sign != SLOW and first[h.code] is h)]


def _judge(case: Case, predictions: Sequence[Prediction]) -> tuple[str | None, str | None]:
    """The sentence that refutes a hypothesis, empty where its premise is not given, or the quantity that is missing."""
    missing = None
    for p in sorted(predictions, key=lambda p: not p.premise):
        holds = p.holds(case)
        if holds is False:
            found = case[p.quantity]
            return ("" if p.premise else p.because(found.value if found is not None else math.nan)), None
        if holds is None and p.needed:
            why = case.reasons.get(p.quantity)
            missing = f"{p.quantity} cannot be measured in this run" + (f": {why}" if why else "")
    return None, missing


def _tried(
    case: Case, h: Hypothesis, hypotheses: Sequence[Hypothesis], sign: str, progress: Progress | None
) -> tuple[list[Finding], list[RuledOut], dict[str, str]]:
    """What the survivor's own remedies make of it: a finding, a refutation, or why it stays open."""
    refuted, missing = _judge(case, h.experiment)
    if refuted is not None or missing is not None:
        return [], [RuledOut(h.code, refuted)] if refuted else [], {} if missing is None else {h.code: missing}
    remedies = h.remedies(case)
    trial, because = _tested(case, h, remedies, h.origin(case), progress)
    if h.over_again and trial is not None and h.code not in _proved(h, remedies, trial):
        trial = _tested(case, h, remedies, case.start, progress)[0] or trial
    proved = set() if trial is None else _proved(h, remedies, trial)
    if h.code in proved:
        return [_finding(case, h, PROVED, _advice(h.advice, trial), trial)], [], {}
    untried = f"{h.advice} (It could not be tried: {because}.)" if remedies and trial is None else h.advice
    if h.decisive:
        return [_finding(case, h, SHOWN, untried, trial)], [], {}
    if trial is not None:
        others = [_finding(case, o, PROVED, _advice(o.advice, trial), trial) for o in hypotheses if o.code in proved]
        best = min((a for a in trial.arms if a.remedy in _own(h, remedies)), key=lambda a: a.effect)
        failed = f"its own remedy does not help: {best.remedy} ends {_change(best.effect)} than the control"
        return others, [RuledOut(h.code, failed)], {}
    if sign in (BLIND, DIVERGED) or h.suspected:
        return [_finding(case, h, SUSPECT, untried, None)], [], {}
    return [], [], {h.code: because}


def _tested(
    case: Case, h: Hypothesis, remedies: Sequence[Remedy], state: State | None, progress: Progress | None
) -> tuple[Trial | None, str]:
    """The trial of its remedies from some weights, or why there is none."""
    if not remedies:
        return None, "it has no remedy that can be tried"
    try:
        return run_trial(case, remedies, state=state, unseen=case.once(unseen), progress=_later(progress)), ""
    except (RuntimeError, ValueError) as error:
        return None, str(error)


def _own(h: Hypothesis, remedies: Sequence[Remedy]) -> list[str]:
    """The names of the remedies that prove the hypothesis that tries them; of all where none does."""
    return [r.name for r in remedies if r.proves in ("", h.code)] or [r.name for r in remedies]


def _proved(h: Hypothesis, remedies: Sequence[Remedy], trial: Trial) -> set[str]:
    """The codes of the causes that the remedies which won speak for."""
    won = {a.remedy for a in trial.accepted}
    return {r.proves or h.code for r in remedies if r.name in won}


def _finding(case: Case, h: Hypothesis, word: str, advice: str, trial: Trial | None) -> Finding:
    always = AMISS in h.symptoms or (SLOW in h.symptoms and h.origin(case) is case.start)  # what the run began with
    step = case.steps[0] if always else since(case)
    return Finding(h.code, word, step, _place(case, h), h.claim(case), advice, _evidence(case, h), trial=trial)


def _evidence(case: Case, h: Hypothesis) -> tuple[Evidence, ...]:
    """The quantities that the hypothesis predicted, after the ones that make the symptom."""
    asked = (p.quantity for p in (*h.predictions, *h.experiment) if p.low < p.high)  # the others say yes or no
    names = dict.fromkeys(("loss over chance", "trend", *h.evidence, *asked))
    return tuple(found for name in names if (found := case[name]) is not None)


def _advice(advice: str, trial: Trial | None) -> str:
    if trial is None or not trial.accepted:
        return advice
    best = min(trial.accepted, key=lambda a: a.effect)
    if best.effect == -math.inf:
        return f"{advice} Tried on a copy: with {best.remedy} the loss stays finite and falls; the control blows up."
    tried = ", ".join(f"{a.remedy} ends {_change(a.effect)}" for a in trial.accepted)
    return f"{advice} Tried on a copy, beside the control: {tried}."


def _change(effect: float) -> str:
    share = math.expm1(effect)
    return f"{abs(share):.0%} {'lower' if share < 0 else 'higher'}"


def _place(case: Case, h: Hypothesis) -> str:
    layers = dead_layers(case, case.fixed[-1].program) if h.code in ("dead-units", "killed") else []
    return ", ".join(case.names[k] for k in layers[:2])


def since(case: Case) -> int:
    """The first step from which the loss stays as it is now: within a tenth of its present level, or out of bounds."""
    losses = case.losses
    bad = next((k for k, x in enumerate(losses) if not math.isfinite(x) or x > 10 * max(losses[0], 1e-12)), None)
    if bad is not None:
        return case.steps[bad]
    width = max(len(losses) // 50, 1)
    means = [sum(losses[k : k + width]) / width for k in range(0, len(losses) - width + 1, width)]
    level = sum(means[-5:]) / len(means[-5:])
    first = next((k for k, m in enumerate(means) if m <= 1.1 * level), 0)
    return case.steps[first * width] if first else case.steps[0]


def _without_tapes(case: Case, codes: Sequence[str], weighed: Collection[str], sign: str) -> Diagnosis:
    because = _why_no_tapes(case)
    unjudged = {c: because for c in codes if c not in FACTS or c in weighed}
    judged = [c for c in FACTS if c not in unjudged]
    level, rise = case["loss over chance"], case["rise of the loss"]
    blown_up = (rise is not None and math.isinf(rise.value)) or (level is not None and level.value >= LASTING)
    if not (blown_up if sign == DIVERGED else at_chance(case)):  # the losses of a policy, or of a game, may well rise
        return _result(case.run, [], judged, unjudged)
    what = _blown_up(case) if sign == DIVERGED else "The loss is stuck at the level of chance"
    found = _unknown(case, f"{what}; the steps cannot be replayed: {because}.")
    return _result(case.run, [found], judged, unjudged)


def _why_no_tapes(case: Case) -> str:
    reasons = next((e["refusals"] for e in reversed(case.run.of("end")) if e.get("refusals")), {})
    because = max(reasons, key=reasons.__getitem__) if reasons else "no step could be recorded for replay"
    return case.left_out or because


def _blown_up(case: Case) -> str:
    blown = non_finite(case.run)
    return "The loss blew up" if blown is None else blown.claim.removesuffix(".")


def _elsewhere(case: Case) -> list[Finding]:
    """What another rank's loss says where that of the first has no symptom."""
    fact = next((e for e in case.run.facts if e["code"] == "non-finite" and "rank" in e), None)
    if fact is None:
        return []
    advice = f"Look at what rank {fact['rank']} alone computes with: its share of the data, its device."
    return [Finding(UNKNOWN, CANNOT_TELL, fact["step"], f"rank {fact['rank']}", f"{_blown_up(case)}.", advice)]


def _unknown(case: Case, claim: str) -> Finding:
    evidence = tuple(e for name in ("loss over chance", "trend", "input dependence") if (e := case[name]) is not None)
    return Finding(
        UNKNOWN, CANNOT_TELL, since(case), "", claim, "See which causes were not checked, and why.", evidence
    )


def _result(
    run: Run,
    findings: Sequence[Finding],
    checked: Sequence[str],
    not_checked: Mapping[str, str],
    certain: Sequence[Finding] = (),
) -> Diagnosis:
    return Diagnosis(
        script=run.script,
        steps=run.steps,
        seconds=run.seconds,
        overhead=run.overhead,
        findings=(*certain, *sorted(findings, key=lambda f: WORDS.index(f.word))),
        checked=tuple(checked),
        not_checked=not_checked,
    )


def _later(progress: Progress | None) -> Progress | None:
    return None if progress is None else lambda text, share: progress(f"trying: {text}", 0.4 + 0.6 * share)
