"""3.2 Critical points and curvature."""

import torch
from torch import nn
from torch.nn import functional as F

from clinic.data import Data
from clinic.faults._fault import EVERYWHERE, Fault, biases, head, matrices, of_class, on, weights
from clinic.training import Net, Training, r_squared, sign_accuracy

ORIGIN, SLOW, CAPACITY = "origin", "slow", "capacity"


def near_zero(t: Training, std: float) -> None:
    """Weights so small that the gradient, a product of them, is smaller still; plain SGD, which feels it."""
    for layer in matrices(t.model):
        for w in weights(layer):
            nn.init.normal_(w, std=std)
        for b in biases(layer):
            nn.init.zeros_(b)
    rate = {torch.optim.SGD: 0.05}.get(t.optimizer_class, 0.1)
    momentum = t.optimizer_options.get("momentum", 0.0)
    of_class(t, torch.optim.SGD, lr=rate if not momentum else min(t.lr, 0.05), momentum=momentum)


class Wave(nn.Module):
    """a·sin(ωx + φ), all three to be found."""

    def __init__(self, frequency: float):
        super().__init__()
        self.amplitude, self.frequency = nn.Parameter(torch.tensor(0.5)), nn.Parameter(torch.tensor(frequency))
        self.phase = nn.Parameter(torch.rand(()))

    def forward(self, x):
        return self.amplitude * torch.sin(self.frequency * x + self.phase)


def wave(t: Training, frequency: float) -> None:
    """sin(2x) fitted from another frequency: between the two lie minima that are no good."""
    t.train, t.held_out = (Data(d.x[:, :1] * 2, torch.sin(4 * d.x[:, :1])) for d in (t.train, t.held_out))
    t.model = Wave(frequency)
    t.criterion = t.right_loss = F.mse_loss
    t.score = r_squared
    t.scale = 0.5
    t.step_schedule = t.epoch_schedule = None
    of_class(t, torch.optim.SGD, lr=0.1)


def far_on_the_sigmoid(t: Training, bias: float) -> None:
    """Squared error behind a sigmoid, whose output starts where it is flat."""
    if isinstance(t.model, Net):
        t.model.out = nn.Sigmoid()
        nn.init.constant_(head(t.model).bias, bias)
    classes = head(t.model).out_features

    def squared(output, target):
        return F.mse_loss(output, F.one_hot(target, classes).float() if target.dim() == 1 else target)

    t.criterion = t.right_loss = squared
    t.scale = 0.09


def spread(t: Training, decades: float) -> None:
    """Columns whose scales differ by decades, and plain gradient descent."""
    columns = t.train.x[0].numel()
    scales = torch.logspace(-decades, 0, columns)[torch.randperm(columns, generator=torch.Generator().manual_seed(0))]
    scales = scales.view(t.train.x[0].shape)
    t.train, t.held_out = (Data(d.x * scales, d.y) for d in (t.train, t.held_out))
    if t.optimizer_class is not torch.optim.SGD:
        of_class(t, torch.optim.SGD, lr=0.05, momentum=0.9)


def far_on_the_right_side(t: Training, far: float) -> None:
    """Points that a threshold at 1/2 separates; the squared error of a line would rather be near those far out."""
    x = torch.tensor([0.0] * 12 + [1.0] * 10 + [far] * 4).repeat(15)[:, None]
    y = (x > 0.5).float()
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    whole = Data(x[order], y[order])
    t.train, t.held_out = whole.rows(slice(260)), whole.rows(slice(260, None))
    t.model = nn.Linear(1, 1)
    t.criterion = t.right_loss = lambda output, target: F.mse_loss(output, 2 * target - 1)
    t.score = lambda output, target: sign_accuracy(output, target)
    t.step_schedule = t.epoch_schedule = None
    of_class(t, torch.optim.SGD, lr=min(0.1, 5 / far**2))


FAULTS = (
    Fault(
        12,
        "saddle",
        ORIGIN,
        near_zero,
        on(
            EVERYWHERE,
            1e-4,
            1e-6,
            1e-8,
            mlp=(1e-8, 1e-10, 1e-12),
            tabular=(1e-8, 1e-10, 1e-12),
            cnn=(1e-8, 1e-9, 1e-10),
        ),
    ),
    Fault(
        13,
        "poor-minimum",
        CAPACITY,
        wave,
        on(("regression",), 6.0, 8.0, 10.0),
        harmless=2.0,
        why_alone="it needs a family of functions whose bad minima are known",
    ),
    Fault(
        14,
        "plateau",
        ORIGIN,
        far_on_the_sigmoid,
        on(("mlp", "cnn", "gru", "autoencoder"), 5.0, 10.0, 20.0),
        harmless=0.0,
    ),
    Fault(
        15,
        "ill-conditioned",
        SLOW,
        spread,
        on(("mlp", "tabular", "regression", "autoencoder"), 2.0, 3.0, 4.0),
        harmless=0.0,
    ),
    Fault(
        16,
        "not-separated",
        CAPACITY,
        far_on_the_right_side,
        on(("tabular", "regression"), 20.0, 30.0, 100.0),
        harmless=2.0,
    ),
)
