"""An autoencoder of Fashion-MNIST: Adam, the squared error of pixels behind a sigmoid."""

import torch
from torch import nn
from torch.nn import functional as F

from clinic.data import compressible
from clinic.training import Net, Training, r_squared


def build(*, width=64, code=12, depth=1, activation=nn.ReLU, norm=None, dropout=0.0, out=nn.Sigmoid):
    def layer(size, to):
        after = [*([norm(to)] if norm else []), activation(), *([nn.Dropout(dropout)] if dropout else [])]
        return [nn.Linear(size, to), *after]

    def inner():
        return [part for _ in range(depth - 1) for part in layer(width, width)]

    encoder = [*layer(196, width), *inner(), nn.Linear(width, code)]
    decoder = [*layer(code, width), *inner()]
    return Net(nn.Sequential(*encoder, *decoder), nn.Linear(width, 196), out())


def setup() -> Training:
    data = compressible()
    scale = (data[0].y - data[0].y.mean(0)).square().mean().item()
    return Training(
        data, build, F.mse_loss, r_squared, torch.optim.Adam, {"lr": 5e-3}, batch_size=50, steps=400, scale=scale
    )
