"""A training as users write it, cut at its seams: data, network, loss, optimiser, schedule, batches, step, scoring."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from clinic.data import Data, Split


class Net(nn.Module):
    """Stages one after another, a last layer, and what is done to its output."""

    def __init__(self, body: nn.Sequential, head: nn.Module, out: nn.Module | None = None):
        super().__init__()
        self.body = body
        self.head = head
        self.out = nn.Identity() if out is None else out

    def forward(self, x: Tensor) -> Tensor:
        features = self.body(x)
        return self.out(self.head(features))


class Check(NamedTuple):
    """What the validation after an epoch has said."""

    step: int
    loss: float  # mean of the training losses of the epoch
    score: float  # on held-out data: accuracy, or R²


class Ending(NamedTuple):
    """How a training ended."""

    score: float  # on held-out data, as the program's own validation tells it
    loss: float  # on the training data, by the program's right loss over its scale
    honest: float  # the score on held-out data that no error of the validation has touched
    checks: tuple[Check, ...]


# The loop: each function is a seam, and a fault puts a wrong one in its place.


def shuffled(t: "Training") -> Iterator[Data]:
    """An epoch of batches in random order."""
    for rows in torch.randperm(len(t.train)).split(t.batch_size):
        yield t.train.rows(rows)


def begin_epoch(t: "Training") -> None:
    t.model.train()


def step(t: "Training", batch: Data) -> float:
    t.optimizer.zero_grad()
    loss = t.criterion(t.model(batch.x), batch.y)
    loss.backward()
    if t.clip:
        nn.utils.clip_grad_norm_(t.model.parameters(), t.clip)
    t.optimizer.step()
    return loss.item()


def validate(t: "Training") -> float:
    t.model.eval()
    with torch.no_grad():
        return t.score(torch.cat([t.model(x) for x in t.held_out.x.split(t.validation_size)]), t.held_out.y)


def one_optimizer(t: "Training") -> Optimizer:
    return t.optimizer_class(t.model.parameters(), **t.optimizer_options)


@dataclass(eq=False)
class Training:
    """A training that has not begun. A program fills the fields; a fault changes some of them."""

    data: Split
    build: Callable[..., nn.Module]  # the network, by options that have defaults
    criterion: Callable[[Tensor, Tensor], Tensor]
    score: Callable[[Tensor, Tensor], float]
    optimizer_class: Callable[..., Optimizer]
    optimizer_options: dict[str, Any]
    batch_size: int
    steps: int
    clip: float = 0.0
    scale: float = 1.0  # of the loss: that of a network that knows nothing but the mean, or 1
    validation_size: int = 500
    step_schedule: Callable[[Optimizer, int], LRScheduler] | None = None  # by the optimiser and the number of steps
    epoch_schedule: Callable[[Optimizer, int], LRScheduler] | None = None  # by the optimiser and the number of epochs
    make_optimizer: Callable[["Training"], Optimizer] = one_optimizer
    batches: Callable[["Training"], Iterator[Data]] = shuffled
    begin_epoch: Callable[["Training"], None] = begin_epoch
    step: Callable[["Training", Data], float] = step
    validate: Callable[["Training"], float] = validate
    model: nn.Module = field(init=False)
    optimizer: Optimizer = field(init=False)

    def __post_init__(self) -> None:
        self.train, self.held_out = (Data(d.x.clone(), d.y.clone()) for d in self.data)
        self.model = self.build()
        self.right_loss = self.criterion
        self.honest: Callable[[], float] | None = None  # where the validation is spoilt, one that is not

    @property
    def lr(self) -> float:
        return self.optimizer_options["lr"]

    @lr.setter
    def lr(self, rate: float) -> None:
        self.optimizer_options["lr"] = rate

    def rebuild(self, **options: Any) -> None:
        """Another network of the same kind."""
        self.model = self.build(**options)

    def epoch_length(self) -> int:
        return max(len(self.train) // self.batch_size, 1)


def train(t: Training, *, tell: Callable[[str], object] = print) -> Ending:
    """Runs the loop and tells of each epoch as users' scripts do."""
    t.optimizer = t.make_optimizer(t)
    per_step = t.step_schedule(t.optimizer, t.steps) if t.step_schedule else None
    per_epoch = t.epoch_schedule(t.optimizer, t.steps // t.epoch_length()) if t.epoch_schedule else None
    checks: list[Check] = []
    done = 0
    while done < t.steps:
        t.begin_epoch(t)
        losses = []
        for batch in islice(t.batches(t), t.steps - done):
            losses.append(t.step(t, batch))
            if per_step:
                per_step.step()
        if per_epoch:
            per_epoch.step()
        done += len(losses)
        checks.append(Check(done, sum(losses) / len(losses), t.validate(t)))
        tell(f"epoch {len(checks):3d} step {done} loss {checks[-1].loss:.4f} score {checks[-1].score:.3f}")
    ending = _ending(t, tuple(checks))
    tell(f"score {ending.score:.3f} loss {ending.loss:.4g}")
    return ending


def _ending(t: Training, checks: tuple[Check, ...]) -> Ending:
    t.model.eval()
    seen = t.train.rows(slice(1000))
    with torch.no_grad():
        outputs = torch.cat([t.model(x) for x in seen.x.split(250)])
        try:
            loss = float(t.right_loss(outputs, seen.y)) / t.scale
        except (RuntimeError, ValueError):  # the error has given the output another form
            loss = checks[-1].loss
    score = checks[-1].score
    return Ending(score, loss, t.honest() if t.honest else score, checks)


def accuracy(output: Tensor, target: Tensor) -> float:
    """Of the classes named last: of rows, or of every place of a text."""
    return (output.argmax(-1) == target).float().mean().item()


def sign_accuracy(output: Tensor, target: Tensor) -> float:
    return ((output > 0) == (target > 0.5)).float().mean().item()


def r_squared(output: Tensor, target: Tensor) -> float:
    return 1 - ((output - target).square().mean() / (target - target.mean(0)).square().mean()).item()


def cross_entropy(output: Tensor, target: Tensor) -> Tensor:
    """Over rows, or over every place of a text."""
    return nn.functional.cross_entropy(output.flatten(0, -2), target.flatten())
