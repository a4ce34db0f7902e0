"""Batch renormalisation against torch's batch norm, both limits of it, and the formula with constants."""

import pytest
import torch
from sklearn.datasets import load_digits
from torch import nn

from unstuck.optim import BatchRenorm1d, BatchRenorm2d

CASES = [
    (BatchRenorm1d, nn.BatchNorm1d, (6, 3)),
    (BatchRenorm1d, nn.BatchNorm1d, (4, 3, 5)),
    (BatchRenorm2d, nn.BatchNorm2d, (4, 3, 2, 5)),
]


def drawn(shape, dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    return torch.randn(shape, generator=generator, dtype=dtype) * 2 + 1


@pytest.mark.parametrize(("renorm", "norm", "shape"), CASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_without_room_for_correction_it_is_batch_norm_with_its_gradients(renorm, norm, shape, dtype):
    ours, theirs = renorm(3, r_max=1, d_max=0).to(dtype), norm(3, eps=1e-3).to(dtype)
    found = []
    for layer in (ours, theirs):
        x = drawn(shape, dtype).requires_grad_()
        y = layer(x)
        y.square().mul(torch.linspace(0, 1, y.numel(), dtype=dtype).view(shape)).sum().backward()
        found.append((y.detach(), x.grad, layer.weight.grad, layer.bias.grad))
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize(("renorm", "norm", "shape"), CASES)
def test_unclipped_training_sees_what_evaluation_does(renorm, norm, shape):
    layer = renorm(3, r_max=1e9, d_max=1e9).double()
    layer.running_mean.copy_(torch.tensor([0.5, 1.0, -2.0]))
    layer.running_std.copy_(torch.tensor([1.0, 3.0, 0.2]))
    twin = renorm(3).double().eval()
    twin.load_state_dict(layer.state_dict())
    x = drawn(shape)
    torch.testing.assert_close(layer(x), twin(x))
    axes = [k for k in range(len(shape)) if k != 1]
    std = (x.var(axes, unbiased=False) + 1e-3).sqrt()
    start = torch.tensor([1.0, 3.0, 0.2], dtype=torch.float64)
    torch.testing.assert_close(layer.running_std, start + 0.01 * (std - start))
    assert int(layer.batches) == 1


def test_the_corrections_are_clipped_and_constant_in_the_gradient():
    layer = BatchRenorm1d(2, r_max=1.5, d_max=0.2).double()
    layer.running_std.copy_(torch.tensor([0.5, 2.0]))
    x = drawn((8, 2)).requires_grad_()
    mean, std = x.mean(0), (x.var(0, unbiased=False) + 1e-3).sqrt()
    start = torch.tensor([0.5, 2.0], dtype=torch.float64)
    r = (std / start).clamp(1 / 1.5, 1.5).detach()
    d = (mean / start).clamp(-0.2, 0.2).detach()
    assert r[0] == 1.5
    assert abs(d[0]) == 0.2
    expected = (x - mean) / std * r + d
    weights = torch.linspace(-1, 1, 16, dtype=torch.float64).view(8, 2)
    (slope,) = torch.autograd.grad((expected**3 * weights).sum(), x)
    y = layer(x)
    torch.testing.assert_close(y, expected)
    (found,) = torch.autograd.grad((y**3 * weights).sum(), x)
    torch.testing.assert_close(found, slope)


def test_evaluation_changes_no_statistics_and_does_not_mix_examples():
    layer = BatchRenorm1d(3).double()
    layer(drawn((6, 3)))
    layer.eval()
    before = {k: v.clone() for k, v in layer.state_dict().items()}
    x = drawn((6, 3))
    assert torch.equal(layer(x)[:1], layer(x[:1]))
    assert all(torch.equal(v, before[k]) for k, v in layer.state_dict().items())


def test_without_affine_there_is_nothing_to_train():
    assert not list(BatchRenorm2d(3, affine=False).parameters())


@pytest.mark.slow
def test_with_two_examples_in_a_batch_it_learns_what_batch_norm_does_not():
    # lecture 002: digits, B = 2; only the ordering is asserted
    x, y = (torch.as_tensor(a) for a in load_digits(return_X_y=True))
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    x, y = x[order].float() / 16, y[order]
    accuracy = {}
    for norm in (nn.BatchNorm1d, BatchRenorm1d):
        torch.manual_seed(0)
        model = nn.Sequential(
            *(nn.Linear(64, 64), norm(64), nn.ReLU()), *(nn.Linear(64, 64), norm(64), nn.ReLU()), nn.Linear(64, 10)
        )
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
        for _ in range(3):
            for batch in torch.randperm(1200).split(2):
                optimizer.zero_grad()
                nn.functional.cross_entropy(model(x[batch]), y[batch]).backward()
                optimizer.step()
        accuracy[norm] = float((model.eval()(x[1200:]).argmax(1) == y[1200:]).float().mean())
    assert accuracy[BatchRenorm1d] > accuracy[nn.BatchNorm1d] + 0.1


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: BatchRenorm1d(0), "features=0"),
        (lambda: BatchRenorm1d(2, r_max=0.5), "r_max ≥ 1"),
        (lambda: BatchRenorm1d(2, momentum=0), "momentum"),
        (lambda: BatchRenorm1d(2)(torch.ones(4, 3)), r"\(N, 2\) or \(N, 2, L\) is needed, got \(4, 3\)"),
        (lambda: BatchRenorm2d(2)(torch.ones(4, 2)), r"\(N, 2, H, W\) is needed, got \(4, 2\)"),
        (lambda: BatchRenorm1d(2)(torch.ones(1, 2)), "more than one value"),
    ],
)
def test_a_mistake_is_told_in_one_sentence(call, words):
    with pytest.raises(ValueError, match=words):
        call()
