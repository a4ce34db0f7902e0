"""Optimisers and schedules that torch lacks, by the conventions of torch.optim; the theory of quadratics."""

from unstuck.optim import quadratics
from unstuck.optim._course import Course, describe
from unstuck.optim._schedules import InverseTime, WarmupPlateau, linear_scaling
from unstuck.optim._scipy import Minimised, ScipyMinimize

__all__ = [
    "Course",
    "InverseTime",
    "Minimised",
    "ScipyMinimize",
    "WarmupPlateau",
    "describe",
    "linear_scaling",
    "quadratics",
]
