"""Optimisers and schedules that torch lacks, by the conventions of torch.optim; the theory of quadratics."""

from unstuck.optim import quadratics
from unstuck.optim._course import Course, describe
from unstuck.optim._elementwise import Quickprop, RMSAdagrad, RMSpropFirst, RpropPlus
from unstuck.optim._escape import NegativeCurvatureEscape
from unstuck.optim._mixup import Mixup, mixup
from unstuck.optim._renorm import BatchRenorm1d, BatchRenorm2d
from unstuck.optim._schedules import InverseTime, WarmupPlateau, linear_scaling
from unstuck.optim._scipy import Minimised, ScipyMinimize
from unstuck.optim._second_order import (
    DampedNewton,
    LevenbergMarquardt,
    Newton,
    SaddleFreeNewton,
    SecondOrder,
    by_best,
    by_gain,
    damped,
    newton,
    saddle_free,
    whole,
)
from unstuck.optim._swap import swap

__all__ = [
    "BatchRenorm1d",
    "BatchRenorm2d",
    "Course",
    "DampedNewton",
    "InverseTime",
    "LevenbergMarquardt",
    "Minimised",
    "Mixup",
    "NegativeCurvatureEscape",
    "Newton",
    "Quickprop",
    "RMSAdagrad",
    "RMSpropFirst",
    "RpropPlus",
    "SaddleFreeNewton",
    "ScipyMinimize",
    "SecondOrder",
    "WarmupPlateau",
    "by_best",
    "by_gain",
    "damped",
    "describe",
    "linear_scaling",
    "mixup",
    "newton",
    "quadratics",
    "saddle_free",
    "swap",
    "whole",
]
