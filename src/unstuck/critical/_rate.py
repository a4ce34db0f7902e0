"""How large a rate the curvature allows an optimiser."""

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from unstuck.curvature import Operator, eigenpairs, hessian
from unstuck.objective import Objective, unwrapped


@dataclass(frozen=True, eq=False)
class RateLimit:
    """The rate above which an optimiser moves away from where it stands, and the rate that it has."""

    limit: float  # infinite where no curvature is positive
    stderr: float  # the error that the eigenvalue's leaves
    rate: float
    converged: bool
    products: int

    @property
    def share(self) -> float:
        """rate / limit: stable below 1."""
        return self.rate / self.limit

    def __str__(self) -> str:
        word = "above" if self.rate > self.limit else "below"
        text = (
            f"The rate {self.rate:.4g} is {word} the limit {self.limit:.4g} ± {self.stderr:.1g} that the curvature sets"
        )
        return f"{text} ({self.products} products{'' if self.converged else ', not converged'})."


def rate_limit(
    objective: Objective,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    *,
    tol: float = 1e-2,
    generator: torch.Generator | None = None,
) -> RateLimit:
    """The largest stable rate of SGD or Adam in the state that it has, where the model stands.

    SGD: 2(1+β)/λmax, with Nesterov's momentum 2(1+β)/((1+2β)λmax), both divided by 1 − dampening and with the weight
    decay added to H. Adam: 2(1+β₁)/((1−β₁)λmax(P⁻¹H)) with P = √v̂ + ε as it is now (Cohen et al. 2022, eq. 2). The
    limit is that of full-batch steps on the quadratic model. One group of one rate is needed.
    """
    if len({(g["lr"], g.get("momentum", 0), g.get("betas")) for g in optimizer.param_groups}) > 1:
        raise ValueError("a rate limit needs one rate and momentum for all parameters, got groups that differ")
    group = optimizer.param_groups[0]
    H = hessian(objective)
    if isinstance(optimizer, torch.optim.SGD):
        beta = group["momentum"]
        factor = 2 * (1 + beta) / (1 + 2 * beta) if group["nesterov"] else 2 * (1 + beta)
        factor /= 1 - group["dampening"]
        A, decay = H, group["weight_decay"]
    elif isinstance(optimizer, (torch.optim.Adam, torch.optim.AdamW)):
        beta = group["betas"][0]
        factor, decay = 2 * (1 + beta) / (1 - beta), 0.0
        A = _preconditioned(H, _scales(objective, model, optimizer))
    else:
        raise TypeError(f"rate_limit knows SGD, Adam and AdamW, got {type(optimizer).__name__}")
    found = eigenpairs(A, largest=1, smallest=0, tol=tol, generator=generator)
    top, error = float(found.values[0]) + decay, float(found.errors[0])
    limit = factor / top if top > error else math.inf
    stderr = limit * error / top if top > error else math.nan
    return RateLimit(limit, stderr, float(group["lr"]), found.converged, found.products)


def _preconditioned(H: Operator, scales: Tensor) -> Operator:
    root = scales.rsqrt()
    lead = H.lead
    return replace(H, matvec=lambda v: root * (H @ (root * v)), lead=lead and (lambda: root * lead()))


def _scales(objective: Objective, model: nn.Module, optimizer: torch.optim.Optimizer) -> Tensor:
    """√v̂ + ε for each weight, in the order of the objective."""
    parameters = dict(unwrapped(model).named_parameters())
    group = optimizer.param_groups[0]
    pieces = []
    for name in objective.names:
        state = optimizer.state.get(parameters[name], {})
        if "exp_avg_sq" not in state:
            raise ValueError(f"Adam's limit needs its state, got none for {name}: take a step first")
        squares = state.get("max_exp_avg_sq", state["exp_avg_sq"]) / (1 - group["betas"][1] ** float(state["step"]))
        pieces.append((squares.sqrt() + group["eps"]).reshape(-1).to(objective.device, objective.dtype))
    return torch.cat(pieces)
