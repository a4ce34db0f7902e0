"""What a fault is: one thing that a user gets wrong, at one seam of a training, in three strengths."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from clinic.training import Training

STRENGTHS = ("mild", "clear", "severe")
HARMLESS = "harmless"  # the same change with a value that does no harm

Triple = tuple[Any, Any, Any]  # what `change` is given at each strength

EVERYWHERE = ("mlp", "cnn", "gru", "autoencoder", "tabular", "gan", "lstm", "transformer", "regression")
SUPERVISED = tuple(p for p in EVERYWHERE if p != "gan")
CLASSES = ("mlp", "cnn", "gru", "lstm", "transformer")  # by cross-entropy
ROWS = ("mlp", "cnn", "gru")  # a class for each row of numbers
NUMBERS = tuple(p for p in SUPERVISED if p not in ("lstm", "transformer"))  # whose inputs are numbers
RELU = ("mlp", "cnn", "gru", "autoencoder", "tabular", "transformer", "regression")
SGD = ("mlp", "cnn", "regression")


@dataclass(frozen=True)
class Fault:
    """A cause, and how it is put into a training."""

    number: int  # in the catalogue of faults
    code: str
    family: str  # within which a confusion is half right
    change: Callable[[Training, Any], None]
    strengths: Mapping[str, Triple]  # by program: those that it applies to
    why_alone: str = ""  # where it applies to fewer than two programs
    harmless: Any = None  # a value of the same change that does no harm; None: the program as it is

    def put_into(self, training: Training, program: str, strength: str) -> None:
        if program not in self.strengths:
            raise ValueError(
                f"{self.code} needs one of {', '.join(self.strengths)}, got {program}: choose one of these"
            )
        self.change(training, self.value(program, strength))

    def value(self, program: str, strength: str) -> Any:
        return self.harmless if strength == HARMLESS else self.strengths[program][STRENGTHS.index(strength)]


def on(programs: tuple[str, ...], mild: Any, clear: Any, severe: Any, /, **others: Triple) -> dict[str, Triple]:
    """The same strengths for these programs, and what other strengths others need."""
    return {**dict.fromkeys(programs, (mild, clear, severe)), **others}


def matrices(model: nn.Module) -> list[nn.Module]:
    """The layers that multiply by weights, in the order in which they were made."""
    kinds = (nn.Linear, nn.Conv2d, nn.RNNBase, nn.Embedding)
    return [m for m in model.modules() if isinstance(m, kinds)]


def weights(layer: nn.Module) -> list[nn.Parameter]:
    return [p for name, p in layer.named_parameters(recurse=False) if "weight" in name]


def biases(layer: nn.Module) -> list[nn.Parameter]:
    return [p for name, p in layer.named_parameters(recurse=False) if "bias" in name]


def before_relu(model: nn.Module) -> list[nn.Module]:
    """The layer with a bias that comes directly before each ReLU."""
    found, last = [], None
    for m in model.modules():
        if isinstance(m, nn.ReLU) and last is not None:
            found.append(last)
        last = m if biases(m) else last
    return found


def head(model: nn.Module) -> nn.Linear:
    """The last layer; of a pair of networks, that of the first."""
    return model.generator.head if hasattr(model, "generator") else model.head


def net(model: nn.Module) -> nn.Module:
    return model.generator if hasattr(model, "generator") else model


def of_class(t: Training, optimizer_class: Any, **options: Any) -> None:
    """Another optimiser, with its own options."""
    t.optimizer_class, t.optimizer_options = optimizer_class, options
