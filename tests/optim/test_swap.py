"""SWAP: the mean of models that were refined apart."""

import copy
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import nn

from unstuck.optim import BatchRenorm1d, swap


def net(*, norm=False):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4) if norm else nn.Tanh(), nn.Linear(4, 1)).double()


X = torch.randn(40, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def refine(model, worker):
    """Ten steps on small batches in an order of the worker's own."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    generator = torch.Generator().manual_seed(worker)
    for _ in range(10):
        batch = X[torch.randint(40, (4,), generator=generator)]
        optimizer.zero_grad()
        (model(batch) - batch.sum(1, keepdim=True)).square().mean().backward()
        optimizer.step()
    return model


@pytest.mark.parametrize("executor", [None, ThreadPoolExecutor(2)])
def test_the_weights_are_the_arithmetic_mean_of_the_workers(executor):
    model = net()
    kept = copy.deepcopy(model.state_dict())
    averaged = swap(model, refine, 3, executor=executor)
    apart = [refine(net(), worker) for worker in range(3)]
    for name, value in averaged.state_dict().items():
        mean = torch.stack([one.state_dict()[name] for one in apart]).mean(0)
        torch.testing.assert_close(value, mean, rtol=0, atol=1e-15)
    assert all(torch.equal(value, kept[name]) for name, value in model.state_dict().items())
    assert type(averaged) is nn.Sequential


def test_the_statistics_of_batch_norm_are_those_of_the_mean_model():
    averaged = swap(net(norm=True), refine, 2, batches=[(X[:20],), (X[20:],)])
    hidden = averaged[0](X)
    torch.testing.assert_close(averaged[1].running_mean, hidden.mean(0).detach())
    var = torch.stack([averaged[0](part).var(0) for part in (X[:20], X[20:])]).mean(0)
    torch.testing.assert_close(averaged[1].running_var, var.detach())


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: swap(net(), refine, 0), ValueError, "workers=0"),
        (lambda: swap(net(norm=True), refine, 2), ValueError, "needs batches="),
        (lambda: swap(nn.Sequential(BatchRenorm1d(3)), refine, 2), ValueError, "renormalisation"),
        (lambda: swap(net(), lambda model, worker: None, 2), TypeError, "got NoneType"),
    ],
)
def test_a_mistake_is_told_in_one_sentence(call, error, words):
    with pytest.raises(error, match=words):
        call()
