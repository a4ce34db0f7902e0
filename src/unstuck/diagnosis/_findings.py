"""What a diagnosis says: findings with their evidence, the rivals ruled out and the remedies tried."""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

PROVED, SHOWN, SUSPECT, CANNOT_TELL = "PROVED", "SHOWN", "SUSPECT", "CANNOT TELL"
WORDS = (PROVED, SHOWN, SUSPECT, CANNOT_TELL)  # most certain first


@dataclass(frozen=True)
class Evidence:
    """A measured, dimensionless number with its interval (equal to the value where the measurement is exact)."""

    name: str
    value: float
    low: float
    high: float
    n: int  # how many steps, tapes or examples it rests on
    meaning: str  # one phrase a student understands

    @classmethod
    def exact(cls, name: str, value: float, meaning: str, *, n: int = 1) -> "Evidence":
        return cls(name, value, value, value, n, meaning)


@dataclass(frozen=True)
class RuledOut:
    """A rival cause and the number that refutes it."""

    code: str
    because: str


@dataclass(frozen=True)
class Arm:
    """One arm of a trial: where it ended relative to the control, over the same recorded steps, cooled to rate 0."""

    remedy: str
    role: str  # "control", "remedy" or "null"
    effect: float  # ln(loss of this arm / loss of the control), at the end; negative is better
    low: float
    high: float
    accepted: bool
    curve: tuple[float, ...]  # the loss at every step of the arm


@dataclass(frozen=True)
class Trial:
    """Control, the hypothesis's remedies and a null arm from one state over the same recorded steps."""

    arms: tuple[Arm, ...]
    steps: int  # at the arm's own rate
    cooldown: int  # steps during which the rate falls linearly to 0
    held_out: bool  # whether the loss at the end is on tapes that no arm trained on

    @property
    def accepted(self) -> tuple[Arm, ...]:
        return tuple(arm for arm in self.arms if arm.accepted)


@dataclass(frozen=True)
class Finding:
    """A cause with the word it has earned, the evidence for it and the rivals that the evidence rules out."""

    code: str
    word: str  # one of WORDS
    step: int  # since when
    where: str  # parameter, module, source line, or "" where the whole run is meant
    claim: str
    advice: str
    evidence: tuple[Evidence, ...] = ()
    ruled_out: tuple[RuledOut, ...] = ()
    trial: Trial | None = None


@dataclass(frozen=True)
class Diagnosis:
    """The findings of a run, most certain first; a healthy run has none."""

    script: str
    steps: int
    seconds: float
    overhead: float  # share of the run's time spent watching it
    findings: tuple[Finding, ...]
    checked: tuple[str, ...]
    not_checked: Mapping[str, str] = field(default_factory=dict)  # code: because

    @property
    def status(self) -> int:
        """0 healthy, 1 a fault was found, 2 nothing could be told."""
        if any(f.word != CANNOT_TELL for f in self.findings):
            return 1
        return 2 if self.findings or not self.checked else 0

    def to_json(self) -> dict[str, Any]:
        """The diagnosis as strict JSON values: version 1, laid down in docs/diagnosis-json.md."""
        return {
            "version": 1,
            "script": self.script,
            "steps": self.steps,
            "seconds": number(self.seconds),
            "overhead": {"share": number(self.overhead)},
            "findings": [_finding(f) for f in self.findings],
            "checked": list(self.checked),
            "not_checked": [{"code": code, "because": because} for code, because in self.not_checked.items()],
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> "Diagnosis":
        """The diagnosis that `to_json` wrote."""
        if data.get("version") != 1:
            raise ValueError(
                f"a diagnosis of version 1 is needed, got version {data.get('version')!r}: diagnose it again"
            )
        return cls(
            script=data["script"],
            steps=data["steps"],
            seconds=float(data["seconds"]),
            overhead=float(data["overhead"]["share"]),
            findings=tuple(_read_finding(f) for f in data["findings"]),
            checked=tuple(data["checked"]),
            not_checked={n["code"]: n["because"] for n in data["not_checked"]},
        )

    def __str__(self) -> str:
        if not self.findings:
            return f"No fault found in {self.steps} steps ({len(self.checked)} causes checked)."
        return "\n".join(f"{f.word} {f.code}: {f.claim}" for f in self.findings)


def number(x: float) -> float | str:
    """JSON has no NaN and no infinity: they travel as strings."""
    return x if math.isfinite(x) else str(x)


def plain(x: float) -> str:
    """A number as it is read aloud: three digits, thousands grouped, powers of ten only where they must be."""
    if 1000 <= abs(x) < 1e6:
        return f"{x:,.0f}"
    return f"{x:.3g}"


def dumps(data: Mapping[str, Any]) -> str:
    return json.dumps(data, allow_nan=False, ensure_ascii=False)


def _finding(f: Finding) -> dict[str, Any]:
    remedies = [] if f.trial is None else [a for a in f.trial.arms if a.role == "remedy"]
    return {
        "code": f.code,
        "word": f.word,
        "step": f.step,
        "where": f.where,
        "claim": f.claim,
        "advice": f.advice,
        "evidence": [
            {
                "name": e.name,
                "value": number(e.value),
                "low": number(e.low),
                "high": number(e.high),
                "n": e.n,
                "meaning": e.meaning,
            }
            for e in f.evidence
        ],
        "ruled_out": [{"code": r.code, "because": r.because} for r in f.ruled_out],
        "remedies": [_arm(a) for a in remedies],
        "trial": None if f.trial is None else _trial(f.trial),
    }


def _arm(a: Arm) -> dict[str, Any]:
    return {
        "remedy": a.remedy,
        "effect": number(a.effect),
        "low": number(a.low),
        "high": number(a.high),
        "accepted": a.accepted,
    }


def _trial(t: Trial) -> dict[str, Any]:
    arms = [{**_arm(a), "role": a.role, "curve": [number(x) for x in a.curve]} for a in t.arms]
    return {"steps": t.steps, "cooldown": t.cooldown, "held_out": t.held_out, "arms": arms}


def _read_finding(data: Mapping[str, Any]) -> Finding:
    evidence = (
        Evidence(e["name"], float(e["value"]), float(e["low"]), float(e["high"]), e["n"], e["meaning"])
        for e in data["evidence"]
    )
    return Finding(
        code=data["code"],
        word=data["word"],
        step=data["step"],
        where=data["where"],
        claim=data["claim"],
        advice=data["advice"],
        evidence=tuple(evidence),
        ruled_out=tuple(RuledOut(r["code"], r["because"]) for r in data["ruled_out"]),
        trial=None if data["trial"] is None else _read_trial(data["trial"]),
    )


def _read_trial(data: Mapping[str, Any]) -> Trial:
    arms = (
        Arm(
            remedy=a["remedy"],
            role=a["role"],
            effect=float(a["effect"]),
            low=float(a["low"]),
            high=float(a["high"]),
            accepted=a["accepted"],
            curve=tuple(float(x) for x in a["curve"]),
        )
        for a in data["arms"]
    )
    return Trial(tuple(arms), data["steps"], data["cooldown"], data["held_out"])
