"""Finds out why a neural network stops training, and proves the cure."""

from unstuck.critical import escape, examine
from unstuck.curvature import Operator, dense, eigenpairs, hessian
from unstuck.diagnosis import Diagnosis, diagnose
from unstuck.objective import Objective
from unstuck.record import Run, watch

Run.diagnose = diagnose  # the verb on its noun: only here are both rooms known

__all__ = [
    "Diagnosis",
    "Objective",
    "Operator",
    "Run",
    "dense",
    "diagnose",
    "eigenpairs",
    "escape",
    "examine",
    "hessian",
    "watch",
]
