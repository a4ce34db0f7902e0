"""What users log: the loss, the rate and the norm of the gradient of each step, the held-out loss of each epoch."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from clinic.training import Training

Tell = Callable[..., object]  # by the step and the values that are named


def logged(t: Training, tell: Tell) -> None:
    """Has the training tell of itself. Nothing of it changes: no weight, no gradient, no random number."""
    seen: dict[str, Any] = {"step": 0, "norm": None}
    norms(t, seen)
    step, validate = t.step, t.validate

    def stepped(t, batch):
        seen["norm"] = None
        loss = step(t, batch)
        seen["step"] += 1
        norm = {} if seen["norm"] is None else {"grad_norm": float(seen["norm"])}
        tell(seen["step"], loss=loss, lr=float(t.optimizer.param_groups[0]["lr"]), **norm)
        return loss

    def validated(t):
        outputs: list[Tensor] = []
        handle = t.model.register_forward_hook(lambda module, args, output: outputs.append(output.detach()))
        try:
            score = validate(t)
        finally:
            handle.remove()
        loss = held_out_loss(t, outputs)
        if loss is not None:
            tell(seen["step"], eval_loss=loss)
        return score

    t.step, t.validate = stepped, validated


def norms(t: Training, seen: dict[str, Any]) -> None:
    """Keeps the norm of the gradient that each step has used; where it is clipped that from before."""
    made, clip = t.make_optimizer, nn.utils.clip_grad_norm_

    def clipped(*args, **options):
        seen["norm"] = clip(*args, **options)
        return seen["norm"]

    def measured(optimizer, *_):
        if seen["norm"] is None:
            grads = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
            seen["norm"] = nn.utils.get_total_norm(grads)

    def make(t):
        optimizer = made(t)
        optimizer.register_step_post_hook(measured)
        return optimizer

    nn.utils.clip_grad_norm_ = clipped  # of this process alone
    t.make_optimizer = make


def held_out_loss(t: Training, outputs: list[Tensor]) -> float | None:
    """By the training's own loss, of what the validation has computed; None where that fits no target."""
    if sum(map(len, outputs)) != len(t.held_out):
        return None
    with torch.no_grad():
        try:
            return float(t.criterion(torch.cat(outputs), t.held_out.y))
        except (RuntimeError, ValueError):
            return None
