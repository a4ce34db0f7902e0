"""Optimisers and schedules that torch lacks, by the conventions of torch.optim; the theory of quadratics."""

from unstuck.optim import quadratics
from unstuck.optim._course import Course, describe
from unstuck.optim._mixup import Mixup, mixup
from unstuck.optim._renorm import BatchRenorm1d, BatchRenorm2d
from unstuck.optim._schedules import InverseTime, WarmupPlateau, linear_scaling
from unstuck.optim._scipy import Minimised, ScipyMinimize
from unstuck.optim._swap import swap

__all__ = [
    "BatchRenorm1d",
    "BatchRenorm2d",
    "Course",
    "InverseTime",
    "Minimised",
    "Mixup",
    "ScipyMinimize",
    "WarmupPlateau",
    "describe",
    "linear_scaling",
    "mixup",
    "quadratics",
    "swap",
]
