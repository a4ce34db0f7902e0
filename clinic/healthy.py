"""Runs that are well though they look odd: twelve optimisers, and the look-alikes of section 3.9 of the catalogue."""

import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F
from torch.optim import lr_scheduler

from clinic.data import Data
from clinic.faults._fault import before_relu, matrices, of_class, weights
from clinic.programs import PROGRAMS
from clinic.training import Net, Training, accuracy, begin_epoch, r_squared, validate

RATES: dict[str, dict[str, float]] = json.loads((Path(__file__).parent / "rates.json").read_text())  # clinic.rates

# The optimisers


def closure_step(t, batch):
    def closure():
        t.optimizer.zero_grad()
        loss = t.criterion(t.model(batch.x), batch.y)
        loss.backward()
        return loss

    return t.optimizer.step(closure).item()


def by(name, optimizer_class, **options) -> Callable[[Training, str], None]:
    def change(t: Training, program: str) -> None:
        of_class(t, optimizer_class, lr=RATES[name].get(program, 1e-3), **options)
        t.step_schedule = t.epoch_schedule = None

    return change


def whole(name, optimizer_class, step=None, **options) -> Callable[[Training, str], None]:
    """Optimisers that want the same loss at every step: a large batch for all of them."""

    def change(t: Training, program: str) -> None:
        by(name, optimizer_class, **options)(t, program)
        fixed = t.train.rows(slice(600))
        t.train, t.batch_size, t.steps = fixed, len(fixed), 60 if step else 35  # then Rprop begins to overfit
        t.batches = lambda t: [t.train] * 10
        t.clip = 0.0
        t.step = step or t.step

    return change


def lbfgs(parameters, **options):
    return torch.optim.LBFGS(parameters, max_iter=2, history_size=10, **options)


OPTIMISERS = {
    "SGD": by("SGD", torch.optim.SGD),
    "momentum": by("momentum", torch.optim.SGD, momentum=0.9),
    "Nesterov": by("Nesterov", torch.optim.SGD, momentum=0.9, nesterov=True),
    "Adam": by("Adam", torch.optim.Adam),
    "AdamW": by("AdamW", torch.optim.AdamW, weight_decay=0.05),
    "RMSprop": by("RMSprop", torch.optim.RMSprop),
    "Adagrad": by("Adagrad", torch.optim.Adagrad),
    "Adadelta": by("Adadelta", torch.optim.Adadelta),
    "NAdam": by("NAdam", torch.optim.NAdam),
    "RAdam": by("RAdam", torch.optim.RAdam),
    "Rprop": whole("Rprop", torch.optim.Rprop),
    "LBFGS": whole("LBFGS", lbfgs, closure_step),
}

# The look-alikes


def edge_of_stability(t: Training) -> None:
    """The whole data at a rate at which the largest curvature comes to 2 over it, and the loss falls all the same."""
    if t.criterion is not F.mse_loss:
        t.criterion = t.right_loss = lambda output, target: F.mse_loss(output, F.one_hot(target, 10).float())
        t.lr = 4.0
    else:
        of_class(t, torch.optim.SGD, lr=0.2)
        t.steps = 600
    t.batch_size, t.epoch_schedule = len(t.train), None


def catapult(t: Training) -> None:
    """A start so steep that the loss rises before it falls."""
    for layer in matrices(t.model):
        for w in weights(layer):
            with torch.no_grad():
                w.mul_(2.5)
    t.lr *= 1.5


def cosine_tail(t: Training) -> None:
    t.epoch_schedule = None
    t.step_schedule = lambda optimizer, steps: lr_scheduler.CosineAnnealingLR(optimizer, steps)


def one_cycle(t: Training) -> None:
    t.epoch_schedule = None
    t.step_schedule = lambda optimizer, steps: lr_scheduler.OneCycleLR(optimizer, max_lr=1.5 * t.lr, total_steps=steps)


def warm_restarts(t: Training) -> None:
    t.epoch_schedule = None
    t.step_schedule = lambda optimizer, steps: lr_scheduler.CosineAnnealingWarmRestarts(optimizer, steps // 4)


def accumulated(t, batch):
    t.optimizer.zero_grad()
    for x, y in zip(batch.x.chunk(4), batch.y.chunk(4), strict=True):
        loss = t.criterion(t.model(x), y) / 4
        loss.backward()
    t.optimizer.step()
    return 4 * loss.item()


def gradient_accumulation(t: Training) -> None:
    t.step = accumulated


def frozen_backbone(t: Training) -> None:
    """Random features that stay as they are, and a head that is trained."""
    t.rebuild(width=2 * t.build.__kwdefaults__["width"])
    t.model.body.requires_grad_(False)
    t.make_optimizer = lambda t: t.optimizer_class(t.model.head.parameters(), **t.optimizer_options)


class LowRank(nn.Module):
    """A frozen layer and a correction of rank 4, which starts at zero by design."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer.requires_grad_(False)
        self.down = nn.Parameter(torch.randn(4, layer.in_features) / math.sqrt(layer.in_features))
        self.up = nn.Parameter(torch.zeros(layer.out_features, 4))

    def forward(self, x):
        return self.layer(x) + x @ self.down.T @ self.up.T


def low_rank(t: Training) -> None:
    for k, stage in enumerate(t.model.body):
        if isinstance(stage, nn.Linear):
            t.model.body[k] = LowRank(stage)
    t.make_optimizer = lambda t: t.optimizer_class(
        [p for p in t.model.parameters() if p.requires_grad], **t.optimizer_options
    )


def frozen_norm(t: Training) -> None:
    """The norms keep their statistics from the second epoch on, as in fine-tuning."""

    def begin(t):
        begin_epoch(t)
        if t.optimizer.state:
            for m in t.model.modules():
                if isinstance(m, nn.BatchNorm2d):
                    m.eval()

    t.begin_epoch = begin


def sparse_relu(t: Training) -> None:
    """Biases at which most units are silent for most rows, and none for all."""
    for layer in before_relu(t.model):
        nn.init.constant_(layer.bias, -0.5)


def constant_columns(t: Training) -> None:
    """Pixels from 0 to 1, of which those at the border never change."""
    t.train, t.held_out = (Data(d.x.clone(), d.y) for d in (t.train, t.held_out))
    for d in (t.train, t.held_out):
        d.x[..., :: max(d.x.shape[-1] // 3, 1)] = 0.0


def label_smoothing(t: Training) -> None:
    t.criterion = lambda output, target: F.cross_entropy(output.flatten(0, -2), target.flatten(), label_smoothing=0.2)


def mixup(t: Training) -> None:
    """Pairs of rows are mixed, and so are their losses: no loss comes near to zero."""
    right = t.criterion

    def step(t, batch):
        share = float(torch.distributions.Beta(0.4, 0.4).sample())
        order = torch.randperm(len(batch))
        t.optimizer.zero_grad()
        output = t.model(share * batch.x + (1 - share) * batch.x[order])
        loss = share * right(output, batch.y) + (1 - share) * right(output, batch.y[order])
        loss.backward()
        t.optimizer.step()
        return loss.item()

    t.step = step


def distillation(t: Training) -> None:
    """The targets are a teacher's soft ones: a wider network's after some steps of its own."""
    teacher = t.build(width=2 * t.build.__kwdefaults__["width"])
    optimizer = torch.optim.Adam(teacher.parameters(), lr=5e-3)
    for rows in torch.randint(len(t.train), (60, 100)):
        optimizer.zero_grad()
        t.criterion(teacher(t.train.x[rows]), t.train.y[rows]).backward()
        optimizer.step()
    teacher.eval()

    def step(t, batch):
        with torch.no_grad():
            soft = (teacher(batch.x) / 2).softmax(-1)
        t.optimizer.zero_grad()
        loss = F.cross_entropy(t.model(batch.x) / 2, soft)
        loss.backward()
        t.optimizer.step()
        return loss.item()

    t.step = step


class Variational(nn.Module):
    """A code with noise, whose loss, a negative bound, may fall below zero."""

    def __init__(self, size=196, width=64, code=6):
        super().__init__()
        self.encode = nn.Sequential(nn.Linear(size, width), nn.ReLU(), nn.Linear(width, 2 * code))
        self.decode = nn.Sequential(nn.Linear(code, width), nn.ReLU(), nn.Linear(width, size))
        self.log_scale = nn.Parameter(torch.zeros(()))

    def bound(self, x):
        mean, log_std = self.encode(x).chunk(2, 1)
        code = mean + log_std.exp() * torch.randn_like(mean)
        divergence = 0.5 * (mean.square() + (2 * log_std).exp() - 1 - 2 * log_std).sum(1)
        fit = 0.5 * ((self.decode(code) - x) / self.log_scale.exp()).square() + self.log_scale
        return (divergence + fit.sum(1)).mean()

    def forward(self, x):
        return self.decode(self.encode(x).chunk(2, 1)[0])


def variational_step(t, batch):
    t.optimizer.zero_grad()
    loss = t.model.bound(batch.x)
    loss.backward()
    t.optimizer.step()
    return loss.item()


def negative_bound(t: Training) -> None:
    t.model = Variational()
    t.step = variational_step


def parity(t: Training) -> None:
    """The parity of three of ten bits: nothing for a while, and then all."""
    bits = torch.randint(2, (len(t.train) + 400, 10), generator=torch.Generator().manual_seed(0))
    data = Data(2.0 * bits - 1, bits[:, :3].sum(1) % 2)
    t.train, t.held_out = data.rows(slice(len(t.train))), data.rows(slice(len(t.train), None))
    t.model = Net(nn.Sequential(nn.Linear(10, 64), nn.ReLU()), nn.Linear(64, 2))
    t.score, t.steps = accuracy, 800
    t.criterion = t.right_loss = lambda output, target: F.cross_entropy(output, target)
    t.step_schedule = t.epoch_schedule = None
    of_class(t, torch.optim.Adam, lr=1e-3)


def deep_linear(t: Training) -> None:
    """Four linear layers that begin small: one plateau after another is left."""
    data = Data(t.train.x, t.train.x[:, :3] @ torch.tensor([[1.0], [0.5], [-0.5]]))
    held_out = Data(t.held_out.x, t.held_out.x[:, :3] @ torch.tensor([[1.0], [0.5], [-0.5]]))
    t.train, t.held_out = data, held_out
    size = t.train.x.shape[1]
    layers = [nn.Linear(size, 16, bias=False), nn.Linear(16, 16, bias=False), nn.Linear(16, 16, bias=False)]
    t.model = Net(nn.Sequential(*layers), nn.Linear(16, 1, bias=False))
    for layer in matrices(t.model):
        nn.init.normal_(layer.weight, std=0.3 / math.sqrt(layer.in_features))
    t.criterion = t.right_loss = F.mse_loss
    t.score = r_squared
    t.step_schedule = t.epoch_schedule = None
    of_class(t, torch.optim.SGD, lr=0.02, momentum=0.9)


def converged(t: Training) -> None:
    """Three times as many steps as it takes."""
    t.steps *= 3


def strong_dropout(t: Training) -> None:
    """The held-out loss lies below that of training, which has units missing."""
    options = {"width": 2 * t.build.__kwdefaults__["width"]} if t.build.__kwdefaults__.get("width") else {}
    t.rebuild(dropout=0.4, **options)


def sparse_embedding(t: Training) -> None:
    """Rows of an embedding that do not occur have no gradient at all."""
    t.model.body[0] = nn.Embedding(*t.model.body[0].weight.shape, sparse=True)
    t.clip = 0.0
    of_class(t, torch.optim.Adagrad, lr=0.05)


def shared_weights(t: Training) -> None:
    t.model.head.weight = t.model.body[0].weight
    nn.init.normal_(t.model.head.weight, std=0.3)


def averaged(t: Training) -> None:
    """An average of the weights is validated, the weights themselves are trained."""
    average = torch.optim.swa_utils.AveragedModel(
        t.model, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.95)
    )
    plain = t.step

    def step(t, batch):
        loss = plain(t, batch)
        average.update_parameters(t.model)
        return loss

    def validate_average(t):
        trained, t.model = t.model, average.module
        try:
            return validate(t)
        finally:
            t.model = trained

    t.step, t.validate = step, validate_average


def no_grad_clearing_by_hand(t: Training) -> None:
    """Gradients are cleared by the loop itself, after the step."""

    def step(t, batch):
        loss = t.criterion(t.model(batch.x), batch.y)
        loss.backward()
        t.optimizer.step()
        for p in t.model.parameters():
            p.grad = None
        return loss.item()

    t.step = step


@dataclass(frozen=True)
class Variant:
    """A healthy run that looks odd, and the programs that have it."""

    lookalike: int  # of the catalogue's fifteen
    change: Callable[[Training], None]
    programs: tuple[str, ...]


_ALL = tuple(PROGRAMS)
_ROWS = ("mlp", "cnn", "gru")
_PLAIN = tuple(p for p in _ALL if p != "gan")

VARIANTS = {
    "edge-of-stability": Variant(1, edge_of_stability, ("mlp", "regression")),
    "catapult": Variant(2, catapult, ("mlp", "cnn")),
    "cosine-tail": Variant(3, cosine_tail, _ALL),
    "one-cycle": Variant(4, one_cycle, _PLAIN),
    "warm-restarts": Variant(4, warm_restarts, _PLAIN),
    "gradient-accumulation": Variant(5, gradient_accumulation, _PLAIN),
    "frozen-backbone": Variant(6, frozen_backbone, ("mlp", "cnn", "tabular")),
    "low-rank": Variant(6, low_rank, ("mlp", "tabular")),
    "frozen-norm": Variant(6, frozen_norm, ("cnn",)),
    "sparse-relu": Variant(7, sparse_relu, ("mlp", "cnn", "tabular")),
    "constant-columns": Variant(8, constant_columns, ("mlp", "cnn", "tabular")),
    "label-smoothing": Variant(9, label_smoothing, (*_ROWS, "transformer")),
    "mixup": Variant(9, mixup, _ROWS),
    "distillation": Variant(9, distillation, _ROWS),
    "negative-bound": Variant(9, negative_bound, ("autoencoder",)),
    "parity": Variant(10, parity, ("mlp", "tabular")),
    "deep-linear": Variant(10, deep_linear, ("mlp", "regression")),
    "converged": Variant(12, converged, ("mlp", "cnn", "gru", "tabular", "regression")),
    "strong-dropout": Variant(13, strong_dropout, ("mlp", "cnn", "gru", "lstm", "transformer")),
    "sparse-embedding": Variant(14, sparse_embedding, ("lstm",)),
    "shared-weights": Variant(15, shared_weights, ("lstm",)),
    "averaged": Variant(15, averaged, ("mlp", "gru", "regression")),
    "cleared-by-hand": Variant(5, no_grad_clearing_by_hand, ("mlp", "tabular", "lstm")),
}
"""Number 11, games, is the program `gan` itself, and in the held-out scripts; closures are the optimiser LBFGS."""
