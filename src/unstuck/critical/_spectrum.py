"""The spectrum at a point, and what of it counts as zero."""

import math
from dataclasses import replace

import torch
from torch import Tensor

from unstuck.curvature import Eigenpairs, Operator, dense, eigenpairs


def spectrum_of(
    H: Operator, *, tol: float, dense_up_to: int, max_products: int, generator: torch.Generator | None
) -> Eigenpairs:
    """All eigenpairs of a small operator, the two ends of a large one, with errors for their signs."""
    if H.size > dense_up_to:
        found = eigenpairs(H, tol=tol, max_products=max_products, generator=generator)
        # an end beyond zero is only an inner bound of the spectrum's: its sign is as sure as its residual
        outside = torch.stack([found.values[0] < 0, found.values[-1] > 0])
        return replace(found, errors=torch.where(outside, torch.minimum(found.residuals, found.errors), found.errors))
    values, vectors = torch.linalg.eigh(dense(H, memory=math.inf).double())
    values, vectors = values.to(H.dtype), vectors.T.to(H.dtype)
    scale = float(values.abs().max())
    rounding = torch.full_like(values, 100 * torch.finfo(H.dtype).eps * scale)  # as in eigenpairs
    return Eigenpairs(values, vectors, rounding, rounding, scale, missed=0.0, converged=True, products=H.size)


def zero_width(spectrum: Eigenpairs) -> float:
    return math.sqrt(torch.finfo(spectrum.values.dtype).eps) * spectrum.scale


def signs(values: Tensor, errors: Tensor | float, zero: float) -> Tensor:
    """−1, 0 or 1 for each eigenvalue, 0 where the sign is not known."""
    known = (values.abs() > zero) & (values.abs() > errors)
    return values.sign().where(known, 0).int()
