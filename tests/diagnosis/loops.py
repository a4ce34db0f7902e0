"""Small training loops, step by step, for the tests of errors in the order of their calls."""

import torch
from torch import nn
from torch.nn import functional as F

STEPS = 40


class Task:
    """A small regression: a network, an optimiser, and a loss on a new batch each time."""

    def __init__(self, kind=torch.optim.SGD, **options):
        self.model = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 1))
        self.optimizer = kind(self.model.parameters(), **{"lr": 0.01, **options})

    def loss(self):
        x = torch.randn(8, 3)
        return F.mse_loss(self.model(x), x.sum(1, keepdim=True))


def usual(t):
    t.optimizer.zero_grad()
    t.loss().backward()
    t.optimizer.step()


def accumulated(t):
    t.optimizer.zero_grad()
    for _ in range(3):
        t.loss().backward()
    t.optimizer.step()


def sharpness_aware(t):
    t.loss().backward()
    with torch.no_grad():
        moves = [0.01 * p.grad for p in t.model.parameters()]
        torch._foreach_add_(list(t.model.parameters()), moves)
    t.optimizer.zero_grad()
    t.loss().backward()
    with torch.no_grad():
        torch._foreach_sub_(list(t.model.parameters()), moves)
    t.optimizer.step()
    t.optimizer.zero_grad()


def looped(step, task=Task, steps=STEPS, **options):
    t = task(**options)
    return lambda: [step(t) for _ in range(steps)]
