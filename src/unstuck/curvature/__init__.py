"""Operators known by their products, and what the products tell of the spectrum."""

from unstuck.curvature._density import Density, Share, density
from unstuck.curvature._diagonal import Diagonal, diagonal
from unstuck.curvature._eigenpairs import Eigenpairs, eigenpairs
from unstuck.curvature._gauss_newton import empirical_fisher, fisher, gauss_newton, sampled_fisher
from unstuck.curvature._krylov import Krylov
from unstuck.curvature._operator import ArrayOperator, Operator, dense, draws, hessian, identity, to_scipy
from unstuck.curvature._outputs import outputs
from unstuck.curvature._solve import Solution, solve
from unstuck.curvature._trace import Trace, trace, xtrace

__all__ = [
    "ArrayOperator",
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
    "draws",
    "eigenpairs",
    "empirical_fisher",
    "fisher",
    "gauss_newton",
    "hessian",
    "identity",
    "outputs",
    "sampled_fisher",
    "solve",
    "to_scipy",
    "trace",
    "xtrace",
]
