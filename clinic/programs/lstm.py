"""An LSTM that predicts the next character of Python's own sources: RMSprop and clipping."""

import torch
from torch import nn

from clinic.data import CHARACTERS, text
from clinic.training import Net, Training, accuracy, cross_entropy


class States(nn.Module):
    """A recurrent layer of which all states are kept."""

    def __init__(self, cell):
        super().__init__()
        self.cell = cell

    def forward(self, x):
        states, _ = self.cell(x)
        return states


def build(*, width=32, depth=1, dropout=0.0, cell=nn.LSTM):
    layers = [nn.Embedding(CHARACTERS, width)]
    for _ in range(depth):
        layers += [States(cell(width, width, batch_first=True)), *([nn.Dropout(dropout)] if dropout else [])]
    return Net(nn.Sequential(*layers), nn.Linear(width, CHARACTERS))


def setup() -> Training:
    return Training(
        text(), build, cross_entropy, accuracy, torch.optim.RMSprop, {"lr": 4e-3}, batch_size=24, steps=300, clip=1.0
    )
