"""The data that the programs train on: bundled with scikit-learn or Python, drawn from a formula, or Fashion-MNIST."""

import functools
import gzip
import inspect
import math
import textwrap
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from sklearn.datasets import load_breast_cancer, load_digits, make_friedman1
from torch import Tensor, nn

FASHION = Path("/usr/share/datasets/fashion-mnist")  # Debian's package dataset-fashion-mnist


@dataclass(frozen=True, eq=False)
class Data:
    """Inputs and targets, row by row."""

    x: Tensor
    y: Tensor

    def rows(self, chosen: Tensor | slice) -> "Data":
        return Data(self.x[chosen], self.y[chosen])

    def __len__(self) -> int:
        return len(self.x)


Split = tuple[Data, Data]  # training and held-out


def _split(x: Tensor, y: Tensor, train: int) -> Split:
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(1))  # the same for all seeds
    data = Data(x[order], y[order])
    return data.rows(slice(train)), data.rows(slice(train, None))


def _standardised(split: Split) -> Split:
    train, held_out = split
    mean, std = train.x.mean(0), train.x.std(0) + 0.1  # pixels at the border are constant
    return Data((train.x - mean) / std, train.y), Data((held_out.x - mean) / std, held_out.y)


@functools.cache
def digits() -> Split:
    """1,400 and 397 digits of 64 standardised pixels."""
    bunch = load_digits()
    x, y = torch.tensor(bunch.data, dtype=torch.float32), torch.tensor(bunch.target)
    return _standardised(_split(x, y, 1400))


@functools.cache
def pictures() -> Split:
    """3,000 and 1,000 articles of fashion in 14 × 14 pixels from 0 to 1; where they are not installed, digits."""
    if not FASHION.is_dir():
        bunch = load_digits()
        x = torch.tensor(bunch.images, dtype=torch.float32)[:, None] / 16
        return _split(nn.functional.interpolate(x, (14, 14), mode="bilinear"), torch.tensor(bunch.target), 1400)
    count = 4000
    with gzip.open(FASHION / "train-images-idx3-ubyte.gz") as file:
        pixels = np.frombuffer(file.read(16 + 784 * count), np.uint8, offset=16).reshape(count, 1, 28, 28)
    with gzip.open(FASHION / "train-labels-idx1-ubyte.gz") as file:
        labels = np.frombuffer(file.read(8 + count), np.uint8, offset=8)
    images = nn.functional.avg_pool2d(torch.tensor(pixels / 255, dtype=torch.float32), 2)
    return _split(images, torch.tensor(labels, dtype=torch.long), 3000)


def fashion() -> Split:
    """The pictures around zero, with their classes."""
    train, held_out = pictures()
    mean, std = train.x.mean(), train.x.std()
    return Data((train.x - mean) / std, train.y), Data((held_out.x - mean) / std, held_out.y)


def compressible() -> Split:
    """The pictures as their own targets."""
    train, held_out = pictures()
    return Data(train.x.flatten(1), train.x.flatten(1).clone()), Data(
        held_out.x.flatten(1), held_out.x.flatten(1).clone()
    )


@functools.cache
def friedman() -> Split:
    """Friedman's first function of ten variables, five of which matter, with noise; standardised."""
    x, y = make_friedman1(1600, noise=0.5, random_state=0)
    x, y = torch.tensor(x, dtype=torch.float32), torch.tensor(y, dtype=torch.float32)[:, None]
    train, held_out = _split((x - 0.5) * math.sqrt(12), y, 1200)
    mean, std = train.y.mean(), train.y.std()
    return Data(train.x, (train.y - mean) / std), Data(held_out.x, (held_out.y - mean) / std)


@functools.cache
def tumours() -> Split:
    """Two kinds of tumour by 30 measurements."""
    bunch = load_breast_cancer()
    x, y = torch.tensor(bunch.data, dtype=torch.float32), torch.tensor(bunch.target, dtype=torch.float32)[:, None]
    x = (x - x.mean(0)) / x.std(0)
    return _split(x, y, 400)


CHARACTERS = 97  # of ASCII that can be printed, the newline and one for all others


@functools.cache
def text(context: int = 16) -> Split:
    """Windows of the source text of a module of the standard library, and the next character at each place."""
    source = inspect.getsource(textwrap)
    codes = [95 if c == "\n" else ord(c) - 32 if " " <= c <= "~" else 96 for c in source]
    ids = torch.tensor(codes)
    windows = ids.unfold(0, context + 1, context // 2)
    cut = int(0.85 * len(windows))
    x, y = windows[:, :-1].contiguous(), windows[:, 1:].contiguous()
    return Data(x[:cut], y[:cut]), Data(x[cut + 2 :], y[cut + 2 :])  # which share no character


@functools.cache
def ring() -> Split:
    """Points of a ring, without a target."""
    generator = torch.Generator().manual_seed(0)
    angle = 2 * math.pi * torch.rand(3000, generator=generator)
    x = torch.stack([angle.cos(), angle.sin()], 1) + 0.05 * torch.randn(3000, 2, generator=generator)
    return Data(x[:2000], x[:2000].clone()), Data(x[2000:], x[2000:].clone())
