"""Two classes from a table, scikit-learn's breast cancer: a small network, Adam, binary cross-entropy of logits."""

import torch
from torch import nn

from clinic.data import tumours
from clinic.training import Net, Training, sign_accuracy


def build(*, width=16, depth=1, activation=nn.ReLU, norm=None, dropout=0.0):
    layers, size = [], 30
    for _ in range(depth):
        layers += [nn.Linear(size, width), *([norm(width)] if norm else []), activation()]
        layers += [nn.Dropout(dropout)] if dropout else []
        size = width
    return Net(nn.Sequential(*layers), nn.Linear(size, 1))


def setup() -> Training:
    criterion = nn.BCEWithLogitsLoss()
    options = {"lr": 3e-3}
    return Training(tumours(), build, criterion, sign_accuracy, torch.optim.Adam, options, batch_size=32, steps=300)
