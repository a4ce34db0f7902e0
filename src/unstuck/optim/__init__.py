"""Optimisers that torch lacks, as ordinary torch.optim classes."""

from unstuck.optim._elementwise import Quickprop, RMSAdagrad, RMSpropFirst, RpropPlus
from unstuck.optim._second_order import (
    DampedNewton,
    LevenbergMarquardt,
    Newton,
    SaddleFreeNewton,
    SecondOrder,
    by_gain,
    damped,
    newton,
    saddle_free,
    whole,
)

__all__ = [
    "DampedNewton",
    "LevenbergMarquardt",
    "Newton",
    "Quickprop",
    "RMSAdagrad",
    "RMSpropFirst",
    "RpropPlus",
    "SaddleFreeNewton",
    "SecondOrder",
    "by_gain",
    "damped",
    "newton",
    "saddle_free",
    "whole",
]
