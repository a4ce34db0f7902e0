"""Optimisers and schedules that torch lacks, by the conventions of torch.optim; the theory of quadratics."""

from unstuck.optim import quadratics

__all__ = [
    "quadratics",
]
