"""The exam for optimisers: ours and torch's pass it, and each broken one is told what is broken."""

import pytest
import torch

from unstuck import optim
from unstuck.testing import check_optimizer

PASSING = {
    "SGD": lambda params: torch.optim.SGD(params, lr=0.1),
    "momentum": lambda params: torch.optim.SGD(params, lr=0.1, momentum=0.9, weight_decay=0.1),
    "Adam": torch.optim.Adam,
    "AdamW": torch.optim.AdamW,
    "Rprop": torch.optim.Rprop,
    "Adagrad": torch.optim.Adagrad,
    "Quickprop": lambda params: optim.Quickprop(params, lr=0.1),
    "Quickprop with decay": lambda params: optim.Quickprop(params, lr=0.1, weight_decay=1e-4),
    "RpropPlus": optim.RpropPlus,
    "RMSAdagrad": optim.RMSAdagrad,
    "RMSpropFirst": optim.RMSpropFirst,
}


@pytest.mark.filterwarnings("ignore:Sparse invariant checks")  # torch's Adagrad makes sparse tensors
@pytest.mark.parametrize("name", PASSING)
def test_a_sound_optimiser_passes(name):
    check_optimizer(PASSING[name])


class Toy(torch.optim.Optimizer):
    """Gradient descent with momentum, as it should be; the others break one thing each."""

    def __init__(self, params, lr=0.1, maximize=False):
        super().__init__(params, {"lr": lr, "maximize": maximize})

    def slope(self, group, p):
        if p.grad.is_sparse or p.is_complex():
            raise ValueError("neither sparse nor complex")
        return -p.grad if group["maximize"] else p.grad

    def buffer(self, p):
        return self.state[p].setdefault("buffer", torch.zeros_like(p))

    def chosen(self, group):
        return [p for p in group["params"] if p.grad is not None]

    def called(self, closure):
        with torch.enable_grad():
            return closure()

    def step(self, closure=None):
        loss = None if closure is None else self.called(closure)
        with torch.no_grad():
            for group in self.param_groups:
                for p in self.chosen(group):
                    buffer = self.buffer(p)
                    buffer.mul_(0.5).add_(self.slope(group, p))
                    p.sub_(group["lr"] * buffer.to(p.dtype))
        return loss


class Forgetful(Toy):
    def buffer(self, p):
        self.__dict__.setdefault("buffers", {})
        return self.buffers.setdefault(p, torch.zeros_like(p))


class Writing(Toy):
    def slope(self, group, p):
        return super().slope(group, p).mul_(0.5) if not group["maximize"] else super().slope(group, p)


class Pushy(Toy):
    def chosen(self, group):
        for p in group["params"]:
            p.grad = torch.ones_like(p) if p.grad is None else p.grad
        return group["params"]


class Narrow(Toy):
    def buffer(self, p):
        return self.state[p].setdefault("buffer", torch.zeros_like(p, dtype=torch.float32))


class Lossless(Toy):
    def step(self, closure=None):
        super().step(closure)


class Dark(Toy):
    def called(self, closure):
        with torch.no_grad(), torch.enable_grad():
            loss = closure()
        torch.set_grad_enabled(False)
        return loss

    def step(self, closure=None):
        loss = super().step(closure)
        torch.set_grad_enabled(False)
        return loss


class Idle(Toy):
    def chosen(self, group):
        return [p for p in super().chosen(group) if p.ndim > 1]


class OneRate(Toy):
    def step(self, closure=None):
        for group in self.param_groups:
            group["lr"] = self.defaults["lr"]
        return super().step(closure)


class FirstGroup(Toy):
    def step(self, closure=None):
        groups, self.param_groups = self.param_groups, self.param_groups[:1]
        try:
            return super().step(closure)
        finally:
            self.param_groups = groups


class Downward(Toy):
    def slope(self, group, p):
        return super().slope({**group, "maximize": False}, p)


class Swallowing(Toy):
    def __init__(self, params, lr=0.1, **options):
        super().__init__(params, lr)


class Dense(Toy):
    def slope(self, group, p):
        if p.grad.is_sparse:
            return p.grad.to_dense() * 2
        return super().slope(group, p)


class Mute(Toy):
    def slope(self, group, p):
        if p.grad.is_sparse:
            raise ValueError("not supported")
        return super().slope(group, p)


class Squaring(Toy):
    def slope(self, group, p):
        return p.grad * p.grad.abs() if p.is_complex() else super().slope(group, p)


class Drawing(Toy):
    def slope(self, group, p):
        return super().slope(group, p) + 0 * torch.rand(())


BROKEN = {
    Forgetful: "state_dict bit for bit",
    Writing: "leave .grad alone",
    Pushy: "without a gradient must be skipped",
    Narrow: "keep the type torch.float64",
    Lossless: "return the loss",
    Dark: "leave the grad mode alone",
    Idle: "got 1 of 2 moved",
    OneRate: "own lr must be used",
    FirstGroup: "must go as in one group",
    Downward: "maximize must descend the negative loss",
    Swallowing: "misspelt keyword",
    Dense: "do what the dense one does",
    Mute: "sparse gradient must be refused by name",
    Squaring: "treated as pairs of real ones",
    Drawing: "global generator",
}


def test_the_toy_itself_passes():
    check_optimizer(Toy)


@pytest.mark.parametrize("broken", BROKEN, ids=lambda broken: broken.__name__)
def test_a_broken_optimiser_is_told_what_is_broken(broken):
    with torch.random.fork_rng(devices=[]), torch.enable_grad(), pytest.raises(AssertionError, match=BROKEN[broken]):
        check_optimizer(broken)
