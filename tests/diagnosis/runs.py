"""Small recorded runs for the tests of the diagnosis, and logs with losses of known shape."""

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from unstuck.diagnosis import MEASURES, Case, Diagnosis, diagnose
from unstuck.record import Run, watch
from unstuck.record._log import Log

Loss = Callable[[nn.Module, Tensor, Tensor], Tensor]


def recorded(folder: Path, loop: Callable[[], object]) -> Run:
    """The run of a training loop, read back from its folder."""
    with watch(folder=folder, budget=1.0):
        loop()
    return Run(folder)


def case(run: Run) -> Case:
    return Case(run, MEASURES)


def verdict(folder: Path, loop: Callable[[], object]) -> Diagnosis:
    return diagnose(recorded(folder, loop))


def codes(found: Diagnosis) -> list[str]:
    return [f.code for f in found.findings]


def of_losses(folder: Path, losses: Iterable[float]) -> Run:
    """A run that left nothing but its losses."""
    log = Log(folder)
    log.write("start", version=1, script="losses.py", argv=[])
    for k, loss in enumerate(losses, 1):
        log.write("step", step=k, time=0.01 * k, loss=loss)
    log.write("end", time=1.0, overhead=0.0, outcome="finished", refusals={})
    log.close()
    return Run(folder)


def classify(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(model(x), y)


def fit(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return F.mse_loss(model(x), y)


def train(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    batches: Sequence[tuple[Tensor, Tensor]],
    steps: int,
    loss: Loss = classify,
) -> Callable[[], None]:
    """An ordinary loop that goes through the batches in order, again and again."""

    def loop() -> None:
        for k in range(steps):
            x, y = batches[k % len(batches)]
            optimizer.zero_grad()
            loss(model, x, y).backward()
            optimizer.step()

    return loop


def blobs(n: int, *, features: int = 8, classes: int = 4, noise: float = 1.0, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Points around class means: a task that a small network learns, up to its noise."""
    g = torch.Generator().manual_seed(seed)
    means = 2 * torch.randn(classes, features, generator=g)
    y = torch.randint(classes, (n,), generator=g)
    return means[y] + noise * torch.randn(n, features, generator=g), y


def batches(x: Tensor, y: Tensor, size: int) -> list[tuple[Tensor, Tensor]]:
    return list(zip(x.split(size), y.split(size), strict=True))


def mlp(features: int = 8, width: int = 16, classes: int = 4) -> nn.Sequential:
    return nn.Sequential(nn.Linear(features, width), nn.ReLU(), nn.Linear(width, classes))
