"""A small convolutional network with batch norm on Fashion-MNIST: SGD with momentum and weight decay, a DataLoader."""

import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from clinic.data import Data, fashion
from clinic.training import Net, Training, accuracy, cross_entropy


def build(*, width=8, depth=2, activation=nn.ReLU, norm=nn.BatchNorm2d, dropout=0.0):
    layers, channels = [], 1
    for k in range(depth):
        layers += [nn.Conv2d(channels, width * 2 ** min(k, 1), 3, padding=1)]
        channels = width * 2 ** min(k, 1)
        layers += [*([norm(channels)] if norm else []), activation(), *([nn.MaxPool2d(2)] if k < 2 else [])]
    layers += [nn.Flatten(), *([nn.Dropout(dropout)] if dropout else [])]
    return Net(nn.Sequential(*layers), nn.Linear(channels * 9, 10))


def loader(t):
    loader = DataLoader(TensorDataset(t.train.x, t.train.y), batch_size=t.batch_size, shuffle=True, drop_last=True)
    return (Data(images, labels) for images, labels in loader)


def setup() -> Training:
    options = {"lr": 0.05, "momentum": 0.9, "weight_decay": 1e-3}
    training = Training(fashion(), build, cross_entropy, accuracy, torch.optim.SGD, options, batch_size=50, steps=300)
    training.batches = loader
    return training
