"""What a network or its loss cannot express: told from what its optimisation has not reached yet."""

import pytest
import torch
from runs import batches, case, classify, codes, fit, recorded, train, verdict
from torch import nn
from torch.nn import functional as F

from unstuck.diagnosis import SHOWN


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


def exclusive_or(n=800):
    """Two classes in the four quadrants: no line tells more than half of them, nor does one unit."""
    x = torch.rand(n, 2, generator=torch.Generator().manual_seed(1)) * 2 - 1
    return x, (x[:, 0] * x[:, 1] > 0).long()


def trained(folder, model, x, y, *, loss=classify, kind=torch.optim.Adam, rate=0.01, steps=400):
    parts = batches(x, y, 40)
    return verdict(folder, train(model, kind(model.parameters(), lr=rate), parts, steps, loss))


def of_width(width, out=2):
    return nn.Sequential(nn.Linear(2, width), nn.Tanh(), nn.Linear(width, out))


@pytest.mark.parametrize("model", [nn.Linear(2, 2), of_width(1)], ids=["line", "one-unit"])
def test_a_network_that_cannot_say_it_is_too_small(model, tmp_path):
    found = trained(tmp_path, model, *exclusive_or())
    assert codes(found) == ["capacity-too-small"]
    assert found.findings[0].word == SHOWN


def test_the_narrowest_layer_is_named(tmp_path):
    found = trained(tmp_path, of_width(1), *exclusive_or())
    assert "0.weight lets only 1 number pass." in found.findings[0].claim


def test_a_wide_one_on_the_same_rows_is_silent(tmp_path):
    assert codes(trained(tmp_path, of_width(32), *exclusive_or())) == []


def test_a_wide_one_that_has_not_got_there_is_not_too_small(tmp_path):
    found = trained(tmp_path, of_width(32), *exclusive_or(), kind=torch.optim.SGD, rate=1e-3)
    assert "capacity-too-small" not in codes(found)


def test_a_line_through_noise_is_not_too_small(tmp_path):
    """Of y = a·x + noise nobody explains more than the noise leaves."""
    x = torch.randn(800, 4)
    y = x @ torch.tensor([[1.0], [-1.0], [0.5], [0.0]]) + torch.randn(800, 1)
    assert codes(trained(tmp_path, nn.Linear(4, 1), x, y, loss=fit)) == []


def test_a_narrow_code_is_what_an_autoencoder_is_for(tmp_path):
    x = torch.randn(800, 6) @ torch.randn(6, 12)
    model = nn.Sequential(nn.Linear(12, 2), nn.Linear(2, 12))
    assert codes(trained(tmp_path, model, x, x, loss=fit)) == []


def test_the_loss_that_a_wide_network_leaves_of_noise_is_the_noise(tmp_path):
    """The mean of y is known to be sin 3x: what is left of its loss by any network is at least the noise's variance."""
    x = torch.rand(2000, 1) * 2 - 1
    y = torch.sin(3 * x) + 0.5 * torch.randn(2000, 1)
    model = nn.Linear(1, 1)
    run = recorded(tmp_path, train(model, torch.optim.SGD(model.parameters(), lr=0.1), batches(x, y, 50), 400, fit))
    found = case(run)["what a wide network leaves"]
    bx, by = x.double().flatten(), y.double().flatten()
    slope = float(((bx - bx.mean()) * (by - by.mean())).mean() / bx.var(correction=0))
    line = float((by - by.mean() - slope * (bx - bx.mean())).square().mean())  # least squares, in closed form
    assert found is not None
    assert found.value == pytest.approx(0.25 / line, abs=3 * (found.high - found.low) / 4 + 0.05)


def far_out(far):
    """12 rows at 0, 10 at 1 and 4 far out: a threshold at 1/2 tells the first from the others."""
    x = torch.tensor([0.0] * 12 + [1.0] * 10 + [far] * 4).repeat(15)[:, None]
    x = x[torch.randperm(len(x))]
    return x[:360], (x[:360] > 0.5).float() * 2 - 1


def test_rows_that_the_squared_error_leaves_mixed_are_separated_by_another_loss(tmp_path):
    x, y = far_out(30.0)
    found = trained(tmp_path, nn.Linear(1, 1), x, y, loss=fit, kind=torch.optim.SGD, rate=5 / 900)
    assert codes(found)[:1] == ["not-separated"]
    shown = {e.name: e.value for e in found.findings[0].evidence}
    design = torch.cat([x, torch.ones_like(x)], 1).double()
    line = design @ torch.linalg.lstsq(design, y.double()).solution
    wrong = float((line.sign() != y).double().mean())  # of the best line, in closed form
    assert shown["on the wrong side under its own loss"] == pytest.approx(wrong, abs=0.1)
    assert shown["on the wrong side under a logistic loss"] == 0


def test_rows_near_by_are_separated_by_the_squared_error_itself(tmp_path):
    assert "not-separated" not in codes(trained(tmp_path, nn.Linear(1, 1), *far_out(2.0), loss=fit, rate=0.05))


def test_kinds_that_overlap_are_not_called_separable(tmp_path):
    y = torch.randint(2, (800, 1)) * 2.0 - 1
    x = y + 2 * torch.randn(800, 1)
    assert codes(trained(tmp_path, nn.Linear(1, 1), x, y, loss=fit)) == []


def test_a_logistic_loss_is_not_told_to_be_one(tmp_path):
    x, y = far_out(30.0)

    def logistic(model, x, y):
        return F.binary_cross_entropy_with_logits(model(x), y)

    found = trained(tmp_path, nn.Linear(1, 1), x, (y + 1) / 2, loss=logistic, kind=torch.optim.SGD, rate=0.01)
    assert "not-separated" not in codes(found)


def test_inputs_of_one_number_each_may_come_without_a_column(tmp_path):
    """A wave through a line, where the inputs are a vector: the same rows as a column of them."""
    x = torch.rand(800, generator=torch.Generator().manual_seed(1)) * 2 - 1

    def loss(model, x, y):
        return F.mse_loss(model(x[:, None]).flatten(), y)

    assert codes(trained(tmp_path, nn.Linear(1, 1), x, torch.sin(4 * x), loss=loss)) == ["capacity-too-small"]
