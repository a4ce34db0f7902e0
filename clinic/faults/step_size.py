"""3.1 Step size, schedule, optimiser."""

import torch
from torch import nn
from torch.optim import lr_scheduler

from clinic.faults._fault import EVERYWHERE, SGD, SUPERVISED, Fault, of_class, on
from clinic.training import Training

TOO_LARGE, SLOW = "step too large", "slow"


def rate_times(t: Training, factor: float) -> None:
    t.lr *= factor


def without_decay(t: Training, factor: float) -> None:
    """A rate that only a decay would calm, on units that it cannot kill; Adam, where plain SGD would bear it."""
    t.step_schedule = t.epoch_schedule = None
    t.clip = 0.0
    if "activation" in t.build.__kwdefaults__:
        t.rebuild(activation=nn.Tanh)
    if t.optimizer_class is torch.optim.SGD and "norm" in t.build.__kwdefaults__ and not t.build.__kwdefaults__["norm"]:
        of_class(t, torch.optim.Adam, lr=5e-3)
    t.lr *= factor


def decays_each_epoch(t: Training, gamma: float) -> None:
    t.step_schedule = None
    t.epoch_schedule = lambda optimizer, epochs: lr_scheduler.ExponentialLR(optimizer, gamma)


def epochs_counted_as_steps(optimizer, steps):
    """A cosine over ten epochs that is stepped after every batch: a sawtooth."""
    return lr_scheduler.CosineAnnealingLR(optimizer, T_max=10)


def warm_up_without_end(optimizer, steps):
    """A warm-up planned for fifty times as many steps."""
    return lr_scheduler.LinearLR(optimizer, start_factor=1e-4, total_iters=50 * steps)


def milestones_counted_as_steps(optimizer, steps):
    """A tenth every ten epochs, stepped after every batch."""
    return lr_scheduler.StepLR(optimizer, step_size=10, gamma=0.1)


def schedule_each_step(t: Training, schedule) -> None:
    t.epoch_schedule = None
    t.step_schedule = schedule


def no_warm_up(t: Training, factor: float) -> None:
    """A deep network, or one with its norms after the sums, that starts at once at a rate it could come to bear."""
    t.step_schedule = None
    options = t.build.__kwdefaults__
    if "norm_after" in options:
        t.rebuild(norm_after=True, depth=4)
    elif options["depth"] == 1:
        t.rebuild(depth=8)
        of_class(t, torch.optim.Adam, lr=1e-3)
    t.lr *= factor


def momentum(t: Training, beta: float) -> None:
    if "betas" in t.optimizer_options or t.optimizer_class is torch.optim.Adam:
        t.optimizer_options["betas"] = (beta, 0.999)
    else:
        t.optimizer_options["momentum"] = beta


def adam_eps(t: Training, eps: float) -> None:
    if "momentum" in t.optimizer_options or t.optimizer_class is torch.optim.SGD:
        of_class(t, torch.optim.Adam, lr=3e-3)
    t.optimizer_options["eps"] = eps


def clip(t: Training, norm: float) -> None:
    t.clip = norm


def weight_decay(t: Training, decay: float) -> None:
    if t.optimizer_class is torch.optim.Adam:
        t.optimizer_class = torch.optim.AdamW
    t.optimizer_options["weight_decay"] = decay


def slow_and_negated(t: Training) -> None:
    t.lr *= 0.1
    negated(t)


def negated(t: Training) -> None:
    right = t.criterion
    t.criterion = lambda output, target: -right(output, target)


def maximised(t: Training) -> None:
    t.optimizer_options["maximize"] = True


def wrong_sign(t: Training, mistake) -> None:
    mistake(t)


FAULTS = (
    Fault(  # Adam on a table bears any rate, and behind the sigmoid of the autoencoder nothing blows up
        1,
        "lr-diverges",
        TOO_LARGE,
        rate_times,
        on(
            ("gan", "lstm", "transformer"),
            *(3e3, 2e4, 1e6),
            mlp=(25, 50, 500),
            cnn=(100, 2000, 1e5),
            gru=(3e3, 2e4, 1e6),
            regression=(6, 30, 300),
        ),
    ),
    Fault(
        2,
        "lr-bounces",
        TOO_LARGE,
        without_decay,
        on(
            ("cnn", "gru", "autoencoder", "lstm", "transformer"),
            *(10, 20, 40),
            mlp=(30, 60, 120),
            regression=(30, 60, 120),
        ),
    ),
    Fault(3, "lr-too-small", SLOW, rate_times, on(EVERYWHERE, 1 / 20, 1 / 500, 1e-5)),
    Fault(4, "lr-decayed-early", SLOW, decays_each_epoch, on(EVERYWHERE, 0.6, 0.2, 0.01)),
    Fault(
        5,
        "scheduler-misused",
        SLOW,
        schedule_each_step,
        on(EVERYWHERE, epochs_counted_as_steps, warm_up_without_end, milestones_counted_as_steps),
    ),
    Fault(6, "warmup-missing", TOO_LARGE, no_warm_up, on(("mlp", "autoencoder", "transformer"), 12, 20, 50)),
    Fault(
        7,
        "momentum-too-high",
        TOO_LARGE,
        momentum,
        on(
            ("mlp", "cnn", "gru", "autoencoder", "lstm", "transformer", "regression"),
            0.98,
            0.99,
            0.998,
            mlp=(0.93, 0.96, 0.98),
        ),
    ),
    Fault(8, "adam-constants", SLOW, adam_eps, on(EVERYWHERE, 0.1, 1.0, 100.0)),
    Fault(9, "clip-too-strong", SLOW, clip, on(SGD, 0.1, 1e-2, 1e-4)),  # Adam and RMSprop divide it out again
    Fault(
        10,
        "weight-decay-too-large",
        SLOW,
        weight_decay,
        on(EVERYWHERE, 10.0, 30.0, 100.0, mlp=(0.05, 0.2, 1.0), cnn=(0.05, 0.2, 1.0), regression=(0.05, 0.2, 1.0))
        | on(("lstm",), 0.01, 0.1, 1.0),  # coupled
    ),
    Fault(11, "wrong-sign", "wrong-sign", wrong_sign, on(SUPERVISED, slow_and_negated, negated, maximised)),
)
