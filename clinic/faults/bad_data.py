"""3.6 Data."""

import torch
from torch import Tensor

from clinic.data import Data
from clinic.faults._fault import CLASSES, NUMBERS, ROWS, SUPERVISED, Fault, on
from clinic.training import Training

LABELS = "labels"


def both(t: Training, change) -> None:
    """The same done to the inputs of both parts of the data."""
    t.train, t.held_out = (Data(change(d.x), d.y) for d in (t.train, t.held_out))


def mixed(y: Tensor, share: float) -> Tensor:
    """A share of the rows get each other's targets."""
    rows = torch.randperm(len(y))[: round(share * len(y))]
    y = y.clone()
    y[rows] = y[rows[torch.randperm(len(rows))]]
    return y


def shuffled_labels(t: Training, share: float) -> None:
    t.train = Data(t.train.x, mixed(t.train.y, share))


def noisy_labels(t: Training, share: float) -> None:
    """A share of the rows get a wrong class; a quantity gets that much noise."""
    y = t.train.y.clone()
    rows = torch.rand(len(y)) < share
    if y.is_floating_point() and t.train.y.unique().numel() > 2:
        y[rows] = y[rows] + 3 * y.std() * torch.randn_like(y[rows])
    elif y.is_floating_point():
        y[rows] = 1 - y[rows]
    else:
        places = torch.rand(y.shape) < share
        y[places] = torch.randint(int(y.max()) + 1, (int(places.sum()),))
    t.train = Data(t.train.x, y)


def two_swapped(y: Tensor) -> Tensor:
    return torch.where(y == 0, 1, torch.where(y == 1, 0, y))


def off_by_one(y: Tensor) -> Tensor:
    return (y + 1) % (int(y.max()) + 1)


def reversed_order(y: Tensor) -> Tensor:
    return y.max() - y


def another_map(t: Training, change) -> None:
    """The held-out classes are numbered in another way."""
    t.held_out = Data(t.held_out.x, change(t.held_out.y))


def imbalance(t: Training, share: float) -> None:
    """Of the upper half of the classes a share is left."""
    y = t.train.y.flatten(1)[:, 0] if t.train.y.dim() > 1 else t.train.y
    rare = y > y.max() / 2
    t.train = t.train.rows(~rare | (torch.rand(len(y)) < share))


def scaled_and_shifted(t: Training, how: tuple[float, float]) -> None:
    factor, shift = how
    both(t, lambda x: x * factor + shift)


def cropped(x: Tensor) -> Tensor:
    """All but a corner is cut away."""
    x = x.clone()
    if not x.is_floating_point():
        x[...] = 1
    else:
        x.flatten(1)[:, 2:] = 0
    return x


def zeroed(x: Tensor) -> Tensor:
    return torch.zeros_like(x)


def one_for_all(x: Tensor) -> Tensor:
    """The path leads to the same row always."""
    return x[:1].expand_as(x).clone()


def empty(t: Training, change) -> None:
    both(t, change)


def non_finite(t: Training, count: int) -> None:
    """So many rows hold a NaN, or an infinity where the targets are the inputs."""
    rows = torch.randperm(len(t.train))[:count]
    t.train.x.flatten(1)[rows, 3 % t.train.x[0].numel()] = float("nan")


def outliers(t: Training, factor: float) -> None:
    """One row of a hundred is in another unit."""
    rows = torch.randperm(len(t.train))[: max(len(t.train) // 100, 2)]
    part = t.train.y if t.train.y.is_floating_point() and t.train.y.unique().numel() > 2 else t.train.x
    part[rows] *= factor


def other_preprocessing(t: Training, how: tuple[float, float]) -> None:
    factor, shift = how
    t.held_out = Data(t.held_out.x * factor + shift, t.held_out.y)


def leak(t: Training, share: float) -> None:
    """A share of the rows held out is among those trained on, which are few enough to be learned by heart."""
    honest = t.held_out
    few = t.train.rows(slice(len(t.train) // 8))
    known = torch.rand(len(honest)) < share
    known[: len(known) // 20] = False
    t.train = Data(torch.cat([few.x, honest.x[known]]), torch.cat([few.y, honest.y[known]]))
    unseen = honest.rows(~known)

    def score_of_unseen() -> float:
        t.model.eval()
        with torch.no_grad():
            return t.score(t.model(unseen.x), unseen.y)

    t.honest = score_of_unseen


FAULTS = (
    Fault(47, "labels-shuffled", LABELS, shuffled_labels, on(SUPERVISED, 0.8, 0.95, 1.0)),
    Fault(
        48,
        "label-map-wrong",
        "label-map-wrong",
        another_map,
        on(CLASSES, two_swapped, off_by_one, reversed_order),
    ),
    Fault(
        49,
        "label-noise",
        LABELS,
        noisy_labels,
        on(
            ("mlp", "cnn", "gru", "tabular", "lstm", "transformer", "regression"),
            0.2,
            0.4,
            0.6,
            tabular=(0.1, 0.2, 0.4),
        ),
    ),
    Fault(50, "class-imbalance", "class-imbalance", imbalance, on((*ROWS, "tabular"), 0.05, 0.02, 0.005)),
    Fault(
        51,
        "inputs-unscaled",
        "slow",
        scaled_and_shifted,
        on(("mlp", "cnn", "gru", "tabular", "regression"), (4.0, 3.0), (16.0, 30.0), (255.0, 1000.0)),
    ),
    Fault(
        52,
        "inputs-empty",
        "origin",
        empty,
        on(("mlp", "cnn", "gru", "tabular", "regression", "lstm", "transformer"), cropped, zeroed, one_for_all),
    ),
    Fault(53, "non-finite-data", "non-finite-data", non_finite, on((*NUMBERS, "gan"), 1, 5, 100)),
    Fault(
        54,
        "outliers",
        "outliers",
        outliers,
        on(("mlp", "cnn", "gru", "autoencoder", "regression", "gan"), 30.0, 100.0, 1e4),
    ),
    Fault(
        55,
        "preprocessing-mismatch",
        "preprocessing-mismatch",
        other_preprocessing,
        on(NUMBERS, (2.0, 1.0), (4.0, 3.0), (16.0, 30.0)),
    ),
    Fault(56, "leakage", "leakage", leak, on(SUPERVISED, 0.2, 0.5, 0.9), harmless=0.0),
)
