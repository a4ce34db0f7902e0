"""A recurrent network that reads digits row by row: Adam with a warm-up."""

import torch
from torch import nn

from clinic.data import Data, digits
from clinic.training import Net, Training, accuracy, cross_entropy


class LastState(nn.Module):
    """A recurrent layer of which the last state is kept."""

    def __init__(self, cell):
        super().__init__()
        self.cell = cell

    def forward(self, rows):
        states, _ = self.cell(rows)
        return states[:, -1]


def build(*, width=32, depth=1, activation=nn.ReLU, dropout=0.0, cell=nn.GRU):
    layers = [LastState(cell(8, width, batch_first=True))]
    for _ in range(depth):
        layers += [nn.Linear(width, width), activation(), *([nn.Dropout(dropout)] if dropout else [])]
    return Net(nn.Sequential(*layers), nn.Linear(width, 10))


def rows_of(split):
    return tuple(Data(part.x.view(-1, 8, 8), part.y) for part in split)


def warm_up(optimizer, steps):
    return torch.optim.lr_scheduler.LinearLR(optimizer, start_factor=0.1, total_iters=20)


def setup() -> Training:
    options = {"lr": 5e-3}
    return Training(
        rows_of(digits()),
        build,
        cross_entropy,
        accuracy,
        torch.optim.Adam,
        options,
        batch_size=100,
        steps=400,
        step_schedule=warm_up,
    )
