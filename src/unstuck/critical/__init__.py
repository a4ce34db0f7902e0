"""Points where the gradient vanishes: how to find them, what they are, and the way out of a saddle."""

from unstuck.critical._escape import Escape, escape
from unstuck.critical._find import Search, find_critical
from unstuck.critical._noise import Noise, gradient_noise
from unstuck.critical._point import CriticalPoint, classify, examine
from unstuck.critical._rate import RateLimit, rate_limit
from unstuck.critical._verify import Verification, verify

__all__ = [
    "CriticalPoint",
    "Escape",
    "Noise",
    "RateLimit",
    "Search",
    "Verification",
    "classify",
    "escape",
    "examine",
    "find_critical",
    "gradient_noise",
    "rate_limit",
    "verify",
]
