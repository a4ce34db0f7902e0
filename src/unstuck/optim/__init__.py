"""Optimisers that torch lacks, as ordinary torch.optim classes."""

from unstuck.optim._elementwise import Quickprop, RMSAdagrad, RMSpropFirst, RpropPlus
from unstuck.optim._escape import NegativeCurvatureEscape
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

__all__ = [
    "DampedNewton",
    "LevenbergMarquardt",
    "NegativeCurvatureEscape",
    "Newton",
    "Quickprop",
    "RMSAdagrad",
    "RMSpropFirst",
    "RpropPlus",
    "SaddleFreeNewton",
    "SecondOrder",
    "by_best",
    "by_gain",
    "damped",
    "newton",
    "saddle_free",
    "whole",
]
