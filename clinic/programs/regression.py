"""Regression on Friedman's first function: two hidden layers, Nesterov momentum, weight decay, a step schedule."""

import torch
from torch import nn
from torch.nn import functional as F

from clinic.data import friedman
from clinic.training import Net, Training, r_squared


def build(*, width=32, depth=2, activation=nn.ReLU, norm=None, dropout=0.0):
    layers, size = [], 10
    for _ in range(depth):
        layers += [nn.Linear(size, width), *([norm(width)] if norm else []), activation()]
        layers += [nn.Dropout(dropout)] if dropout else []
        size = width
    return Net(nn.Sequential(*layers), nn.Linear(size, 1))


def halving(optimizer, epochs):
    return torch.optim.lr_scheduler.StepLR(optimizer, step_size=max(epochs // 3, 1), gamma=0.5)


def setup() -> Training:
    options = {"lr": 0.06, "momentum": 0.9, "nesterov": True, "weight_decay": 1e-4}
    return Training(
        friedman(),
        build,
        F.mse_loss,
        r_squared,
        torch.optim.SGD,
        options,
        batch_size=32,
        steps=500,
        epoch_schedule=halving,
    )
