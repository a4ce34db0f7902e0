"""A point in words."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from unstuck.critical._point import CriticalPoint

_REASONS = {
    "minimum": "a minimum: the loss curves upwards along every direction",
    "maximum": "a maximum: the loss curves downwards along every direction",
    "saddle": "a saddle: the loss curves upwards along some directions and downwards along others",
    "degenerate": "a degenerate point: some curvature is zero within its error, so second derivatives do not tell",
}


def told(point: CriticalPoint) -> str:
    return " ".join(filter(None, [_meaning(point), _slope(point), _curvature(point), _advice(point)]))


def gist(point: CriticalPoint) -> str:
    """What the point is and what follows, without the numbers that show it."""
    return " ".join(filter(None, [_meaning(point), _advice(point)]))


def _meaning(point: CriticalPoint) -> str:
    if point.kind == "not critical" and point.within_noise:
        return (
            f"Critical within noise, at a loss of {point.loss:.6g}: the gradient is not zero on these batches, but no "
            "larger than its sampling error explains, so on others it might be."
        )
    if point.kind == "not critical":
        return f"Not a critical point: the gradient is still large, at a loss of {point.loss:.6g}."
    if point.kind == "gradient-flat":
        return (
            f"Not a critical point but a gradient-flat one, at a loss of {point.loss:.6g}: along the gradient there is "
            f"hardly any curvature (‖Hg‖/(‖H‖‖g‖) = {point.flatness:.1g}), so methods that minimise ‖g‖ stop here, "
            "though the loss still falls."
        )
    reason = _REASONS[point.kind]
    if point.kind in ("minimum", "maximum") and point.flat:
        reason = f"a {point.name}: flat to second order there, and the loss goes no further as far as was tried"
    return f"The weights stand at {reason}. The loss is {point.loss:.6g}."


def _slope(point: CriticalPoint) -> str:
    noise = ""
    if point.noise is not None:
        noise = f" ± {point.noise.stderr:.1g} over {point.noise.batches} batches"
    return (
        f"The gradient has norm {point.gradient_norm:.3g}{noise}; the best step along it promises to lower the loss by "
        f"{100 * point.promise:.2g} % and is {100 * point.reach:.2g} % of the weights' length (critical: at most "
        f"{100 * point.promise_limit:.2g} % or 0.001 %)."
    )


def _curvature(point: CriticalPoint) -> str:
    count = len(point.values)
    positive = count - point.negative - point.flat
    which = f"The {count} eigenvalues" if point.complete else f"The {count} computed eigenvalues"
    text = (
        f"{which} of the Hessian go from {point.smallest:.4g} ± {float(point.errors[0]):.1g} to "
        f"{point.largest:.4g} ± {float(point.errors[-1]):.1g}: {point.negative} negative, {point.flat} zero "
        f"(within {point.zero:.1g} or the error), {positive} positive."
    )
    if point.positive is not None and not point.complete:
        text += f" Of all, {point.positive} are positive."
    return text if point.converged else f"{text} They have not converged: allow more products."


def _advice(point: CriticalPoint) -> str:
    limit = point.rate_limit()
    rate = f"Gradient descent needs a rate below {limit:.4g}." if limit < math.inf else ""
    way = f"A way out leads along the eigenvalue {point.smallest:.4g}." if point.kind == "saddle" else ""
    return " ".join(filter(None, [rate, way]))
