"""The entrance exams that our own parts pass, for parts that users write."""

import torch

from unstuck.curvature import Operator, draws


def check_operator(A: Operator, *, generator: torch.Generator | None = None) -> None:
    """Raises AssertionError unless A is finite, repeatable, linear and symmetric, and leaves its vectors alone.

    Linearity and symmetry are asked for to √ulp of the operator's dtype, relative to the vectors that meet.
    """
    u, v = torch.randn(2, A.size, generator=draws(generator, A.device), dtype=A.dtype, device=A.device)
    kept = v.clone()
    Au, Av = A @ u, A @ v
    tolerance = torch.finfo(A.dtype).eps ** 0.5
    _expect(torch.equal(v, kept), "a product must leave its vector alone, got another one back: copy before writing")
    _expect(
        Av.shape == v.shape and Av.dtype == v.dtype, f"a product must be like its vector, got {Av.dtype} {Av.shape}"
    )
    _expect(bool(Av.isfinite().all()), "products must be finite, got NaN or infinity")
    _expect(
        torch.equal(A @ v, Av), "a product must be repeatable, got two results: fix random masks and train-mode layers"
    )
    bent = (A @ (2 * u - 3 * v) - (2 * Au - 3 * Av)).norm() / (Au.norm() + Av.norm()).clamp(min=tolerance**4)
    _expect(
        float(bent) <= tolerance, f"an operator must be linear, got A(2u − 3v) off by {float(bent):.1g} of its size"
    )
    # against ‖u‖‖Av‖ and not u·Av, which may be small by chance
    skew = (A.dot(u, Av) - A.dot(v, Au)).abs() / (u.norm() * Av.norm()).clamp(min=tolerance**4)
    _expect(float(skew) <= tolerance, f"an operator must be symmetric, got u·Av and v·Au {float(skew):.1g} apart")


def _expect(holds: bool, otherwise: str) -> None:  # noqa: FBT001
    if not holds:
        raise AssertionError(otherwise)
