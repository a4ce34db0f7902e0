"""3.8 Numerics, and the network that an earlier step destroyed."""

import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

from clinic.data import Data
from clinic.faults._fault import CLASSES, NUMBERS, RELU, SUPERVISED, Fault, of_class, on
from clinic.training import Training

HALF = torch.float16
KILLABLE = tuple(p for p in RELU if p != "transformer")  # which passes on what its blocks do not


def in_half(t: Training) -> None:
    """Gradients pass through half precision, as they do on an accelerator under autocast."""
    for p in t.model.parameters():
        p.register_hook(lambda g: g.to(HALF).to(g.dtype))


def underflow(t: Training, scale: float) -> None:
    """The loss is a small share of a larger one, and half of the gradients are too small to be told from zero."""
    in_half(t)

    def step(t, batch):
        t.optimizer.zero_grad()
        loss = t.criterion(t.model(batch.x), batch.y) * scale
        loss.backward()
        for p in t.model.parameters():
            p.grad.div_(scale)
        t.optimizer.step()
        return loss.item()

    t.step = step


def scaled_step(t, batch):
    t.optimizer.zero_grad()
    loss = t.criterion(t.model(batch.x), batch.y)
    t.scaler.scale(loss).backward()
    t.scaler.step(t.optimizer)
    t.scaler.update()
    return loss.item()


def clipped_before_unscaled(t, batch):
    t.optimizer.zero_grad()
    loss = t.criterion(t.model(batch.x), batch.y)
    t.scaler.scale(loss).backward()
    nn.utils.clip_grad_norm_(t.model.parameters(), 1.0)
    t.scaler.step(t.optimizer)
    t.scaler.update()
    return loss.item()


def clips_first(t: Training) -> None:
    t.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**6)
    t.step = clipped_before_unscaled


def skips_most(t: Training) -> None:
    """The scale grows after every step that is taken, and hardly falls after one that is not."""
    t.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**20, growth_factor=8.0, backoff_factor=0.9, growth_interval=1)
    t.step = scaled_step


def skips_all(t: Training) -> None:
    t.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**60, backoff_factor=0.99)
    t.step = scaled_step


def scaler(t: Training, how) -> None:
    in_half(t)
    how(t)


def naive_cross_entropy(factor: float):
    def criterion(output, target):
        z = factor * output.flatten(0, -2)
        chosen = z.gather(1, target.flatten()[:, None])[:, 0]
        return (z.exp().sum(1).log() - chosen).mean()

    return criterion


def overflow(t: Training, factor: float) -> None:
    """The logarithm of a sum of exponentials by hand, of logits at a high inverse temperature."""
    t.criterion = naive_cross_entropy(factor)


def root_of_zero(t: Training, share: float) -> None:
    """A penalty on how far a row's output moves when its inputs are masked; where nothing is masked it is √0."""
    right = t.criterion

    def step(t, batch):
        t.optimizer.zero_grad()
        masked = batch.x * (torch.rand(len(batch), *[1] * (batch.x.dim() - 1)) < share)
        output = t.model(batch.x)
        moved = (output - t.model(batch.x - 0.1 * (batch.x - masked))).square().flatten(1).sum(1).sqrt()
        loss = right(output, batch.y) + 0.01 * moved.mean()
        loss.backward()
        t.optimizer.step()
        return loss.item()

    t.step = step


def in_bfloat16(t: Training, factor: float) -> None:
    """Weights that an update below their last digit does not change."""
    t.model = t.model.bfloat16()
    right = t.criterion
    t.criterion = t.right_loss = lambda output, target: right(output.float(), target)
    score = t.score
    t.score = lambda output, target: score(output.float(), target)
    t.lr *= factor
    t.train, t.held_out = (Data(d.x.bfloat16() if d.x.is_floating_point() else d.x, d.y) for d in (t.train, t.held_out))


def kicked(t: Training, factor: float) -> None:
    """Twenty steps at a rate far too high, from which a deep network of rectified units does not come back."""
    options = {"norm": None} if "norm" in t.build.__kwdefaults__ else {}
    t.rebuild(depth=4, **options)
    of_class(t, torch.optim.Adam, lr=3e-3)
    t.epoch_schedule = None
    t.clip = 0.0
    t.step_schedule = lambda optimizer, steps: LambdaLR(optimizer, lambda k: factor if k < 20 else 1.0)


FAULTS = (
    Fault(60, "fp16-underflow", "fp16-underflow", underflow, on(SUPERVISED, 1e-6, 3e-7, 1e-7)),
    Fault(61, "scaler-skips", "scaler-skips", scaler, on(SUPERVISED, clips_first, skips_most, skips_all)),
    Fault(62, "forward-overflow", "forward-overflow", overflow, on(CLASSES, 8.0, 20.0, 100.0)),
    Fault(63, "non-finite-gradient", "non-finite-gradient", root_of_zero, on(NUMBERS, 1e-3, 1e-2, 0.1)),
    Fault(
        64,
        "update-below-precision",
        "update-below-precision",
        in_bfloat16,
        on(("mlp", "gru", "tabular", "autoencoder", "regression"), 0.1, 0.03, 0.01),
    ),
    Fault(
        65,
        "killed",
        "step too large",
        kicked,
        on(KILLABLE, 70.0, 100.0, 300.0, tabular=(150.0, 300.0, 1000.0)),
        harmless=1.0,
    ),
)
