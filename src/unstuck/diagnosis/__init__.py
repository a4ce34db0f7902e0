"""Says why a run is stuck: findings with evidence, rivals ruled out, remedies tried beside a control."""

from unstuck.diagnosis._blown import non_finite
from unstuck.diagnosis._case import Case
from unstuck.diagnosis._diagnose import diagnose
from unstuck.diagnosis._findings import (
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
    dumps,
)
from unstuck.diagnosis._hypotheses import HYPOTHESES, MEASURES
from unstuck.diagnosis._hypothesis import Hypothesis, Prediction
from unstuck.diagnosis._lookout import Lookout
from unstuck.diagnosis._trial import Fork, Remedy, run_trial

__all__ = [
    "CANNOT_TELL",
    "HYPOTHESES",
    "MEASURES",
    "PROVED",
    "SHOWN",
    "SUSPECT",
    "Arm",
    "Case",
    "Diagnosis",
    "Evidence",
    "Finding",
    "Fork",
    "Hypothesis",
    "Lookout",
    "Prediction",
    "Remedy",
    "RuledOut",
    "Trial",
    "diagnose",
    "dumps",
    "non_finite",
    "run_trial",
]
