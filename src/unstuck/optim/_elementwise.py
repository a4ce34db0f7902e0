"""Optimisers that treat each weight on its own: Quickprop, Rprop with backtracking, the root-mean-square forms."""

import abc
import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

Group = dict[str, Any]
State = dict[str, Any]


class Elementwise(torch.optim.Optimizer, abc.ABC):
    """What the optimisers of this file share: the loop over groups, and what they refuse.

    A parameter without a gradient is skipped. The rules work on lists of tensors of one device and type, in place,
    with as few passes over memory as they can.
    """

    def __init__(self, params: Iterable[Any], defaults: Group) -> None:
        super().__init__(params, defaults)

    @abc.abstractmethod
    def _check(self, group: Group) -> None:
        """Raises ValueError for an option of a group that makes no sense."""

    @abc.abstractmethod
    def _start(self, group: Group, slope: Tensor) -> State:
        """The state of a parameter before its first step."""

    @abc.abstractmethod
    def _update(self, group: Group, params: list[Tensor], slopes: list[Tensor], states: list[State]) -> None:
        """One step; the slopes belong to somebody else and are only read."""

    def add_param_group(self, param_group: Group) -> None:
        """Adds a group of parameters; options that it does not give are the defaults."""
        super().add_param_group(param_group)
        try:
            group = self.param_groups[-1]
            refuse_complex(self, group["params"])
            self._check(group)
        except ValueError:
            del self.param_groups[-1]
            raise

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        """One step along the gradients in `.grad`; the loss, if a closure computes it and them."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        ready = [(group, _by_kind(group["params"])) for group in self.param_groups]
        for _, kinds in ready:  # before the first weight is moved
            for params in kinds:
                _refuse_sparse(self, params)
        for group, kinds in ready:
            for params in kinds:
                slopes = [p.grad for p in params if p.grad is not None]
                if group["maximize"]:
                    slopes = list(torch._foreach_neg(slopes))
                for p, slope in zip(params, slopes, strict=True):
                    if not self.state[p]:
                        self.state[p].update(self._start(group, slope))
                self._update(group, params, slopes, [self.state[p] for p in params])
        return loss


class Quickprop(Elementwise):
    """Fahlman's Quickprop: for each weight the secant step Δ = s/(s₋ − s)·Δ₋ to where its slope s would vanish.

    s₋ and Δ₋ are the slope and the step before. The first step is −lr·s. Where the slope has kept at least
    growth/(1 + growth) of its size, the step is growth·Δ₋; and as long as the slope has not changed its sign, −lr·s is
    added. For full batches: a secant between two different batches means little. `growth` is Fahlman's μ;
    `weight_decay` adds weight_decay·w to the slope, as his code does with 1e-4. (Fahlman 1988, CMU-CS-88-162.)

    Each weight takes its slope for a function of itself alone, which is the better the weaker they are coupled.

    >>> w = torch.nn.Parameter(torch.tensor([1.0]))
    >>> optimizer = Quickprop([w], lr=1.5)
    >>> for _ in range(2):
    ...     optimizer.zero_grad()
    ...     (w**2 / 2).sum().backward()
    ...     optimizer.step()
    >>> abs(w.item()) < 1e-6
    True
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-2,
        *,
        growth: float = 1.75,
        weight_decay: float = 0.0,
        maximize: bool = False,
    ) -> None:
        super().__init__(params, {"lr": lr, "growth": growth, "weight_decay": weight_decay, "maximize": maximize})

    def _check(self, group: Group) -> None:
        _needs(float(group["lr"]) >= 0, f"a learning rate is not negative, got lr={group['lr']}")
        _needs(group["growth"] > 0, f"steps grow by a positive factor, got growth={group['growth']}: 1.75 is usual")
        _needs(group["weight_decay"] >= 0, f"a weight decay is not negative, got weight_decay={group['weight_decay']}")

    def _start(self, group: Group, slope: Tensor) -> State:
        return {"slope": torch.zeros_like(slope), "move": torch.zeros_like(slope)}

    def _update(self, group: Group, params: list[Tensor], slopes: list[Tensor], states: list[State]) -> None:
        before, moves = [s["slope"] for s in states], [s["move"] for s in states]
        if group["weight_decay"]:
            slopes = list(torch._foreach_add(slopes, params, alpha=group["weight_decay"]))
        quickprop(slopes, before, moves, lr=float(group["lr"]), growth=group["growth"])
        torch._foreach_add_(params, moves)


def quickprop(slopes: list[Tensor], before: list[Tensor], moves: list[Tensor], *, lr: float, growth: float) -> None:
    """Replaces the last moves by the next, and the slopes before by these.

    With r = s/s₋ the secant step is r/(1 − r)·Δ₋. That grows with r up to growth·Δ₋ at r = growth/(1 + growth): one
    clamp keeps Fahlman's limit, and as r/(1 − r) > −1 no step back is longer than the last.
    """
    precision = torch.finfo(slopes[0].dtype)
    # a slope of exactly 0 came with a move of 0, whatever the ratio; only 0/0 must not happen
    ratios = torch._foreach_div(slopes, torch._foreach_add(before, 1.5 * precision.tiny))
    torch._foreach_clamp_max_(ratios, growth / (1 + growth))
    torch._foreach_clamp_min_(ratios, -1 / precision.eps)  # where r/(1 − r) is −1
    past = torch._foreach_mul(slopes, moves)  # positive where the last move went past the minimum
    torch._foreach_sign_(past)
    torch._foreach_clamp_min_(past, 0.0)
    torch._foreach_mul_(moves, ratios)
    torch._foreach_sub_(ratios, 1.0)
    torch._foreach_div_(moves, ratios)
    torch._foreach_copy_(before, slopes)
    torch._foreach_mul_(past, slopes)
    torch._foreach_sub_(past, slopes)  # −s, or 0 past the minimum
    torch._foreach_mul_(past, lr)
    torch._foreach_sub_(past, moves)  # the moves were divided by r − 1, not by 1 − r
    torch._foreach_copy_(moves, past)


class RpropPlus(Elementwise):
    """Rprop with weight backtracking: the sign of a slope decides its step, whose length adapts by itself.

    While the sign stays, the length grows by etas[1]; when it changes, the last step is taken back and the length
    shrinks by etas[0]. `lr` is the first length; lengths stay within step_sizes. For full batches. torch's own Rprop,
    iRprop⁻, does not take steps back: it stands still for a step instead. (Riedmiller and Braun 1993; Rprop⁺ in Igel
    and Hüsken 2003.)
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-2,
        *,
        etas: tuple[float, float] = (0.5, 1.2),
        step_sizes: tuple[float, float] = (1e-6, 50.0),
        maximize: bool = False,
    ) -> None:
        super().__init__(params, {"lr": lr, "etas": etas, "step_sizes": step_sizes, "maximize": maximize})

    def _check(self, group: Group) -> None:
        (shrink, grow), (least, most) = group["etas"], group["step_sizes"]
        _needs(float(group["lr"]) >= 0, f"a first step is not negative, got lr={group['lr']}")
        _needs(0 < shrink < 1 < grow, f"etas shrink and grow, as (0.5, 1.2) do, got {group['etas']}")
        _needs(0 <= least <= most, f"step_sizes are the least and the greatest, got {group['step_sizes']}")

    def _start(self, group: Group, slope: Tensor) -> State:
        return {"sign": torch.zeros_like(slope), "step_size": torch.full_like(slope, float(group["lr"]))}

    def _update(self, group: Group, params: list[Tensor], slopes: list[Tensor], states: list[State]) -> None:
        before, sizes = [s["sign"] for s in states], [s["step_size"] for s in states]
        (shrink, grow), (least, most) = group["etas"], group["step_sizes"]
        signs = torch._foreach_sign(slopes)
        turned = torch._foreach_mul(signs, before)  # 1 where the sign stays, −1 where it changed, 0 after a change
        grown = torch._foreach_clamp_min(turned, 0.0)
        torch._foreach_clamp_max_(turned, 0.0)
        torch._foreach_addcmul_(sizes, sizes, grown, value=grow - 1)
        torch._foreach_clamp_max_(sizes, most)
        # where the sign changed the length is still that of the last step, which this takes back
        torch._foreach_addcmul_(params, signs, sizes, value=-1)
        torch._foreach_addcmul_(sizes, sizes, turned, value=1 - shrink)
        torch._foreach_clamp_min_(sizes, least)
        torch._foreach_addcmul_(signs, signs, turned)
        torch._foreach_copy_(before, signs)


class RMSAdagrad(Elementwise):
    """Adagrad with the mean in place of the sum: w ← w − lr·g/σ, σ the root mean square of all gradients so far.

    Its steps do not shrink like Adagrad's. It is torch's Adagrad at the rate lr·√(t + 1), to the last digit; where the
    gradients grow smaller for good, σ remembers the large ones longer than RMSprop does. `eps` is added to σ·√(t + 1).
    """

    def __init__(self, params: Iterable[Any], lr: float = 1e-2, *, eps: float = 1e-10, maximize: bool = False) -> None:
        super().__init__(params, {"lr": lr, "eps": eps, "maximize": maximize})

    def _check(self, group: Group) -> None:
        _needs(float(group["lr"]) >= 0, f"a learning rate is not negative, got lr={group['lr']}")
        _needs(group["eps"] >= 0, f"eps is not negative, got eps={group['eps']}")

    def _start(self, group: Group, slope: Tensor) -> State:
        return {"step": torch.zeros(()), "sum": torch.zeros_like(slope)}

    def _update(self, group: Group, params: list[Tensor], slopes: list[Tensor], states: list[State]) -> None:
        sums, lr = [s["sum"] for s in states], float(group["lr"])
        for state in states:
            state["step"] += 1
        torch._foreach_addcmul_(sums, slopes, slopes)
        roots = torch._foreach_sqrt(sums)
        torch._foreach_add_(roots, group["eps"])
        torch._foreach_addcdiv_(params, slopes, roots, [-lr * math.sqrt(s["step"]) for s in states])


class RMSpropFirst(Elementwise):
    """RMSprop that starts at the first gradient: σ₀ = |g₀|, σ² ← alpha·σ² + (1 − alpha)·g², w ← w − lr·g/(σ + eps).

    torch's starts at σ = 0, which makes the first step lr/√(1 − alpha): ten times lr at alpha=0.99; here it is lr. A
    weight whose first gradient is exactly 0 starts as in torch.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-2,
        *,
        alpha: float = 0.99,
        eps: float = 1e-8,
        maximize: bool = False,
    ) -> None:
        super().__init__(params, {"lr": lr, "alpha": alpha, "eps": eps, "maximize": maximize})

    def _check(self, group: Group) -> None:
        _needs(float(group["lr"]) >= 0, f"a learning rate is not negative, got lr={group['lr']}")
        _needs(0 <= group["alpha"] < 1, f"alpha is the share that is remembered, below 1, got alpha={group['alpha']}")
        _needs(group["eps"] >= 0, f"eps is not negative, got eps={group['eps']}")

    def _start(self, group: Group, slope: Tensor) -> State:
        return {"square": slope.square()}

    def _update(self, group: Group, params: list[Tensor], slopes: list[Tensor], states: list[State]) -> None:
        squares = [s["square"] for s in states]
        torch._foreach_mul_(squares, group["alpha"])
        torch._foreach_addcmul_(squares, slopes, slopes, value=1 - group["alpha"])
        roots = torch._foreach_sqrt(squares)
        torch._foreach_add_(roots, group["eps"])
        torch._foreach_addcdiv_(params, slopes, roots, value=-float(group["lr"]))


def refuse_complex(optimizer: object, params: Iterable[Tensor]) -> None:
    """Raises ValueError where a parameter is complex."""
    if any(p.is_complex() for p in params):
        raise ValueError(
            f"{type(optimizer).__name__} needs real parameters, got a complex one: optimise torch.view_as_real of it"
        )


def _refuse_sparse(optimizer: object, params: Iterable[Tensor]) -> None:
    if any(p.grad is not None and p.grad.layout != torch.strided for p in params):
        raise ValueError(
            f"{type(optimizer).__name__} needs dense gradients, got a sparse one: set sparse=False in the embedding"
        )


def _needs(holds: bool, otherwise: str) -> None:  # noqa: FBT001
    if not holds:
        raise ValueError(otherwise)


def _by_kind(params: Iterable[Tensor]) -> list[list[Tensor]]:
    """Those with a gradient, gathered by device and type, as the foreach functions want them."""
    kinds: dict[tuple[torch.device, torch.dtype], list[Tensor]] = {}
    for p in params:
        if p.grad is not None:
            kinds.setdefault((p.device, p.dtype), []).append(p)
    return list(kinds.values())
