"""A point as JSON values."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from unstuck.critical._point import CriticalPoint


def plain_values(point: CriticalPoint) -> dict[str, Any]:
    noise, positive = point.noise, point.positive
    pairs = zip(point.values.tolist(), point.errors.tolist(), strict=True)
    return {
        "version": 1,
        "kind": point.kind,
        "name": point.name,
        "size": len(point.direction),
        "loss": _number(point.loss),
        "gradient_norm": _number(point.gradient_norm),
        "noise": None if noise is None else {"stderr": _number(noise.stderr), "batches": noise.batches},
        "within_noise": point.within_noise,
        "relative_gradient": _number(point.relative_gradient),
        "promise": _number(point.promise),
        "promise_limit": _number(point.promise_limit),
        "reach": _number(point.reach),
        "flatness": _number(point.flatness),
        "eigenvalues": [{"value": _number(value), "error": _number(error)} for value, error in pairs],
        "complete": point.complete,
        "zero": _number(point.zero),
        "negative": point.negative,
        "flat": point.flat,
        "positive": None
        if positive is None
        else {"estimate": _number(positive.estimate), "error": _number(positive.error)},
        "condition": _number(point.condition),
        "rate_limits": [{"momentum": b, "limit": _number(point.rate_limit(momentum=b))} for b in (0.0, 0.9)],
        "products": point.products,
        "converged": point.converged,
        "missed": _number(point.missed),
        "words": str(point),
    }


def _number(x: float) -> float | str:
    """JSON has no NaN and no infinity: they travel as strings."""
    return x if math.isfinite(x) else str(x)
