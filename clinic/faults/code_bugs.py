"""3.5 Code bugs: loops and losses as users write them when they err."""

import copy
import itertools

import torch
from torch import nn
from torch.nn import functional as F

from clinic.faults._fault import CLASSES, EVERYWHERE, ROWS, SGD, SUPERVISED, Fault, net, on
from clinic.training import Net, Training, begin_epoch

# The step


def never_cleared(t, batch):
    loss = t.criterion(t.model(batch.x), batch.y)
    loss.backward()
    t.optimizer.step()
    return loss.item()


def cleared_each_epoch(t):
    t.model.train()
    t.optimizer.zero_grad()


def zero_grad_missing(t: Training, begin) -> None:
    t.step = never_cleared
    t.begin_epoch = begin


def never_cleared_with_momentum(t):
    t.model.train()
    for group in t.optimizer.param_groups:
        group["momentum" if "momentum" in group else "lr"] = 0.9 if "momentum" in group else 3 * t.lr


def cleared_between_halves(t, batch):
    """Two halves are to be added up, and the clearing stands inside their loop."""
    half = (len(batch) + 1) // 2
    for x, y in zip(batch.x.split(half), batch.y.split(half), strict=True):
        t.optimizer.zero_grad()
        loss = t.criterion(t.model(x), y) / 2
        loss.backward()
    t.optimizer.step()
    return 2 * loss.item()


def step_before_backward(t, batch):
    t.optimizer.zero_grad()
    loss = t.criterion(t.model(batch.x), batch.y)
    t.optimizer.step()
    loss.backward()
    return loss.item()


def cleared_before_step(t, batch):
    loss = t.criterion(t.model(batch.x), batch.y)
    loss.backward()
    t.optimizer.zero_grad(set_to_none=False)
    t.optimizer.step()
    return loss.item()


def stepped_twice(t, batch):
    t.optimizer.zero_grad()
    loss = t.criterion(t.model(batch.x), batch.y)
    loss.backward()
    t.optimizer.step()
    t.optimizer.step()
    return loss.item()


def stepped_by_two(t, batch):
    """Two optimisers hold the same parameters."""
    if not hasattr(t, "second"):
        t.second = torch.optim.Adam(t.model.parameters(), lr=0.02)
    t.optimizer.zero_grad()
    loss = t.criterion(t.model(batch.x), batch.y)
    loss.backward()
    t.optimizer.step()
    t.second.step()
    return loss.item()


def stepped_in_a_loop(t, batch):
    t.optimizer.zero_grad()
    loss = t.criterion(t.model(batch.x), batch.y)
    loss.backward()
    for _ in t.model.parameters():
        t.optimizer.step()
    return loss.item()


def step_of(t: Training, step) -> None:
    t.step = step


# What the optimiser holds, and what the loss sees


def output_layer(t):
    model = net(t.model)
    old = model.head
    model.head = nn.Linear(old.in_features, old.out_features)


def first_layer(t):
    model = net(t.model)
    for k, stage in enumerate(model.body):
        if any(True for _ in stage.parameters()):
            model.body[k] = copy.deepcopy(stage)
            return


def whole_body(t):
    model = net(t.model)
    model.body = copy.deepcopy(model.body)
    output_layer(t)


def replaced_afterwards(t: Training, replace) -> None:
    """The optimiser is made first, and then a layer is put in that it does not know."""
    make = t.make_optimizer

    def made_too_early(t):
        optimizer = make(t)
        replace(t)
        return optimizer

    t.make_optimizer = made_too_early


class CutAfterFirst(Net):
    def forward(self, x):
        for stage in self.body[: self.stages]:
            x = stage(x)
        x = x.detach()
        for stage in self.body[self.stages :]:
            x = stage(x)
        return self.out(self.head(x))

    @property
    def stages(self):
        """As many as hold the first parameters."""
        return 1 + next(k for k, stage in enumerate(self.body) if any(True for _ in stage.parameters()))


class CutBeforeHead(Net):
    def forward(self, x):
        features = self.body(x)
        return self.out(self.head(features.detach()))


class CutByNumpy(Net):
    def forward(self, x):
        features = self.body(x)
        features = torch.tensor(features.tolist())
        return self.out(self.head(features))


def graph_cut(t: Training, kind) -> None:
    whole = net(t.model)
    cut = kind(whole.body, whole.head, whole.out)
    if whole is t.model:
        t.model = cut
    else:
        t.model.generator = cut


# The loss


def softmax_then_cross_entropy(t: Training, factor: float) -> None:
    t.model.out = nn.Softmax(dim=-1)
    t.lr *= factor


def wrong_pair(t: Training, factor: float) -> None:
    """Probabilities where the loss takes logits, or where it takes their logarithms."""
    t.lr *= factor
    if isinstance(t.criterion, nn.BCEWithLogitsLoss):
        t.model.out = nn.Sigmoid()
        t.score = lambda output, target: ((output > 0.5) == (target > 0.5)).float().mean().item()
        return
    t.model.out = nn.Softmax(dim=-1)
    t.criterion = lambda output, target: F.nll_loss(output.flatten(0, -2), target.flatten())


def bounded_output(t: Training, kind) -> None:
    t.model.out = kind()


def class_as_number(output, target):
    return F.mse_loss(output[..., 0], target.float())


def expected_class(output, target):
    classes = torch.arange(output.shape[-1], dtype=output.dtype)
    return F.mse_loss(output.softmax(-1) @ classes, target.float())


def one_column(output, target):
    return F.binary_cross_entropy_with_logits(output[..., 0], (target > 0).float())


def loss_of(t: Training, criterion) -> None:
    t.criterion = criterion


def broadcast(t: Training, batch_size: int) -> None:
    """The target has lost its last dimension: every output meets every target."""
    t.batch_size = batch_size
    if isinstance(t.criterion, nn.BCEWithLogitsLoss):
        t.criterion = lambda output, target: ((torch.sigmoid(output) - target[:, 0]) ** 2).mean()
    else:
        t.criterion = lambda output, target: ((output - target[:, 0]) ** 2).mean()


def ten_parts_undivided(t):
    right = t.criterion

    def step(t, batch):
        t.optimizer.zero_grad()
        for x, y in zip(batch.x.chunk(10), batch.y.chunk(10), strict=True):
            loss = right(t.model(x), y)
            loss.backward()
        t.optimizer.step()
        return loss.item()

    t.step = step


def summed(t):
    right = t.criterion
    t.criterion = lambda output, target: right(output, target) * len(target)


def summed_over_large_batches(t):
    summed(t)
    t.batch_size = 4 * t.batch_size


def loss_summed(t: Training, how) -> None:
    how(t)


# Between the steps


def reloaded(t: Training, every: int) -> None:
    """The weights of the start are loaded again at the beginning of every few epochs."""
    start = copy.deepcopy(t.model.state_dict())
    epoch = itertools.count()

    def begin(t):
        if next(epoch) % every == 0:
            t.model.load_state_dict(start)
        begin_epoch(t)

    t.begin_epoch = begin


def scaled_in_place(t: Training, factor: float) -> None:
    """What was meant as a normalisation of the batch changes the data set itself, every epoch."""

    def begin(t):
        t.train.x.mul_(factor)
        begin_epoch(t)

    t.begin_epoch = begin


FAULTS = (
    Fault(
        34,
        "zero-grad-missing",
        "zero-grad-missing",
        zero_grad_missing,
        on(SUPERVISED, cleared_each_epoch, begin_epoch, never_cleared_with_momentum),
    ),
    Fault(
        35,
        "wrong-order",
        "wrong-order",
        step_of,
        on(SUPERVISED, cleared_between_halves, step_before_backward, cleared_before_step),
    ),
    Fault(
        36,
        "parameters-not-optimised",
        "parameters-not-optimised",
        replaced_afterwards,
        on(EVERYWHERE, output_layer, first_layer, whole_body),
    ),
    Fault(37, "graph-cut", "graph-cut", graph_cut, on(EVERYWHERE, CutAfterFirst, CutBeforeHead, CutByNumpy)),
    Fault(38, "softmax-before-cross-entropy", "wrong loss", softmax_then_cross_entropy, on(CLASSES, 1.0, 0.3, 0.1)),
    Fault(39, "wrong-logits-pair", "wrong loss", wrong_pair, on((*CLASSES, "tabular"), 1.0, 0.3, 0.1)),
    Fault(
        40,
        "output-out-of-range",
        "wrong loss",
        bounded_output,
        on(CLASSES, nn.Tanh, nn.Sigmoid, nn.Hardsigmoid, regression=(nn.Tanh, nn.Sigmoid, nn.ReLU)),
    ),
    Fault(41, "wrong-loss", "wrong loss", loss_of, on(ROWS, expected_class, class_as_number, one_column)),
    Fault(42, "silent-broadcast", "wrong loss", broadcast, on(("regression", "tabular"), 4, 32, 128)),
    Fault(
        43,
        "loss-summed",
        "step too large",
        loss_summed,
        on(SGD, ten_parts_undivided, summed, summed_over_large_batches),
    ),
    Fault(
        44, "stepped-twice", "stepped-twice", step_of, on(SUPERVISED, stepped_twice, stepped_by_two, stepped_in_a_loop)
    ),
    Fault(45, "weights-reset", "weights-reset", reloaded, on(EVERYWHERE, 6, 3, 1)),
    Fault(
        46,
        "data-corrupted-in-place",
        "data-corrupted-in-place",
        scaled_in_place,
        on(("mlp", "cnn", "gru", "autoencoder", "tabular", "gan", "regression"), 0.9, 0.5, 0.1),
    ),
)
