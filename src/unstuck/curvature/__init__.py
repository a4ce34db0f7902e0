"""Operators known by their products, and what the products tell of the spectrum."""

from unstuck.curvature._eigenpairs import Eigenpairs, eigenpairs
from unstuck.curvature._operator import Operator, dense, hessian, identity

__all__ = ["Eigenpairs", "Operator", "dense", "eigenpairs", "hessian", "identity"]
