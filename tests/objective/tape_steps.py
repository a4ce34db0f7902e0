"""Steps run, recorded and replayed, for the tests of tapes."""

import torch
from torch import nn

from unstuck.objective import Recorder, Vault


def build(make, *, nudge=0.0):
    """A fresh program, always from the same seed; `nudge` moves its weights."""
    torch.manual_seed(0)
    leaves, step = make()
    g = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for p in leaves:
            p.add_(torch.randn(p.shape, generator=g, dtype=p.dtype), alpha=nudge)
    torch.manual_seed(1)
    return leaves, step


def run(step, recorder=None):
    """The losses that the step calls backward on."""
    losses = []

    def backward(loss, **options):
        if recorder is not None:
            recorder.root([loss])
        losses.append(loss.detach().clone().reshape(()))
        loss.backward(**options)

    if recorder is None:
        step(backward)
    else:
        with recorder:
            step(backward)
    return losses


def record(make, *, vault=None):
    leaves, step = build(make)
    recorder = Recorder(leaves, names=lambda modules: [""] * len(modules))
    losses = run(step, recorder)
    return recorder.finish(vault or Vault()), leaves, losses


def gradients(leaves):
    return [None if p.grad is None else p.grad.to_dense() if p.grad.is_sparse else p.grad for p in leaves]


def replayed(tape, values):
    """Loss and gradients of a tape at copies of `values`."""
    copies = [p.detach().clone().requires_grad_(p.requires_grad) for p in values]
    loss = tape.replay(copies)
    free = [c for c in copies if c.requires_grad]
    found = iter(torch.autograd.grad(loss, free, allow_unused=True))
    return loss.detach(), [next(found) if c.requires_grad else None for c in copies]


def assert_same(ours, theirs, *, rtol):
    for a, b in zip(ours, theirs, strict=True):
        a, b = (torch.zeros(()) if t is None else t.to_dense() if t.is_sparse else t for t in (a, b))
        # a gradient gathered over several backward() calls is summed in another order
        torch.testing.assert_close(a, b.expand_as(a), rtol=rtol, atol=rtol * max(1.0, b.abs().max().item()))


def small():
    torch.manual_seed(0)
    return nn.Linear(3, 3), torch.randn(5, 3)


def rooted(body):
    """A recorder that saw the loss body(layer, x), without its backward(), and the layer."""
    layer, x = small()
    recorder = Recorder(list(layer.parameters()))
    with recorder:
        recorder.root([body(layer, x)])
    return recorder, layer
