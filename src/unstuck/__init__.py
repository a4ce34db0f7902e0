"""Finds out why a neural network stops training, and proves the cure."""

from unstuck.critical import escape, examine, find_critical, rate_limit, verify
from unstuck.curvature import (
    Operator,
    dense,
    density,
    diagonal,
    eigenpairs,
    empirical_fisher,
    fisher,
    gauss_newton,
    hessian,
    identity,
    outputs,
    sampled_fisher,
    solve,
    to_scipy,
    trace,
    xtrace,
)
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
    "density",
    "diagnose",
    "diagonal",
    "eigenpairs",
    "empirical_fisher",
    "escape",
    "examine",
    "find_critical",
    "fisher",
    "gauss_newton",
    "hessian",
    "identity",
    "outputs",
    "rate_limit",
    "sampled_fisher",
    "solve",
    "to_scipy",
    "trace",
    "verify",
    "watch",
    "xtrace",
]
