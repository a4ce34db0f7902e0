"""3.4 Batch and normalisation."""

import torch
from torch import nn

from clinic.data import Data
from clinic.faults._fault import SUPERVISED, Fault, on
from clinic.training import Training, validate

SLOW, TOO_LARGE, NORM = "slow", "step too large", "normalisation"


def fewer_larger_batches(t: Training, share: float) -> None:
    """A share of the whole data to a batch, for as many epochs as before."""
    epochs = t.steps / t.epoch_length()
    t.batch_size = round(share * len(t.train))
    t.steps = max(round(epochs * t.epoch_length()), 8)


def small_batches(t: Training, how: tuple[int, float]) -> None:
    t.batch_size, factor = how
    t.lr *= factor
    t.step_schedule = t.epoch_schedule = None
    t.clip = 0.0


def with_norm(t: Training, **options) -> None:
    """Batch norm, where the program has none."""
    if not any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in t.model.modules()):  # noqa: SLF001
        options["norm"] = nn.BatchNorm1d
    if options:
        t.rebuild(**options)


def norm_of_tiny_batches(t: Training, how: tuple[int, float]) -> None:
    """As many steps of a few examples each; the rate falls with the batch, so that noise alone is not to blame."""
    with_norm(t)
    size, factor = how
    t.batch_size = size
    t.lr *= factor
    t.batches = lambda t: (t.train.rows(rows) for rows in torch.randperm(len(t.train)).split(size) if len(rows) == size)


def norm_momentum(t: Training, momentum: float) -> None:
    """Statistics that hardly move, over inputs that they would have to follow."""
    with_norm(t)
    shifted(t, (3.0, 2.0))
    for m in t.model.modules():
        if isinstance(m, nn.modules.batchnorm._BatchNorm):  # noqa: SLF001
            m.momentum = momentum


def shifted(t: Training, how: tuple[float, float]) -> None:
    factor, shift = how
    t.train, t.held_out = (Data(d.x * factor + shift, d.y) for d in (t.train, t.held_out))


def eval_while_training(t: Training, how: tuple[float, float]) -> None:
    """Validation, or a line too many, leaves the network in eval mode, on inputs that its norms should centre."""
    with_norm(t)
    shifted(t, how)
    t.begin_epoch = lambda t: t.model.eval()


def validate_in_train_mode(t: Training) -> float:
    with torch.no_grad():
        return t.score(torch.cat([t.model(x) for x in t.held_out.x.split(t.validation_size)]), t.held_out.y)


def train_while_validating(t: Training, dropout: float) -> None:
    """The validation leaves dropout on."""
    t.rebuild(dropout=dropout)
    t.validate = validate_in_train_mode
    t.honest = lambda: validate(t)


def shuffled_in_a_buffer(t: Training, size: int) -> None:
    """Rows sorted by target, and a shuffle that sees only the next few; with a size of 1 it does nothing."""
    key = t.train.y.flatten(1).double().mean(1) if t.train.y.dim() > 1 else t.train.y
    t.train = t.train.rows(key.argsort())

    def batches(t):
        order, rest = [], list(range(len(t.train)))
        buffer, rest = rest[:size], rest[size:]
        while buffer:
            k = int(torch.randint(len(buffer), ()))
            order.append(buffer[k])
            if rest:
                buffer[k] = rest.pop(0)
            else:
                buffer.pop(k)
        for rows in torch.tensor(order).split(t.batch_size):
            yield t.train.rows(rows)

    t.batches = batches


def the_same_few(t: Training, count: int) -> None:
    """The loader is seeded anew whenever it starts, and starts after a few batches."""

    def batches(t):
        generator = torch.Generator().manual_seed(0)
        for rows in torch.randperm(len(t.train), generator=generator).split(t.batch_size)[:count]:
            yield t.train.rows(rows)

    def one_epoch(t):
        for _ in range(t.epoch_length() // count + 1):
            yield from batches(t)

    t.batches = one_epoch


NORMS = ("mlp", "cnn", "tabular", "autoencoder", "regression")

FAULTS = (
    Fault(26, "batch-too-large", SLOW, fewer_larger_batches, on(SUPERVISED, 0.3, 0.5, 1.0, tabular=(0.4, 0.6, 1.0))),
    Fault(
        27,
        "noise-floor",
        TOO_LARGE,
        small_batches,
        on(
            ("gru", "autoencoder", "lstm", "transformer"),
            (4, 3.0),
            (2, 5.0),
            (1, 8.0),
            mlp=((4, 1.0), (2, 0.7), (1, 0.7)),
            cnn=((8, 1.0), (4, 1.0), (2, 2.0)),
            regression=((4, 0.3), (2, 0.3), (1, 0.3)),
        ),
    ),
    Fault(28, "batchnorm-tiny-batch", NORM, norm_of_tiny_batches, on(NORMS, (4, 0.3), (3, 0.3), (2, 0.3))),
    Fault(29, "batchnorm-stale", NORM, norm_momentum, on(NORMS, 3e-3, 1e-3, 1e-4), harmless=0.1),
    Fault(
        30,
        "eval-while-training",
        NORM,
        eval_while_training,
        on(NORMS, (2.0, 2.0), (3.0, 3.0), (6.0, 8.0)),
    ),
    Fault(
        31,
        "train-while-validating",
        "train-while-validating",
        train_while_validating,
        on(SUPERVISED, 0.2, 0.4, 0.6, tabular=(0.6, 0.75, 0.9)),
    ),
    Fault(
        32,
        "not-shuffled",
        "not-shuffled",
        shuffled_in_a_buffer,
        on(("mlp", "cnn", "gru", "regression"), 300, 100, 1),
    ),
    Fault(33, "same-batch", "same-batch", the_same_few, on(SUPERVISED, 6, 3, 1)),
)
