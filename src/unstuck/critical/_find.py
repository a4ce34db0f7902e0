"""The search for critical points of any kind: minima of ½‖∇L‖²."""

from dataclasses import dataclass

import torch
from torch import Tensor

from unstuck.curvature import Krylov, hessian
from unstuck.objective import Objective

_FLAT = 1e-3  # below it ‖Hg‖/(‖H‖‖g‖) calls a point gradient-flat


@dataclass(frozen=True, eq=False)
class Search:
    """Where a search for a critical point ended, and whether it found one."""

    outcome: str  # "critical", "gradient-flat" or "not converged"
    point: Tensor  # (size,)
    loss: float
    gradient_norms: Tensor  # (steps + 1,), float64
    flatness: float  # ‖Hg‖ / (‖H‖‖g‖) at the end; NaN where it is critical
    converged: bool  # whether the outcome is critical
    products: int

    def __str__(self) -> str:
        start, end = (float(self.gradient_norms[i]) for i in (0, -1))
        fate = {
            "critical": "A critical point",
            "gradient-flat": f"No critical point but a gradient-flat one (‖Hg‖/(‖H‖‖g‖) = {self.flatness:.1g})",
            "not converged": f"No critical point yet (‖Hg‖/(‖H‖‖g‖) = {self.flatness:.1g})",
        }[self.outcome]
        return (
            f"{fate} at a loss of {self.loss:.6g}: the gradient norm went from {start:.3g} to {end:.3g} in "
            f"{len(self.gradient_norms) - 1} steps ({self.products} products)."
        )


def find_critical(objective: Objective, *, tol: float | None = None, steps: int = 200, space: int = 100) -> Search:
    """A critical point near the weights, of whatever index: Levenberg–Marquardt on ½‖∇L‖².

    A step minimises ‖Hs + g‖² + μ‖s‖² over the Krylov space of H and g, of at most `space` products; a step that does
    not lower ‖g‖ is taken back and tried again with a larger μ, for no further product (Nielsen's rule for μ). It ends
    at ‖g‖ ≤ `tol` (√ulp), or where the gradient has come to lie in the kernel of H: a minimum of ‖g‖, but no critical
    point of the loss, and the commonest end on networks (Frye et al. 2021). float64 weights are needed to get close.
    """
    tol = float(torch.finfo(objective.dtype).eps ** 0.5) if tol is None else tol
    if not tol > 0 or min(steps, space) < 1:
        raise ValueError(f"find_critical needs tol > 0, steps and space of at least 1, got {tol}, {steps}, {space}")
    loss, gradient = objective.value_and_gradient()
    if not (loss.isfinite() and gradient.isfinite().all()):
        raise ValueError(f"a search needs a finite loss and gradient, got loss {loss.item():.4g} where it starts")
    norms = [gradient.norm().item()]
    mu, growth, products, flatness = 1e-3, 2.0, 0, float("nan")
    outcome = "not converged"
    while norms[-1] > tol and len(norms) <= steps:
        model = _Model(objective, gradient, space)
        products += model.products
        flatness = model.flatness
        if flatness <= _FLAT**2:  # the search is over long before, but a passage through a flat part is none
            break
        for _ in range(40):
            step, predicted = model.step(mu)
            there = objective.at(objective.point + step)
            loss_there, gradient_there = there.value_and_gradient()
            norm = gradient_there.norm().item()
            gain = (norms[-1] ** 2 - norm**2) / max(predicted, 1e-300)
            if gain > 0 and loss_there.isfinite():
                mu, growth = mu * max(1 / 3, 1 - (2 * gain - 1) ** 3), 2.0
                break
            mu, growth = max(mu, 1e-12) * growth, 2 * growth
        else:
            break
        objective, loss, gradient = there, loss_there, gradient_there
        norms.append(norm)
    if norms[-1] <= tol:
        outcome, flatness = "critical", float("nan")
    elif norms[-1] > 0:
        flatness = _Model(objective, gradient, space).flatness
        outcome = "gradient-flat" if flatness <= _FLAT else outcome
    return Search(
        outcome=outcome,
        point=objective.point,
        loss=loss.item(),
        gradient_norms=torch.tensor(norms, dtype=torch.float64),
        flatness=flatness,
        converged=outcome == "critical",
        products=products,
    )


class _Model:
    """‖Hs + g‖ for s in the Krylov space of g, as a small least-squares problem."""

    def __init__(self, objective: Objective, gradient: Tensor, space: int) -> None:
        H = hessian(objective)
        self.krylov = Krylov(H, rows=space, start=gradient)
        while not (self.krylov.full or self.krylov.closed):
            self.krylov.grow()
        self.products = self.krylov.products
        count = len(self.krylov)
        self.matrix = torch.cat([self.krylov.matrix[:count, :count], self.krylov.links[None]])
        self.target = torch.zeros(count + 1, dtype=torch.float64)
        self.target[0] = -gradient.double().norm()
        self.scale = float(torch.linalg.matrix_norm(self.matrix, 2))

    @property
    def flatness(self) -> float:
        return float(self.matrix[:, 0].norm()) / self.scale if self.scale else 0.0

    def step(self, mu: float) -> tuple[Tensor, float]:
        """The step for a damping of μ‖H‖², and by how much it lowers ‖Hs + g‖²."""
        damping = (mu**0.5 * self.scale) * torch.eye(self.matrix.shape[1], dtype=torch.float64)
        stacked = torch.cat([self.matrix, damping])
        y = torch.linalg.lstsq(stacked, torch.cat([self.target, torch.zeros(len(damping)).double()])).solution
        left = self.target - self.matrix @ y
        step = self.krylov.combine(y[:, None])[0]
        return step, float(self.target.square().sum() - left.square().sum())
