"""3.3 Initialisation and signal propagation."""

import torch
from torch import nn

from clinic.data import Data
from clinic.faults._fault import (
    EVERYWHERE,
    RELU,
    Fault,
    before_relu,
    biases,
    head,
    matrices,
    net,
    on,
    weights,
)
from clinic.programs.gru import LastState
from clinic.training import Training

ORIGIN = "origin"


def zero(parameters) -> None:
    for p in parameters:
        nn.init.zeros_(p)


def hidden_layers(t: Training) -> None:
    zero(p for layer in matrices(net(t.model).body) for p in layer.parameters(recurse=False))


def all_layers(t: Training) -> None:
    zero(p for layer in matrices(net(t.model)) for p in layer.parameters(recurse=False))


def everything(t: Training) -> None:
    zero(net(t.model).parameters())


def zero_init(t: Training, which) -> None:
    which(t)


def constant_init(t: Training, value: float) -> None:
    for layer in matrices(net(t.model)):
        for w in weights(layer):
            nn.init.constant_(w, value)
        zero(biases(layer))


def gain(t: Training, factor: float) -> None:
    """Normal weights of `factor` times the scale that keeps a signal's size."""
    for layer in matrices(t.model):
        for w in weights(layer):
            fan_in = 1 if isinstance(layer, nn.Embedding) else w[0].numel()
            nn.init.normal_(w, std=factor / fan_in**0.5)
        zero(biases(layer))


def small_gain(t: Training, factor: float) -> None:
    """The same in a network that is deep enough for the signal to fade."""
    options = t.build.__kwdefaults__
    if "depth" in options and "norm" in options:
        t.rebuild(depth=4, norm=None)
    gain(t, factor)


def saturating(t: Training, std: float) -> None:
    """Sigmoids, or the gates of a cell, whose inputs are far out on their flat parts."""
    if "activation" in t.build.__kwdefaults__:
        t.rebuild(activation=nn.Sigmoid)
    for layer in matrices(net(t.model).body):
        if not isinstance(layer, nn.Embedding):
            for w in weights(layer):
                nn.init.normal_(w, std=std)


def dead(t: Training, bias: float) -> None:
    for layer in before_relu(net(t.model)):
        for b in biases(layer):
            nn.init.constant_(b, bias)


def deep_sigmoids(t: Training, depth: int) -> None:
    options = {"norm": None} if "norm" in t.build.__kwdefaults__ else {}
    t.rebuild(activation=nn.Sigmoid, depth=depth, **options)


def expanding(t: Training, factor: float) -> None:
    """Layers, or a recurrence over all pixels, each of which makes the signal longer by a factor."""
    recurrent = [m for m in t.model.modules() if isinstance(m, nn.RNNBase)]
    if not recurrent:
        t.rebuild(depth=12)
        t.lr *= 0.1
        for layer in matrices(t.model.body):
            nn.init.orthogonal_(layer.weight, gain=factor * 2**0.5)
        return
    if any(isinstance(m, LastState) for m in t.model.modules()):
        t.train, t.held_out = (
            Data(d.x.flatten(1).view(len(d), -1, 8).repeat(1, 5, 1), d.y) for d in (t.train, t.held_out)
        )
    t.rebuild(cell=lambda *sizes, **options: nn.RNN(*sizes, nonlinearity="relu", **options))
    for m in t.model.modules():
        if isinstance(m, nn.RNN):
            nn.init.orthogonal_(m.weight_hh_l0)
            with torch.no_grad():
                m.weight_hh_l0.mul_(factor)


def output_bias(t: Training, value: float) -> None:
    with torch.no_grad():
        head(t.model).bias[:1] = value


FAULTS = (
    Fault(17, "zero-init", ORIGIN, zero_init, on(EVERYWHERE, hidden_layers, all_layers, everything)),
    Fault(18, "constant-init", "constant-init", constant_init, on(EVERYWHERE, 0.02, 0.05, 0.2)),
    Fault(19, "init-too-large", ORIGIN, gain, on(EVERYWHERE, 5.0, 15.0, 50.0)),
    Fault(
        20,
        "init-too-small",
        ORIGIN,
        small_gain,
        on(tuple(p for p in EVERYWHERE if p != "tabular"), 0.4, 0.2, 0.03),
        harmless=1.0,
    ),
    Fault(
        21,
        "saturated",
        ORIGIN,
        saturating,
        on(("mlp", "cnn", "gru", "autoencoder", "tabular", "lstm", "regression"), 1.5, 3.0, 10.0),
    ),
    Fault(22, "dead-units", ORIGIN, dead, on(RELU, -2.0, -20.0, -100.0)),
    Fault(
        23,
        "vanishing-gradient",
        ORIGIN,
        deep_sigmoids,
        on(("mlp", "gru", "autoencoder", "regression"), 2, 5, 12, tabular=(7, 10, 16)),
    ),
    Fault(
        24,
        "exploding-gradient",
        "exploding-gradient",
        expanding,
        on(("mlp", "gru", "lstm", "regression"), 1.15, 1.4, 1.8),
        harmless=1.0,
    ),
    Fault(
        25,
        "output-bias",
        "output-bias",
        output_bias,
        on(EVERYWHERE, 10.0, 30.0, 100.0, mlp=(60.0, 150.0, 500.0), regression=(3.0, 10.0, 30.0)),
    ),
)
