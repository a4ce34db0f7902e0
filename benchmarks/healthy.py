"""Healthy training programs, from 0.5 to some 30 milliseconds a step, on which watching is measured.

Each builds its networks and gives back a function that takes one step and returns the loss. Data: Fashion-MNIST,
scikit-learn's digits, Python's own sources. All chances are drawn from torch's global generator.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from workloads import GPT, digits, fashion, sources

Step = Callable[[], Tensor]
Batch = Callable[[], tuple[Tensor, Tensor]]


@dataclass(frozen=True, eq=False)
class Plain:
    """A chain of layers, a loss and an optimiser: the programs that Cockpit can watch as well."""

    model: nn.Sequential
    loss: nn.Module
    optimizer: torch.optim.Optimizer
    batch: Batch

    def __call__(self) -> Tensor:
        x, y = self.batch()
        self.optimizer.zero_grad()
        loss = self.loss(self.model(x), y)
        loss.backward()
        self.optimizer.step()
        return loss.detach()


def drawn(x: Tensor, y: Tensor, rows: int) -> Batch:
    def batch() -> tuple[Tensor, Tensor]:
        chosen = torch.randint(len(x), (rows,))
        return x[chosen], y[chosen]

    return batch


def sgd(model: nn.Module, lr: float) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9)


def adam(model: nn.Module, lr: float) -> torch.optim.Optimizer:
    return torch.optim.Adam(model.parameters(), lr=lr)


def flat(count: int = 10_000) -> tuple[Tensor, Tensor]:
    x, y = fashion(count)
    return x.flatten(1), y


def perceptron() -> Step:
    hidden = [nn.Linear(784, 512), nn.ReLU(), nn.Linear(512, 512), nn.ReLU()]
    model = nn.Sequential(*hidden, nn.Linear(512, 10))
    return Plain(model, nn.CrossEntropyLoss(), sgd(model, 0.02), drawn(*flat(), 256))


def convolution() -> Step:
    layers = [nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(16, 32, 3, padding=1), nn.ReLU()]
    model = nn.Sequential(*layers, nn.MaxPool2d(2), nn.Flatten(), nn.Linear(1568, 64), nn.ReLU(), nn.Linear(64, 10))
    return Plain(model, nn.CrossEntropyLoss(), adam(model, 1e-3), drawn(*fashion(10_000), 64))


def autoencoder() -> Step:
    narrow = [nn.Linear(784, 256), nn.ReLU(), nn.Linear(256, 32), nn.ReLU()]
    model = nn.Sequential(*narrow, nn.Linear(32, 256), nn.ReLU(), nn.Linear(256, 784), nn.Sigmoid())
    x, _ = flat()
    return Plain(model, nn.MSELoss(), adam(model, 1e-3), drawn(x, x, 192))


def batch_norm() -> Step:
    layers: list[nn.Module] = []
    for into, out in ((1, 16), (16, 32), (32, 64)):
        layers += [nn.Conv2d(into, out, 3, padding=1), nn.BatchNorm2d(out), nn.ReLU(), nn.MaxPool2d(2)]
    model = nn.Sequential(*layers, nn.Flatten(), nn.Linear(576, 10))
    return plain(model, F.cross_entropy, sgd(model, 0.05), drawn(*fashion(10_000), 64))


def plain(model: nn.Module, loss: Callable[..., Tensor], optimizer: torch.optim.Optimizer, batch: Batch) -> Step:
    def step() -> Tensor:
        x, y = batch()
        optimizer.zero_grad()
        value = loss(model(x), y)
        value.backward()
        optimizer.step()
        return value.detach()

    return step


class Residual(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.first, self.second = (nn.Conv2d(width, width, 3, padding=1, bias=False) for _ in range(2))
        self.norms = nn.ModuleList(nn.BatchNorm2d(width) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        inner = F.relu(self.norms[0](self.first(x)))
        return F.relu(x + self.norms[1](self.second(inner)))


def residual() -> Step:
    """Two parameter groups, Nesterov's momentum and a schedule."""
    stem = [nn.Conv2d(1, 16, 3, stride=2, padding=1), nn.BatchNorm2d(16), nn.ReLU()]
    pool = [nn.AdaptiveAvgPool2d(4), nn.Flatten()]
    model = nn.Sequential(*stem, *(Residual(16) for _ in range(4)), *pool, nn.Linear(256, 10))
    groups = [
        {"params": [p for p in model.parameters() if p.dim() > 1], "weight_decay": 5e-4},
        {"params": [p for p in model.parameters() if p.dim() == 1]},
    ]
    optimizer = torch.optim.SGD(groups, lr=0.05, momentum=0.9, nesterov=True)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 5000)
    batch = drawn(*fashion(10_000), 32)

    def step() -> Tensor:
        x, y = batch()
        loss = F.cross_entropy(model(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        return loss.detach()

    return step


class Words(nn.Module):
    def __init__(self, kind: type[nn.RNNBase], width: int) -> None:
        super().__init__()
        self.letters, self.net = nn.Embedding(128, width), kind(width, width, batch_first=True)
        self.head = nn.Linear(width, 128)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.net(self.letters(x))[0])


def recurrent(kind: type[nn.RNNBase], width: int, rows: int, length: int) -> Step:
    model = Words(kind, width)
    optimizer = adam(model, 2e-3)
    batch = drawn(*sources(2000, length), rows)

    def step() -> Tensor:
        x, y = batch()
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x).flatten(0, 1), y.flatten())
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        return loss.detach()

    return step


def transformer(width: int, layers: int, length: int, rows: int) -> Step:
    model = GPT(width=width, layers=layers, heads=4, length=length)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda k: min(1.0, (k + 1) / 100))
    batch = drawn(*sources(2000, length), rows)

    def step() -> Tensor:
        x, y = batch()
        logits = model(x)
        loss = F.cross_entropy(logits.view(-1, logits.shape[-1]), y.reshape(-1))
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        schedule.step()
        return loss.detach()

    return step


def variational() -> Step:
    """A loss of two parts and a sample inside the network."""
    encoder = nn.Sequential(nn.Linear(784, 256), nn.ReLU(), nn.Linear(256, 40))
    decoder = nn.Sequential(nn.Linear(20, 256), nn.ReLU(), nn.Linear(256, 784))
    optimizer = torch.optim.Adam([*encoder.parameters(), *decoder.parameters()], lr=1e-3)
    batch = drawn(*flat(), 192)

    def step() -> Tensor:
        x, _ = batch()
        mean, spread = encoder(x).chunk(2, dim=1)
        code = mean + torch.randn_like(mean) * (spread / 2).exp()
        rebuilt = F.binary_cross_entropy_with_logits(decoder(code), x, reduction="sum")
        divergence = -0.5 * (1 + spread - mean.square() - spread.exp()).sum()
        loss = (rebuilt + divergence) / len(x)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return loss.detach()

    return step


def adversarial() -> Step:
    """Two networks and two optimisers; the loss returned is the sum of both."""
    forger = nn.Sequential(nn.Linear(32, 256), nn.LeakyReLU(0.2), nn.Linear(256, 784), nn.Sigmoid())
    judge = nn.Sequential(nn.Linear(784, 256), nn.LeakyReLU(0.2), nn.Dropout(0.3), nn.Linear(256, 1))
    first, second = (torch.optim.Adam(m.parameters(), lr=2e-4, betas=(0.5, 0.999)) for m in (forger, judge))
    batch = drawn(*flat(), 64)

    def step() -> Tensor:
        x, _ = batch()
        right, wrong = torch.ones(len(x), 1), torch.zeros(len(x), 1)
        forged = forger(torch.randn(len(x), 32))
        second.zero_grad()
        judged = F.binary_cross_entropy_with_logits(judge(x), right)
        judged = judged + F.binary_cross_entropy_with_logits(judge(forged.detach()), wrong)
        judged.backward()
        second.step()
        first.zero_grad()
        fooled = F.binary_cross_entropy_with_logits(judge(forged), right)
        fooled.backward()
        first.step()
        return (judged + fooled).detach()

    return step


def accumulation() -> Step:
    """Four backward passes a step, then clipping."""
    layers = [nn.Conv2d(1, 16, 3, padding=1), nn.GroupNorm(4, 16), nn.ReLU(), nn.MaxPool2d(4), nn.Flatten()]
    model = nn.Sequential(*layers, nn.Linear(784, 10))
    optimizer = sgd(model, 0.05)
    batch = drawn(*fashion(10_000), 96)

    def step() -> Tensor:
        x, y = batch()
        total = torch.zeros(())
        optimizer.zero_grad()
        for part, labels in zip(x.chunk(4), y.chunk(4), strict=True):
            loss = F.cross_entropy(model(part), labels) / 4
            loss.backward()
            total += loss.detach()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        return total

    return step


def loader() -> Step:
    """A DataLoader, dropout, AdamW, a schedule and an average of the weights."""
    loaded = DataLoader(TensorDataset(*flat()), batch_size=128, shuffle=True, drop_last=True)
    wide = [nn.Linear(784, 384), nn.GELU(), nn.Dropout(0.1), nn.Linear(384, 384), nn.LayerNorm(384), nn.GELU()]
    model = nn.Sequential(*wide, nn.Linear(384, 10))
    average = torch.optim.swa_utils.AveragedModel(model, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.99))
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9995)
    batches: Any = iter(())

    def step() -> Tensor:
        nonlocal batches
        try:
            x, y = next(batches)
        except StopIteration:
            batches = iter(loaded)
            x, y = next(batches)
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x), y, label_smoothing=0.1)
        loss.backward()
        optimizer.step()
        schedule.step()
        average.update_parameters(model)
        return loss.detach()

    return step


def small_perceptron() -> Step:
    model = nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 10))
    return Plain(model, nn.CrossEntropyLoss(), adam(model, 1e-3), drawn(*digits(), 96))


def small_convolution() -> Step:
    x, y = digits()
    layers = [nn.Conv2d(1, 8, 3), nn.ReLU(), nn.Conv2d(8, 16, 3), nn.ReLU(), nn.Flatten(), nn.Linear(256, 10)]
    model = nn.Sequential(*layers)
    return Plain(model, nn.CrossEntropyLoss(), sgd(model, 0.05), drawn(x.view(-1, 1, 8, 8), y, 32))


def small_autoencoder() -> Step:
    model = nn.Sequential(nn.Linear(64, 192), nn.Tanh(), nn.Linear(192, 8), nn.Tanh(), nn.Linear(8, 192), nn.Tanh())
    model.append(nn.Linear(192, 64))
    x, _ = digits()
    return Plain(model, nn.MSELoss(), torch.optim.RMSprop(model.parameters(), lr=1e-3), drawn(x, x, 128))


def raw_tensors() -> Step:
    """A network of characters written out in tensors, as in many courses."""
    x, y = sources(5000, 8)
    names, weight, out = torch.randn(128, 10), torch.randn(80, 300) / math.sqrt(80), torch.randn(300, 128) * 0.05
    bias = torch.zeros(300)
    parameters = [p.requires_grad_() for p in (names, weight, bias, out)]
    optimizer = torch.optim.SGD(parameters, lr=0.2)
    batch = drawn(x, y[:, -1], 128)

    def step() -> Tensor:
        letters, wanted = batch()
        hidden = torch.tanh(names[letters].view(-1, 80) @ weight + bias)
        loss = F.cross_entropy(hidden @ out, wanted) + 1e-4 * weight.square().sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return loss.detach()

    return step


PROGRAMS: dict[str, Callable[[], Step]] = {
    "perceptron": perceptron,
    "convolution": convolution,
    "batch-norm": batch_norm,
    "residual": residual,
    "autoencoder": autoencoder,
    "variational": variational,
    "adversarial": adversarial,
    "accumulation": accumulation,
    "loader": loader,
    "gru": lambda: recurrent(nn.GRU, 128, 16, 48),
    "transformer": lambda: transformer(96, 3, 64, 8),
    "small-perceptron": small_perceptron,
    "small-convolution": small_convolution,
    "small-autoencoder": small_autoencoder,
    "small-lstm": lambda: recurrent(nn.LSTM, 48, 8, 16),
    "small-transformer": lambda: transformer(32, 2, 16, 8),
    "raw-tensors": raw_tensors,
}
