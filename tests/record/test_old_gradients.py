"""Gradients that a step has left: which of them the next step uses again."""

import torch
from torch import nn

from unstuck.record._facts import StaleGradients


def test_a_gradient_is_not_old_because_it_lies_where_the_old_one_lay():
    p = nn.Parameter(torch.zeros(3))
    optimizer, stale = torch.optim.SGD([p], lr=0.1), StaleGradients()
    p.grad = torch.ones(3)
    stale.note_step(optimizer)
    place, others = id(p.grad), []
    p.grad = None
    while id(new := torch.ones(3)) != place and len(others) < 1000:
        others.append(new)
    assert id(new) == place
    p.grad = new  # as the sum over two parts of a batch, made anew
    stale.note_backward()
    assert stale.used_by(optimizer) is None
    stale.note_step(optimizer)
    stale.note_backward()
    assert stale.used_by(optimizer) is p
