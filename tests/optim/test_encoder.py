"""The 10-5-10 encoder of Fahlman 1988: the epochs that each method needs, and that the slides' Rprop learns none."""

import pytest
import torch
from tests.optim.encoder import Encoder, literal_rprop

from unstuck.optim import Quickprop, RpropPlus

TRIALS = 100


def mean_epochs(optimizer_of, *, seed=0, most=600, **how):
    """The mean over the trials that learnt, and how many did not."""
    encoder = Encoder(TRIALS, seed=seed, **how)
    found = encoder.epochs(optimizer_of(encoder.weights).step, most)
    return float(found.nanmean()), int(found.isnan().sum())


def test_the_encoders_gradient_is_that_of_half_the_summed_squares():
    encoder = Encoder(2, reach=1)
    x = encoder.patterns
    first, second = encoder.weights
    h = torch.sigmoid(x @ first[..., :-1].mT + first[..., -1:].mT)
    y = torch.sigmoid(h @ second[..., :-1].mT + second[..., -1:].mT)
    wanted = torch.autograd.grad((y - x).square().sum() / 2, encoder.weights)
    encoder.backward()
    for w, slope in zip(encoder.weights, wanted, strict=True):
        torch.testing.assert_close(w.grad, slope)


# Fahlman's means over 100 trials (25 of plain descent): 129, 75 and 22.1, the last with the dead zone of his program


def test_plain_descent_needs_129_epochs():
    mean, failed = mean_epochs(lambda w: torch.optim.SGD(w, lr=1.7), reach=1)
    assert failed == 0
    assert mean == pytest.approx(129, abs=15)


def test_descent_with_an_offset_to_the_sigmoids_derivative_needs_75():
    mean, failed = mean_epochs(lambda w: torch.optim.SGD(w, lr=1.5), reach=1, offset=0.1)
    assert failed == 0
    assert mean == pytest.approx(75, abs=15)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_quickprop_needs_22(seed):
    mean, failed = mean_epochs(lambda w: Quickprop(w, lr=1.5), reach=2, offset=0.1, dead=0.1, seed=seed)
    assert failed == 0
    assert mean == pytest.approx(22.1, abs=3)


def test_without_the_dead_zone_quickprop_needs_17():
    mean, failed = mean_epochs(lambda w: Quickprop(w, lr=1.5), reach=2, offset=0.1)
    assert failed == 0
    assert 16 <= mean <= 18.5


@pytest.mark.parametrize("optimizer_of", [RpropPlus, torch.optim.Rprop])
def test_rprop_needs_24_and_learns_every_trial_with_the_offset_and_nine_in_ten_without(optimizer_of):
    mean, failed = mean_epochs(lambda w: optimizer_of(w, lr=0.1), reach=1, offset=0.1)
    assert failed == 0
    assert mean == pytest.approx(24.5, abs=2)
    assert mean_epochs(lambda w: optimizer_of(w, lr=0.1), reach=1)[1] <= 10


@pytest.mark.parametrize("most", [300, pytest.param(3000, marks=pytest.mark.slow)])
@pytest.mark.parametrize("offset", [0.0, 0.1])
def test_the_rprop_of_the_slides_taken_literally_learns_none(offset, most):
    encoder = Encoder(TRIALS, reach=1, offset=offset)
    assert encoder.epochs(literal_rprop(encoder.weights), most).isnan().all()
