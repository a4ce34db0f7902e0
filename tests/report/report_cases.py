"""Made-up but plausible diagnoses and recorded runs."""

import atexit
import json
import math
import random
import shutil
import tempfile
from pathlib import Path
from typing import Any

from unstuck.diagnosis import (
    CANNOT_TELL,
    PROVED,
    SHOWN,
    SUSPECT,
    Arm,
    Diagnosis,
    Evidence,
    Finding,
    RuledOut,
    Trial,
)
from unstuck.record import Run

CAUSES = (
    "lr-bounces",
    "lr-too-small",
    "minimum",
    "saddle",
    "noise-floor",
    "batch-too-large",
    "dead-units",
    "graph-cut",
)


HEADER = {
    "script": "train.py",
    "argv": ["--epochs", "20", "--lr", "0.4"],
    "started": "2031-04-05T10:12:31+00:00",
    "torch": "2.13.0",
    "python": "3.11.9",
}
Series = tuple[list[int], list[float]]

_SHELF = Path(tempfile.mkdtemp(prefix="unstuck-report-"))
atexit.register(shutil.rmtree, _SHELF)


def run_of(columns: dict[str, Series], *, header: dict[str, Any] = HEADER, outcome: str = "finished") -> Run:
    """A run folder whose log holds these series."""
    rows: dict[int, dict[str, Any]] = {}
    for name, (steps, values) in columns.items():
        for step, value in zip(steps, values, strict=True):
            rows.setdefault(step, {})[name] = value if math.isfinite(value) else str(value)
    folder = Path(tempfile.mkdtemp(dir=_SHELF))
    events = [{"kind": "start", "version": 1, **header}]
    events += [{"kind": "step", "step": step, "time": 0.064 * step, **row} for step, row in sorted(rows.items())]
    events += [{"kind": "end", "outcome": outcome, "overhead": 0.014}]
    (folder / "log.jsonl").write_text("".join(f"{json.dumps(event)}\n" for event in events), encoding="utf-8")
    return Run(folder)


def recorded(steps: int = 600, *, stuck_from: int = 120, nan_from: int | None = None) -> Run:
    """A run whose loss falls until `stuck_from`, bounces after it, and is NaN from `nan_from` on."""
    draw = random.Random(1)
    loss, norm, update, rate = [], [], [], []
    for t in range(steps):
        progress = min(t, stuck_from) / stuck_from
        loss.append(2.3 * math.exp(-1.6 * progress) * math.exp(draw.gauss(0, 0.09 + 0.12 * (t > stuck_from))))
        norm.append((0.8 + 1.4 * progress) * math.exp(draw.gauss(0, 0.2)))
        update.append(4e-3 * (1 + 3 * progress) * math.exp(draw.gauss(0, 0.15)))
        rate.append(0.4 * min(1.0, (t + 1) / 50))
        if nan_from is not None and t >= nan_from:
            loss[-1] = norm[-1] = update[-1] = math.nan
        elif nan_from is not None and t > nan_from - 5:
            loss[-1] *= 10.0 ** (t - nan_from + 5)
            norm[-1] *= 30.0 ** (t - nan_from + 5)
    at = list(range(steps))
    columns = {"loss": (at, loss), "grad_norm": (at, norm), "update_ratio": (at, update), "lr": (at, rate)}
    return run_of(columns)


def _curve(start: float, end: float, *, spread: float, seed: int) -> tuple[float, ...]:
    """Ninety steps from `start` towards `end`; the noise shrinks during the last thirty, as it does in a cool-down."""
    batches, own = random.Random(7), random.Random(seed)
    values = []
    for t in range(90):
        noise = (batches.gauss(0, 0.08) + own.gauss(0, spread)) * min(1.0, (95 - t) / 35)
        values.append(math.exp(math.log(end) + math.log(start / end) * math.exp(-t / 22) + noise))
    return tuple(values)


def _arm(remedy: str, role: str, ratio: float, low: float, high: float, *, end: float, spread: float) -> Arm:
    accepted = role == "remedy" and high < 0.95
    curve = _curve(0.52, end, spread=spread, seed=round(1000 * end))
    return Arm(remedy, role, math.log(ratio), math.log(low), math.log(high), accepted, curve)


TRIAL = Trial(
    arms=(
        _arm("control", "control", 1.0, 1.0, 1.0, end=0.39, spread=0.16),
        _arm("learning rate ÷ 4", "remedy", 0.62, 0.55, 0.70, end=0.24, spread=0.03),
        _arm("momentum 0.9 → 0.5", "remedy", 0.81, 0.71, 0.93, end=0.31, spread=0.08),
        _arm("gradient clipping at 1", "remedy", 0.98, 0.88, 1.09, end=0.385, spread=0.14),
        _arm("control, weights perturbed", "null", 1.01, 0.94, 1.08, end=0.40, spread=0.17),
    ),
    steps=60,
    cooldown=30,
    held_out=True,
)

BOUNCES = Finding(
    code="lr-bounces",
    word=PROVED,
    step=124,
    where="",
    claim="The learning rate is too large: the weights jump across a ravine instead of descending along it.",
    advice="Divide the learning rate by 4 (0.4 → 0.1), or let it decay from step 120 on.",
    evidence=(
        Evidence(
            "averaged weights",
            0.41,
            0.36,
            0.47,
            30,
            "the mean of the last 30 weights is better than they are: they circle around it",
        ),
        Evidence("head-room", 1.12, 1.04, 1.21, 12, "a step 1.12 times as long would not lower the loss"),
        Evidence("step to edge", 0.97, 0.93, 1.01, 12, "rate × largest curvature ÷ 2: as long as stability allows"),
        Evidence("loss trend", -0.004, -0.03, 0.021, 480, "change of ln loss in 100 steps: flat"),
        Evidence("gradient cosine", -0.31, -0.36, -0.26, 478, "one gradient points back against the one before"),
    ),
    ruled_out=(
        RuledOut("lr-too-small", "head-room 1.12: a rate that is too small would leave more than 20"),
        RuledOut("minimum", "averaging the weights lowers the loss to 0.41 of itself; at a minimum it changes nothing"),
        RuledOut("saddle", "the gradient is 2.2 times as large as at the start; at a saddle it vanishes"),
        RuledOut("noise-floor", "noise ÷ batch is 0.9; the noise floor needs more than 4"),
        RuledOut("dead-units", "2 % of the units are silent on every example"),
    ),
    trial=TRIAL,
)

CUT = Finding(
    code="graph-cut",
    word=SHOWN,
    step=0,
    where="encoder.layers.0.self_attn.in_proj_weight",
    claim="The loss does not depend on 4 of 12 parameters: a .detach() at train.py:48 cuts them off.",
    advice="Remove the .detach() in train.py:48, or freeze the encoder on purpose with requires_grad_(False).",
    evidence=(
        Evidence.exact("parameters without gradient", 4, "their .grad is None after every backward pass", n=200),
        Evidence.exact("loss change", 0.0, "moving them by a tenth changes no bit of the loss"),
    ),
    ruled_out=(RuledOut("not-in-optimizer", "all 12 parameters are in a parameter group"),),
)

OVERFLOWS = Finding(
    code="lr-diverges",
    word=SUSPECT,
    step=8,
    where="head.weight",
    claim="The loss rises tenfold a step from step 8 on and is not a number from step 12 on.",
    advice="Divide the learning rate by 10 and start again; a warm-up of 100 steps makes the start safer still.",
    evidence=(Evidence("head-room", 0.07, 0.05, 0.11, 4, "each step is fourteen times as long as its batch can bear"),),
    ruled_out=(RuledOut("bad-batch", "head-room is below 1 on the other 3 batches as well"),),
)

UNKNOWN = Finding(
    code="labels-shuffled",
    word=CANNOT_TELL,
    step=0,
    where="",
    claim="Whether the labels belong to the inputs cannot be told: the step contains a custom autograd function.",
    advice="Run once with the custom function replaced by its plain torch formula.",
)


def bounces() -> Diagnosis:
    return Diagnosis(
        "train.py", 600, 38.4, 0.014, (BOUNCES,), CAUSES, {"ill-conditioned": "needs 200 steps at one rate"}
    )


def cut() -> Diagnosis:
    return Diagnosis("finetune.py", 200, 312.0, 0.008, (CUT, UNKNOWN), CAUSES)


def healthy() -> Diagnosis:
    return Diagnosis("train.py", 600, 41.0, 0.012, (), CAUSES)


def diverged() -> Diagnosis:
    return Diagnosis("train.py", 20, 1.3, 0.021, (OVERFLOWS,), CAUSES, {"saddle": "the loss is not finite"})
