"""Optimisers that torch lacks, as ordinary torch.optim classes."""

from unstuck.optim._elementwise import Quickprop, RMSAdagrad, RMSpropFirst, RpropPlus

__all__ = [
    "Quickprop",
    "RMSAdagrad",
    "RMSpropFirst",
    "RpropPlus",
]
