"""Operators known by their products, and what the products tell of the spectrum."""

from unstuck.curvature._density import Density, Share, density
from unstuck.curvature._diagonal import Diagonal, diagonal
from unstuck.curvature._eigenpairs import Eigenpairs, eigenpairs
from unstuck.curvature._krylov import Krylov
from unstuck.curvature._operator import Operator, dense, hessian, identity
from unstuck.curvature._solve import Solution, solve
from unstuck.curvature._trace import Trace, trace, xtrace

__all__ = [
    "Density",
    "Diagonal",
    "Eigenpairs",
    "Krylov",
    "Operator",
    "Share",
    "Solution",
    "Trace",
    "dense",
    "density",
    "diagonal",
    "eigenpairs",
    "hessian",
    "identity",
    "solve",
    "trace",
    "xtrace",
]
