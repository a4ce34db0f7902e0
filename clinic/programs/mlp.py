"""A perceptron on scikit-learn's digits: plain SGD, batches drawn by hand."""

import torch
from torch import nn

from clinic.data import digits
from clinic.training import Net, Training, accuracy, cross_entropy


def build(*, width=32, depth=1, activation=nn.ReLU, norm=None, dropout=0.0):
    layers, size = [], 64
    for _ in range(depth):
        layers += [nn.Linear(size, width), *([norm(width)] if norm else []), activation()]
        layers += [nn.Dropout(dropout)] if dropout else []
        size = width
    return Net(nn.Sequential(*layers), nn.Linear(size, 10))


def setup() -> Training:
    return Training(digits(), build, cross_entropy, accuracy, torch.optim.SGD, {"lr": 0.2}, batch_size=50, steps=400)
